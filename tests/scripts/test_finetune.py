"""main_finetune.py and main_linprobe.py as commands: files, exact accuracies, agreement of runs."""

import shutil
import tarfile
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

import main_finetune
import main_linprobe
import models_vit
from tests.helpers import (
    SHARED,
    checkpoint,
    draw_photo,
    finetune,
    launch,
    linprobe,
    log_records,
    ok,
    one_error_line,
    pretrain,
    torchrun,
    weights_equal,
)
from util.data.loader import build_loaders
from util.datasets import DataConfig, build_linprobe_transform, build_transform

SCRIPTS = {'finetune': finetune, 'linprobe': linprobe}

# The flags of the published commands, without epochs, classes, model, batch size and paths.
PUBLISHED_FINETUNE = (
    '--accum_iter 1 --blr 1e-4 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8'
    ' --cutmix 1.0 --reprob 0.25 --dist_eval --global_pool'
).split()
PUBLISHED_LINPROBE = '--accum_iter 1 --cls_token --blr 0.05 --weight_decay 0.0 --dist_eval'.split()


def accuracy_line(stdout):
    return next(line for line in stdout.splitlines() if line.startswith('Accuracy of'))


# ---- flags and the published commands ----


def test_flags_and_defaults():
    both = dict(
        batch_size=64,
        accum_iter=1,
        model='vit_large_patch16',
        output_dir='./output_dir',
        log_dir='./output_dir',
        seed=0,
        device=None,  # the GPU if there is one
        resume='',
        start_epoch=0,
        pin_mem=True,
        world_size=1,
        local_rank=-1,
        dist_on_itp=False,
        lr=None,
        dist_url='env://',
        finetune='',
        global_pool=False,
        nb_classes=1000,
        eval=False,
        dist_eval=False,
        save_every=20,
    )
    finetuning = dict(
        both,
        epochs=50,
        input_size=224,
        weight_decay=0.05,
        blr=1e-3,
        min_lr=1e-6,
        warmup_epochs=5,
        num_workers=16,
        drop_path=0.1,
        clip_grad=None,
        layer_decay=0.75,
        color_jitter=None,
        aa='rand-m9-mstd0.5-inc1',
        smoothing=0.1,
        reprob=0.25,
        remode='pixel',
        recount=1,
        resplit=False,
        mixup=0,
        cutmix=0,
        cutmix_minmax=None,
        mixup_prob=1.0,
        mixup_switch_prob=0.5,
        mixup_mode='batch',
        global_pool_wcls=False,
    )
    probing = dict(
        both,
        batch_size=512,
        epochs=90,
        input_size=224,
        weight_decay=0,
        blr=[0.1],
        min_lr=0,
        warmup_epochs=10,
        num_workers=10,
    )
    for module, published in ((main_finetune, finetuning), (main_linprobe, probing)):
        parse = module.get_args_parser().parse_args
        args = vars(parse([]))
        assert {k: args[k] for k in published} == published
        assert parse(['--global_pool', '--cls_token']).global_pool is False
        assert parse(['--local-rank=3']).local_rank == 3


@pytest.fixture(scope='module')
def cifar10(tmp_path_factory):
    """8 training and 5 validation images per class, drawn if ../shared/data is not here."""
    root = tmp_path_factory.mktemp('cifar10')
    archive = SHARED / 'data' / 'cifar10.tar.gz'
    wanted = {'train': 8, 'val': 5}
    if not archive.exists():
        for split, count in wanted.items():
            for c, i in ((c, i) for c in range(10) for i in range(count)):
                draw_photo(root / split / f'class{c}' / f'{i}.png', (split, c, i), (32, 32))
        return root
    counts = {}
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            *_, split, name, file = member.name.split('/')
            split = {'train': 'train', 'test': 'val'}[split]
            counts[split, name] = counts.get((split, name), 0) + 1
            if counts[split, name] <= wanted[split]:
                (root / split / name).mkdir(parents=True, exist_ok=True)
                (root / split / name / file).write_bytes(tar.extractfile(member).read())
    return root


