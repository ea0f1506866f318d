"""Random generators made from (seed, purpose, ...): the same draw in any worker, rank, thread or resumed run."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def seed_sequence(seed: int, purpose: str, *position: int) -> np.random.SeedSequence:
    """The entropy that belongs to one draw: a seed, what the draw is for, and where in the run it stands."""
    return np.random.SeedSequence([seed % 2**64, zlib.crc32(purpose.encode()), len(position), *position])


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A fresh NumPy generator for one draw, such as ``generator(0, "train", epoch, index, attempt)``."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *position)))


@contextmanager
def seeded_torch(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Seed torch's global generators for what takes none (dropout, initial weights), and put them back afterwards."""
    import torch

    drawn = int(seed_sequence(seed, purpose, *position).generate_state(1, np.uint64)[0] >> 1)
    generators = [torch.default_generator]  # not torch.manual_seed, which takes longer than some steps
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(drawn)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
