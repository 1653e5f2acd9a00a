"""Foreign files other than checkpoints: none of them runs code or fills the memory."""

import gzip
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
import timm
import torch

import clip
from clip.simple_tokenizer import SimpleTokenizer, vocab_path
from tests.helpers import one_error_line, pretrain
from tests.imagenet_archives import TRUTH, devkit
from tests.stress.damage import unzip, zipped
from tools import prepare_imagenet
from util import timm_tower
from util.data import image_folder
from util.errors import UserError

TINY = '--model mae_vit_tiny_patch8 --input_size 32 --batch_size 4 --epochs 1'.split()
TINY += ['--output_dir', '', '--log_dir', '']


# ---- data sets ----


class Shell:
    """A pickle of this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_next_to_tar_files_does_not_run(labelled_images, tmp_path):
    """Timm caches the list of a set above 10 GB in it, and older releases run its content."""
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(labelled_images / 'train', '.')
    os.truncate(tmp_path / 'train.tar', 11 << 30)  # zeros, which need no space on the disk
    cache = tmp_path / '_train_tarinfos.pickle'
    cache.write_bytes(pickle.dumps(Shell(str(tmp_path / 'proof'))))
    result = pretrain(
        *TINY, '--dataset', 'tar', '--data_path', tmp_path, '--train_split', 'train.tar'
    )
    one_error_line(result)
    assert not (tmp_path / 'proof').exists()
    pickle.loads(cache.read_bytes())
    assert (tmp_path / 'proof').exists()


@pytest.mark.parametrize('url', ['http://192.0.2.1/shards', 'pipe:touch proof', 's3://bucket'])
def test_shards_must_be_files(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pretrain(*TINY, '--dataset', 'wds/x', '--data_path', url)
    one_error_line(result, f'--data_path {url}')
    assert not list(tmp_path.iterdir())


def claim_more_entries(data):
    """Put another shape into the headers of an .npz file of 24 entries."""
    old, new = b'(24,), }' + 12 * b' ', b'(99999999999999,), }'
    return zipped([(name, content.replace(old, new)) for name, content in unzip(data)])


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: b'',
        lambda data: data[:-30],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: b'no archive',
        lambda data: np.zeros(1).dumps(),
        lambda data: zipped([('names.npy', b'x')]),
        claim_more_entries,
    ],
    ids=['empty', 'truncated', 'flipped bit', 'text', 'pickle', 'other archive', 'too large'],
)
def test_damaged_cache_of_an_image_folder_is_replaced(
    damage, labelled_images, tmp_path, monkeypatch
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(image_folder, 'CACHE_FROM', 1)
    for root, _, _ in os.walk(labelled_images):
        os.utime(root, (1, 1))  # folders that have just changed are not cached
    expected = image_folder.ImageFolder(labelled_images / 'train')
    (path,) = (tmp_path / 'milan').iterdir()
    path.write_bytes(damage(path.read_bytes()))
    found = image_folder.ImageFolder(labelled_images / 'train')
    assert [found[i] for i in range(len(found))] == [expected[i] for i in range(len(expected))]


# ---- ImageNet's archives ----


def refused(function, *args, match='', **kwargs):
    """Assert that a call fails with a UserError that has its first argument."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert str(args[0]) in str(error.value)


def test_lists_of_labels_that_are_too_large(tmp_path):
    (tmp_path / 'devkit.tar.gz').write_bytes(devkit(**{TRUTH: bytes(5_000_000)}))
    assert (tmp_path / 'devkit.tar.gz').stat().st_size < 10_000
    refused(prepare_imagenet.read_devkit, tmp_path / 'devkit.tar.gz', match=TRUTH)
    (tmp_path / 'labels.txt').write_bytes(bytes(5_000_000))
    refused(prepare_imagenet.read_list, tmp_path / 'labels.txt', set())


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero', tmp_path):
        refused(prepare_imagenet.read_list, path, set())
        refused(prepare_imagenet.index, path, 'train')
        refused(prepare_imagenet.read_devkit, path)


# ---- CLIP and timm ----


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[:1000],
        lambda data: b'text',
        lambda data: data[:5000] + b'x' + data[5001:],
        lambda data: gzip.compress(b'\xff'),
        lambda data: gzip.compress(b'v\na b\n'),
        lambda data: gzip.compress(bytes(1 << 27)),
    ],
    ids=['truncated', 'text', 'damaged', 'not utf-8', 'too short', 'bomb'],
)
def test_damaged_vocabulary(damage, tmp_path):
    with open(vocab_path(), 'rb') as f:
        (tmp_path / 'vocab.gz').write_bytes(damage(f.read()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='vocab.gz') as error:
        SimpleTokenizer(tmp_path / 'vocab.gz')
    assert '\n' not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def test_teacher_that_would_fill_the_memory(tiny_clip, tmp_path):
    """A pickle for which the unpickler in C allocates 64 GB, and a compressed record."""
    records = unzip(tiny_clip.read_bytes())
    pickled = next(r for r in records if r[0].endswith('/data.pkl'))
    index_into_memo = b'\x80\x02}r\xff\xff\xff\x7f0'
    original, pickled[1] = pickled[1], index_into_memo + pickled[1][2:]
    (tmp_path / 'memo.pt').write_bytes(zipped(records))
    model, _ = clip.load(str(tmp_path / 'memo.pt'), 'cpu')  # here it is harmless
    assert model.visual.grid_size == 8
    pickled[1] = original
    next(r for r in records if '/data/' in r[0])[1] = bytes(1 << 27)
    (tmp_path / 'bomb.pt').write_bytes(zipped(records, 8))
    assert (tmp_path / 'bomb.pt').stat().st_size < 5e6
    with pytest.raises(ValueError, match='bomb.pt'):
        clip.load(str(tmp_path / 'bomb.pt'), 'cpu')


@timm.models.register_model
def vit_that_unpickles_anything(pretrained=False, file='', **kwargs):
    """Load weights as older timm does for some models of its hub."""
    return torch.load(file, weights_only=False)


def test_weights_that_timm_downloads_do_not_run(tmp_path):
    file = tmp_path / 'weights.bin'
    torch.save({'state_dict': Shell(str(tmp_path / 'proof'))}, file)
    environment = dict(os.environ)
    refused(timm_tower._fetch, 'vit_that_unpickles_anything', file=file)
    assert not (tmp_path / 'proof').exists() and dict(os.environ) == environment
    vit_that_unpickles_anything(file=file)
    assert (tmp_path / 'proof').exists()
