"""Saving of runs; the results of resumed runs are tested with the scripts."""

import argparse
import resource
import signal

import pytest
import torch

from tests.helpers import checkpoint
from util import misc
from util.amp import NativeScalerWithGradNormCount
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import save_on_master
from util.errors import UserError


def training():
    """Return a model, its optimizer and a loss scaler."""
    model = torch.nn.Linear(2, 2)
    scaler = NativeScalerWithGradNormCount(enabled=False, device='cpu')
    return model, torch.optim.AdamW(model.parameters()), scaler


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last step of an epoch can break them although its loss was finite."""
    model, *rest = training()
    checkpointer = Checkpointer(model, *rest, tmp_path, flags={}, epochs=3, save_every=1)
    checkpointer.save(0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {'checkpoint-0.pth', 'checkpoint-last.pth'}
    model.weight.data[0, 1] = float('inf')
    with pytest.raises(UserError, match='epoch 1'):
        checkpointer.save(1)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'checkpoint-0.pth'
    save_on_master({'model': {'w': torch.zeros(10)}}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match=path.name):
            save_on_master({'model': {'w': torch.ones(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint-0.pth']
    assert torch.equal(checkpoint(path)['model']['w'], torch.zeros(10))


def test_functions_of_mae(tmp_path):
    """save_model and load_model of util.misc, as forks call them."""
    args = argparse.Namespace(output_dir=str(tmp_path), epochs=3, resume='', start_epoch=0)
    model, optimizer, scaler = training()
    misc.save_model(args, 0, model, model, optimizer, scaler)
    args.resume = str(tmp_path / 'checkpoint-0.pth')
    other, optimizer, scaler = training()
    misc.load_model(args, other, optimizer, scaler)
    assert args.start_epoch == 1 and torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    'images_per_step, steps_per_epoch, accum_iter, expected',
    [
        (4, 25, 1, 24),  # as before
        (4, 26, 2, 24),
        (8, 12, 1, 11),  # 96 images are 12 steps of this run: the last one is repeated
        (8, 12, 4, 8),
        (64, 1, 1, 0),
        (4, 10, 1, 9),  # the data set is smaller now
    ],
)
def test_resume_within_an_epoch_with_another_batch_size(
    tmp_path, images_per_step, steps_per_epoch, accum_iter, expected
):
    """The run continues after the last whole update of the images that are done."""
    checkpointer = Checkpointer(*training(), tmp_path, flags={}, epochs=3, images_per_step=4)
    sums = {'loss': (24, 12.0)}
    checkpointer.save(1, step=24, sums=sums)
    checkpointer.images_per_step = images_per_step
    path = tmp_path / 'checkpoint-last.pth'
    start = checkpointer.resume(str(path), steps_per_epoch=steps_per_epoch, accum_iter=accum_iter)
    assert (start.epoch, start.step) == (1, expected)
    assert start.sums == (sums if expected else {})
