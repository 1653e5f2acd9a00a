"""Precision, loss scaling and skipped steps."""

from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, ok, run, torchrun
from util.amp import NativeScalerWithGradNormCount, resolve_amp
from util.lars import LARS


def test_resolve_amp():
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    assert resolve_amp('auto', 'cpu') == ('bf16' if 'avx512_bf16' in flags else 'fp32')
    assert resolve_amp('fp32', 'cpu') == 'fp32' and resolve_amp('bf16', 'cpu') == 'bf16'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_resolve_amp_on_a_gpu():
    assert resolve_amp('auto', 'cuda') in ('bf16', 'fp16')


@pytest.mark.parametrize('enabled', [False, True])
def test_scaler(enabled):
    """Accumulation, clipping and the norm; with loss scaling Inf gradients lower the scale."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = NativeScalerWithGradNormCount(enabled=enabled, device='cpu')

    def backward(*gradient, **kwargs):
        return scaler((p * torch.tensor(gradient)).sum(), optimizer, parameters=[p], **kwargs)

    assert backward(3.0, 0.0, update_grad=False) is None
    assert backward(0.0, 4.0) == pytest.approx(5.0)
    assert p.tolist() == pytest.approx([-0.5, 0.0])
    optimizer.zero_grad()
    assert backward(3.0, 4.0, clip_grad=1.0) == pytest.approx(5.0)
    clipped = pytest.approx([-0.8, -0.4], abs=1e-4)
    assert p.tolist() == clipped
    if enabled:
        optimizer.zero_grad()
        scale = scaler.state_dict()['scale']
        backward(float('inf'), float('inf'))
        assert p.tolist() == clipped and scaler.state_dict()['scale'] < scale


@pytest.mark.parametrize(
    'make',
    [
        lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
        lambda ps: LARS(ps, lr=0.1),
    ],
    ids=['fused', 'plain', 'LARS'],
)
@pytest.mark.parametrize('broken', ['loss', 'gradient'])
def test_skipped_steps_change_nothing(make, broken):
    """Weights and optimizer state stay, and ``skipped`` counts the steps in a row."""

    def train(steps):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = make(layer.parameters())
        scaler = NativeScalerWithGradNormCount(enabled=False, device='cpu')
        counts = []
        for good in steps:
            optimizer.zero_grad()
            out = layer(torch.ones(2, 4)).square().sum()
            if not good and broken == 'loss':
                out = out + torch.tensor(float('nan'))
            elif not good:
                out = torch.sqrt(out - out.detach()) + 1
            scaler(out, optimizer)
            counts.append(int(scaler.skipped))
        return layer.weight.detach(), counts

    weights, counts = train([1, 0, 0, 1, 0, 1])
    assert torch.equal(weights, train([1, 1, 1])[0])
    assert counts == [0, 1, 2, 0, 1, 0]


SKIP_ON_ALL_RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, ROOT)
from util.amp import NativeScalerWithGradNormCount
dist.init_process_group('gloo')
torch.manual_seed(0)
layer = torch.nn.Linear(4, 3)
layer = torch.nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
scaler = NativeScalerWithGradNormCount(enabled=False, device='cpu')
before = layer.module.weight.clone()
loss = layer(torch.ones(2, 4)).square().sum()
scaler(loss * float('inf') if dist.get_rank() == 1 else loss, optimizer)
# one write call per process, so that their lines do not mix
sys.stdout.write(f'{torch.equal(before, layer.module.weight)} {int(scaler.skipped)}\\n')
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_loss_of_one_rank_skips_the_step_on_all(tmp_path):
    (tmp_path / 'skip.py').write_text(SKIP_ON_ALL_RANKS.replace('ROOT', repr(str(ROOT))))
    assert ok(run(*torchrun(2), tmp_path / 'skip.py')).split() == ['True', '1', 'True', '1']
