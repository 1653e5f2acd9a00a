"""Measure the effects of target, decoder and masking on CIFAR-10.

A small CLIP learns from captions of the training images. main_pretrain.py pretrains every
combination of target (pixels, CLIP's features), decoder (MAE's, prompting) and masking (uniform,
semantic aware). Each result, and random weights, is linear-probed and fine-tuned with the same
labels and epochs, for several seeds.

    python -m tools.ablation --data_path DATA --output_dir OUT

The same command resumes an interrupted ablation. results.jsonl has a line per run. ablation.md
and ablation.png are written at the end, or earlier with --report. The captions name the classes:
the teacher has seen the labels of all training images, and models that learn from it use them
indirectly.
"""

import argparse
import fcntl
import itertools
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import torchvision
from PIL import Image

import models_tiny_clip
from tools.ablation import report
from tools.ablation.runs import Runs
from util.cli import Parser, add_flags, bounded, run
from util.errors import UserError, as_user_error, refuse
from util.files import atomic_write_text

# Images are enlarged to 64 pixels: 64 patches of 4 x 4 original pixels. Numbers of images are for
# all ten classes together. The setting gpu has not been run yet.
SETTINGS = {
    'gpu': dict(
        images=50_000,
        val=10_000,
        labels=50_000,
        teacher_steps=10_000,
        epochs=200,
        warmup_epochs=10,
        probe_epochs=50,
        finetune_epochs=50,
        batch_size=256,
    ),
    'cpu': dict(
        images=20_000,
        val=2_000,
        labels=2_000,
        teacher_steps=6_000,
        epochs=2,
        warmup_epochs=1,
        probe_epochs=3,
        finetune_epochs=3,
        batch_size=64,
    ),
    'quick': dict(
        images=160,
        val=20,
        labels=80,
        teacher_steps=2,
        epochs=2,
        warmup_epochs=1,
        probe_epochs=1,
        finetune_epochs=1,
        batch_size=16,
    ),
}

# ---- data ----


# A folder with train/CLASS/ and test/CLASS/ (or val/): ``data_path`` itself, or ``out``/cifar10
# with the images that torchvision finds in ``data_path`` or downloads to it.
def _find_images(data_path, out):
    if (data_path / 'train').is_dir():
        return data_path
    folder = out / 'cifar10'
    for split in [name for name in ('train', 'test') if not (folder / name).is_dir()]:
        with as_user_error(
            f'--data_path {data_path} has no train/, and torchvision cannot provide CIFAR-10',
            OSError,
            RuntimeError,
        ):
            source = torchvision.datasets.CIFAR10(data_path, split == 'train', download=True)
        part = folder / f'{split}.part'
        for i, (image, label) in enumerate(source):
            path = part / source.classes[label] / f'{i:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        part.rename(folder / split)
    return folder


