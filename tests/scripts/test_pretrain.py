"""main_pretrain.py as a command: its files, its results on several processes, its errors."""

import argparse
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import param_groups_weight_decay

from main_pretrain import get_args_parser
from models_milan import MODELS
from tests.helpers import (
    checkpoint,
    launch,
    log_records,
    ok,
    one_error_line,
    pretrain,
    script,
    torchrun,
    weights_equal,
)

PUBLISHED = (
    '--model mae_vit_base_patch16 --mask_ratio 0.75 --warmup_epochs 40 --blr 1.5e-4'
    ' --weight_decay 0.05 --use_clip --change_decoder --attn_mask --accum_iter 2'
).split()


# ---- flags and launchers ----


def test_flags_and_defaults():
    args = vars(get_args_parser().parse_args([]))
    published = dict(
        batch_size=64,
        epochs=400,
        accum_iter=1,
        model='mae_vit_large_patch16',
        input_size=224,
        mask_ratio=0.75,
        norm_pix_loss=False,
        weight_decay=0.05,
        lr=None,
        blr=1e-3,
        min_lr=0.0,
        warmup_epochs=40,
        output_dir='./output_dir',
        log_dir='./output_dir',
        device=None,  # the GPU if there is one
        seed=0,
        resume='',
        start_epoch=0,
        num_workers=16,
        pin_mem=True,
        world_size=1,
        local_rank=-1,
        dist_on_itp=False,
        dist_url='env://',
        use_clip=False,
        change_decoder=False,
        attn_mask=False,
        average_targets=1,
        save_every=20,
    )
    assert {k: args[k] for k in published} == published
    assert not get_args_parser().parse_args(['--no_pin_mem']).pin_mem
    for flag in ('--local_rank=3', '--local-rank=3'):
        assert get_args_parser().parse_args([flag]).local_rank == 3


def test_help_lists_every_flag():
    out = ok(pretrain('--help'))
    for action in get_args_parser()._actions:
        assert all(option in out for option in action.option_strings)


@pytest.mark.slow
def test_published_command(imagenet_samples, clip_b16, tmp_path):
    """ViT-B at 224 pixels, with few images, one epoch and a small batch, on two processes."""
    flags = [*PUBLISHED, '--batch_size', 1, '--epochs', 1, '--data_path', imagenet_samples]
    flags += ['--clip_path', clip_b16, '--output_dir', tmp_path, '--log_dir', tmp_path]
    result = pretrain(*flags, launcher=torchrun(2))
    out = ok(result)
    assert 'CUDA' in result.stderr  # the note that this runs on the CPU
    assert 'effective batch 4 = 1 x accum_iter 2 x 2, lr 2.34e-06' in out
    assert out.count('Epoch [0] mean') == 1
    (record,) = log_records(tmp_path)
    assert record.keys() == {'train_loss', 'train_lr', 'epoch'}
    assert 1.5 < record['train_loss'] < 2.5  # 2 if prediction and target are unrelated
    saved = checkpoint(tmp_path / 'checkpoint-0.pth')
    assert saved.keys() == {'model', 'optimizer', 'epoch', 'scaler', 'args'}
    assert saved['args'].model == 'mae_vit_base_patch16' and saved['epoch'] == 0
    assert sum(v.numel() for v in saved['model'].values()) == 111_776_512
    for path in tmp_path.glob('*.pth'):
        path.unlink()  # 1.3 GB


@pytest.mark.slow
def test_launcher_of_one_process(milan_flags):
    out = ok(pretrain(*milan_flags, '--epochs', 1, launcher=launch(1, '--use_env')))
    assert 'effective batch 4 = 4 x accum_iter 1 x 1' in out
    assert out.count('Epoch [0] mean') == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.slow
def test_gpu(milan_flags):
    out = ok(pretrain(*milan_flags, '--epochs', 2, env={'CUDA_VISIBLE_DEVICES': '0'}))
    assert 'process(es) on cuda' in out


# ---- results that must agree ----


