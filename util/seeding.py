"""Randomness as a function of what it is for, never of what ran before.

Every draw of a run comes from (seed, epoch, sample), so that neither the number of loader workers, nor that of processes, nor a
restart in between changes a crop or a mask.
"""

import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts):
    """63-bit seed for a purpose, e.g. seed_of('crop', seed, epoch, sample); the parts are strings and ints."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_generators(*parts):
    """Seed Python's, NumPy's and PyTorch's CPU generators with seed_of(*parts), which is returned."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    return seed


@contextmanager
def seeded(*parts):
    """seed_generators(*parts) inside, and the generators put back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(*parts)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_step(seed, epoch, step, rank):
    """Seed the global generators, those of the GPUs too, for what one training step draws from them."""
    torch.manual_seed(seed_generators('step', seed, epoch, step, rank))


def sample_noise(seed, epoch, samples, length):
    """Uniform noise in (0, 1), a row a sample, by hashing (seed, epoch, sample, column) with splitmix64.

    A hash instead of a generator, since it gives a whole batch at once, on any device and bit for bit the same.

    Args:
        samples: int64 [N], numbers of the samples in the data set.
        length: columns.

    Returns:
        float32 [N, length] on the device of ``samples``, multiples of 2**-24.
    """
    z = samples.unsqueeze(1) * length + torch.arange(1, length + 1, device=samples.device)
    z = z * _int64(0x9E3779B97F4A7C15) + seed_of('mask', seed, epoch)
    z = (z ^ _shift(z, 30)) * _int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _int64(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).to(torch.float32) + 0.5) * 2.0**-23


def _shift(z, bits):
    """Logical shift to the right; int64's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _int64(unsigned):
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned
