"""Data sets that timm opens, without the scripts."""

import io
import os
import pickle
import shutil
import struct
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import timm_sources
from util.data.loader import build_loader, build_loaders
from util.datasets import DataConfig, SeededStream, build_dataset, build_linprobe_transform
from util.errors import UserError

TRANSFORM = build_linprobe_transform(False, 32)


def build(data, num_classes=3):
    transform = partial(build_linprobe_transform, input_size=32)
    return build_loaders(data, transform, num_classes=num_classes)


@pytest.fixture
def tars(labelled_images, tmp_path):
    """Flags of labelled_images as train.tar and val.tar."""
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            for path in sorted((labelled_images / split).rglob('*.png')):
                tar.add(path, f'{path.parent.name}/{path.name}')
    return dict(data_path=tmp_path, dataset='tar', train_split='train.tar', val_split='val.tar')


def test_tar_files_equal_folders(labelled_images, tars):
    tar = build(DataConfig(**tars, batch_size=4))
    folder = build(DataConfig(labelled_images, batch_size=4))
    for a, b in zip(tar, folder):
        a, b = a.dataset, b.dataset
        assert a.source.classes == b.source.classes and len(a) == len(b)
        assert a.source.name(0) == 'class0/00.png'
        for i in range(len(a)):
            assert torch.equal(a[1, i][0], b[1, i][0]) and a[i][1:] == b[i][1:]


def test_unreadable_images_in_tar_files(labelled_images, tmp_path):
    shutil.copytree(labelled_images / 'train', tmp_path / 'train')
    (tmp_path / 'train' / 'class0' / '00.png').write_bytes(b'')
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'train', '.')
    data = DataConfig(tmp_path, 'tar', train_split='train.tar')
    dataset = build_dataset(True, data, TRANSFORM)
    assert list(dataset[0][3]) == [dataset.source.name(0)]
    assert torch.equal(dataset[0][0], dataset[1][0])  # no random crop: the next image