def assert_same_training(a, b):
    """Compare weights and running means of the gradients, up to the rounding of reordered sums."""
    a, b = checkpoint(a), checkpoint(b)
    assert a['model'].keys() == b['model'].keys()
    for name, x in a['model'].items():
        y = b['model'][name]
        # Softmax ignores the bias of the keys. Its gradient is only rounding, which Adam scales
        # up to full steps.
        if name.endswith('.kv.bias'):
            x, y = x.chunk(2)[1], y.chunk(2)[1]
        elif name.endswith('.qkv.bias'):
            x, y = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (x, y))
        torch.testing.assert_close(
            x, y, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}'
        )
    for i, state in a['optimizer']['state'].items():
        x, y = state['exp_avg'], b['optimizer']['state'][i]['exp_avg']
        assert (x - y).abs().max() <= 1e-4 * x.abs().max(), i


@pytest.mark.slow
def test_accumulation_and_ranks_equal_one_batch(milan_flags, tmp_path):
    """A batch of 8, two batches of 4 in a row, and two batches of 2 on each of two ranks."""
    runs = {'whole': (8, 1, None), 'accumulated': (4, 2, None), 'both': (2, 2, torchrun(2))}
    for name, (batch, accum, launcher) in runs.items():
        flags = ['--epochs', 2, '--batch_size', batch, '--accum_iter', accum]
        flags += ['--output_dir', tmp_path / name]
        ok(pretrain(*milan_flags, *flags, launcher=launcher))
    first, last = (tmp_path / 'whole' / f'checkpoint-{epoch}.pth' for epoch in (0, 1))
    before, after = (checkpoint(path)['model']['mask_token'] for path in (first, last))
    assert (after - before).abs().max() > 1e-3  # without training the comparison proves nothing
    for name in ('accumulated', 'both'):
        assert_same_training(last, tmp_path / name / 'checkpoint-1.pth')


def test_resume_equals_uninterrupted(milan_flags, tmp_path):
    flags = [*milan_flags, '--epochs', 2]
    out, resumed, other = (tmp_path / name for name in ('out', 'resumed', 'other'))
    ok(pretrain(*flags))
    last = out / 'checkpoint-1.pth'
    ok(pretrain(*flags, '--resume', out / 'checkpoint-0.pth', '--output_dir', resumed))
    assert weights_equal(last, resumed / 'checkpoint-1.pth')
    assert log_records(out)[1:] == log_records(resumed)
    ok(pretrain(*flags, '--seed', 1, '--output_dir', other))
    assert not weights_equal(last, other / 'checkpoint-1.pth')
    assert 'Nothing to do' in ok(pretrain(*flags, '--resume', last))


def test_loader_workers_change_nothing(milan_flags, tmp_path):
    files = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        ok(pretrain(*milan_flags, '--epochs', 1, '--num_workers', workers, '--output_dir', out))
        files.append(out / 'checkpoint-0.pth')
    assert weights_equal(*files)


@pytest.mark.slow
def test_precisions(milan_flags, tmp_path):
    losses = {}
    for amp in ('fp32', 'bf16', 'fp16'):
        ok(pretrain(*milan_flags, '--epochs', 1, '--amp', amp, '--output_dir', tmp_path / amp))
        losses[amp] = log_records(tmp_path / amp)[-1]['train_loss']
    for amp in ('bf16', 'fp16'):
        assert losses[amp] != losses['fp32']
        assert losses[amp] == pytest.approx(losses['fp32'], rel=0.02)


def test_published_checkpoint_resumes(milan_flags, tmp_path):
    """It has a scaler state even without fp16, and a Namespace with other names."""
    out, file = tmp_path / 'out', tmp_path / 'published.pth'
    flags = [*milan_flags, '--epochs', 2, '--resume', file]
    ok(pretrain(*milan_flags, '--epochs', 1))
    saved = checkpoint(out / 'checkpoint-0.pth')
    torch.save(saved['model'], file)
    assert 'without optimizer state' in ok(pretrain(*flags, '--epochs', 1))
    saved['scaler'] = {
        'scale': 65536.0,
        'growth_factor': 2.0,
        'backoff_factor': 0.5,
        'growth_interval': 2000,
        '_growth_tracker': 7,
    }
    saved['args'] = argparse.Namespace(gpu=3, dist_backend='nccl', distributed=True)
    torch.save(saved, file)
    assert 'epoch 0 is done' in ok(pretrain(*flags))


