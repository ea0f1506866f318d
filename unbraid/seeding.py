"""Random generators seeded by (seed, purpose, position): the same draw in any worker, rank, thread or resumed run."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def seed_sequence(seed: int, purpose: str, *position: int) -> np.random.SeedSequence:
    """Return the entropy of one draw, from a seed, the purpose of the draw, and its position in the run."""
    # CRC-32 and not hash(): Python's hash of a string differs between processes. The number of positions is included,
    # so that (seed, purpose, 1) and (seed, purpose, 1, 0) differ.
    return np.random.SeedSequence([seed % 2**64, zlib.crc32(purpose.encode()), len(position), *position])


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Return a new NumPy generator for one draw, such as ``generator(0, "train", epoch, index, attempt)``."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *position)))


@contextmanager
def seeded_torch(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Seed torch's global generators, and restore their state afterwards.

    For operations that take no generator: dropout, initial weights.
    """
    import torch  # late, so that importing this module stays fast

    torch_seed = int(seed_sequence(seed, purpose, *position).generate_state(1, np.uint64)[0] >> 1)
    # torch.manual_seed would do this for all devices, but takes longer than some training steps.
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(torch_seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
