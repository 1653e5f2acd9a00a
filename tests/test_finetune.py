"""main_finetune.py and main_linprobe.py as users run them."""

import json
import shutil
import tarfile

import pytest
import torch
from conftest import SHARED, draw_photo, finetune, launch, linprobe, pretrain, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import models_vit
from util.checkpoint import load

SCRIPTS = {'finetune': finetune, 'linprobe': linprobe}
MIXED = ['--mixup', 0.8, '--cutmix', 1.0, '--reprob', 0.25, '--drop_path', 0.2, '--blr', 0.01, '--global_pool']
# the published commands' flags, without their numbers of epochs and classes, model, batch and paths
PUBLISHED_FINETUNE = ['--accum_iter', 1, '--blr', '1e-4', '--layer_decay', 0.65, '--weight_decay', 0.05, '--drop_path', 0.1,
                      '--mixup', 0.8, '--cutmix', 1.0, '--reprob', 0.25, '--dist_eval', '--global_pool']
PUBLISHED_LINPROBE = ['--accum_iter', 1, '--cls_token', '--blr', 0.05, '--weight_decay', 0.0, '--dist_eval']


def log(folder):
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def ok(result):
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture(scope='module')
def cifar10(tmp_path_factory):
    """Two folders, the second smaller: images of CIFAR-10 from ../shared/data, or drawn ones where it is not here."""
    roots = [tmp_path_factory.mktemp(name) for name in ('cifar10', 'cifar10_small')]
    archive = SHARED / 'data' / 'cifar10.tar.gz'
    wanted = [{'train': 8, 'val': 5}, {'train': 2, 'val': 1}]
    if not archive.exists():
        for root, counts in zip(roots, wanted):
            for split, c, i in ((split, c, i) for split, n in counts.items() for c in range(10) for i in range(n)):
                draw_photo(root / split / f'class{c}' / f'{i}.png', (split, c, i), (32, 32))
        return roots
    seen = {}
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            *_, split, name, file = member.name.split('/')
            split = {'train': 'train', 'test': 'val'}[split]
            i = seen[split, name] = seen.get((split, name), -1) + 1
            for root, counts in zip(roots, wanted):
                if i < counts[split]:
                    (root / split / name).mkdir(parents=True, exist_ok=True)
                    (root / split / name / file).write_bytes(tar.extractfile(member).read())
    return roots


@pytest.mark.parametrize('model, size, batch, epochs', [('tiny_patch8', 32, 8, 2), ('small_patch16', 224, 2, 1)])
def test_pretrain_finetune_eval_linprobe(model, size, batch, epochs, cifar10, tmp_path):
    """The published commands one after the other, shortened; the second launcher passes --local-rank to the script."""
    data = cifar10[0 if size == 32 else 1]
    shared = ['--batch_size', batch, '--epochs', epochs, '--data_path', data, '--input_size', size, '--num_workers', 1,
              '--warmup_epochs', 1]
    out1, out2, out3 = (tmp_path / name for name in ('OUT', 'OUT2', 'OUT3'))
    last = f'checkpoint-{epochs - 1}.pth'
    ok(pretrain('--model', f'mae_vit_{model}', *shared, '--output_dir', out1, '--log_dir', out1, launcher=torchrun(2)))
    shared += ['--model', f'vit_{model}', '--nb_classes', 10]
    flags = [*shared, '--finetune', out1 / last]
    ok(finetune(*PUBLISHED_FINETUNE, *flags, '--output_dir', out2, '--log_dir', out2, launcher=launch(2)))
    assert log(out2)[-1].keys() == {'train_loss', 'train_lr', 'test_loss', 'test_acc1', 'test_acc5', 'epoch', 'n_parameters'}
    said = ok(finetune(*PUBLISHED_FINETUNE, *shared, '--eval', '--resume', out2 / last))
    assert f'on the {50 if size == 32 else 10} test images: {log(out2)[-1]["test_acc1"]:.2f}%' in said
    ok(linprobe(*PUBLISHED_LINPROBE, *flags, '--output_dir', out3, '--log_dir', out3, launcher=launch(2)))
    assert log(out3)[-1]['epoch'] == epochs - 1 and log(out3)[-1]['n_parameters'] == (192 if size == 32 else 384) * 10 + 10