# ---- files and images ----


@pytest.mark.slow
def test_files_and_curves(milan_flags, tmp_path):
    stdout = ok(pretrain(*milan_flags, '--epochs', 8, '--save_every', 3))
    out = tmp_path / 'out'
    kept = {f'checkpoint-{name}.pth' for name in (0, 3, 6, 7, 'last')}
    assert {p.name for p in out.glob('*.pth')} == kept
    assert not list(out.glob('*.tmp'))
    records = log_records(out)
    assert [r['epoch'] for r in records] == list(range(8))
    assert records[-1]['train_loss'] < 0.9 * records[0]['train_loss']  # it learns
    events = EventAccumulator(str(out)).Reload()
    loss = events.Scalars('train_loss')
    steps = [int((epoch + step / 6) * 1000) for epoch in range(8) for step in range(6)]
    assert [e.step for e in loss] == steps
    assert sum(e.value for e in loss[-6:]) / 6 == pytest.approx(records[-1]['train_loss'], rel=1e-5)
    assert len(events.Scalars('lr')) == len(loss)
    line = next(line for line in stdout.splitlines() if line.startswith('Epoch [7] [6/6]'))
    for word in ('loss:', 'lr:', 'images/s:', 'data:', 'mem:', 'eta: 0:00:00'):
        assert word in line


def test_mae_without_flags(milan_flags, tmp_path):
    """Neither teacher nor MILAN's flags, and no folder for TensorBoard."""
    milan = ('--use_clip', '--change_decoder', '--attn_mask')
    flags = [f for f in milan_flags if f not in milan]
    ok(pretrain(*flags, '--epochs', 1, '--norm_pix_loss', '--log_dir', ''))
    saved = checkpoint(tmp_path / 'out' / 'checkpoint-0.pth')
    assert 'decoder_blocks.0.attn.qkv.weight' in saved['model']
    assert not list((tmp_path / 'out').glob('events*'))


def test_pixel_target_with_teacher_masks(milan_flags, small_images, tmp_path):
    """tools.visualize shows both from the checkpoint."""
    ok(pretrain(*milan_flags, '--pixel_target', '--epochs', 1))
    file = tmp_path / 'out' / 'checkpoint-last.pth'
    assert checkpoint(file)['model']['decoder_pred.weight'].shape[0] == 8 * 8 * 3
    image = next((small_images / 'train').rglob('*.png'))
    ok(script('tools.visualize')(file, image, '--output_dir', tmp_path))


def test_unreadable_images(milan_flags, small_images, tmp_path):
    """They are named, counted and replaced; past the limit the run stops."""
    data = tmp_path / 'data'
    shutil.copytree(small_images, data)
    good = (data / 'train' / 'class0' / '00.png').read_bytes()
    bad = {'empty.png': b'', 'text.jpg': b'not an image', 'cut.png': good[:200]}
    for name, content in bad.items():
        (data / 'train' / 'class1' / name).write_bytes(content)
    flags = [*milan_flags, '--data_path', data, '--epochs', 2, '--num_workers', 2]
    result = pretrain(*flags)
    ok(result)
    for name in bad:
        assert result.stderr.count(name) == 1
    assert '(3 so far)' in result.stderr
    one_error_line(pretrain(*flags, '--max_bad_images', 2), '3 of 27', '--max_bad_images')
    for path in (data / 'train').glob('*/*'):
        path.write_bytes(b'')
    one_error_line(pretrain(*flags), '27 of 27')


def test_image_modes(milan_flags, tmp_path):
    for i, mode in enumerate(['L', 'P', 'CMYK', 'RGBA', 'I;16', '1', 'LA', 'RGB']):
        for width, height in ((80, 60), (1, 60), (80, 1)):
            suffix = 'jpg' if mode == 'CMYK' else 'png'
            path = tmp_path / 'data' / 'train' / mode[0] / f'{i}-{width}x{height}.{suffix}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (width, height)).save(path)
    result = pretrain(*milan_flags, '--data_path', tmp_path / 'data', '--epochs', 1)
    assert '24 images' in ok(result) and '.png' not in result.stderr


