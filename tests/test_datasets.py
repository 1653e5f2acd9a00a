"""--dataset: what timm's factory reads, through the real scripts."""

import io
import json
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import finetune, pretrain, torchrun

from util.checkpoint import load

TINY = ['--input_size', 32, '--batch_size', 4, '--epochs', 1, '--num_workers', 1, '--log_dir', '']


def both_scripts(tmp_path, *flags, classes=3):
    """Pretrain one epoch, fine-tune one; returns what the two said."""
    out = tmp_path / 'out'
    first = pretrain('--model', 'mae_vit_tiny_patch8', *TINY, '--output_dir', out, *flags)
    assert first.returncode == 0, first.stderr
    second = finetune('--model', 'vit_tiny_patch8', *TINY, '--output_dir', out, '--nb_classes', classes, '--dist_eval',
                      '--finetune', out / 'checkpoint-last.pth', *flags)
    assert second.returncode == 0, second.stderr
    return first.stdout, second.stdout


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_tar_files(labelled_images, tmp_path):
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            for path in sorted((labelled_images / split).rglob('*.png')):
                tar.add(path, f'{path.parent.name}/{path.name}')
    flags = ['--dataset', 'tar', '--data_path', tmp_path, '--train_split', 'train.tar', '--val_split', 'val.tar']
    said = both_scripts(tmp_path, *flags)
    assert '24 images in' in said[0] and '24 training images, 6 steps an epoch; 13 validation images' in said[1]
    # the same images, in the same order, as from the folders: the same training
    folder = finetune('--model', 'vit_tiny_patch8', *TINY, '--output_dir', tmp_path / 'folder', '--nb_classes', 3, '--data_path',
                      labelled_images, '--finetune', '')
    again = finetune('--model', 'vit_tiny_patch8', *TINY, '--output_dir', tmp_path / 'tar', '--nb_classes', 3, *flags)
    assert folder.returncode == again.returncode == 0
    a, b = (load(tmp_path / name / 'checkpoint-0.pth')['model'] for name in ('folder', 'tar'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    wrong = finetune('--model', 'vit_tiny_patch8', *TINY, '--nb_classes', 4, *flags)
    assert wrong.returncode == 1 and 'has 3 classes; give --nb_classes 3' in wrong.stderr


def test_a_torchvision_set(tmp_path):
    """MNIST's own files: grey pictures, classes from 0 to 9."""
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (('train', 20), ('t10k', 13)):
        pixels, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        (raw / f'{name}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 2051, count, 28, 28) + pixels.tobytes())
        (raw / f'{name}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 2049, count) + labels.tobytes())
    said = both_scripts(tmp_path, '--dataset', 'torch/mnist', '--data_path', tmp_path, classes=10)
    assert '20 training images, 5 steps an epoch; 13 validation images' in said[1]


def test_hugging_face(labelled_images, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    folder = tmp_path / 'pictures'
    for split, name in (('train', 'train'), ('val', 'validation')):
        for path in (labelled_images / split).rglob('*.png'):
            target = folder / name / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    said = both_scripts(tmp_path, '--dataset', f'hfds/{folder}', '--data_path', tmp_path / 'cache')
    assert '24 training images, 6 steps an epoch; 13 validation images' in said[1]


@pytest.fixture(scope='module')
def shards(labelled_images, tmp_path_factory):
    """WebDataset shards, 2 of 12 training images and 2 of 7 and 6, with the file that tells of them."""
    root = tmp_path_factory.mktemp('shards')
    splits = {}
    for split, name in (('train', 'train'), ('val', 'validation')):
        paths = sorted((labelled_images / split).rglob('*.png'))
        files, lengths = [], []
        for k in range(2):
            files.append(f'{name}-{k}.tar')
            lengths.append(len(paths[k::2]))
            with tarfile.open(root / files[-1], 'w') as tar:
                for path in paths[k::2]:
                    key = f'{path.parent.name}_{path.stem}'
                    add(tar, f'{key}.png', path.read_bytes())
                    add(tar, f'{key}.cls', path.parent.name[-1].encode())
        splits[name] = {'name': name, 'filenames': files, 'shard_lengths': lengths, 'num_samples': sum(lengths)}
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


def test_webdataset(shards, tmp_path):
    """Shards that are read in order: one process and two; a resumed run equals the uninterrupted one; exact accuracy."""
    pytest.importorskip('webdataset')
    flags = ['--dataset', 'wds/pictures', '--data_path', shards]
    said = both_scripts(tmp_path, *flags)
    assert '24 training images, 6 steps an epoch; 13 validation images' in said[1]
    flags = ['--model', 'vit_tiny_patch8', *TINY, '--nb_classes', 3, *flags, '--epochs', 3, '--blr', 0.01, '--dist_eval']
    first = tmp_path / 'whole' / 'checkpoint-0.pth'
    for name, extra in (('whole', []), ('resumed', ['--resume', first]), ('other', ['--seed', 1])):
        result = finetune(*flags, '--output_dir', tmp_path / name, *extra)
        assert result.returncode == 0, result.stderr
    weights = [load(tmp_path / name / 'checkpoint-2.pth')['model'] for name in ('whole', 'resumed', 'other')]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]['head.weight'], weights[2]['head.weight'])
    evaluate = [*flags, '--eval', '--resume', tmp_path / 'whole' / 'checkpoint-2.pth']
    one, two = finetune(*evaluate), finetune(*evaluate, launcher=torchrun(2))
    assert one.returncode == two.returncode == 0, two.stderr
    lines = {next(line for line in r.stdout.splitlines() if line.startswith('Accuracy of')) for r in (one, two)}
    assert len(lines) == 1 and 'on the 13 test images' in lines.pop()
    trained = finetune(*flags, '--batch_size', 2, '--epochs', 1, '--output_dir', tmp_path / 'two', launcher=torchrun(2))
    assert trained.returncode == 0, trained.stderr


@pytest.mark.parametrize('flags, message', [
    (['--dataset', 'torch/imagenette3'], '--dataset torch/imagenette3'),
    (['--dataset', 'torch/mnist', '--data_path', 'EMPTY'], '--dataset torch/mnist'),
    (['--dataset', 'tar', '--data_path', '/nowhere'], '--data_path /nowhere'),
    (['--dataset', 'wds/pictures', '--data_path', 'EMPTY'], '--dataset wds/pictures'),
    (['--dataset', 'wds/pictures', '--data_path', 'SHARDS', '--train_split', 'test'], 'split test'),
])
def test_what_is_not_there(flags, message, shards, tmp_path):
    pytest.importorskip('webdataset')
    flags = [{'EMPTY': tmp_path, 'SHARDS': shards}.get(f, f) for f in flags]
    result = pretrain('--model', 'mae_vit_tiny_patch8', *TINY, '--output_dir', tmp_path / 'out', *flags)
    errors = [line for line in result.stderr.splitlines() if 'No CUDA' not in line]
    assert result.returncode == 1 and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], result.stderr


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    for name in [name for name in sys.modules if name.startswith('timm.data.readers.reader_hf')]:
        monkeypatch.delitem(sys.modules, name)
    result = pretrain('--model', 'mae_vit_tiny_patch8', *TINY, '--dataset', 'hfds/x', '--data_path', tmp_path, '--output_dir', '')
    assert result.returncode == 1 and 'pip install datasets' in result.stderr.splitlines()[-1]


