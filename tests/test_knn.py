"""tools/knn.py: against NumPy, on any number of processes, on what cannot be read, and in wrong hands."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run, script, torchrun
from test_datasets import shards  # noqa: F401

import models_vit
from tools import knn
from util.checkpoint import load
from util.datasets import build_linprobe_transform, normalise
from util.images import ImageFile

tool = script('tools/knn')


def naive(bank, classes, queries, targets, k, temperature, num_classes):
    """The definition, an image at a time: (top-1, top-5) in per cent."""
    right = np.zeros(2)
    for query, target in zip(queries, targets):
        similarities = bank @ query
        votes = np.zeros(num_classes)
        for i in np.argsort(-similarities)[:k]:
            votes[classes[i]] += np.exp(similarities[i] / temperature)
        ranked = [c for c in np.argsort(-votes) if votes[c] > 0]
        right += [target in ranked[:1], target in ranked[:5]]
    return tuple(100 * right / len(targets))


def test_equal_to_numpy(monkeypatch):
    """Blocks that the sizes are no multiples of; more neighbours than images; a temperature at which exp() alone overflows."""
    monkeypatch.setattr(knn, 'BANK', 64)
    monkeypatch.setattr(knn, 'QUERIES', 32)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 16))
    classes, targets = rng.integers(0, 12, 300), rng.integers(0, 12, 75)
    bank, queries = (c + 1.2 * rng.normal(size=c.shape) for c in (centres[classes], centres[targets]))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    args = [torch.from_numpy(x).float() if x.dtype == float else torch.from_numpy(x) for x in (bank, classes, queries, targets)]
    similarities, rows = knn.nearest(args[2], args[0], 1000, torch.device('cpu'))
    assert similarities.shape == rows.shape == (75, 300) and (similarities.diff(dim=1) <= 0).all()
    few = knn.nearest(args[2], args[0], 10, torch.device('cpu'))
    assert torch.equal(few[0], similarities[:, :10]) and torch.equal(few[1], rows[:, :10])
    ks, found = [1, 3, 10, 65, 300, 1000], set()
    for temperature in (0.07, 1.0, 0.002):
        results = knn.accuracies(similarities, args[1][rows], args[3], ks, temperature, 12)
        for k in ks:
            assert results[k] == pytest.approx(naive(bank, classes, queries, targets, k, temperature, 12)), (k, temperature)
        found.update(results.values())
    assert len(found) > 6


@pytest.fixture(scope='module')
def flags(labelled_images, pretrained, tmp_path_factory):
    """A run on 24 and 13 images, of which one each cannot be read: shares that 2 and 3 processes do not divide evenly."""
    data = tmp_path_factory.mktemp('knn')
    shutil.copytree(labelled_images, data, dirs_exist_ok=True)
    for name in ('train/class0/03.png', 'val/class1/01.png'):
        (data / name).write_bytes(b'')
    return ['--model', 'vit_tiny_patch8', '--input_size', 64, '--nb_classes', 3, '--batch_size', 5, '--num_workers', 0,
            '--data_path', data, '--amp', 'fp32', '--finetune', pretrained, '--k', 1, 2, 3, 4, 5, 7, 10, 200]


def table(result, path):
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize('pool', ['--cls_token', '--global_pool'])
def test_an_encoder_and_a_folder(pool, flags, pretrained, tmp_path):
    """Files in, accuracies out: equal to the definition on features computed here, an image at a time."""
    result = tool(*flags, pool, '--json', tmp_path / 'knn.json')
    content = table(result, tmp_path / 'knn.json')
    model = models_vit.vit_tiny_patch8(num_classes=0, global_pool=pool == '--global_pool').eval()
    missing = model.load_state_dict(load(pretrained)['model'], strict=False).missing_keys
    assert missing == ([] if pool == '--cls_token' else ['fc_norm.weight', 'fc_norm.bias'])
    transform, sets = build_linprobe_transform(False, argparse.Namespace(input_size=64)), []
    for split in ('train', 'val'):
        folder = flags[flags.index('--data_path') + 1] / split
        paths = [path for path in sorted(folder.rglob('*.png')) if path.stat().st_size]
        with torch.no_grad():
            x = torch.cat([model(normalise(transform(ImageFile(path))[None])) for path in paths]).double().numpy()
        sets += [x / np.linalg.norm(x, axis=1, keepdims=True), [int(path.parent.name[-1]) for path in paths]]
    assert (content['train_images'], content['images'], content['temperature']) == (23, 12, 0.07)
    for row in content['knn']:
        assert (row['acc1'], row['acc5']) == pytest.approx(naive(*sets, row['k'], 0.07, 3))
        assert f'{row["k"]:8d}  {row["acc1"]:8.2f}  {row["acc5"]:8.2f}' in result.stdout
    assert 'there are only 23 training images; for a larger k all of them vote' in result.stdout
    assert 'train/class0/03.png cannot be read; it is left out' in result.stderr


def test_any_number_of_processes(flags, tmp_path):
    """No image twice, none missing, and the same numbers to the last digit; gathered in blocks of which the last is cut."""
    once = table(tool(*flags, '--json', tmp_path / '1.json'), tmp_path / '1.json')
    assert len({row['acc1'] for row in once['knn']}) > 2
    program = 'import sys; sys.path.insert(0, "."); from tools import knn; from util import misc; knn.BANK = 3; ' \
              'misc.run(knn.main, knn.get_args_parser().parse_args())'
    (tmp_path / 'small_blocks.py').write_text(program)
    for processes, path in ((2, 'tools/knn.py'), (3, tmp_path / 'small_blocks.py')):
        result = run(*torchrun(processes), path, *flags, '--json', tmp_path / 'many.json')
        assert table(result, tmp_path / 'many.json') == once
        assert result.stdout.count('top-1') == 1


def test_a_stream(shards, labelled_images, pretrained, tmp_path):  # noqa: F811
    """WebDataset's shards, which cannot be shared out: each image once all the same, and what the folder gives."""
    pytest.importorskip('webdataset')
    common = ['--model', 'vit_tiny_patch8', '--input_size', 32, '--nb_classes', 3, '--num_workers', 1, '--amp', 'fp32',
              '--finetune', pretrained, '--k', 3, 24, '--json', tmp_path / 'knn.json']
    stream = table(tool(*common, '--dataset', 'wds/pictures', '--data_path', shards), tmp_path / 'knn.json')
    assert (stream['train_images'], stream['images']) == (24, 13)
    assert table(tool(*common, '--data_path', labelled_images), tmp_path / 'knn.json') == stream


WRONG = {
    'no data': (['--data_path', 'nowhere'], '--data_path nowhere is not a folder'),
    'no checkpoint': (['--finetune', 'nowhere.pth'], '--finetune: checkpoint nowhere.pth does not exist'),
    'another model': (['--model', 'vit_small_patch16'], 'does not fit --model vit_small_patch16'),
    'classes': (['--nb_classes', 1000], 'has 3 classes; give --nb_classes 3'),
    'no neighbour': (['--k', 0], '--k: 0 is outside'),
    'temperature': (['--temperature', 0], '--temperature: 0 is outside'),
    'size': (['--input_size', 36], '--input_size 36 is not a multiple'),
    'json': (['--json', 'no/such/folder.json'], '--json no/such/folder.json cannot be written'),
    'too many unreadable': (['--max_bad_images', 0], '--max_bad_images'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, flags):
    wrong, message = WRONG[case]
    result = tool(*flags, *wrong)
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line and not line.startswith('Image ')]
    assert result.returncode in (1, 2) and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0]
