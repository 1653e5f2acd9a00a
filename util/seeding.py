"""Stateless randomness: every draw is a function of (seed, epoch, sample).

The number of loader workers or processes, or a restart, changes no crop and no mask.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*parts: str | int) -> int:
    """Return a 63-bit seed for a purpose, e.g. seed_of('crop', seed, epoch, sample)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), 'little') >> 1


def seed_generators(*parts: str | int) -> int:
    """Seed the generators of Python, NumPy and PyTorch (CPU). Returns seed_of(*parts)."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    return seed


@contextmanager
def seeded(*parts: str | int) -> Iterator[None]:
    """Call seed_generators(*parts) on entry, and restore the generators on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(*parts)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed the global generators, including those of GPUs, for one training step."""
    torch.manual_seed(seed_generators('step', seed, epoch, step, rank))