def test_flags_and_defaults():
    both = dict(
        batch_size=64, accum_iter=1, model='vit_large_patch16', output_dir='./output_dir', log_dir='./output_dir', seed=0,
        device='cuda', resume='', start_epoch=0, pin_mem=True, world_size=1, local_rank=-1, dist_on_itp=False, lr=None,
        dist_url='env://', finetune='', global_pool=False, nb_classes=1000, eval=False, dist_eval=False)
    finetuning = dict(
        both, epochs=50, input_size=224, weight_decay=0.05, blr=1e-3, min_lr=1e-6, warmup_epochs=5, num_workers=16,
        drop_path=0.1, clip_grad=None, layer_decay=0.75, color_jitter=None, aa='rand-m9-mstd0.5-inc1', smoothing=0.1,
        reprob=0.25, remode='pixel', recount=1, resplit=False, mixup=0, cutmix=0, cutmix_minmax=None, mixup_prob=1.0,
        mixup_switch_prob=0.5, mixup_mode='batch', global_pool_wcls=False)
    probing = dict(both, batch_size=512, epochs=90, weight_decay=0, blr=0.1, min_lr=0, warmup_epochs=10, num_workers=10)
    for module, published in ((main_finetune, finetuning), (main_linprobe, probing)):
        args = vars(module.get_args_parser().parse_args([]))
        assert {k: args[k] for k in published} == published
        assert module.get_args_parser().parse_args(['--global_pool', '--cls_token']).global_pool is False
        assert module.get_args_parser().parse_args(['--local-rank=3']).local_rank == 3


@pytest.mark.parametrize('script', SCRIPTS)
def test_accuracy_is_exact_for_any_number_of_processes(script, classifier_flags, tmp_path):
    """13 images: 1, 2 and 3 processes, a share on each or all on each, and by hand."""
    run = SCRIPTS[script]
    ok(run(*classifier_flags, '--blr', 1, '--batch_size', 4))
    flags = [*classifier_flags, '--batch_size', 4, '--eval', '--resume', tmp_path / 'out' / 'checkpoint-last.pth']
    lines = set()
    many = [(torchrun(2), []), (torchrun(2), ['--dist_eval']), (torchrun(3), ['--dist_eval'])]
    for launcher, extra in ((None, []), *(many if script == 'finetune' else many[2:])):
        said = ok(run(*flags, *extra, launcher=launcher))
        lines.add(next(line for line in said.splitlines() if line.startswith('Accuracy of')))
    line, = lines
    stats = log(tmp_path / 'out')[-1]
    assert f'13 test images: {stats["test_acc1"]:.2f}%' in line and f'loss {stats["test_loss"]:.4f}' in line
    assert stats['test_acc1'] * 13 / 100 == pytest.approx(round(stats['test_acc1'] * 13 / 100), abs=1e-9)  # whole images
    assert stats['test_acc5'] == 100  # of three classes

    module = {'finetune': main_finetune, 'linprobe': main_linprobe}[script]
    args = module.get_args_parser().parse_args([str(f) for f in flags])
    args.rank, args.world_size, args.pin_mem = 0, 1, False
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision.transforms.functional import normalize

    from util.datasets import build_linprobe_transform, build_transform
    from util.loader import build_loaders
    _, loader = build_loaders(args, build_linprobe_transform if script == 'linprobe' else build_transform)
    model = models_vit.vit_tiny_patch8(img_size=32, num_classes=3)
    if script == 'linprobe':
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(192, affine=False, eps=1e-6), model.head)
    model.load_state_dict(load(args.resume)['model'])
    with torch.no_grad():
        hits = [(model.eval()(normalize(x / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)).argmax(1) == y)
                for x, y, _ in loader]
    assert stats['test_acc1'] == pytest.approx(100 * torch.cat(hits).float().mean().item(), abs=1e-4)