@pytest.mark.slow
def test_published_commands(cifar10, tmp_path):
    """Pretraining, fine-tuning, evaluation and probing; launch() passes --local-rank."""
    flags = '--batch_size 8 --epochs 2 --input_size 32 --num_workers 1 --warmup_epochs 1'
    flags = [*flags.split(), '--data_path', cifar10]

    def output(name):
        return ['--output_dir', tmp_path / name, '--log_dir', tmp_path / name]

    model = ['--model', 'mae_vit_tiny_patch8']
    ok(pretrain(*model, *flags, *output('1')))
    flags += ['--model', 'vit_tiny_patch8', '--nb_classes', 10]
    start = ['--finetune', tmp_path / '1' / 'checkpoint-1.pth']
    ok(finetune(*PUBLISHED_FINETUNE, *flags, *start, *output('2'), launcher=launch(2)))
    stats = log_records(tmp_path / '2')[-1]
    tested = {'test_loss', 'test_acc1', 'test_acc5'}
    assert stats.keys() == tested | {'train_loss', 'train_lr', 'epoch', 'n_parameters'}
    resume = ['--eval', '--resume', tmp_path / '2' / 'checkpoint-1.pth']
    line = accuracy_line(ok(finetune(*PUBLISHED_FINETUNE, *flags, *resume)))
    assert f'50 test images: {stats["test_acc1"]:.2f}%' in line
    ok(linprobe(*PUBLISHED_LINPROBE, *flags, *start, *output('3'), launcher=launch(2)))
    stats = log_records(tmp_path / '3')[-1]
    assert stats['epoch'] == 1 and stats['n_parameters'] == 192 * 10 + 10


