import builtins
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'  # reference numbers and real images; not part of the repository
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / 'golden'))

from deterministic import load_deterministic  # noqa: E402
from openai_archive import save_archive  # noqa: E402

import clip  # noqa: E402
from util import misc  # noqa: E402

torch.set_num_threads(1)  # pytest runs as many workers as there are cores


def golden(name):
    """A reference case as a dict, config and other JSON entries decoded; skips where the large ones are not at hand."""
    for folder in (TESTS / 'golden', SHARED / 'golden'):
        if (folder / f'{name}.npz').exists():
            with np.load(folder / f'{name}.npz') as f:
                return {k: json.loads(str(v)) if v.dtype.kind == 'U' else v for k, v in f.items()}
    pytest.skip(f'the reference case {name} is too large for the repository and ../shared is not here')


def run(*command, cwd=ROOT, env=None, timeout=300):
    """A command's CompletedProcess, output as text. Past the timeout it ends with all the processes it started."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})}
    command = [str(c) for c in command]
    process = subprocess.Popen(command, cwd=cwd, env=env, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f'no end after {timeout} s: {" ".join(command)}\n{out}\n{err}')
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def script(name):
    """A function that runs the script ``name`` with flags: as real processes where a launcher or an environment is given, in this
    process where not, which spares an interpreter's start; a CompletedProcess either way."""
    def start(*flags, launcher=None, **kwargs):
        if launcher or kwargs:
            return run(*(launcher or (sys.executable,)), ROOT / f'{name}.py', *flags, **kwargs)
        module = importlib.import_module(name.replace('/', '.'))
        out, err, code, builtin_print = io.StringIO(), io.StringIO(), 0, builtins.print
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                misc.run(module.main, module.get_args_parser().parse_args([str(f) for f in flags]))
            except SystemExit as e:
                code = e.code
            finally:
                builtins.print = builtin_print  # the scripts put their own in its place
        return subprocess.CompletedProcess([name, *flags], code, out.getvalue(), err.getvalue())
    return start


pretrain, finetune, linprobe = map(script, ('main_pretrain', 'main_finetune', 'main_linprobe'))


def torchrun(processes):
    return (sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}')


