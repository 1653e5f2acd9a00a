"""Fixtures shared by the tests.

timm and the modules that use it are imported in the fixtures: the main process of pytest -n, which
runs no test, then starts 6 s sooner.
"""

import functools
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

# pytest -n keeps all cores busy: more threads per process would only wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

from tests.golden.deterministic import load_deterministic
from tests.helpers import SHARED, TINY_CLIP, draw_photo, ok, pretrain, save_archive


@pytest.fixture(scope='session')
def small_images(tmp_path_factory):
    """An image folder of 24 small images in 3 classes, of mixed sizes and shapes."""
    root = tmp_path_factory.mktemp('small')
    for i in range(24):
        draw_photo(root / 'train' / f'class{i % 3}' / f'{i:02d}.png', i, (70 + 3 * i, 90 - i))
    return root


@pytest.fixture(scope='session')
def labelled_images(tmp_path_factory):
    """train/ of 24 and val/ of 13 small images in 3 classes.

    Neither 2 processes nor a batch of 4 divides 13.
    """
    root = tmp_path_factory.mktemp('labelled')
    for split, count in (('train', 24), ('val', 13)):
        for i in range(count):
            path = root / split / f'class{i % 3}' / f'{i:02d}.png'
            draw_photo(path, (split, i % 3, i), (40 + i, 50 - i))
    return root


@pytest.fixture(scope='session')
def shards(labelled_images, tmp_path_factory):
    """WebDataset shards of the same images: 2 x 12 for training, 7 + 6 for validation."""
    root = tmp_path_factory.mktemp('shards')

    def add(tar, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    splits = {}
    for split, name in (('train', 'train'), ('val', 'validation')):
        paths = sorted((labelled_images / split).rglob('*.png'))
        parts = {f'{name}-{k}.tar': paths[k::2] for k in range(2)}
        for file, part in parts.items():
            with tarfile.open(root / file, 'w') as tar:
                for path in part:
                    key = f'{path.parent.name}_{path.stem}'
                    add(tar, f'{key}.png', path.read_bytes())
                    add(tar, f'{key}.cls', path.parent.name[-1].encode())
        splits[name] = {
            'name': name,
            'filenames': list(parts),
            'shard_lengths': list(map(len, parts.values())),
            'num_samples': len(paths),
        }
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


@pytest.fixture(scope='session')
def pretrained(small_images, tmp_path_factory):
    """A checkpoint of main_pretrain.py for 64-pixel images."""
    out = tmp_path_factory.mktemp('pretrained')
    flags = '--model mae_vit_tiny_patch8 --input_size 64 --batch_size 8 --num_workers 0'
    flags += ' --epochs 1 --warmup_epochs 0 --log_dir'
    ok(pretrain(*flags.split(), '', '--data_path', small_images, '--output_dir', out))
    return out / 'checkpoint-0.pth'


@pytest.fixture
def classifier_flags(labelled_images, pretrained, tmp_path):
    """Flags of a short fine-tuning or probing run: 24 images of 32 pixels, 3 steps per epoch."""
    out = tmp_path / 'out'
    flags = '--model vit_tiny_patch8 --input_size 32 --nb_classes 3 --batch_size 8 --num_workers 0'
    flags += ' --amp fp32 --warmup_epochs 1 --epochs 2 --print_freq 2'
    paths = ['--data_path', labelled_images, '--finetune', pretrained]
    return [*flags.split(), *paths, '--output_dir', out, '--log_dir', out]


@pytest.fixture(scope='session')
def imagenet_samples(tmp_path_factory):
    """4 photographs from ../shared/data as an image folder, or drawn images if it is not here."""
    root = tmp_path_factory.mktemp('imagenet_samples')
    archive = SHARED / 'data' / 'imagenet_samples.tar'
    if not archive.exists():
        for i in range(4):
            draw_photo(root / 'train' / f'class{i}' / f'{i}.JPEG', i, (500, 375))
        return root
    with tarfile.open(archive) as tar:
        photos = [m for m in tar if m.name.endswith('.JPEG')][::250]
        for member in photos:
            target = root / Path(*Path(member.name).parts[1:])
            target.parent.mkdir(parents=True)
            target.write_bytes(tar.extractfile(member).read())
    return root


@pytest.fixture(scope='session')
def tiny_clip(tmp_path_factory):
    """A CLIP for 64-pixel images with 8x8 patches, in OpenAI's archive format."""
    from clip.model import CLIP

    path = tmp_path_factory.mktemp('clip') / 'tiny.pt'
    save_archive(load_deterministic(CLIP(**TINY_CLIP), skip=()), path)
    return path


@pytest.fixture(scope='session')
def talking_clip(tmp_path_factory):
    """A CLIP for 64-pixel images whose text tower has CLIP's full vocabulary."""
    from clip.model import CLIP

    path = tmp_path_factory.mktemp('talking') / 'clip.pth.tar'
    model = load_deterministic(CLIP(**{**TINY_CLIP, 'vocab_size': 49408}), skip=())
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope='session')
def clip_b16(tmp_path_factory):
    """A file with the names and shapes of OpenAI's ViT-B-16.pt and random weights."""
    from clip.model import CLIP

    path = tmp_path_factory.mktemp('clip_b16') / 'ViT-B-16.pt'
    torch.manual_seed(0)
    save_archive(CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), path)
    yield path
    shutil.rmtree(path.parent)


@pytest.fixture
def milan_flags(small_images, tiny_clip, tmp_path):
    """Flags of a short MILAN run: 24 images of 64 pixels, 6 steps per epoch."""
    out = tmp_path / 'out'
    flags = '--model mae_vit_tiny_patch8 --input_size 64 --batch_size 4 --num_workers 0 --amp fp32'
    flags += ' --use_clip --change_decoder --attn_mask --blr 0.05 --warmup_epochs 1 --print_freq 2'
    paths = ['--data_path', small_images, '--clip_path', tiny_clip]
    return [*flags.split(), *paths, '--output_dir', out, '--log_dir', out]


@pytest.fixture(scope='session')
def timm_weights(tmp_path_factory):
    """A function timm_weights(name, **sizes) that returns a file of weights for that timm model.

    It skips the test if the installed timm does not have the model.
    """
    import timm

    @functools.cache
    def make(name, sizes):
        if not timm.is_model(name):
            pytest.skip(f'timm {timm.__version__} has no {name}')
        model = timm.create_model(name, num_classes=24 if '_clip_' in name else 0, **dict(sizes))
        path = tmp_path_factory.mktemp('timm') / 'model.pth'
        torch.save(load_deterministic(model, skip=('rope.freqs',)).state_dict(), path)
        return path

    return lambda name, **sizes: make(name, tuple(sizes.items()))