# Link the first images of each class in ``source``, ``count`` in all, into ``target``.
# Returns their paths and class names.
def _link_images(source, target, count):
    with as_user_error(f'--data_path: {source} cannot be read', OSError):
        folders = sorted(entry for entry in source.iterdir() if entry.is_dir())
        images = [(p, f.name) for f in folders for p in sorted(f.iterdir())[: count // 10]]
    refuse(
        (
            len(folders) != 10,
            f'--data_path: {source} has {len(folders)} class folders instead of 10',
        ),
        (
            len(images) < count,
            f'--data_path: {source} has fewer than {count // 10} images per class',
        ),
    )
    for path, name in images:
        link = target / name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    return images


# ---- teacher ----


# Write the teacher to clip.pth.tar, and its zero-shot accuracy on ``val`` to teacher.json.
def _train_teacher(out, steps, train, val, device):
    if (out / 'teacher.json').exists():
        return
    torch.manual_seed(0)
    model, generator = models_tiny_clip.build_clip().to(device), torch.Generator().manual_seed(0)
    captions = [f'a photo of a {name}' for _, name in train]
    models_tiny_clip.train(model, _read_pixels(train), captions, captions, steps, generator)
    models_tiny_clip.save(model, out / 'clip.pth.tar')
    names = sorted({name for _, name in val})
    labels = torch.tensor([names.index(name) for _, name in val])
    prompts = [f'a photo of a {name}' for name in names]
    accuracy = models_tiny_clip.zero_shot(out / 'clip.pth.tar', _read_pixels(val), labels, prompts)
    atomic_write_text(out / 'teacher.json', json.dumps({'zero_shot': 100 * accuracy}))
    print(f'Zero-shot accuracy of the teacher: {accuracy:.1%}')


# All images in memory, resized (bicubic) to the teacher's size: uint8 [N, 3, SIZE, SIZE].
def _read_pixels(images):
    with as_user_error('--data_path', OSError):
        return torch.stack(
            [
                torchvision.transforms.functional.pil_to_tensor(
                    Image.open(path).convert('RGB').resize((models_tiny_clip.SIZE,) * 2)
                )
                for path, _ in images
            ]
        )


# ---- command ----


FLAGS = {
    '--data_path': dict(
        type=Path,
        metavar='DIR',
        required=True,
        help='train/CLASS/ and test/CLASS/ of CIFAR-10, or the folder where torchvision finds it '
        'or downloads it to',
    ),
    '--output_dir': dict(
        type=Path,
        default=Path('ablation'),
        metavar='DIR',
        help='folder of all files that this tool writes',
    ),
    '--setting': dict(
        choices=['auto', *SETTINGS],
        default='auto',
        help='numbers of images, steps and epochs; auto: by --device',
    ),
    '--seeds': dict(type=bounded(int, 1, 1000), default=3, metavar='N', help='runs per variant'),
    '--jobs': dict(
        type=bounded(int, 1, 64),
        default=1,
        metavar='N',
        help='runs at the same time, spread over the GPUs',
    ),
    '--num_workers': dict(
        type=bounded(int, 0, 64), default=1, metavar='N', help='loader workers per run'
    ),
    '--device': dict(
        choices=['cuda', 'cpu'],
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device of the runs',
    ),
    '--report': dict(
        action='store_true',
        help='write the table and the plot of the finished runs, and run nothing',
    ),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.ablation', description=__doc__)
    add_flags(parser, FLAGS)
    return parser


# Lock ``out`` for this process and its scripts, and write setting.json. Returns the locked file.
def _lock_folder(out, setting):
    out.mkdir(parents=True, exist_ok=True)
    lock, file = open(out / '.lock', 'w'), out / 'setting.json'
    with as_user_error(
        f'--output_dir {out} is in use by another ablation, or by a script that it started',
        BlockingIOError,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if file.exists() and json.loads(file.read_text()) != setting:
        raise UserError(
            f'--output_dir {out} has results of another setting or other data ({file}); choose '
            'another folder'
        )
    atomic_write_text(file, json.dumps(setting))
    return lock


def main(args: argparse.Namespace) -> None:
    out = args.output_dir.resolve()
    if args.report:
        return report.write(out)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    name = {'auto': 'gpu' if args.device == 'cuda' else 'cpu'}.get(args.setting, args.setting)
    setting = {'setting': name, 'data_path': str(args.data_path.resolve()), **SETTINGS[name]}
    with as_user_error(f'--output_dir {args.output_dir}', OSError, ValueError):
        lock = _lock_folder(out, setting)

    # ---- data and teacher: data/ to pretrain on, labeled/ to learn from
    source = _find_images(args.data_path, out)
    test = source / ('test' if (source / 'test').is_dir() else 'val')
    train = _link_images(source / 'train', out / 'data' / 'train', setting['images'])
    _link_images(source / 'train', out / 'labeled' / 'train', setting['labels'])
    val = _link_images(test, out / 'labeled' / 'val', setting['val'])
    _train_teacher(out, setting['teacher_steps'], train, val, args.device)

    # ---- runs
    done = report.read_results(out)
    all_runs = list(itertools.product(range(args.seeds), report.VARIANTS))
    missing = [(variant, seed) for seed, variant in all_runs if (*variant, seed) not in done]
    print(f'{len(missing)} of {len(all_runs)} runs to do, {args.jobs} at a time', flush=True)
    runs = Runs(out, setting, lock, args.device, args.jobs, args.num_workers)
    with lock, ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(runs.run, variant, seed) for variant, seed in missing]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                report.add_result(out, future.result())
                print(f'{count}/{len(missing)} {report.summary(future.result())}', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.stop()
            raise
    report.write(out)


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