# ---- exact accuracies ----


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_accuracy_is_exact(script, classifier_flags, labelled_images, tmp_path):
    """13 images: as logged, evaluated again, by hand, and for fine-tuning on 2 and 3 processes."""
    run, out = SCRIPTS[script], tmp_path / 'out'
    flags = [*classifier_flags, '--batch_size', 4]
    ok(run(*flags, '--blr', 1))
    stats = log_records(out)[-1]
    last = out / 'checkpoint-last.pth'
    flags += ['--eval', '--resume', last]
    line = accuracy_line(ok(run(*flags)))
    assert f'13 test images: {stats["test_acc1"]:.2f}%' in line
    assert f'loss {stats["test_loss"]:.4f}' in line
    assert stats['test_acc5'] == 100  # of three classes
    if script == 'finetune':  # each process evaluates all images, or its share
        assert accuracy_line(ok(run(*flags, launcher=torchrun(2)))) == line
        assert accuracy_line(ok(run(*flags, '--dist_eval', launcher=torchrun(3)))) == line

    transform = build_linprobe_transform if script == 'linprobe' else build_transform
    data = DataConfig(labelled_images, batch_size=4)
    transform = partial(transform, input_size=32)
    _, loader = build_loaders(data, transform, num_classes=3, eval_only=True)
    model = models_vit.vit_tiny_patch8(img_size=32, num_classes=3)
    if script == 'linprobe':
        norm = torch.nn.BatchNorm1d(192, affine=False, eps=1e-6)
        model.head = torch.nn.Sequential(norm, model.head)
    model.load_state_dict(checkpoint(last)['model'])
    hits = []
    with torch.no_grad():
        for x, y, _ in loader:
            x = normalize(x / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            hits.append(model.eval()(x).argmax(1) == y)
    assert stats['test_acc1'] == pytest.approx(100 * torch.cat(hits).double().mean().item())


@pytest.mark.slow
def test_accuracy_of_readable_images(classifier_flags, labelled_images, tmp_path):
    """All unreadable images on one of two ranks; then no readable image at all."""
    data = tmp_path / 'data'
    shutil.copytree(labelled_images, data)
    ok(finetune(*classifier_flags, '--epochs', 1))
    flags = [*classifier_flags, '--data_path', data, '--eval']
    flags += ['--resume', tmp_path / 'out' / 'checkpoint-last.pth']
    paths = sorted((data / 'val').rglob('*.png'))
    for path in paths[::2]:  # the share of rank 0
        path.write_bytes(b'')
    line = accuracy_line(ok(finetune(*flags)))
    assert '6 test images' in line
    assert accuracy_line(ok(finetune(*flags, '--dist_eval', launcher=torchrun(2)))) == line
    for path in paths[1::2]:
        path.write_bytes(b'')
    one_error_line(finetune(*flags))
    one_error_line(finetune(*flags, '--dist_eval', launcher=torchrun(2)))


# ---- runs that must agree ----


@pytest.mark.parametrize('script', SCRIPTS)
def test_resume_equals_uninterrupted(script, classifier_flags, tmp_path):
    """Bit for bit, with all augmentation; the number of loader workers changes nothing."""
    mixed = '--mixup 0.8 --cutmix 1 --reprob 0.25 --drop_path 0.2 --blr 0.01 --global_pool'
    more = {'finetune': mixed.split(), 'linprobe': ['--blr', 0.5]}[script]
    run = partial(SCRIPTS[script], *classifier_flags, *more)
    out, resumed, workers, other = (tmp_path / n for n in ('out', 'resumed', 'workers', 'other'))
    ok(run())
    last = out / 'checkpoint-1.pth'
    first = out / 'checkpoint-0.pth'
    assert 'epoch 0 is done' in ok(run('--resume', first, '--output_dir', resumed))
    assert weights_equal(last, resumed / 'checkpoint-1.pth')
    assert log_records(out)[1:] == log_records(resumed)
    ok(run('--num_workers', 2, '--output_dir', workers))
    assert weights_equal(last, workers / 'checkpoint-1.pth')
    ok(run('--seed', 1, '--output_dir', other))
    assert not weights_equal(last, other / 'checkpoint-1.pth')


@pytest.mark.slow
def test_resume_on_two_processes(classifier_flags, tmp_path):
    """The batch norm of linear probing differs between ranks; a checkpoint has rank 0's."""
    flags = [*classifier_flags, '--batch_size', 4, '--blr', 0.5]
    out, resumed = tmp_path / 'out', tmp_path / 'resumed'
    ok(linprobe(*flags, launcher=torchrun(2)))
    resume = ['--resume', out / 'checkpoint-0.pth', '--output_dir', resumed]
    ok(linprobe(*flags, *resume, launcher=torchrun(2)))
    assert weights_equal(out / 'checkpoint-1.pth', resumed / 'checkpoint-1.pth')


@pytest.mark.slow
def test_accumulation_and_ranks_equal_one_batch(classifier_flags, tmp_path):
    """Without mixup and stochastic depth, which depend on the rank."""
    flags = [*classifier_flags, '--drop_path', 0, '--blr', 0.01]
    runs = {'whole': (8, 1, None), 'halves': (4, 1, torchrun(2)), 'twice': (4, 2, None)}
    for name, (batch, accum, launcher) in runs.items():
        more = ['--batch_size', batch, '--accum_iter', accum, '--output_dir', tmp_path / name]
        ok(finetune(*flags, *more, launcher=launcher))
    whole, *others = (checkpoint(tmp_path / name / 'checkpoint-1.pth') for name in runs)
    for other in others:
        for name, x in whole['model'].items():
            # Softmax ignores the bias of the keys: its gradient is only rounding, which Adam
            # scales up.
            if not name.endswith('qkv.bias'):
                torch.testing.assert_close(
                    other['model'][name],
                    x,
                    rtol=1e-4,
                    atol=2e-5,
                    msg=lambda m, name=name: f'{name}: {m}',
                )
        for i, state in whole['optimizer']['state'].items():
            x, y = state['exp_avg'], other['optimizer']['state'][i]['exp_avg']
            assert (x - y).abs().max() <= 1e-4 * x.abs().max(), i


def test_linear_probing_keeps_the_encoder(classifier_flags, pretrained, tmp_path):
    encoder, losses = checkpoint(pretrained)['model'], {}
    flags = [*classifier_flags, '--blr', 1, '--input_size', 64]
    for amp in ('fp32', 'bf16'):
        out = tmp_path / amp
        ok(linprobe(*flags, '--amp', amp, '--output_dir', out))
        probe = checkpoint(out / 'checkpoint-1.pth')
        model = probe['model']
        head = {k.removeprefix('head.') for k in model if k.startswith('head.')}
        statistics = {f'0.{k}' for k in ('running_mean', 'running_var', 'num_batches_tracked')}
        assert head == statistics | {'1.weight', '1.bias'}
        assert len(model) - len(head) == 6 * 12 + 6
        assert all(torch.equal(model[k], encoder[k]) for k in model if not k.startswith('head.'))
        assert model['head.0.num_batches_tracked'] == 6
        assert model['head.1.weight'].dtype == torch.float32
        assert len(probe['optimizer']['state']) == 2
        losses[amp] = log_records(out)[-1]['test_loss']
    assert losses['fp32'] != losses['bf16']
    assert losses['fp32'] == pytest.approx(losses['bf16'], rel=0.02)


# ---- files, data and losses ----


def test_files_and_curves(classifier_flags, tmp_path):
    """The best checkpoint, the last one, and every --save_every-th."""
    flags = '--epochs 6 --save_every 3 --blr 0.01 --clip_grad 1 --reprob 0 --smoothing 0'
    ok(finetune(*classifier_flags, *flags.split(), '--drop_path', 0, '--aa', ''))
    out = tmp_path / 'out'
    kept = {f'checkpoint-{name}.pth' for name in (0, 3, 5, 'last', 'best')}
    assert {p.name for p in out.glob('*.pth')} == kept
    assert not list(out.glob('*.tmp'))
    records = log_records(out)
    assert [r['epoch'] for r in records] == list(range(6))
    assert records[-1]['train_loss'] < records[0]['train_loss']  # it learns
    best = checkpoint(out / 'checkpoint-best.pth')
    assert best['max_accuracy'] == max(r['test_acc1'] for r in records)
    assert records[best['epoch']]['test_acc1'] == best['max_accuracy']
    assert checkpoint(out / 'checkpoint-last.pth')['epoch'] == 5
    events = EventAccumulator(str(out)).Reload()
    tested = {'perf/test_acc1', 'perf/test_acc5', 'perf/test_loss'}
    assert set(events.Tags()['scalars']) == {'loss', 'lr'} | tested
    steps = [int((epoch + step / 3) * 1000) for epoch in range(6) for step in range(3)]
    assert [e.step for e in events.Scalars('loss')] == steps
    accuracies = [r['test_acc1'] for r in records]
    assert [e.value for e in events.Scalars('perf/test_acc1')] == pytest.approx(accuracies)


def test_resume_keeps_the_best_accuracy(classifier_flags, tmp_path):
    """And does not need the pretrained file."""
    resumed, good = tmp_path / 'resumed', tmp_path / 'good.pth'
    ok(finetune(*classifier_flags, '--epochs', 1))
    first = checkpoint(tmp_path / 'out' / 'checkpoint-0.pth')
    torch.save({**first, 'max_accuracy': 99.0}, good)
    flags = [*classifier_flags, '--finetune', 'gone.pth', '--resume', good]
    assert 'best top-1 99.00 %' in ok(finetune(*flags, '--output_dir', resumed))
    assert not (resumed / 'checkpoint-best.pth').exists()
    assert 'Nothing to do' in ok(finetune(*flags, '--epochs', 1))


def test_unreadable_images(classifier_flags, labelled_images, tmp_path):
    """Replaced in training; skipped in evaluation, where the others are counted exactly."""
    data = tmp_path / 'data'
    shutil.copytree(labelled_images, data)
    files = ('train/class0/00.png', 'val/class1/01.png')
    for file in files:
        (data / file).write_bytes(b'')
    flags = [*classifier_flags, '--data_path', data, '--epochs', 1]
    result = finetune(*flags)
    ok(result)
    for file in files:
        assert result.stderr.count(file) == 1
    hits = log_records(tmp_path / 'out')[0]['test_acc1'] * 12 / 100
    assert hits == pytest.approx(round(hits), abs=1e-9)
    one_error_line(finetune(*flags, '--max_bad_images', 0), '--max_bad_images')


def test_class_folders(classifier_flags, labelled_images, tmp_path):
    """Hidden folders are not classes; an empty folder is one, and is reported."""
    data = tmp_path / 'data'
    shutil.copytree(labelled_images, data)
    (data / 'train' / '.ipynb_checkpoints').mkdir()
    for split in ('train', 'val'):
        (data / split / 'class3').mkdir()
    flags = [*classifier_flags, '--data_path', data, '--nb_classes', 4, '--epochs', 1]
    assert f'{data}/train/class3' in ok(finetune(*flags))


def test_losses():
    def build(mixup=0, cutmix=0, cutmix_minmax=None, smoothing=0.1):
        return main_finetune.build_criterion(mixup, cutmix, cutmix_minmax, smoothing, 3)

    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    log_p = logits.log_softmax(1)
    nll = -log_p[[0, 1], labels].mean()
    loss, mixup = build()
    assert mixup is None
    torch.testing.assert_close(loss(logits, labels), 0.9 * nll + 0.1 * -log_p.mean())
    loss, mixup = build(smoothing=0)
    torch.testing.assert_close(loss(logits, labels), nll)
    loss, mixup = build(mixup=0.8, smoothing=0.2)
    _, soft = mixup(torch.zeros(2, 3, 8, 8), labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    assert soft.min().item() == pytest.approx(0.2 / 3)
    torch.testing.assert_close(loss(logits, soft), -(soft * log_p).sum(1).mean())
    for options in ({'cutmix': 1}, {'cutmix_minmax': [0.2, 0.8]}):
        assert build(**options)[1] is not None
