"""Which patches are visible: noise per image, the order of the patches, selecting tokens by it."""

import torch
from torch import Tensor

from util.seeding import seed_of


def patch_order(noise: Tensor, importance: Tensor | None = None) -> Tensor:
    """Draw a random order of the patches of every image (MILAN section 3.3).

    The first K entries of a row are K draws without replacement. With ``importance`` (semantic
    aware masking) every draw is proportional to the importance of the remaining patches.
    Sorting log(importance) + Gumbel noise has exactly the distribution of drawing one patch
    after the other. It costs one sort and accepts zeros: those patches come last, in random
    order among themselves.

    Args:
        noise: [N, L] float32, uniform in (0, 1).
        importance: [N, L], >= 0; rows need not sum to 1. None draws uniformly.

    Returns:
        ids_shuffle [N, L] int64: patch indices in the order drawn.
    """
    if importance is None:
        return noise.argsort(dim=1)
    gumbel = -torch.log(-torch.log(noise))
    scores = importance.float().clamp_min(torch.finfo(torch.float32).tiny).log() + gumbel
    return scores.argsort(dim=1, descending=True)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return K, the number of patches that the encoder sees."""
    return int(num_patches * (1 - mask_ratio))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Select rows ``ids`` [N, K] of ``x`` [N, L, D], or of [1, L, D] for all images: [N, K, D]."""
    x = x.expand(ids.shape[0], -1, -1)
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sample_noise(seed: int, epoch: int, samples: Tensor, length: int) -> Tensor:
    """Return uniform noise in (0, 1), one row per sample.

    The noise is a splitmix64 hash of (seed, epoch, sample, column). Unlike a generator, a hash
    computes a whole batch at once, on any device, with the same bits.

    Args:
        seed, epoch: of the run.
        samples: [N] int64, indices of the samples in the dataset.
        length: number of columns L.

    Returns:
        [N, L] float32 on the device of ``samples``; odd multiples of 2**-24.
    """
    # the constants are splitmix64's, as signed int64
    z = samples.unsqueeze(1) * length + torch.arange(1, length + 1, device=samples.device)
    z = z * (0x9E3779B97F4A7C15 - 2**64) + seed_of('mask', seed, epoch)
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 41).to(torch.float32) + 0.5) * 2.0**-23


# shift without copying the sign, which int64's >> does
def _shift_right(z, bits):
    return (z >> bits) & ((1 << (64 - bits)) - 1)
