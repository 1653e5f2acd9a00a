"""Distribution of the patches drawn by importance, and the noise that they are drawn with."""

import itertools

import pytest
import torch

from util.masking import patch_order, sample_noise


def sequential_inclusion(weights, k):
    """Return each item's exact probability to be among k sequential draws without replacement."""
    inclusion = torch.zeros(len(weights), dtype=torch.float64)
    for order in itertools.permutations(range(len(weights)), k):
        probability, remaining = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / remaining
            remaining -= weights[i]
        inclusion[list(order)] += probability
    return inclusion


@pytest.mark.parametrize(
    'weights, k',
    [([0.5, 0.25, 0.125, 0.08, 0.04, 0.005], 3), ([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], 2)],
)
def test_inclusion_probabilities(weights, k):
    n = 200_000
    expected = sequential_inclusion(weights, k)
    noise = sample_noise(0, 0, torch.arange(n), len(weights))

    def standard_errors(importance):
        ids = patch_order(noise, importance.expand(n, -1))[:, :k]
        observed = torch.bincount(ids.flatten(), minlength=len(weights)).double() / n
        return ((observed - expected) / (expected * (1 - expected) / n).sqrt()).abs().max()

    importance = torch.tensor([weights])
    assert standard_errors(importance) < 4.5  # exceeded by one in 100,000 correct runs
    # the test detects wrong weights: draws in proportion to the square root of the importance
    assert standard_errors(importance.sqrt()) > 20


def test_order_of_the_draws():
    """Every order of three items has its exact probability."""
    n, weights = 200_000, [0.6, 0.3, 0.1]
    ids = patch_order(sample_noise(1, 0, torch.arange(n), 3), torch.tensor([weights]).expand(n, -1))
    for order in itertools.permutations(range(3)):
        expected = weights[order[0]] * weights[order[1]] / (1 - weights[order[0]])
        observed = (ids == torch.tensor(order)).all(1).double().mean().item()
        assert abs(observed - expected) < 4.5 * (expected * (1 - expected) / n) ** 0.5


def test_patches_without_importance_come_last_in_random_order():
    importance = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]]).expand(9000, -1)
    ids = patch_order(sample_noise(0, 0, torch.arange(9000), 5), importance)
    assert (ids.sort(1).values == torch.arange(5)).all()
    assert set(ids[:, :2].flatten().tolist()) == {1, 3}
    share = torch.bincount(ids[:, 2], minlength=5)[[0, 2, 4]] / 9000
    assert (share - 1 / 3).abs().max() < 0.03


def test_uniform_without_importance():
    n = 100_000
    ids = patch_order(sample_noise(0, 0, torch.arange(n), 8))[:, :2]
    observed = torch.bincount(ids.flatten(), minlength=8).double() / n
    assert (observed - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / n) ** 0.5


def test_noise_is_a_function_of_seed_epoch_and_sample():
    samples = torch.tensor([5, 3, 900_000_000])
    noise = sample_noise(7, 2, samples, 196)
    assert noise.dtype == torch.float32 and 0 < noise.min() and noise.max() < 1
    assert torch.equal(noise[1], sample_noise(7, 2, torch.tensor([3]), 196)[0])
    for other in (sample_noise(8, 2, samples, 196), sample_noise(7, 3, samples, 196)):
        assert not (other == noise).all(dim=1).any()


def test_noise_is_uniform_and_uncorrelated():
    x = sample_noise(0, 0, torch.arange(50_000), 4).double()
    assert (x.mean(0) - 0.5).abs().max() < 0.006 and (x.var(0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(x.T) - torch.eye(4)).abs().max() < 0.02


def test_noise_keeps_its_bits():
    """A change of the hash would change the masks of runs that are resumed."""
    noise = sample_noise(3, 5, torch.tensor([0, 123_456]), 3)
    bits = (noise.double() * 2**24).long().tolist()
    assert bits == [[2223319, 16283285, 10595143], [5015347, 12853327, 14310479]]
