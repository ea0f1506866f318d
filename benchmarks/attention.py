"""Compare two implementations of attention: python benchmarks/attention.py.

PyTorch's fused attention and the explicit product, in turns, with and without a backward pass, at the sequence lengths
of dual-path models. `unbraid.models.attention.attend` chooses between them by these figures.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from race import Contestant, race
from torch import Tensor

from unbraid.models.attention import attend_unfused

HEADS = 8
CHANNELS = 32
# Rows over batch and sequence together, as in a SepFormer: longer sequences come in smaller batches.
ROWS = 8000


def main() -> None:
    """Measure, and print a line for each length."""
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
                query_key_value = torch.randn(3, *shape, device=args.device, dtype=dtype, requires_grad=backward)
                calls = {
                    Contestant(name, ""): partial(call, way, query_key_value, backward) for name, way in ways.items()
                }
                measured = race(calls, rounds=args.repeats, device=query_key_value.device, calls=3, warm_up=2)
                fused, explicit = (measured[Contestant(name, "")] for name in ways)
                ratio = torch.tensor([a / b for a, b in zip(fused, explicit, strict=True)])
                word = str(dtype).removeprefix("torch.")
                print(
                    f"{word:9} {backward!s:8} {frames:7}  {ratio.median():.2f} ({ratio.min():.2f}, {ratio.max():.2f})",
                    flush=True,
                )


def call(way: Callable[..., Tensor], query_key_value: Tensor, backward: bool) -> None:
    """Run attention once, with its gradient if asked for."""
    with torch.set_grad_enabled(backward):
        result = way(*query_key_value)
    if backward:
        query_key_value.grad = None  # else the gradient of the next call would be added
        result.sum().backward()


if __name__ == "__main__":
    main()