def same_weights(a, b):
    a, b = load(a), load(b)
    states = [[t for state in c['optimizer']['state'].values() for t in state.values()] for c in (a, b)]
    return (all(torch.equal(v, b['model'][k]) for k, v in a['model'].items()) and len(states[0]) > 0
            and all(torch.equal(x, y) for x, y in zip(*states)))


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_resumed_run_equals_the_uninterrupted_one(script, classifier_flags, tmp_path):
    """Bit for bit, with mixup, cutmix, random erasing and stochastic depth; and the number of loader workers changes nothing."""
    flags = [*classifier_flags, *(MIXED if script == 'finetune' else ['--blr', 0.5]), '--epochs', 3]
    run = SCRIPTS[script]
    ok(run(*flags))
    first = tmp_path / 'out' / 'checkpoint-0.pth'
    assert 'epoch 0 is done' in ok(run(*flags, '--resume', first, '--output_dir', tmp_path / 'resumed'))
    last = tmp_path / 'out' / 'checkpoint-2.pth'
    assert same_weights(last, tmp_path / 'resumed' / 'checkpoint-2.pth')
    assert log(tmp_path / 'out')[1:] == log(tmp_path / 'resumed')
    ok(run(*flags, '--num_workers', 2, '--output_dir', tmp_path / 'workers'))
    assert same_weights(last, tmp_path / 'workers' / 'checkpoint-2.pth')
    # another seed is another run, or none of this could fail
    ok(run(*flags, '--seed', 1, '--output_dir', tmp_path / 'other'))
    assert not same_weights(last, tmp_path / 'other' / 'checkpoint-2.pth')


def test_a_resumed_run_on_two_processes(classifier_flags, tmp_path):
    """The batch norm of linear probing has other statistics on every process; a checkpoint holds those of the first."""
    flags = [*classifier_flags, '--epochs', 3, '--batch_size', 4, '--blr', 0.5]
    ok(linprobe(*flags, launcher=torchrun(2)))
    first = tmp_path / 'out' / 'checkpoint-0.pth'
    ok(linprobe(*flags, '--resume', first, '--output_dir', tmp_path / 'resumed', launcher=torchrun(2)))
    assert same_weights(tmp_path / 'out' / 'checkpoint-2.pth', tmp_path / 'resumed' / 'checkpoint-2.pth')


def test_two_ranks_equal_one(classifier_flags, tmp_path):
    """Without what depends on the rank, mixup and stochastic depth: two ranks with half the batch, or two steps, are one."""
    flags = [*classifier_flags, '--drop_path', 0, '--blr', 0.01]
    ok(finetune(*flags, '--batch_size', 8, '--output_dir', tmp_path / 'whole'))
    ok(finetune(*flags, '--batch_size', 4, '--output_dir', tmp_path / 'halves', launcher=torchrun(2)))
    ok(finetune(*flags, '--batch_size', 4, '--accum_iter', 2, '--output_dir', tmp_path / 'twice'))
    whole = load(tmp_path / 'whole' / 'checkpoint-1.pth')
    start = models_vit.vit_tiny_patch8(img_size=32, num_classes=3, global_pool=False).state_dict()
    assert whole['model'].keys() == start.keys()
    for other in ('halves', 'twice'):
        other = load(tmp_path / other / 'checkpoint-1.pth')
        for name, x in whole['model'].items():
            if not name.endswith('qkv.bias'):  # the keys' bias has no gradient but rounding, which Adam scales up
                torch.testing.assert_close(other['model'][name], x, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f'{name}: {m}')
        for i, state in whole['optimizer']['state'].items():
            x, y = state['exp_avg'], other['optimizer']['state'][i]['exp_avg']
            assert (x - y).abs().max() <= 1e-4 * x.abs().max(), i


