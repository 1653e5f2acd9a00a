"""main_pretrain.py as users run it: real processes, real files."""

import json
import shutil
import sys

import pytest
import torch
from conftest import launch, pretrain, run, script, torchrun
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import param_groups_weight_decay

from main_pretrain import get_args_parser
from models_milan import MODELS

PUBLISHED = ['--model', 'mae_vit_base_patch16', '--mask_ratio', '0.75', '--warmup_epochs', 40, '--blr', '1.5e-4',
             '--weight_decay', '0.05', '--use_clip', '--change_decoder', '--attn_mask', '--accum_iter', 2]


def checkpoint(path):
    import argparse
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)


def weights_equal(a, b):
    a, b = checkpoint(a), checkpoint(b)
    return (all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
            and all(torch.equal(s['exp_avg_sq'], b['optimizer']['state'][k]['exp_avg_sq'])
                    for k, s in a['optimizer']['state'].items()))


def assert_same_training(a, b):
    """Equal weights and equal running means of the gradients, up to the rounding of sums in another order."""
    a, b = checkpoint(a), checkpoint(b)
    assert a['model'].keys() == b['model'].keys()
    for name, x in a['model'].items():
        y = b['model'][name]
        if name.endswith(('qkv.bias', 'kv.bias')):
            # Softmax ignores the keys' bias: its gradient is nothing but rounding, which Adam scales up to full steps.
            parts = 3 if name.endswith('qkv.bias') else 2
            keys = parts - 2
            x, y = [torch.cat([c for i, c in enumerate(v.chunk(parts)) if i != keys]) for v in (x, y)]
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')
    for i, state in a['optimizer']['state'].items():
        x, y = state['exp_avg'], b['optimizer']['state'][i]['exp_avg']
        assert (x - y).abs().max() <= 1e-4 * x.abs().max(), i


