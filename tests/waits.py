"""Count the operations that would make the host wait for an accelerator; runs on the CPU, where none has to."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    """A dispatch mode that counts operations which need values on the host."""

    WAITING = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "allclose"})

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in arguments[1]
        )
        if name in self.WAITING or name.lstrip("_").startswith("unique") or by_mask:
            self.counts[name] += 1
        return function(*arguments, **(options or {}))


@contextmanager
def counted_waits(monkeypatch):
    """Count waits by name within the context; reading a single number is always ``_local_scalar_dense``."""
    counts = Counter()

    def counting(name):
        original = getattr(Tensor, name)

        def method(self, *arguments, **options):
            counts[name] += 1
            return original(self, *arguments, **options)

        return method

    with monkeypatch.context() as patched:
        for name in ("tolist", "cpu", "numpy"):
            patched.setattr(Tensor, name, counting(name))
        with _Operations(counts):
            yield counts
