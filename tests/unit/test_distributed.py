"""Collectives of one process; those of several are tested with the scripts."""

import torch

from util.distributed import all_reduce_mean, all_reduce_sum, gather


def test_collectives_of_one_process():
    assert all_reduce_mean(3) == 3.0
    assert torch.equal(all_reduce_mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert all_reduce_sum([1.0, 2.0]) == [1.0, 2.0] and gather('x') == ['x']
