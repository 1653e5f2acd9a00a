"""Files from elsewhere that are no checkpoints: archives, lists, caches, the vocabulary. None runs or fills the memory."""

import gzip
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
import timm
import torch
from conftest import pretrain
from imagenet_archives import TRUTH, devkit
from stress_mutations import unzip, zipped

import clip
from clip.simple_tokenizer import SimpleTokenizer, vocab_path
from tools import prepare_imagenet
from util import folder, teachers_timm
from util.errors import UserError

TINY = ['--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--batch_size', 4, '--epochs', 1, '--output_dir', '',
        '--log_dir', '']


# ---- data sets ----

class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_list_beside_tar_files_does_not_run(labelled_images, tmp_path):
    """timm keeps one for sets above 10 GB, and older releases run what is in it."""
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(labelled_images / 'train', '.')
    os.truncate(tmp_path / 'train.tar', 11 << 30)  # zeros, which take no space on the disk
    (tmp_path / '_train_tarinfos.pickle').write_bytes(pickle.dumps(Shell(str(tmp_path / 'proof'))))
    result = pretrain(*TINY, '--dataset', 'tar', '--data_path', tmp_path, '--train_split', 'train.tar')
    assert result.returncode == 1 and not (tmp_path / 'proof').exists()
    assert result.stderr.splitlines()[-1].startswith('error: ') and 'Traceback' not in result.stderr
    pickle.loads((tmp_path / '_train_tarinfos.pickle').read_bytes())
    assert (tmp_path / 'proof').exists()


@pytest.mark.parametrize('url', ['http://192.0.2.1/shards', 'pipe:touch proof', 's3://bucket'])
def test_shards_are_files(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pretrain(*TINY, '--dataset', 'wds/x', '--data_path', url)
    assert result.returncode == 1 and f'error: --data_path {url} is no folder' in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('damage', [
    lambda data: b'', lambda data: data[:-30], lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    lambda data: b'no archive', lambda data: np.zeros(1).dumps(), lambda data: zipped([('names.npy', b'x')]),
    lambda data: zipped([(n, c.replace(b'(24,), }' + 12 * b' ', b'(99999999999999,), }')) for n, c in unzip(data)])],
    ids=['empty', 'cut', 'a flipped bit', 'text', 'pickle', 'another archive', 'endless'])
def test_a_damaged_list_of_images_is_made_again(damage, labelled_images, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(folder, 'CACHE_FROM', 1)
    for root, _, _ in os.walk(labelled_images):
        os.utime(root, (1, 1))  # a folder that has just changed is not kept
    whole = folder.ImageFolder(labelled_images / 'train')
    path, = (tmp_path / 'milan').iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = folder.ImageFolder(labelled_images / 'train')
    assert [again[i] for i in range(len(again))] == [whole[i] for i in range(len(whole))]


# ---- ImageNet's archives ----

def refused(function, *args, match, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert str(args[0]) in str(error.value)


def test_lists_of_labels_that_would_fill_the_memory(tmp_path):
    (tmp_path / 'devkit.tar.gz').write_bytes(devkit(**{TRUTH: bytes(5_000_000)}))
    assert (tmp_path / 'devkit.tar.gz').stat().st_size < 10_000
    refused(prepare_imagenet.read_devkit, tmp_path / 'devkit.tar.gz', match=f'{TRUTH} in it has more than 4,194,304 bytes')
    (tmp_path / 'labels.txt').write_bytes(bytes(5_000_000))
    refused(prepare_imagenet.read_list, tmp_path / 'labels.txt', None, match='is no file, or larger than')


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero', tmp_path):
        refused(prepare_imagenet.read_list, path, None, match='is no file')
        refused(prepare_imagenet.index_train, path, match='is no file')
        refused(prepare_imagenet.read_devkit, path, match='is no file')


# ---- CLIP ----

@pytest.mark.parametrize('damage, message', [
    (lambda data: data[:1000], 'cannot be read'), (lambda data: b'text', 'cannot be read'),
    (lambda data: data[:5000] + b'x' + data[5001:], 'cannot be read'),
    (lambda data: gzip.compress(b'\xff'), 'cannot be read'), (lambda data: gzip.compress(b'v\na b\n'), 'is not the'),
    (lambda data: gzip.compress(bytes(1 << 28)), 'is not the')],
    ids=['cut', 'text', 'damaged', 'no text', 'short', 'a bomb'])
def test_a_vocabulary_that_is_none(damage, message, tmp_path):
    with open(vocab_path(), 'rb') as f:
        (tmp_path / 'vocab.gz').write_bytes(damage(f.read()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        SimpleTokenizer(tmp_path / 'vocab.gz')
    assert str(tmp_path / 'vocab.gz') in str(error.value) and '\n' not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def test_a_teacher_that_would_fill_the_memory(tiny_clip, tmp_path):
    """An index into the unpickler's memo, for which that in C sets aside 64 GB; and a record that is a bomb."""
    records = unzip(tiny_clip.read_bytes())
    pickled = next(r for r in records if r[0].endswith('/data.pkl'))
    whole, pickled[1] = pickled[1], b'\x80\x02}r\xff\xff\xff\x7f0' + pickled[1][2:]
    (tmp_path / 'memo.pt').write_bytes(zipped(records))
    assert clip.load(str(tmp_path / 'memo.pt'), 'cpu')[0].visual.grid_size == 8  # it is harmless here
    pickled[1] = whole
    next(r for r in records if '/data/' in r[0])[1] = bytes(1 << 27)
    (tmp_path / 'bomb.pt').write_bytes(zipped(records, 8))
    assert (tmp_path / 'bomb.pt').stat().st_size < 5e6
    with pytest.raises(ValueError, match='compressed records'):
        clip.load(str(tmp_path / 'bomb.pt'), 'cpu')


@timm.models.register_model
def vit_that_unpickles_anything(pretrained=False, file='', **kwargs):
    """As older timm does with some files of its hub."""
    return torch.load(file, weights_only=False)


def test_what_timm_fetches_does_not_run(tmp_path):
    file = tmp_path / 'weights.bin'
    torch.save({'state_dict': Shell(str(tmp_path / 'proof'))}, file)
    refused(teachers_timm._fetch, '--teacher x', 'vit_that_unpickles_anything', match='could not be fetched', file=file)
    assert not (tmp_path / 'proof').exists() and teachers_timm.ONLY_WEIGHTS not in os.environ
    vit_that_unpickles_anything(file=file)
    assert (tmp_path / 'proof').exists()