def launch(processes, *flags):
    """The older launcher; without --use_env it passes --local-rank to the script."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return (sys.executable, '-m', 'torch.distributed.launch', f'--master_port={port}', f'--nproc_per_node={processes}', *flags)


def draw_photo(path, seed, size):
    """A picture with some content, for where no photograph is at hand. The seed: an int or a tuple."""
    rng = np.random.default_rng(zlib.crc32(repr(seed).encode()))
    image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2]
    ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(0, 255, 3).tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope='session')
def small_images(tmp_path_factory):
    """An image folder of 24 small pictures in 3 classes, sizes and shapes mixed."""
    root = tmp_path_factory.mktemp('small')
    for i in range(24):
        draw_photo(root / 'train' / f'class{i % 3}' / f'{i:02d}.png', i, (70 + 3 * i, 90 - i))
    return root


@pytest.fixture(scope='session')
def labelled_images(tmp_path_factory):
    """train/ of 24 and val/ of 13 small pictures in 3 classes: numbers that 2 processes and a batch of 4 do not divide evenly."""
    root = tmp_path_factory.mktemp('labelled')
    for split, count in (('train', 24), ('val', 13)):
        for i in range(count):
            draw_photo(root / split / f'class{i % 3}' / f'{i:02d}.png', (split, i % 3, i), (40 + i, 50 - i))
    return root


@pytest.fixture(scope='session')
def pretrained(small_images, tmp_path_factory):
    """A checkpoint of main_pretrain.py for 64-pixel images."""
    out = tmp_path_factory.mktemp('pretrained')
    result = pretrain('--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--batch_size', 8, '--data_path', small_images,
                      '--epochs', 1, '--warmup_epochs', 0, '--num_workers', 0, '--output_dir', out, '--log_dir', '')
    assert result.returncode == 0, result.stderr
    return out / 'checkpoint-0.pth'


@pytest.fixture
def classifier_flags(labelled_images, pretrained, tmp_path):
    """Flags of a fine-tuning or probing run of seconds: 24 images, 3 steps an epoch, 32 pixels."""
    return ['--model', 'vit_tiny_patch8', '--input_size', 32, '--nb_classes', 3, '--batch_size', 8, '--num_workers', 0,
            '--data_path', labelled_images, '--amp', 'fp32', '--finetune', pretrained, '--warmup_epochs', 1, '--epochs', 2,
            '--output_dir', tmp_path / 'out', '--log_dir', tmp_path / 'out', '--print_freq', 2]


@pytest.fixture(scope='session')
def imagenet_samples(tmp_path_factory):
    """4 photographs of ../shared/data/imagenet_samples.tar as an image folder; drawn pictures where it is not here."""
    root = tmp_path_factory.mktemp('imagenet_samples')
    archive = SHARED / 'data' / 'imagenet_samples.tar'
    if not archive.exists():
        for i in range(4):
            draw_photo(root / 'train' / f'class{i}' / f'{i}.JPEG', i, (500, 375))
        return root
    import tarfile
    with tarfile.open(archive) as tar:
        photos = [m for m in tar if m.name.endswith('.JPEG')][::250]
        for member in photos:
            target = root / Path(*Path(member.name).parts[1:])
            target.parent.mkdir(parents=True)
            target.write_bytes(tar.extractfile(member).read())
    return root


TINY_CLIP = dict(embed_dim=48, image_resolution=64, vision_layers=2, vision_width=128, vision_patch_size=8, context_length=16,
                 vocab_size=512, transformer_width=64, transformer_heads=1, transformer_layers=1)


@pytest.fixture(scope='session')
def tiny_clip(tmp_path_factory):
    """A CLIP for 64-pixel images with 8x8 patches, in OpenAI's archive format."""
    path = tmp_path_factory.mktemp('clip') / 'tiny.pt'
    save_archive(load_deterministic(clip.CLIP(**TINY_CLIP), skip=()), path)
    return path


@pytest.fixture(scope='session')
def talking_clip(tmp_path_factory):
    """A CLIP for 64-pixel images whose text tower knows all of CLIP's tokens."""
    path = tmp_path_factory.mktemp('talking') / 'clip.pth.tar'
    torch.save(load_deterministic(clip.CLIP(**{**TINY_CLIP, 'vocab_size': 49408}), skip=()).state_dict(), path)
    return path


@pytest.fixture(scope='session')
def clip_b16(tmp_path_factory):
    """A file like OpenAI's ViT-B-16.pt in every name and shape, with weights of its own."""
    path = tmp_path_factory.mktemp('clip_b16') / 'ViT-B-16.pt'
    torch.manual_seed(0)
    save_archive(clip.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), path)
    yield path
    shutil.rmtree(path.parent)


@pytest.fixture
def milan_flags(small_images, tiny_clip, tmp_path):
    """Flags of a MILAN run of seconds: 24 images, 6 steps an epoch."""
    return ['--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--amp', 'fp32', '--batch_size', 4, '--data_path', small_images,
            '--clip_path', tiny_clip, '--use_clip', '--change_decoder', '--attn_mask', '--num_workers', 0, '--blr', 0.05,
            '--warmup_epochs', 1, '--output_dir', tmp_path / 'out', '--log_dir', tmp_path / 'out', '--print_freq', 2]


@pytest.fixture(scope='session')
def timm_weights(tmp_path_factory):
    """timm_weights(name, **sizes): a file of weights for that timm model; skips where this timm does not have it."""
    @functools.cache
    def make(name, sizes):
        if not timm.is_model(name):
            pytest.skip(f'timm {timm.__version__} has no {name}')
        model = timm.create_model(name, num_classes=24 if '_clip_' in name else 0, **dict(sizes))
        path = tmp_path_factory.mktemp('timm') / 'model.pth'
        torch.save(load_deterministic(model, skip=('rope.freqs',)).state_dict(), path)
        return path
    return lambda name, **sizes: make(name, tuple(sizes.items()))
