"""Which way of attention is the faster: python benchmarks/attention.py.

Torch's own, and the product written out, in turns, with a backward and without, at the lengths that dual-path models
have. What `unbraid.models.attention.attend` chooses by.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from race import Contestant, race
from torch import Tensor

from unbraid.models.attention import attend_unfused

HEADS, CHANNELS, ROWS = 8, 32, 8000
"""Of a SepFormer's attention; so many rows over batch and sequence together, in sequences of the length measured."""


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[35, 65, 100, 250, 300, 400])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = {"fused": F.scaled_dot_product_attention, "explicit": attend_unfused}
    print("dtype     backward  frames  fused / explicit, time, median (lowest, highest)")
    for dtype in (torch.bfloat16, torch.float32):
        for backward in (True, False):
            for frames in args.frames:
                shape = (max(1, ROWS // frames), HEADS, frames, CHANNELS)
                given = torch.randn(3, *shape, device=args.device, dtype=dtype, requires_grad=backward)
                calls = {Contestant(name, ""): partial(call, way, given, backward) for name, way in ways.items()}
                spent = race(calls, rounds=args.repeats, device=given.device, calls=3, warm_up=2)
                fused, explicit = (spent[Contestant(name, "")] for name in ways)
                ratio = torch.tensor([a / b for a, b in zip(fused, explicit, strict=True)])
                low, middle, high = ratio.min(), ratio.median(), ratio.max()
                word = str(dtype).removeprefix("torch.")
                print(f"{word:9} {backward!s:8} {frames:7}  {middle:.2f} ({low:.2f}, {high:.2f})", flush=True)


def call(way: Callable[..., Tensor], given: Tensor, backward: bool) -> None:
    """One attention, perhaps with its gradient."""
    with torch.set_grad_enabled(backward):
        result = way(*given)
    if backward:
        given.grad = None
        result.sum().backward()


if __name__ == "__main__":
    main()