def test_linear_probing_leaves_the_encoder_alone(classifier_flags, pretrained, tmp_path):
    for amp in ('fp32', 'bf16'):
        ok(linprobe(*classifier_flags, '--blr', 1, '--amp', amp, '--input_size', 64, '--output_dir', tmp_path / amp))
        probe, encoder = load(tmp_path / amp / 'checkpoint-1.pth'), load(pretrained)['model']
        names = [k for k in probe['model'] if not k.startswith('head.')]
        assert len(names) == 6 * 12 + 6 and all(torch.equal(probe['model'][k], encoder[k]) for k in names)
        assert {k for k in probe['model'] if k.startswith('head')} == {
            'head.0.running_mean', 'head.0.running_var', 'head.0.num_batches_tracked', 'head.1.weight', 'head.1.bias'}
        assert probe['model']['head.0.num_batches_tracked'] == 6 and probe['model']['head.1.weight'].dtype == torch.float32
        assert len(probe['optimizer']['state']) == 2
    assert log(tmp_path / 'fp32')[-1]['test_loss'] != log(tmp_path / 'bf16')[-1]['test_loss']
    assert log(tmp_path / 'fp32')[-1]['test_loss'] == pytest.approx(log(tmp_path / 'bf16')[-1]['test_loss'], rel=0.02)


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode():
    model = models_vit.vit_tiny_patch8(num_classes=3, drop_path_rate=0.5)
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(192, affine=False), model.head)
    model.freeze_encoder().train()
    assert not model.blocks[3].training and not model.norm.training and model.head[0].training
    x = torch.randn(4, 3, 64, 64)
    features = []
    model.head[0].register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    model(x).sum().backward()
    assert not features[0].requires_grad
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {'head.1.weight', 'head.1.bias'}
    model(x)
    assert torch.equal(features[0], features[1])  # no stochastic depth
    assert not model.eval().head[0].training


def test_pooling():
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    token = models_vit.vit_tiny_patch8(num_classes=5).eval()
    tokens = {}
    token.blocks.register_forward_hook(lambda module, inputs, output: tokens.update(last=output))
    out = token(x)
    torch.testing.assert_close(out, token.head(token.norm(tokens['last'])[:, 0]))
    weights = {f'fc_{k}' if k.startswith('norm.') else k: v for k, v in token.state_dict().items()}
    for flag, mean in (('global_pool', tokens['last'][:, 1:].mean(1)), ('global_pool_wcls', tokens['last'].mean(1))):
        pooled = models_vit.vit_tiny_patch8(num_classes=5, **{flag: True}).eval()
        pooled.load_state_dict(weights)
        torch.testing.assert_close(pooled(x), token.head(token.norm(mean)))
    with pytest.raises(ValueError, match='not a multiple'):
        models_vit.vit_base_patch16(img_size=100)


def test_files_and_curves(classifier_flags, tmp_path):
    """The best checkpoint and the last stay; of the others every --save_every-th."""
    ok(finetune(*classifier_flags, '--epochs', 6, '--save_every', 3, '--blr', 0.01, '--clip_grad', 1, '--aa', '',
                '--reprob', 0, '--smoothing', 0, '--drop_path', 0))
    out = tmp_path / 'out'
    assert {p.name for p in out.glob('*.pth')} == {
        'checkpoint-0.pth', 'checkpoint-3.pth', 'checkpoint-5.pth', 'checkpoint-last.pth', 'checkpoint-best.pth'}
    assert not list(out.glob('*.tmp'))
    records = log(out)
    assert [r['epoch'] for r in records] == list(range(6))
    assert records[-1]['train_loss'] < records[0]['train_loss']  # it learns
    best = load(out / 'checkpoint-best.pth')
    assert best['max_accuracy'] == max(r['test_acc1'] for r in records)
    assert records[best['epoch']]['test_acc1'] == best['max_accuracy']
    assert load(out / 'checkpoint-last.pth')['epoch'] == 5
    events = EventAccumulator(str(out)).Reload()
    assert set(events.Tags()['scalars']) == {'loss', 'lr', 'perf/test_acc1', 'perf/test_acc5', 'perf/test_loss'}
    assert [e.step for e in events.Scalars('loss')] == [int((epoch + step / 3) * 1000) for epoch in range(6) for step in range(3)]
    assert [e.value for e in events.Scalars('perf/test_acc1')] == pytest.approx([r['test_acc1'] for r in records])


def test_the_best_so_far_survives_a_restart(classifier_flags, tmp_path):
    ok(finetune(*classifier_flags, '--epochs', 1))
    first = load(tmp_path / 'out' / 'checkpoint-0.pth')
    torch.save({**first, 'max_accuracy': 99.0}, tmp_path / 'good.pth')
    said = ok(finetune(*classifier_flags, '--epochs', 2, '--resume', tmp_path / 'good.pth', '--output_dir', tmp_path / 'resumed'))
    assert 'best top-1 99.00 %' in said and not (tmp_path / 'resumed' / 'checkpoint-best.pth').exists()
    done = ok(finetune(*classifier_flags, '--epochs', 1, '--resume', tmp_path / 'good.pth'))
    assert 'Nothing to do' in done


