"""Measure the speed of pretraining on this machine: one step, the data loader, the whole script.

    python -m tools.benchmark step --model mae_vit_base_patch16 --batch_size 256
    python -m tools.benchmark data --data_path /dataset/imagenet
    python -m tools.benchmark train --data_path /dataset/imagenet --seconds 60
    python -m tools.benchmark all --data_path /dataset/imagenet --json speed.json

step: our training step, run by engine_pretrain.py, against the textbook formulation in
tools/benchmark/textbook.py, with the same weights, batch and masks. data: our loader against PIL
and torchvision's transforms. train: main_pretrain.py. all: all three, and on a GPU also step
with ViT-L/16 and half the batch size. The two sides of a comparison take turns, and a figure is
the median of its rounds.

All other flags are those of main_pretrain.py. Their defaults here are MILAN with ViT-B/16, a
batch of 256 on a GPU and 8 on a CPU, and a teacher with random weights (--clip_path '').
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets, transforms

import clip
import main_pretrain
from tools.benchmark import step
from util.arguments import grid_size_of
from util.cli import Parser, add_flags, bounded, from_flags, run
from util.data.loader import build_loader
from util.datasets import BICUBIC, DataConfig, build_dataset, build_pretrain_transform, image_folder
from util.errors import UserError
from util.files import atomic_write_text
from util.run_info import describe_machine, describe_versions
from util.runtime import setup


# The training images of --data_path.
def _image_files(data_path):
    root = image_folder(data_path, 'train')
    extensions = datasets.folder.IMG_EXTENSIONS
    files = sorted(p for p in Path(root).rglob('*') if p.suffix.lower() in extensions)
    if not files:
        raise UserError(f'--data_path: there are no images in the class folders of {root}')
    return files


# A temporary --data_path of exactly ``count`` links, spread over ``files``. If there are fewer
# files than links, files are repeated.
@contextlib.contextmanager
def _linked(files, count):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, 'train', 'all')
        target.mkdir(parents=True)
        for i in range(count):
            file = files[i * len(files) // count]
            (target / f'{i:07d}{file.suffix}').symlink_to(file.resolve())
        yield folder


# ---- data: our loader against PIL and torchvision's transforms ----


# The published data set: PIL decodes, and torchvision's transforms follow.
def _pil_dataset(data_path, input_size):
    published = [
        transforms.RandomResizedCrop(input_size, scale=(0.2, 1.0), interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    return datasets.ImageFolder(os.path.join(data_path, 'train'), transforms.Compose(published))


# Measure one thread, and the loader with its workers, on both sides: ``images`` per core and round.
# PyTorch's ``threads`` are restored afterwards. Returns the entry ``data`` of the JSON file.
def _measure_data(data, input_size, *, images, rounds, threads):
    files, workers = _image_files(data.data_path), max(1, data.num_workers)
    with _linked(files, images * workers) as folder:
        data = replace(data, data_path=folder, batch_size=min(data.batch_size, 64, images))
        ours = build_dataset(True, data, build_pretrain_transform(input_size))
        sets = {'ours': ours, 'pil': _pil_dataset(folder, input_size)}
        loaders = {
            'ours': build_loader(ours, data),
            'pil': torch.utils.data.DataLoader(
                sets['pil'],
                data.batch_size,
                shuffle=True,
                num_workers=data.num_workers,
                pin_memory=data.pin_mem,
                drop_last=True,
                persistent_workers=data.num_workers > 0,
            ),
        }
        loaded = len(loaders['pil']) * data.batch_size
        indices = range(0, images * workers, workers)
        torch.set_num_threads(1)
        thread = _rates(sets, lambda s: sum(1 for i in indices if s[i]), images, rounds)
        whole = _rates(loaders, lambda s: sum(1 for _ in s), loaded, rounds)
        torch.set_num_threads(threads)
        del loaders  # ends the workers before the links are deleted
    result = {
        'files': len(files),
        'input_size': input_size,
        'images_a_round': images,
        'num_workers': data.num_workers,
        'images_per_s_a_thread': thread,
        'ratio': thread['ours'] / thread['pil'],
        'images_per_s_of_loader': whole,
        'images_per_s_of_loader_a_worker': {name: rate / workers for name, rate in whole.items()},
        'ratio_of_loader': whole['ours'] / whole['pil'],
    }
    step.print_table(
        f'data: {len(files)} files, {input_size} pixels',
        ('images/s', 'ours', 'PIL pipeline'),
        ('one thread', thread, 1, f'{result["ratio"]:8.2f}'),
        (f'loader, {data.num_workers} workers', whole, 1, f'{result["ratio_of_loader"]:8.2f}'),
    )
    return result


# The images/s of each source. ``read(source)`` reads ``count`` images. The first round warms up.
def _rates(sources, read, count, rounds):
    turns = [
        {name: step.seconds_of(read, source) for name, source in sources.items()}
        for _ in range(rounds + 1)
    ]
    return {name: count / median(turn[name] for turn in turns[1:]) for name in sources}


# ---- train: main_pretrain.py from end to end ----


# Measure images/s and the time spent waiting for data, from the log of main_pretrain.py, for
# ``seconds`` after its first line. ``steps``: results of ``step`` to compare with, if any.
# Returns the entry ``train`` of the JSON file.
def _measure_train(flags, data, model, *, seconds, threads, steps):
    files = _image_files(data.data_path)
    enough = 200 * data.batch_size  # with fewer, epochs would end right after they begin
    known = contextlib.nullcontext(data.data_path)
    with known if len(files) >= enough else _linked(files, enough) as folder:
        command = sys.executable, main_pretrain.__file__, *flags, '--data_path', folder
        lines = _log_lines(command, seconds, threads)
    result = {
        'model': model,
        'batch_size': data.batch_size,
        'num_workers': data.num_workers,
        'files': len(files),
        'seconds': seconds,
        'log_lines': len(lines),
        'images_per_s': median(rate for rate, _ in lines),
        'share_waiting_for_data': mean(share for _, share in lines),
    }
    print(
        f'\ntrain: {model}, batch {data.batch_size}, {len(files)} files, {data.num_workers} '
        f'workers: {result["images_per_s"]:.1f} images/s, waiting for data '
        f'{result["share_waiting_for_data"]:.0%} of the time'
    )
    if steps:
        result['ratio_to_step'] = result['images_per_s'] / steps[0]['images_per_s']['ours']
        print(f'{result["ratio_to_step"]:.0%} of the rate of ``step``')
    return result


# Run a command until its log lines span ``seconds``, then kill it. Returns (images/s, share of time
# spent waiting for data) per log line, without the first, which includes the start.
def _log_lines(command, seconds, threads):
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
    ) as process:
        limit = threading.Timer(seconds + 240, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        found, last, begin = [], '', None
        try:
            for line in process.stdout:
                last = line.strip() or last
                if match := re.search(r'images/s: ([\d.]+).* data: (\d+)%', line):
                    begin = begin or time.perf_counter()
                    found.append((float(match[1]), int(match[2]) / 100))
                    if len(found) > 1 and time.perf_counter() - begin >= seconds:
                        break
        finally:
            limit.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # including the workers of its loader
    if len(found) < 2:
        raise UserError(
            f'main_pretrain.py ended or hung before its second log line; its last output: {last}'
        )
    return found[1:]


# ---- command ----


FLAGS = {
    'what': dict(choices=['step', 'data', 'train', 'all'], help='what to measure, see above'),
    '--rounds': dict(type=bounded(int, 1), default=5, metavar='N', help='rounds per measurement'),
    '--steps': dict(
        type=bounded(int, 1),
        default=10 if torch.cuda.is_available() else 2,
        metavar='N',
        help='step: training steps per round',
    ),
    '--images': dict(
        type=bounded(int, 1), default=512, metavar='N', help='data: images per core and round'
    ),
    '--seconds': dict(
        type=bounded(float, 0),
        default=60,
        metavar='S',
        help='train: how long to run after the first log line',
    ),
    '--threads': dict(
        type=bounded(int, 1), default=torch.get_num_threads(), metavar='N', help="PyTorch's threads"
    ),
    '--json': dict(metavar='FILE', help='write all figures, the machine, versions and the command'),
}


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.benchmark', description=__doc__, allow_abbrev=False)
    add_flags(parser, FLAGS)
    return parser


# Save a CLIP with random weights. Its image tower has the size of OpenAI's for these patches
# (a tiny one for the tiny student), its text tower the smallest possible size.
def _save_random_clip(path, patch_size, input_size):
    sizes = {8: (128, 2, 48), 14: (1024, 24, 768)}
    width, layers, dim = sizes.get(patch_size, (768, 12, 512))
    torch.manual_seed(0)
    model = clip.CLIP(dim, input_size, layers, width, patch_size, 1, 1, 64, 1, 1)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)


def main(args: argparse.Namespace, pretrain_flags: Sequence[str] = ()) -> None:
    """Measure, print and write --json, with the results so far if a measurement fails."""
    parse = main_pretrain.get_args_parser().parse_args
    batch_size = '256' if torch.cuda.is_available() else '8'
    flags = ['--model', 'mae_vit_base_patch16', '--clip_path', '', '--batch_size', batch_size]
    flags += [*pretrain_flags, '--use_clip', '--change_decoder', '--attn_mask']
    flags += ['--output_dir', '', '--log_dir', '']
    pretrain = parse(flags)
    if pretrain.teacher or pretrain.use_clip_dino or pretrain.use_clip_slip:
        raise UserError('the textbook side has a CLIP teacher only: give --clip_path, or none')
    if args.what != 'step':
        _image_files(pretrain.data_path)  # so that an error comes now and not after minutes
    with tempfile.TemporaryDirectory() as folder:
        # ---- resolve the flags
        model, size = pretrain.model, pretrain.input_size
        if not pretrain.clip_path:
            flags += ['--clip_path', os.path.join(folder, 'random_clip.pt')]
            patch_size = size // grid_size_of(model, main_pretrain.MODELS[model], size)
            _save_random_clip(flags[-1], patch_size, size)
        pretrain = parse(flags)
        main_pretrain.check(pretrain)
        torch.set_num_threads(args.threads)
        runtime = setup(pretrain)
        device = runtime.device.type
        flags += ['--device', device, '--amp', runtime.amp, '--lr', repr(runtime.lr)]
        flags += ['--num_workers', str(runtime.num_workers), '--print_freq']
        flags += ['20' if device == 'cuda' else '2']
        data = from_flags(DataConfig, pretrain, **vars(runtime))

        # ---- measure
        result = {
            'command': shlex.join(['python', '-m', 'tools.benchmark', *sys.argv[1:]]),
            'machine': describe_machine(),
            'versions': describe_versions(),
        }
        described = {**result['machine'], **result['versions']}
        print(', '.join(f'{name} {value}' for name, value in described.items()))
        options = {'rounds': args.rounds, 'threads': args.threads}
        measure_step = partial(step.measure, runtime=runtime, steps=args.steps, **options)
        try:
            if args.what in ('step', 'all'):
                result['step'] = [measure_step(flags)]
            if args.what in ('data', 'all'):
                result['data'] = _measure_data(data, size, images=args.images, **options)
            if args.what in ('train', 'all'):
                result['train'] = _measure_train(
                    flags,
                    data,
                    model,
                    seconds=args.seconds,
                    threads=args.threads,
                    steps=result.get('step', []),
                )
            if args.what == 'all' and device == 'cuda' and 'base_patch16' in model:
                flags += ['--model', model.replace('base', 'large'), '--batch_size']
                result['step'].append(measure_step([*flags, str(max(1, data.batch_size // 2))]))
        finally:
            if args.json:
                atomic_write_text(args.json, json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    args, flags = get_args_parser().parse_known_args()
    run(partial(main, pretrain_flags=flags), args)
