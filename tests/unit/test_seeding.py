"""Random generators as a function of their purpose."""

import random

import numpy as np
import torch

from util.seeding import seed_generators, seed_of, seed_step, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seed_of_depends_on_every_part():
    seeds = [seed_of(*p) for p in (('a', 0, 1), ('a', 1, 0), ('a', 0), ('b', 0, 1), ('a', '0', 1))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of('a', 0, 1) == seeds[0]


def test_seed_generators_seeds_all_three():
    assert seed_generators('test', 3) == seed_of('test', 3)
    first = draw()
    seed_generators('test', 3)
    assert first == draw()
    seed_generators('test', 4)
    assert not set(first) & set(draw())


def test_seeded_restores_the_generators():
    seed_generators('test', 0)
    expected = draw(), draw()
    seed_generators('test', 0)
    first = draw()
    with seeded('other'):
        inside = draw()
    assert (first, draw()) == expected
    with seeded('other'):
        assert draw() == inside


def test_seed_step_depends_on_epoch_step_and_rank():
    draws = []
    for key in ((0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        seed_step(*key)
        draws.append(draw())
    assert len({d[2] for d in draws}) == 5
    seed_step(0, 1, 2, 3)
    assert draw() == draws[0]