def test_unreadable_images(classifier_flags, labelled_images, tmp_path):
    """In training another takes its place; in evaluation it is left out, and the rest counted exactly."""
    data = tmp_path / 'data'
    shutil.copytree(labelled_images, data)
    for file in ('train/class0/00.png', 'val/class1/01.png'):
        (data / file).write_bytes(b'')
    result = finetune(*classifier_flags, '--data_path', data, '--epochs', 1)
    ok(result)
    assert 'train/class0/00.png cannot be read; another one takes its place' in result.stderr
    assert 'val/class1/01.png cannot be read; it is left out' in result.stderr
    right = log(tmp_path / 'out')[0]['test_acc1'] * 12 / 100
    assert right == pytest.approx(round(right), abs=1e-9)
    result = finetune(*classifier_flags, '--data_path', data, '--epochs', 1, '--max_bad_images', 0)
    assert result.returncode == 1 and '--max_bad_images' in result.stderr.splitlines()[-1]


def test_only_what_was_counted_is_reported(classifier_flags, labelled_images, tmp_path):
    """Unreadable images on one of two processes, and no readable one on either."""
    shutil.copytree(labelled_images, tmp_path / 'data')
    ok(finetune(*classifier_flags, '--epochs', 1))
    flags = [*classifier_flags, '--data_path', tmp_path / 'data', '--eval', '--resume', tmp_path / 'out' / 'checkpoint-last.pth']
    paths = sorted((tmp_path / 'data' / 'val').rglob('*.png'))
    for path in paths[::2]:  # the first process's share
        path.write_bytes(b'')
    said = [ok(finetune(*flags)), ok(finetune(*flags, '--dist_eval', launcher=torchrun(2)))]
    lines = {next(line for line in s.splitlines() if line.startswith('Accuracy of')) for s in said}
    assert len(lines) == 1 and 'on the 6 test images' in lines.pop()
    for path in paths[1::2]:
        path.write_bytes(b'')
    for launcher in (None, torchrun(2)):
        result = finetune(*flags, '--dist_eval', launcher=launcher)
        assert result.returncode == 1 and 'error: ' in result.stderr and 'ZeroDivision' not in result.stderr


def test_a_resumed_run_needs_no_pretrained_file(classifier_flags, tmp_path):
    ok(finetune(*classifier_flags, '--epochs', 1))
    flags = [*classifier_flags, '--finetune', 'gone.pth', '--resume', tmp_path / 'out' / 'checkpoint-last.pth']
    assert 'epoch 0 is done' in ok(finetune(*flags))


def test_class_folders(classifier_flags, labelled_images, tmp_path):
    """Hidden folders are no classes; an empty one is, and is named."""
    shutil.copytree(labelled_images, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / '.ipynb_checkpoints').mkdir()
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'class3').mkdir()
    said = ok(finetune(*classifier_flags, '--data_path', tmp_path / 'data', '--nb_classes', 4, '--epochs', 1))
    assert f'Note: there are no images in {tmp_path}/data/train/class3' in said


def test_losses():
    def criterion(*flags):
        return main_finetune.build_criterion(main_finetune.get_args_parser().parse_args(['--nb_classes', '3', *flags]))

    logits, classes = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    log_p = logits.log_softmax(1)
    nll = -log_p[[0, 1], classes].mean()
    loss, mixup = criterion()
    assert mixup is None
    torch.testing.assert_close(loss(logits, classes), 0.9 * nll + 0.1 * -log_p.mean())
    loss, mixup = criterion('--smoothing', '0')
    torch.testing.assert_close(loss(logits, classes), nll)
    loss, mixup = criterion('--mixup', '0.8', '--smoothing', '0.2')
    _, soft = mixup(torch.zeros(2, 3, 8, 8), classes)
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    assert soft.min().item() == pytest.approx(0.2 / 3)
    torch.testing.assert_close(loss(logits, soft), -(soft * log_p).sum(1).mean())
    for flags in (['--cutmix', '1'], ['--cutmix_minmax', '0.2', '0.8']):
        assert criterion(*flags)[1] is not None
