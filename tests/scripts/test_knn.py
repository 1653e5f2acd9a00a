"""tools/knn.py: against NumPy, with several processes, unreadable images and wrong flags."""

import json
import shutil

import numpy as np
import pytest
import torch

import models_vit
from tests.helpers import ok, one_error_line, run, script, torchrun
from tools import knn
from util.checkpoints.io import load
from util.data.image_file import ImageFile
from util.datasets import build_linprobe_transform, normalize

tool = script('tools.knn')


def naive(queries, targets, bank, labels, k, temperature, num_classes):
    """Return (top-1, top-5) in percent, one query at a time."""
    correct = np.zeros(2)
    for query, target in zip(queries, targets):
        similarities = bank @ query
        votes = np.zeros(num_classes)
        for i in np.argsort(-similarities)[:k]:
            votes[labels[i]] += np.exp(similarities[i] / temperature)
        ranked = [c for c in np.argsort(-votes) if votes[c] > 0]
        correct += [target in ranked[:1], target in ranked[:5]]
    return tuple(100 * correct / len(targets))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_accuracies_equal_numpy(monkeypatch):
    """Also for k above the number of images, and at a temperature at which exp() overflows."""
    monkeypatch.setattr(knn, 'QUERIES', 32)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(12, 16))
    labels, targets = rng.integers(0, 12, 300), rng.integers(0, 12, 75)
    bank, queries = (
        unit(center + 1.2 * rng.normal(size=center.shape))
        for center in (centers[labels], centers[targets])
    )
    arrays, ks, found = (queries, targets, bank, labels), [1, 3, 10, 65, 300, 1000], set()
    tensors = [torch.from_numpy(x.astype('f4') if x.ndim == 2 else x) for x in arrays]
    for temperature in (0.07, 1.0, 0.002):
        results = knn.accuracies(*tensors, ks=ks, temperature=temperature, num_classes=12)
        for k in ks:
            expected = naive(*arrays, k, temperature, 12)
            assert results[k] == pytest.approx(expected), (k, temperature)
        found.update(results.values())
    assert len(found) > 6


@pytest.fixture(scope='module')
def flags(labelled_images, pretrained, tmp_path_factory):
    """Flags for 24 and 13 images, one of each unreadable; 3 processes do not divide 13."""
    data = tmp_path_factory.mktemp('knn')
    shutil.copytree(labelled_images, data, dirs_exist_ok=True)
    for name in ('train/class0/03.png', 'val/class1/01.png'):
        (data / name).write_bytes(b'')
    words = '--model vit_tiny_patch8 --input_size 64 --nb_classes 3 --batch_size 5 --num_workers 0'
    words += ' --amp fp32 --k 1 2 3 4 5 7 10 200'
    return [*words.split(), '--data_path', data, '--finetune', pretrained]


def read(result, path):
    ok(result)
    return json.loads(path.read_text())


def features_of(model, folder):
    """Return features [N, D] and labels [N] of the readable images, one image at a time."""
    transform = build_linprobe_transform(False, 64)
    paths = [path for path in sorted(folder.rglob('*.png')) if path.stat().st_size]
    with torch.no_grad():
        rows = [model(normalize(transform(ImageFile(path))[None])) for path in paths]
    return unit(torch.cat(rows).double().numpy()), [int(path.parent.name[-1]) for path in paths]


@pytest.mark.parametrize('pool', ['--cls_token', '--global_pool'])
def test_accuracy_of_an_encoder(pool, flags, pretrained, tmp_path):
    result = tool(*flags, pool, '--json', tmp_path / 'knn.json')
    content = read(result, tmp_path / 'knn.json')
    model = models_vit.vit_tiny_patch8(num_classes=0, global_pool=pool == '--global_pool').eval()
    missing = model.load_state_dict(load(pretrained)['model'], strict=False).missing_keys
    assert missing == ([] if pool == '--cls_token' else ['fc_norm.weight', 'fc_norm.bias'])
    data = flags[flags.index('--data_path') + 1]
    sets = [*features_of(model, data / 'val'), *features_of(model, data / 'train')]
    assert (content['train_images'], content['images'], content['temperature']) == (23, 12, 0.07)
    for row in content['knn']:
        assert (row['acc1'], row['acc5']) == pytest.approx(naive(*sets, row['k'], 0.07, 3))
        assert f'{row["k"]:8d}  {row["acc1"]:8.2f}  {row["acc5"]:8.2f}' in result.stdout
    assert 'Note: ' in result.stdout and '23 training images' in result.stdout
    assert 'train/class0/03.png' in result.stderr


@pytest.mark.slow
def test_accuracy_does_not_depend_on_the_number_of_processes(flags, tmp_path):
    one = read(tool(*flags, '--json', tmp_path / '1.json'), tmp_path / '1.json')
    assert len({row['acc1'] for row in one['knn']}) > 2
    path = tmp_path / '3.json'
    result = run(*torchrun(3), '-m', 'tools.knn', *flags, '--json', path)
    assert read(result, path) == one
    assert result.stdout.count('top-1') == 1


def test_stream(shards, labelled_images, pretrained, tmp_path):
    """WebDataset shards give the accuracy of the image folder: every image counts once."""
    pytest.importorskip('webdataset')
    path = tmp_path / 'knn.json'
    words = '--model vit_tiny_patch8 --input_size 32 --nb_classes 3 --num_workers 1 --amp fp32'
    words += ' --k 3 24'
    common = [*words.split(), '--finetune', pretrained, '--json', path]
    stream = read(tool(*common, '--dataset', 'wds/images', '--data_path', shards), path)
    assert (stream['train_images'], stream['images']) == (24, 13)
    assert read(tool(*common, '--data_path', labelled_images), path) == stream


WRONG = {
    'no data': ['--data_path', 'nowhere'],
    'no checkpoint': ['--finetune', 'nowhere.pth'],
    'another model': ['--model', 'vit_small_patch16'],
    'classes': ['--nb_classes', 1000],
    'no neighbor': ['--k', 0],
    'temperature': ['--temperature', 0],
    'size': ['--input_size', 36],
    'json': ['--json', 'no/such/folder.json'],
    'too many unreadable': ['--max_bad_images', 0],
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, flags):
    flag, value = WRONG[case]
    one_error_line(tool(*flags, flag, value), flag, value)