class Attack:
    """Create a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('old_timm', [False, True])
def test_pickled_index_next_to_tar_files_does_not_run(tars, old_timm, tmp_path, monkeypatch):
    """Timm stores an index for more than 10 GB, and older releases run code in it."""
    if old_timm:
        monkeypatch.delattr(timm_sources.reader_image_in_tar, '_TarInfoUnpickler', raising=False)
    os.truncate(tmp_path / 'train.tar', 11 << 30)  # zeros, which take no space on the disk
    index = tmp_path / '_train_tarinfos.pickle'
    index.write_bytes(pickle.dumps(Attack(tmp_path / 'proof')))
    with pytest.raises(UserError, match=str(index if old_timm else tmp_path)):
        build_dataset(True, DataConfig(**tars), TRANSFORM)
    assert not (tmp_path / 'proof').exists()
    pickle.loads(index.read_bytes())  # check of the test: the attack works
    assert (tmp_path / 'proof').exists()


def test_torchvision(tmp_path):
    """MNIST's own files: gray images, labels 0 to 9."""
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (('train', 20), ('t10k', 13)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        header = struct.pack('>4I', 2051, count, 28, 28)
        (raw / f'{name}-images-idx3-ubyte').write_bytes(header + pixels.tobytes())
        header = struct.pack('>2I', 2049, count)
        (raw / f'{name}-labels-idx1-ubyte').write_bytes(header + labels.tobytes())
    train, val = build(DataConfig(tmp_path, 'torch/mnist', batch_size=5), num_classes=10)
    assert len(train.dataset) == 20 and len(val.dataset) == 13
    assert len(val.dataset.source.classes) == 10 and val.dataset.source.name(3) == 'sample 3'
    images, labels, _ = next(iter(val))
    assert images.shape == (5, 3, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match='--nb_classes 3.*--nb_classes 10'):
        build(DataConfig(tmp_path, 'torch/mnist'))


@pytest.mark.slow
def test_hugging_face(labelled_images, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    folder = tmp_path / 'images'
    for split, name in (('train', 'train'), ('val', 'validation')):
        shutil.copytree(labelled_images / split, folder / name)
    data = DataConfig(tmp_path / 'cache', f'hfds/{folder}', batch_size=4)
    train, val = build(data)
    assert len(train.dataset) == 24 and len(val.dataset) == 13
    assert val.dataset.source.classes == ['class0', 'class1', 'class2']
    assert val.dataset.source.name(0).endswith('.png')
    assert sum(len(labels) for _, labels, _ in val) == 13


def stream(shards, is_train, **flags):
    pytest.importorskip('webdataset')
    data = DataConfig(shards, 'wds/x', batch_size=4, num_workers=1, **flags)
    dataset = build_dataset(is_train, data, TRANSFORM)
    assert isinstance(dataset, SeededStream)
    return build_loader(dataset, data, is_train=is_train)


def test_webdataset_evaluation_is_complete_on_each_process(shards):
    for rank in range(2):
        loader = stream(shards, False, rank=rank, world_size=2)
        assert len(loader.dataset) == 13 and not loader.shared
        assert loader.dataset.source.classes is None
        labels = torch.cat([labels for _, labels, _ in loader])
        assert labels.bincount().tolist() == [5, 4, 4]


def test_webdataset_epochs_can_be_resumed(shards):
    loader, epochs = stream(shards, True), []
    for epoch, start_step in ((0, 0), (1, 0), (1, 2)):
        loader.set_epoch(epoch, start_step)
        epochs.append(list(loader))
    assert len(loader) == len(epochs[1]) == 6
    for a, b in zip(epochs[1][2:], epochs[2], strict=True):
        assert all(map(torch.equal, a, b))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(epochs[0], epochs[1]))


class Stream(torch.utils.data.IterableDataset):
    """8 images, the first one and another one unreadable."""

    classes = None

    def __len__(self):
        return 8

    def __iter__(self):
        for i in range(8):
            yield b'' if i in (0, 5) else Image.new('RGB', (9, 9), (i, i, i)), i

    def set_epoch(self, epoch):
        pass


def test_unreadable_images_in_a_stream(capsys):
    """The previous image replaces them in training; evaluation drops them."""
    for is_train in (True, False):
        dataset = SeededStream(Stream(), TRANSFORM)
        loader = build_loader(dataset, DataConfig(None, batch_size=4), is_train=is_train)
        loader.set_epoch(0)
        images, labels, ids = map(torch.cat, zip(*loader))
        assert images.float().mean((1, 2, 3)).tolist() == labels.tolist()
        kept = list(range(8)) if is_train else [1, 2, 3, 4, 6, 7]
        assert ids.tolist() == kept
        assert labels.tolist() == [4 if i == 5 else i for i in kept]
        errors = capsys.readouterr().err.splitlines()
        assert ['sample 0;' in errors[0], 'sample 5;' in errors[1]] == [True, True]
        assert len(errors) == 2


def test_open_files_in_a_stream():
    """An unreadable image is replaced by the previous one, whose file is at its end by then."""

    class Files(Stream):
        def __iter__(self):
            for image, label in super().__iter__():
                file = io.BytesIO()
                if image:
                    image.save(file, 'PNG')
                    file.seek(0)
                yield file, label

    labels = [
        (int(image.float().mean()), label) for image, label, *_ in SeededStream(Files(), TRANSFORM)
    ]
    assert labels[1:] == [(i, i) for i in (1, 2, 3, 4, 4, 6, 7)]


@pytest.mark.parametrize(
    'flags, words',
    [
        (['/missing', 'tar'], '--data_path /missing'),
        (['EMPTY', 'torch/mnist'], '--dataset torch/mnist'),
        (['EMPTY', 'torch/imagenette3'], '--dataset torch/imagenette3'),
        (['EMPTY', 'wds/x'], '--dataset wds/x'),
        (['SHARDS', 'wds/x', 'test'], 'split test'),
    ],
)
def test_missing_data(flags, words, shards, tmp_path):
    pytest.importorskip('webdataset')
    flags = [{'EMPTY': tmp_path, 'SHARDS': shards}.get(f, f) for f in flags]
    with pytest.raises(UserError, match=words):
        build_dataset(True, DataConfig(*flags), TRANSFORM)


@pytest.mark.parametrize('url', ['http://192.0.2.1/shards', 'pipe:touch proof', 's3://bucket'])
def test_shards_must_be_in_a_folder(url, tmp_path, monkeypatch):
    """WebDataset would run a URL in a shell."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f'--data_path {url}'):
        build_dataset(True, DataConfig(url, 'wds/x'), TRANSFORM)
    assert not list(tmp_path.iterdir())


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    for name in [name for name in sys.modules if name.startswith('timm.data.readers.reader_hf')]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match='pip install datasets'):
        build_dataset(True, DataConfig(tmp_path, 'hfds/x'), TRANSFORM)