# ---- errors ----


def test_too_many_skipped_steps(milan_flags, tmp_path):
    """The run stops, and writes down epoch, step, learning rate and samples of each."""
    # 3 batches per step do not divide a line every 2 batches
    flags = '--epochs 4 --lr 1e9 --warmup_epochs 0 --max_skipped_steps 2 --accum_iter 3'
    result = pretrain(*milan_flags, *flags.split(), '--batch_size', 2)
    one_error_line(result, '--max_skipped_steps 2')
    assert 'Skipped step' in result.stderr
    notes = log_records(tmp_path / 'out', 'skipped_steps.txt')
    assert [note['in_a_row'] for note in notes] == [1, 2, 3]
    assert notes[0]['lr'] > 1e8 and notes[0]['epoch'] == 0
    for note in notes:
        assert [len(batch) for batch in note['processes'][0]['samples']] == [2, 2, 2]


WRONG_VALUES = {
    'unknown model': (['--model', 'mae_vit_giant'], 'mae_vit_base_patch16'),
    'mask ratio 1': (['--mask_ratio', '1'], '[0, 1)'),
    'mask ratio negative': (['--mask_ratio', '-0.1'], '--mask_ratio'),
    'mask ratio nan': (['--mask_ratio', 'nan'], '--mask_ratio'),
    'rate infinite': (['--lr', 'inf'], '--lr'),
    'seed too large': (['--seed', str(2**70)], '--seed'),
    'batch size zero': (['--batch_size', '0'], '--batch_size'),
    'not a number': (['--epochs', 'many'], '--epochs'),
    'unknown flag': (['--maskratio', '1'], '--maskratio'),
    'no value': (['--epochs'], '--epochs'),
    'dashes for a value': (['--lr=--'], '--lr=--'),
    'a line end in a word': (['--x\ny'], '--x\\ny'),
}


@pytest.mark.parametrize('case', WRONG_VALUES)
def test_wrong_values(case, capsys):
    """The parser refuses them before anything else happens."""
    flags, word = WRONG_VALUES[case]
    with pytest.raises(SystemExit) as exit_:
        get_args_parser().parse_args(flags)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and word in line


# Case: (additional flags, words of the error). A name in upper case is a file of wrong_files. A
# value of None removes the flag.
WRONG = {
    'no data path': (['--data_path', None], '--data_path'),
    'data path absent': (['--data_path', '/nowhere'], '--data_path /nowhere'),
    'no train folder': (['--data_path', 'EMPTY'], '--data_path', 'train/'),
    'no images': (['--data_path', 'NO_IMAGES'], 'no images'),
    'no classes': (['--data_path', 'NO_CLASSES'], 'no class folders'),
    'nothing visible': (['--mask_ratio', 0.99], '--mask_ratio 0.99', '0 of 64'),
    'mask without teacher': (['--use_clip', None], '--attn_mask'),
    'teacher without use': (['--pixel_target', '--attn_mask', None], '--pixel_target'),
    'teacher absent': (['--clip_path', 'nowhere.pt'], '--clip_path', 'nowhere.pt'),
    'teacher is not a CLIP': (['--clip_path', __file__], '--clip_path', __file__),
    'teacher of another size': (['--input_size', 32], '--input_size'),
    'grid differs': (['--model', 'mae_vit_small_patch16'], '8x8', 'mae_vit_small_patch16'),
    'size does not fit': (
        ['--input_size', 63, '--use_clip', None, '--attn_mask', None],
        '--input_size 63',
    ),
    'batch too large': (['--batch_size', 25], 'effective batch'),
    'accumulation too long': (['--accum_iter', 7], 'effective batch'),
    'resume absent': (['--resume', 'nowhere.pth'], '--resume', 'nowhere.pth'),
    'resume truncated': (['--resume', 'TRUNCATED'], 'TRUNCATED'),
    'resume of another model': (['--resume', 'OTHER'], '--resume', 'model'),
    'resume with code inside': (['--resume', 'FOREIGN'], 'FOREIGN', 'print'),
    'resume without moments': (['--resume', 'NO_MOMENTS'], '--resume', 'optimizer'),
    'resume of other moments': (['--resume', 'OTHER_MOMENTS'], '--resume', 'exp_avg'),
    'resume without an epoch': (['--resume', 'NO_EPOCH'], 'NO_EPOCH'),
    'resume without a folder': (['--resume', 'auto', '--output_dir', ''], '--resume auto'),
    'too many targets': (['--average_targets', 3], '--average_targets 3'),
    'no GPU': (['--device', 'cuda'], '--device cuda'),
    'unknown device': (['--device', 'gpu'], '--device gpu'),
    'no Open MPI': (['--dist_on_itp'], 'OMPI_COMM_WORLD_RANK'),
    'output is a file': (['--output_dir', __file__], '--output_dir', __file__),
}


