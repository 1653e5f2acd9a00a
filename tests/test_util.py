"""The parts under util/ that forks import."""

import argparse
import fcntl
import os
import platform
import pty
import resource
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pretrain, run
from torchvision.datasets import ImageFolder

from util import misc
from util.checkpoint import load, save_on_master
from util.datasets import SeededDataset, build_dataset, build_pretrain_transform, class_names
from util.errors import UserError
from util.loader import EpochSampler


def test_augmentation_depends_on_seed_epoch_and_sample_alone(small_images):
    args = argparse.Namespace(input_size=32)
    folder = ImageFolder(small_images / 'train')
    dataset = SeededDataset(folder, build_pretrain_transform(args), seed=3)
    first = dataset[2, 5][0]
    dataset[0, 1], torch.rand(7)
    assert torch.equal(first, dataset[2, 5][0])
    for other in (dataset[3, 5][0], SeededDataset(folder, dataset.transform, seed=4)[2, 5][0]):
        assert not torch.equal(first, other)


def test_sampler_shares_one_order_between_ranks():
    def samples(epoch, world, batch):
        ranks = []
        for rank in range(world):
            sampler = EpochSampler(range(24), num_replicas=world, rank=rank, seed=1)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
        return [{key for r in ranks for key in r[i:i + batch // world]} for i in range(0, len(ranks[0]), batch // world)]

    assert samples(5, 1, 8) == samples(5, 2, 8) == samples(5, 4, 8)
    assert samples(5, 1, 8) != samples(6, 1, 8)
    assert {epoch for batch in samples(5, 1, 8) for epoch, _ in batch} == {5}


def test_classifier_data(small_images, tmp_path):
    args = argparse.Namespace(data_path=tmp_path, input_size=32, color_jitter=None, aa='rand-m9-mstd0.5-inc1', reprob=0.25,
                              remode='pixel', recount=1, dataset='', seed=0, max_bad_images=0)
    for split in ('train', 'val'):
        (tmp_path / split).symlink_to(small_images / 'train')
    train, val = build_dataset(True, args), build_dataset(False, args)
    assert train[0][0].shape == val[0][0].shape == (3, 32, 32)
    assert class_names(val) == ['class0', 'class1', 'class2']
    assert 'RandAugment' in str(train.transform)
    resize, centre = val.transform.transforms[1:3]
    assert resize.size == 36 and centre.size == (32, 32)


def test_meters():
    meter = misc.SmoothedValue(window_size=3)
    for x in (1.0, 2.0, 9.0, 4.0):
        meter.update(x)
    assert (meter.median, meter.avg, meter.global_avg, meter.max, meter.value) == (4.0, 5.0, 4.0, 9.0, 4.0)
    logger = misc.MetricLogger()
    logger.update(loss=torch.tensor(2.0), lr=0.1, absent=None)
    assert logger.loss.value == 2.0 and 'lr: 0.1000' in str(logger) and 'absent' not in str(logger)
    with pytest.raises(AttributeError, match='absent'):
        _ = logger.absent


def test_log_lines(capsys):
    logger = misc.MetricLogger()
    due = []
    for _ in logger.log_every(range(7), 3, 'Epoch [0]', items_per_step=4):
        due.append(logger.due)
        logger.update(loss=1.0)
    assert due == [False, False, True, False, False, True, True]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['Epoch [0] [3/7]', 'Epoch [0] [6/7]', 'Epoch [0] [7/7]']
    assert all('images/s' in line and 'eta' in line for line in lines)


@pytest.mark.parametrize('columns', [140, 80, 0])
def test_bar_on_a_terminal(columns):
    """One bar that is redrawn, instead of lines; lines where it would be cut off."""
    code = ('import time; from util.misc import MetricLogger; m = MetricLogger()\n'
            'for i in m.log_every(range(9), 3, "Epoch [0]"): m.update(loss=i); time.sleep(0.02)')
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    pid = os.fork()
    if pid == 0:
        os.dup2(slave, 1)
        os.close(master)
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, '-c', code], os.environ)
    os.close(slave)
    shown = b''
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # the terminal is gone: the process has ended
        pass
    assert os.waitpid(pid, 0)[1] == 0
    text = shown.decode()
    assert '9/9' in text and 'loss: 4.0000 (4.0000)' in text and ('Epoch [0] [' in text) == (columns < 140)


@pytest.mark.parametrize('enabled', [False, True])
def test_scaler(enabled):
    """Accumulation, clipping, the norm; with loss scaling a step with infinite gradients is skipped."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = misc.NativeScalerWithGradNormCount(enabled=enabled, device='cpu')
    assert scaler((p * torch.tensor([3.0, 0.0])).sum(), optimizer, parameters=[p], update_grad=False) is None
    norm = scaler((p * torch.tensor([0.0, 4.0])).sum(), optimizer, parameters=[p])
    assert norm == pytest.approx(5.0) and p.tolist() == pytest.approx([-0.5, 0.0])
    optimizer.zero_grad()
    norm = scaler((p * torch.tensor([3.0, 4.0])).sum(), optimizer, clip_grad=1.0, parameters=[p])
    assert norm == pytest.approx(5.0) and p.tolist() == pytest.approx([-0.8, -0.4], abs=1e-4)
    if enabled:
        optimizer.zero_grad()
        scale = scaler.state_dict()['scale']
        scaler((p * float('inf')).sum(), optimizer, parameters=[p])
        assert p.tolist() == pytest.approx([-0.8, -0.4], abs=1e-4) and scaler.state_dict()['scale'] < scale


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'checkpoint-0.pth'
    save_on_master({'model': {'w': torch.zeros(10)}}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match='could not be written'):
            save_on_master({'model': {'w': torch.ones(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint-0.pth']
    assert torch.equal(load(path)['model']['w'], torch.zeros(10))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last step of an epoch can break them after its loss was found to be good."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(output_dir=tmp_path, save_every=1, epochs=3)
    scaler = misc.NativeScalerWithGradNormCount(enabled=False, device='cpu')
    misc.save_model(args, 0, model, model, optimizer, scaler)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {'checkpoint-0.pth', 'checkpoint-last.pth'}
    model.weight.data[0, 1] = float('inf')
    with pytest.raises(UserError, match='no longer finite after epoch 1'):
        misc.save_model(args, 1, model, model, optimizer, scaler)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_published_checkpoint_resumes(milan_flags, tmp_path):
    """Its scaler has a state even where ours, without float16, has none; its args are a Namespace with names of its own."""
    assert pretrain(*milan_flags, '--epochs', 2).returncode == 0
    checkpoint = load(tmp_path / 'out' / 'checkpoint-0.pth')
    checkpoint['scaler'] = {'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000,
                            '_growth_tracker': 7}
    checkpoint['args'] = argparse.Namespace(gpu=3, dist_backend='nccl', distributed=True)
    torch.save(checkpoint, tmp_path / 'published.pth')
    torch.save(checkpoint['model'], tmp_path / 'bare.pth')
    result = pretrain(*milan_flags, '--epochs', 2, '--resume', tmp_path / 'published.pth')
    assert result.returncode == 0 and 'epoch 0 is done' in result.stdout, result.stderr
    result = pretrain(*milan_flags, '--epochs', 1, '--resume', tmp_path / 'bare.pth')
    assert result.returncode == 0 and 'no optimiser state' in result.stdout, result.stderr


def test_all_reduce_mean_of_one_process():
    assert misc.all_reduce_mean(3) == 3.0
    assert torch.equal(misc.all_reduce_mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))


def test_precision_names():
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    assert misc.resolve_amp('auto', 'cpu') == ('bf16' if 'avx512_bf16' in flags else 'fp32')
    assert misc.resolve_amp('fp32', 'cpu') == 'fp32' and misc.resolve_amp('bf16', 'cpu') == 'bf16'
    assert misc.resolve_compile('on', 'cpu') and not misc.resolve_compile('auto', 'cpu') and misc.resolve_compile('auto', 'cuda')
    if not torch.cuda.is_available():
        pytest.skip('what auto means on a GPU needs one')
    assert misc.resolve_amp('auto', 'cuda') in ('bf16', 'fp16')


def test_too_little_memory_ends_a_script_with_a_line(capsys):
    def too_much(args):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(SystemExit) as end:
        misc.run(too_much, None)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith('error: there is not enough memory for a step: lower --batch_size')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_pretraining_on_a_gpu(milan_flags, tmp_path):
    result = run(sys.executable, ROOT / 'main_pretrain.py', *milan_flags, '--epochs', 2, env={'CUDA_VISIBLE_DEVICES': '0'})
    assert result.returncode == 0, result.stderr
    assert 'process(es) on cuda' in result.stdout


FAULTS = """
import resource, sys, torch
from util.memory import keep_freed_memory
if sys.argv[1] == 'kept':
    keep_freed_memory()
x = torch.zeros(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    y = x + 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries are left as they are')
def test_freed_memory_is_kept():
    """Fifty tensors of 32 MB, two at a time, are got from the system a few times and not fifty."""
    got = {how: float(run(sys.executable, '-c', FAULTS, how).stdout) for how in ('kept', 'given back')}
    assert got['kept'] < 15 * 32, got
    if got['given back'] < 30 * 32:
        pytest.skip('this system hands out memory in large pages, and cannot show the difference')


FORK = """
import os, pathlib, re, torch
from util import memory
memory.keep_freed_memory()
del_me = [torch.ones(1 << 20) for _ in range(64)]  # 256 MB
del del_me
def allocated():
    return int(re.search(r'Anonymous: +([0-9]+)', pathlib.Path('/proc/self/smaps_rollup').read_text())[1]) // 1024
before = allocated()
if os.fork() == 0:
    memory.give_back_freed_memory()
    print(before, allocated(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries are left as they are')
def test_a_forked_process_gives_back_what_is_kept():
    kept, given_back = map(int, run(sys.executable, '-c', FORK).stdout.split())
    assert kept > 256 and given_back < kept - 200
