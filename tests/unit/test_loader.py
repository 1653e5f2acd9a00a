"""Order, shares and unreadable images of the loaders."""

import shutil
from functools import partial

import pytest
import torch

from util.data.loader import EpochSampler, build_loader, build_loaders
from util.datasets import (
    DataConfig,
    SeededDataset,
    build_dataset,
    build_linprobe_transform,
    build_pretrain_transform,
    build_transform,
)
from util.errors import UserError

TRANSFORM = build_pretrain_transform(32)


def train_loader(root, batch_size=4, **kwargs):
    flags = {k: kwargs.pop(k) for k in list(kwargs) if k in DataConfig.__annotations__}
    data = DataConfig(root, batch_size=batch_size, **flags)
    return build_loader(build_dataset(True, data, TRANSFORM), data, **kwargs)


def test_all_ranks_share_one_order():
    def samples(epoch, world, batch):
        ranks = []
        for rank in range(world):
            sampler = EpochSampler(range(24), num_replicas=world, rank=rank, seed=1)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
        share = batch // world
        steps = range(0, len(ranks[0]), share)
        return [{key for r in ranks for key in r[i : i + share]} for i in steps]

    assert samples(5, 1, 8) == samples(5, 2, 8) == samples(5, 4, 8)
    assert samples(5, 1, 8) != samples(6, 1, 8)
    assert {epoch for batch in samples(5, 1, 8) for epoch, _ in batch} == {5}


def test_batches(small_images):
    loader = train_loader(small_images)
    assert len(loader) == 6 and len(loader.dataset) == 24 and loader.shared
    loader.set_epoch(0)
    (images, labels, ids), *rest = loader
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == ids.dtype == torch.int64
    assert labels.tolist() == loader.dataset.source.targets[ids].tolist()
    assert len(rest) == 5
    seen = torch.cat([ids, *(batch[2] for batch in rest)])
    assert sorted(seen.tolist()) == list(range(24))


@pytest.mark.parametrize('workers', [0, 1])
def test_epochs_differ_and_can_be_resumed(small_images, workers):
    loader = train_loader(small_images, num_workers=workers)
    epochs = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    loader.set_epoch(1, start_step=4)
    assert len(loader) == 6
    epochs.append([None] * 4 + list(loader))
    for a, b in zip(epochs[1] + epochs[1][4:], epochs[2] + epochs[3][4:], strict=True):
        assert all(map(torch.equal, a, b))
    assert [ids.tolist() for *_, ids in epochs[0]] != [ids.tolist() for *_, ids in epochs[1]]


def test_evaluation_sees_every_sample_once(labelled_images):
    def ids(dist_eval, rank):
        data = DataConfig(labelled_images, batch_size=4, rank=rank, world_size=2)
        dataset = build_dataset(False, data, build_transform(False, 32))
        loader = build_loader(dataset, data, is_train=False, dist_eval=dist_eval)
        assert loader.shared == dist_eval
        return torch.cat([ids for _, _, ids in loader]).tolist()

    assert ids(False, 0) == ids(False, 1) == list(range(13))
    assert ids(True, 0) == list(range(0, 13, 2)) and ids(True, 1) == list(range(1, 13, 2))


def test_build_loaders(labelled_images):
    """The images of both sets, and float images, which random erasing needs."""
    data = DataConfig(labelled_images, batch_size=8)
    for build in (build_transform, build_linprobe_transform):
        transform = partial(build, input_size=32)
        train, val = build_loaders(data, transform, num_classes=3, accum_iter=2)
        train.set_epoch(0)
        images, labels, _ = next(iter(train))
        assert images.shape == (8, 3, 32, 32) and labels.max() < 3
        assert images.dtype == (torch.float32 if build is build_transform else torch.uint8)
        assert [len(labels) for _, labels, _ in val] == [8, 5]
        assert build_loaders(data, transform, num_classes=3, eval_only=True)[0] is None
        with pytest.raises(UserError, match='--nb_classes 4'):
            build_loaders(data, transform, num_classes=4)
        with pytest.raises(UserError, match='--accum_iter 4'):
            build_loaders(data, transform, num_classes=3, accum_iter=4)


def test_training_set_smaller_than_one_effective_batch(small_images):
    train_loader(small_images, batch_size=12, accum_iter=2)
    train_loader(small_images, batch_size=12, world_size=2)
    for kwargs in ({'batch_size': 25}, {'accum_iter': 7}, {'batch_size': 13, 'world_size': 2}):
        with pytest.raises(UserError, match='--batch_size'):
            train_loader(small_images, **kwargs)


def test_label_outside_the_classes(small_images):
    for labels in ([0, 3], [0, -1]):
        loader = train_loader(small_images, batch_size=24, num_classes=3)
        loader.dataset.source.targets[:2] = torch.tensor(labels)
        loader.set_epoch(0)
        with pytest.raises(UserError, match='--nb_classes 3'):
            list(loader)


@pytest.fixture
def damaged(small_images, tmp_path):
    """small_images with 3 unreadable ones of 24."""
    shutil.copytree(small_images, tmp_path / 'damaged')
    for name in ('class0/03.png', 'class0/06.png', 'class2/23.png'):
        (tmp_path / 'damaged' / 'train' / name).write_bytes(b'')
    return tmp_path / 'damaged'


NAMES = ['03.png', '06.png', '23.png']


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_reported_once(damaged, tmp_path, capsys, workers):
    out = tmp_path / 'out'
    out.mkdir()
    for _ in range(2):  # the second one is a resumed run
        loader = train_loader(damaged, num_workers=workers, output_dir=out)
        for epoch in range(2):
            loader.set_epoch(epoch)
            assert sum(len(ids) for *_, ids in loader) == 24
        captured = capsys.readouterr()
        errors = captured.err.splitlines()
        assert sorted(line.split(';')[0][-6:] for line in errors) == NAMES
        assert [line.startswith('3 of 24 images') for line in captured.out.splitlines()] == [True]
    listed = (out / 'unreadable_images.txt').read_text().splitlines()
    assert sorted(line.split('\t')[0][-6:] for line in listed) == NAMES
    assert all(line.split('\t')[1] for line in listed)


def test_too_many_unreadable_images_stop_the_run(damaged, tmp_path, capsys):
    loader = train_loader(damaged, max_bad_images=2, output_dir=tmp_path)
    loader.set_epoch(0)
    with pytest.raises(UserError, match='^3 of 24 .*--max_bad_images'):
        list(loader)
    assert len((tmp_path / 'unreadable_images.txt').read_text().splitlines()) == 3
    assert len(capsys.readouterr().err.splitlines()) == 3

    loader = train_loader(damaged, max_bad_images=3)  # without output_dir: no list
    loader.set_epoch(0)
    list(loader)
    for path in damaged.rglob('*.png'):
        path.write_bytes(b'')
    loader = train_loader(damaged)  # stops although 24 < max_bad_images
    loader.set_epoch(0)
    with pytest.raises(UserError, match='^24 of 24 '):
        list(loader)


def test_evaluation_drops_unreadable_images(damaged, capsys):
    data = DataConfig(damaged, batch_size=8)
    source = build_dataset(True, data, TRANSFORM).source
    dataset = SeededDataset(source, TRANSFORM, replace=False)
    batches = list(build_loader(dataset, data, is_train=False))
    assert [len(ids) for *_, ids in batches] == [6, 8, 7]
    ids = torch.cat([ids for *_, ids in batches]).tolist()
    assert ids == [i for i in range(24) if i not in (1, 2, 23)]
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels.tolist() == source.targets[ids].tolist()
    assert len(capsys.readouterr().err.splitlines()) == 3