class Foreign:
    """An object whose unpickling calls print."""

    def __reduce__(self):
        return print, ('this must never be printed',)


@pytest.fixture(scope='module')
def wrong_files(tmp_path_factory):
    root = tmp_path_factory.mktemp('wrong')
    (root / 'EMPTY').mkdir()
    (root / 'NO_CLASSES' / 'train').mkdir(parents=True)
    (root / 'NO_IMAGES' / 'train' / 'class').mkdir(parents=True)
    model = {'cls_token': torch.zeros(1, 1, 48)}
    torch.save({'model': model, 'epoch': 0, 'optimizer': {}}, root / 'OTHER')
    (root / 'TRUNCATED').write_bytes((root / 'OTHER').read_bytes()[:-300])
    torch.save({'model': {}, 'args': Foreign()}, root / 'FOREIGN')

    model = MODELS['mae_vit_tiny_patch8'](
        use_clip=True, change_decoder=True, attn_mask=True, target_dim=48
    )
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    states = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    whole = {**states, 'epoch': 0, 'scaler': {}}
    torch.save({**whole, 'optimizer': {}}, root / 'NO_MOMENTS')
    torch.save({**whole, 'epoch': 'zero'}, root / 'NO_EPOCH')
    whole['optimizer']['state'][0]['exp_avg'] = torch.zeros(1, 1, 3)
    torch.save(whole, root / 'OTHER_MOMENTS')
    return root


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, milan_flags, wrong_files, tmp_path):
    """One error line that names the flag or file, and files stay as they were."""
    more, *words = WRONG[case]
    flags = [*milan_flags, '--epochs', 1, *more]
    while None in flags:  # drop the flag wherever it is, with its value if it has one
        at = flags.index(None)
        name = flags[at - 1]
        del flags[at - 1 : at + 1]
        while name in flags:
            at = flags.index(name)
            del flags[at : at + (1 if name in ('--use_clip', '--attn_mask') else 2)]
    paths = {p.name: p for p in wrong_files.iterdir()}
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'checkpoint-0.pth').write_bytes(b'precious')
    result = pretrain(*[paths.get(f, f) if isinstance(f, str) else f for f in flags])
    one_error_line(result, *words)
    assert 'never be printed' not in result.stdout
    assert [p.name for p in out.iterdir()] == ['checkpoint-0.pth']
    assert (out / 'checkpoint-0.pth').read_bytes() == b'precious'


@pytest.mark.slow
def test_one_error_line_from_several_processes(milan_flags, small_images, tmp_path):
    """The same error on all ranks is printed once; a rank that fails alone ends the others."""
    result = pretrain(*milan_flags, '--data_path', '/nowhere', launcher=torchrun(2))
    one_error_line(result, '--data_path /nowhere')
    data = tmp_path / 'data'
    shutil.copytree(small_images, data)
    (data / 'train' / 'class1' / '07.png').write_bytes(b'')
    flags = [*milan_flags, '--data_path', data, '--max_bad_images', 0, '--epochs', 1]
    one_error_line(pretrain(*flags, launcher=torchrun(2)), '1 of 24')