@pytest.mark.parametrize('launcher, processes', [
    (torchrun(1), 1), (torchrun(2), 2), (launch(1, '--use_env'), 1), (launch(2), 2)
], ids=['torchrun 1', 'torchrun 2', 'launch 1', 'launch 2'])
def test_the_published_command(launcher, processes, imagenet_samples, clip_b16, tmp_path):
    """Shortened in epochs and data, and the batch with them."""
    flags = ['--batch_size', 2 // processes, '--epochs', 1, '--data_path', imagenet_samples, '--clip_path', clip_b16,
             '--output_dir', tmp_path, '--log_dir', tmp_path]
    result = pretrain(*PUBLISHED, *flags, launcher=launcher, env={'OMP_NUM_THREADS': str(2 // processes)})
    assert result.returncode == 0, result.stderr
    assert 'No CUDA GPU here' in result.stderr
    assert f'effective batch 4 = {2 // processes} x accum_iter 2 x {processes}, lr 2.34e-06' in result.stdout
    assert result.stdout.count('Epoch [0] mean') == 1
    record, = (json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines())
    assert record.keys() == {'train_loss', 'train_lr', 'epoch'}
    assert 1.5 < record['train_loss'] < 2.5  # 2: prediction and target have nothing to do with each other
    saved = checkpoint(tmp_path / 'checkpoint-0.pth')
    assert saved.keys() == {'model', 'optimizer', 'epoch', 'scaler', 'args'}
    assert saved['args'].model == 'mae_vit_base_patch16' and saved['epoch'] == 0
    assert sum(v.numel() for v in saved['model'].values()) == 111_776_512
    for path in tmp_path.glob('*.pth'):
        path.unlink()  # 1.3 GB


def test_flags_and_defaults():
    args = vars(get_args_parser().parse_args([]))
    published = dict(
        batch_size=64, epochs=400, accum_iter=1, model='mae_vit_large_patch16', input_size=224, mask_ratio=0.75,
        norm_pix_loss=False, weight_decay=0.05, lr=None, blr=1e-3, min_lr=0.0, warmup_epochs=40, output_dir='./output_dir',
        log_dir='./output_dir', device='cuda', seed=0, resume='', start_epoch=0, num_workers=16, pin_mem=True, world_size=1,
        local_rank=-1, dist_on_itp=False, dist_url='env://', use_clip=False, change_decoder=False, attn_mask=False,
        average_targets=1)
    assert {k: args[k] for k in published} == published
    assert not get_args_parser().parse_args(['--no_pin_mem']).pin_mem
    for flag in ('--local_rank=3', '--local-rank=3'):
        assert get_args_parser().parse_args([flag]).local_rank == 3


def test_two_ranks_equal_one(milan_flags, tmp_path):
    """Half the batch on each of two ranks, and half the batch twice with accumulation: the same updates as the whole batch."""
    flags = [*milan_flags, '--epochs', 2]
    whole = pretrain(*flags, '--batch_size', 8, '--output_dir', tmp_path / 'whole')
    halves = pretrain(*flags, '--batch_size', 4, '--output_dir', tmp_path / 'halves', launcher=torchrun(2))
    accumulated = pretrain(*flags, '--batch_size', 4, '--accum_iter', 2, '--output_dir', tmp_path / 'accumulated')
    both = pretrain(*flags, '--batch_size', 2, '--accum_iter', 2, '--output_dir', tmp_path / 'both', launcher=torchrun(2))
    for result in (whole, halves, accumulated, both):
        assert result.returncode == 0, result.stderr
    expected = tmp_path / 'whole' / 'checkpoint-1.pth'
    assert pretrain(*flags, '--batch_size', 8, '--lr', 0, '--output_dir', tmp_path / 'start').returncode == 0
    end, start = [checkpoint(path)['model']['mask_token'] for path in (expected, tmp_path / 'start' / 'checkpoint-1.pth')]
    assert (end - start).abs().max() > 1e-3  # or agreement would mean nothing
    for other in ('halves', 'accumulated', 'both'):
        assert_same_training(expected, tmp_path / other / 'checkpoint-1.pth')


def test_a_resumed_run_equals_the_uninterrupted_one(milan_flags, tmp_path):
    flags = [*milan_flags, '--epochs', 3]
    assert pretrain(*flags).returncode == 0
    result = pretrain(*flags, '--resume', tmp_path / 'out' / 'checkpoint-0.pth', '--output_dir', tmp_path / 'resumed')
    assert result.returncode == 0, result.stderr
    assert weights_equal(tmp_path / 'out' / 'checkpoint-2.pth', tmp_path / 'resumed' / 'checkpoint-2.pth')
    lines = [(tmp_path / folder / 'log.txt').read_text().splitlines() for folder in ('out', 'resumed')]
    assert lines[0][1:] == lines[1]
    # another seed is another run, or the comparison above could not fail
    assert pretrain(*flags, '--seed', 1, '--output_dir', tmp_path / 'other').returncode == 0
    assert not weights_equal(tmp_path / 'out' / 'checkpoint-2.pth', tmp_path / 'other' / 'checkpoint-2.pth')

    done = pretrain(*flags, '--resume', tmp_path / 'out' / 'checkpoint-2.pth')
    assert done.returncode == 0 and 'Nothing to do' in done.stdout


def test_workers_change_nothing(milan_flags, tmp_path):
    for workers in (0, 1, 2):
        result = pretrain(*milan_flags, '--epochs', 1, '--num_workers', workers, '--output_dir', tmp_path / str(workers))
        assert result.returncode == 0, result.stderr
    for workers in (1, 2):
        assert weights_equal(tmp_path / '0' / 'checkpoint-0.pth', tmp_path / str(workers) / 'checkpoint-0.pth')


def test_files_and_curves(milan_flags, tmp_path):
    result = pretrain(*milan_flags, '--epochs', 22)
    assert result.returncode == 0, result.stderr
    out = tmp_path / 'out'
    assert {p.name for p in out.glob('*.pth')} == {
        'checkpoint-0.pth', 'checkpoint-20.pth', 'checkpoint-21.pth', 'checkpoint-last.pth'}
    assert not list(out.glob('*.tmp'))
    records = [json.loads(line) for line in (out / 'log.txt').read_text().splitlines()]
    assert [r['epoch'] for r in records] == list(range(22))
    assert records[-1]['train_loss'] < 0.7 * records[0]['train_loss']  # it learns
    events = EventAccumulator(str(out)).Reload()
    loss = events.Scalars('train_loss')
    assert [e.step for e in loss] == [int((epoch + step / 6) * 1000) for epoch in range(22) for step in range(6)]
    assert sum(e.value for e in loss[-6:]) / 6 == pytest.approx(records[-1]['train_loss'], rel=1e-5)
    assert len(events.Scalars('lr')) == len(loss)
    line = next(line for line in result.stdout.splitlines() if line.startswith('Epoch [21] [6/6]'))
    assert all(word in line for word in ('loss:', 'lr:', 'images/s:', 'data:', 'mem:', 'eta: 0:00:00'))


def test_mae_is_the_case_without_flags(small_images, tmp_path):
    result = pretrain('--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--batch_size', 8, '--data_path', small_images,
                      '--epochs', 2, '--norm_pix_loss', '--output_dir', tmp_path, '--log_dir', '')
    assert result.returncode == 0, result.stderr
    assert 'decoder_blocks.0.attn.qkv.weight' in checkpoint(tmp_path / 'checkpoint-1.pth')['model']
    assert not list(tmp_path.glob('events*'))


def test_precisions(milan_flags, tmp_path):
    losses = {}
    for amp in ('fp32', 'bf16', 'fp16'):
        result = pretrain(*milan_flags, '--epochs', 2, '--amp', amp, '--output_dir', tmp_path / amp)
        assert result.returncode == 0, result.stderr
        losses[amp] = json.loads((tmp_path / amp / 'log.txt').read_text().splitlines()[-1])['train_loss']
    for amp in ('bf16', 'fp16'):
        assert losses[amp] != losses['fp32']
        assert losses[amp] == pytest.approx(losses['fp32'], rel=0.02)


def test_unreadable_images(milan_flags, small_images, tmp_path):
    """Named, counted, replaced; past the limit the run stops. Healthy samples are augmented and masked as without them."""
    import shutil
    data = tmp_path / 'data'
    shutil.copytree(small_images, data)
    good = (data / 'train' / 'class0' / '00.png').read_bytes()
    bad = {'empty.png': b'', 'text.jpg': b'not an image', 'cut.png': good[:200]}
    for name, content in bad.items():
        (data / 'train' / 'class1' / name).write_bytes(content)
    flags = [*milan_flags, '--data_path', data, '--epochs', 2, '--num_workers', 2]
    result = pretrain(*flags)
    assert result.returncode == 0, result.stderr
    for name in bad:
        assert result.stderr.count(f'{name} cannot be read') == 1
    assert '(3 so far)' in result.stderr
    stopped = pretrain(*flags, '--max_bad_images', 2, '--output_dir', tmp_path / 'stopped')
    assert stopped.returncode == 1
    assert 'error: 3 of 27 images cannot be read' in stopped.stderr and '--max_bad_images' in stopped.stderr
    assert 'Traceback' not in stopped.stderr

    for path in (data / 'train').glob('*/*'):
        path.write_bytes(b'')
    stopped = pretrain(*flags)
    assert stopped.returncode == 1 and '27 of 27 images cannot be read' in stopped.stderr and 'Traceback' not in stopped.stderr


def test_image_modes(milan_flags, tmp_path):
    for i, mode in enumerate(['L', 'P', 'CMYK', 'RGBA', 'I;16', '1', 'LA', 'RGB']):
        for size in ((80, 60), (1, 60), (80, 1)):
            path = tmp_path / 'data' / 'train' / mode[0] / f'{i}-{size[0]}x{size[1]}.{"jpg" if mode == "CMYK" else "png"}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, size).save(path)
    result = pretrain(*milan_flags, '--data_path', tmp_path / 'data', '--epochs', 1)
    assert result.returncode == 0, result.stderr
    assert '24 images' in result.stdout and 'cannot be read' not in result.stderr


def test_pixels_with_the_teachers_masks(milan_flags, small_images, tmp_path):
    """--pixel_target: the teacher chooses the visible patches and gives nothing else; looked at, the checkpoint shows both."""
    result = pretrain(*milan_flags, '--pixel_target', '--epochs', 1)
    assert result.returncode == 0, result.stderr
    file = tmp_path / 'out' / 'checkpoint-last.pth'
    assert checkpoint(file)['model']['decoder_pred.weight'].shape[0] == 8 * 8 * 3
    picture = next((small_images / 'train').rglob('*.png'))
    result = script('tools.visualize')(file, picture, '--output_dir', tmp_path)
    assert result.returncode == 0 and 'Left out' not in result.stdout, result.stdout + result.stderr


WRONG = {
    'no data path': ([], ['--data_path', None], '--data_path is missing'),
    'wrong value': (['--mask_ratio', 1], [], '1 is outside [0, 1)'),
    'data path absent': ([], ['--data_path', '/nowhere'], '--data_path /nowhere is not a folder'),
    'no train folder': ([], ['--data_path', 'EMPTY'], 'no folder train/'),
    'no images': ([], ['--data_path', 'NO_IMAGES'], 'there are no images'),
    'no classes': ([], ['--data_path', 'NO_CLASSES'], 'no class folders'),
    'nothing visible': (['--mask_ratio', 0.99], [], 'leaves 0 of 64 patches visible'),
    'mask without teacher': ([], ['--use_clip', None], '--attn_mask needs the teacher'),
    'teacher without use': (['--pixel_target'], ['--attn_mask', None], '--pixel_target leaves the teacher nothing to do'),
    'teacher absent': (['--clip_path', 'nowhere.pt'], [], "neither a file nor one of CLIP's names"),
    'teacher not a clip': (['--clip_path', __file__], [], 'cannot be read as a CLIP checkpoint'),
    'teacher of another size': (['--input_size', 32], [], 'the teacher'),
    'grid differs': (['--model', 'mae_vit_small_patch16'], [], 'has 8x8 patches and mae_vit_small_patch16'),
    'size does not fit': (['--input_size', 63], ['--use_clip', None, '--attn_mask', None], 'not a multiple of the patch size'),
    'batch too large': (['--batch_size', 25], [], 'fewer than one effective batch'),
    'accumulation too long': (['--accum_iter', 7], [], 'fewer than one effective batch'),
    'resume absent': (['--resume', 'nowhere.pth'], [], 'nowhere.pth does not exist'),
    'resume truncated': (['--resume', 'TRUNCATED'], [], 'cannot be read'),
    'resume of another model': (['--resume', 'OTHER'], [], 'another model'),
    'resume with code inside': (['--resume', 'FOREIGN'], [], 'print, and could run code'),
    'too many targets': (['--average_targets', 3], [], 'has 2 blocks'),
    'no gpu': (['--device', 'cuda'], [], '--device cuda'),
    'no such device': (['--device', 'gpu'], [], '--device gpu'),
    'open mpi absent': (['--dist_on_itp'], [], 'OMPI_COMM_WORLD_RANK'),
    'resume without moments': (['--resume', 'NO_MOMENTS'], [], 'optimiser state does not fit'),
    'resume of other moments': (['--resume', 'OTHER_MOMENTS'], [], 'optimiser state does not fit: exp_avg of shape [1, 1, 3]'),
    'resume of no epoch': (['--resume', 'NO_EPOCH'], [], 'optimiser state does not fit'),
    'output is a file': (['--output_dir', __file__], [], '--output_dir'),
    'not finite': (['--lr', '1e9', '--epochs', 3, '--warmup_epochs', 0], [], 'gradients that are'),
}

WRONG_VALUES = {
    'unknown model': (['--model', 'mae_vit_giant'], 'mae_vit_base_patch16'),
    'mask ratio 1': (['--mask_ratio', '1'], '1 is outside [0, 1)'),
    'mask ratio negative': (['--mask_ratio', '-0.1'], '--mask_ratio'),
    'mask ratio nan': (['--mask_ratio', 'nan'], '--mask_ratio'),
    'rate infinite': (['--lr', 'inf'], '--lr'),
    'seed too large': (['--seed', str(2**70)], '--seed'),
    'batch size zero': (['--batch_size', '0'], '--batch_size'),
    'not a number': (['--epochs', 'many'], "invalid int value: 'many'"),
    'unknown flag': (['--maskratio', '1'], '--maskratio'),
    'no value': (['--epochs'], '--epochs'),
    'dashes for a value': (['--lr=--'], '--lr=--: -- is no value'),
    'a line end in a word': (['--x\ny'], 'unrecognized arguments: --x\\ny'),
}


@pytest.mark.parametrize('case', WRONG_VALUES)
def test_wrong_values(case, capsys):
    """What the parser itself refuses, before anything else happens."""
    flags, message = WRONG_VALUES[case]
    with pytest.raises(SystemExit) as exit_:
        get_args_parser().parse_args(flags)
    assert exit_.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line


class Foreign:
    def __reduce__(self):
        return print, ('this must never be printed',)


@pytest.fixture(scope='module')
def wrong_files(tmp_path_factory):
    root = tmp_path_factory.mktemp('wrong')
    (root / 'EMPTY').mkdir()
    (root / 'NO_CLASSES' / 'train').mkdir(parents=True)
    (root / 'NO_IMAGES' / 'train' / 'class').mkdir(parents=True)
    torch.save({'model': {'cls_token': torch.zeros(1, 1, 48)}, 'epoch': 0, 'optimizer': {}}, root / 'OTHER')
    model = MODELS['mae_vit_tiny_patch8'](use_clip=True, change_decoder=True, attn_mask=True, target_dim=48)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    whole = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': 0, 'scaler': {}}
    torch.save({**whole, 'optimizer': {}}, root / 'NO_MOMENTS')
    torch.save({**whole, 'epoch': 'zero'}, root / 'NO_EPOCH')
    whole['optimizer']['state'][0]['exp_avg'] = torch.zeros(1, 1, 3)
    torch.save(whole, root / 'OTHER_MOMENTS')
    (root / 'TRUNCATED').write_bytes((root / 'OTHER').read_bytes()[:-300])
    torch.save({'model': {}, 'args': Foreign()}, root / 'FOREIGN')
    return root


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, milan_flags, wrong_files, tmp_path):
    """One line that names the flag or file, no traceback, status not 0, and nothing touched."""
    extra, replaced, message = WRONG[case]
    flags = [str(f) for f in milan_flags]
    for name, value in zip(replaced[::2], replaced[1::2]):
        at = flags.index(name)
        flags[at:at + (1 if name in ('--use_clip', '--attn_mask') else 2)] = [] if value is None else [name, value]
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'checkpoint-0.pth').write_bytes(b'precious')
    paths = {p.name: str(p) for p in wrong_files.iterdir()}
    result = pretrain(*[paths.get(str(f), f) for f in [*flags, '--epochs', 1, *extra]])
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith(('No CUDA GPU', 'Step left out', 'Not saved'))]
    assert len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], result.stderr
    assert 'Traceback' not in result.stdout + result.stderr and 'never be printed' not in result.stdout
    assert (out / 'checkpoint-0.pth').read_bytes() == b'precious'
    if case != 'not finite':
        assert [p.name for p in out.iterdir()] == ['checkpoint-0.pth']


def test_wrong_use_is_said_once_by_many_processes(milan_flags):
    result = pretrain(*milan_flags, '--data_path', '/nowhere', launcher=torchrun(2))
    assert result.returncode != 0
    assert result.stderr.count('error: --data_path /nowhere') == 1


def test_one_process_ends_the_others(milan_flags, small_images, tmp_path):
    """What is wrong is said by the process that has met it, and no other adds a traceback."""
    shutil.copytree(small_images, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'class1' / '07.png').write_bytes(b'')
    result = pretrain(*milan_flags, '--data_path', tmp_path / 'data', '--max_bad_images', 0, '--epochs', 1, launcher=torchrun(2))
    assert result.returncode != 0
    assert result.stderr.count('error: 1 of 24 images cannot be read') == 1
    scripts = result.stderr[:result.stderr.find('torch/distributed')]  # the launcher's own report follows
    assert 'Traceback' not in scripts, result.stderr


def test_help_is_complete():
    result = run(sys.executable, 'main_pretrain.py', '--help')
    assert result.returncode == 0
    for action in get_args_parser()._actions:
        assert all(option in result.stdout for option in action.option_strings)
