"""Measures on this machine how fast pretraining is: one step of it, the loader, and the script from end to end.

    python tools/benchmark.py step --model mae_vit_base_patch16 --batch_size 256
    python tools/benchmark.py data --data_path /dataset/imagenet
    python tools/benchmark.py train --data_path /dataset/imagenet --seconds 60
    python tools/benchmark.py all --data_path /dataset/imagenet --json speed.json

step: our training step, run by engine_pretrain.py, against the textbook formulation in tests/textbook.py: same weights, same
batch, same masks. data: our loader against PIL and torchvision's transforms. train: main_pretrain.py. all: everything; on a
GPU with ViT-L/16 at half the batch too. Both sides of a comparison take turns, and a figure is the median of its rounds.

Flags that are not this tool's are main_pretrain.py's. Their defaults here are MILAN's with ViT-B/16, a batch of 256 on a GPU
and 8 on the CPU, and a teacher of random weights (--clip_path '').
"""

import argparse
import contextlib
import gc
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
from pathlib import Path
from statistics import mean, median

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]  # of a script, Python adds only its own folder

import clip  # noqa: E402
import main_pretrain  # noqa: E402
from tools.benchmark_step import alternate, measure_step, start  # noqa: E402
from util.arguments import Parser, bounded  # noqa: E402
from util.datasets import BICUBIC, build_dataset, build_pretrain_transform, image_folder  # noqa: E402
from util.errors import UserError, as_user_error  # noqa: E402
from util.loader import build_loader  # noqa: E402
from util.misc import run  # noqa: E402
from util.provenance import describe_machine, describe_versions  # noqa: E402

# ---- the loader ----

def image_files(args):
    """The image files below the training folder of args.data_path; a UserError if there are none."""
    root = image_folder(args, 'train')
    files = sorted(p for p in Path(root).rglob('*') if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    if not files:
        raise UserError(f'--data_path: there are no images in the class folders of {root}')
    return files


@contextlib.contextmanager
def linked(files, count):
    """A folder for --data_path with exactly ``count`` links, spread over the files, which repeat where there are fewer."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, 'train', 'all')
        target.mkdir(parents=True)
        for i in range(count):
            file = files[i * len(files) // count]
            (target / f'{i:07d}{file.suffix}').symlink_to(file.resolve())
        yield folder


def pil_pipeline(args):
    """The published data set: PIL decodes, and torchvision's transforms follow."""
    crop = transforms.RandomResizedCrop(args.input_size, scale=(0.2, 1.0), interpolation=BICUBIC)
    return datasets.ImageFolder(os.path.join(args.data_path, 'train'),
                                transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                                    transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]))


def measure_data(args, device, options):
    """The entry ``data`` of the result: images/s of one thread and of the DataLoader with its workers, both pipelines."""
    files = image_files(args)
    workers = max(1, args.num_workers)
    args = argparse.Namespace(**{**vars(args), 'batch_size': min(args.batch_size, 64, options.images)})
    with linked(files, options.images * workers) as folder:
        args.data_path = folder
        sets = {'ours': build_dataset(True, args, build_pretrain_transform(args)), 'pil': pil_pipeline(args)}
        loaders = {'ours': build_loader(args, sets['ours']), 'pil': torch.utils.data.DataLoader(
            sets['pil'], args.batch_size, shuffle=True, num_workers=args.num_workers, pin_memory=args.pin_mem,
            drop_last=True, persistent_workers=args.num_workers > 0)}
        keys = range(0, options.images * workers, workers)
        torch.set_num_threads(1)
        # the first round of each is a warm-up
        rounds = options.rounds + 1
        thread = alternate({k: lambda s=s: sum(1 for i in keys if s[i]) for k, s in sets.items()}, rounds, device)
        whole = alternate({k: lambda s=s: sum(1 for _ in s) for k, s in loaders.items()}, rounds, device)
        torch.set_num_threads(options.threads)
        passed = len(loaders['pil']) * args.batch_size
        del loaders  # their workers leave before the links do
    thread = {name: options.images / median(seconds[1:]) for name, seconds in thread.items()}
    whole = {name: passed / median(seconds[1:]) for name, seconds in whole.items()}
    return {'files': len(files), 'input_size': args.input_size, 'images_a_round': options.images,
            'num_workers': args.num_workers,
            'images_per_s_a_thread': thread, 'ratio': thread['ours'] / thread['pil'], 'images_per_s_of_loader': whole,
            'images_per_s_of_loader_a_worker': {name: rate / workers for name, rate in whole.items()},
            'ratio_of_loader': whole['ours'] / whole['pil']}


# ---- the script ----

def measure_train(args, device, options):
    """The entry ``train``: images/s and the share of time spent waiting for data, from the log lines of main_pretrain.py."""
    files = image_files(args)
    enough = 200 * args.batch_size  # with fewer, epochs would end as soon as they have begun
    with linked(files, enough) if len(files) < enough else contextlib.nullcontext(args.data_path) as folder:
        flags = {'model': args.model, 'batch_size': args.batch_size, 'clip_path': args.clip_path, 'data_path': folder,
                 'device': args.device, 'num_workers': args.num_workers, 'output_dir': '', 'log_dir': '',
                 'print_freq': 20 if device.type == 'cuda' else 2}  # the others are among the rest or have the same default
        lines = log_lines([sys.executable, str(ROOT / 'main_pretrain.py'), *options.rest, *MILAN,
                           *(str(word) for name, value in flags.items() for word in (f'--{name}', value))], options)
    return {'model': args.model, 'batch_size': args.batch_size, 'num_workers': args.num_workers, 'files': len(files),
            'seconds': options.seconds, 'log_lines': len(lines), 'images_per_s': median(rate for rate, _ in lines),
            'share_waiting_for_data': mean(share for _, share in lines)}


def log_lines(command, options):
    """(images/s, share of waiting) of each log line in --seconds of a run, without the first, which has the start in it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env={**os.environ, 'OMP_NUM_THREADS': str(options.threads)})
    patience = threading.Timer(options.seconds + 240, os.killpg, (process.pid, signal.SIGKILL))
    patience.start()
    found, last, begin = [], '', None
    try:
        for line in process.stdout:
            last = line.strip() or last
            if match := re.search(r'images/s: ([\d.]+).* data: (\d+)%', line):
                found.append((float(match[1]), int(match[2]) / 100))
                begin = begin or time.perf_counter()
                if len(found) > 1 and time.perf_counter() - begin >= options.seconds:
                    break
    finally:
        patience.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers of its loader too
        process.wait()
    if len(found) < 2:
        raise UserError(f'main_pretrain.py ended, or took too long, before it told its speed; the last it said: {last}')
    return found[1:]


# ---- what is said ----

def print_step(r):
    book, ours = r['precision']['textbook'], r['precision']['ours']
    print(f'\nstep: {r["model"]}, {r["input_size"]} pixels, batch {r["batch_size"]}, {r["device"]}')
    print(f'{"":34}{f"ours ({ours})":>15}{f"textbook ({book})":>18}{"ratio":>8}')
    rate, memory = r['images_per_s'], {name: value / 2**30 for name, value in r['peak_memory_bytes'].items()}
    print(f'{"images/s":34}{rate["ours"]:15.2f}{rate["textbook"]:18.2f}{r["ratio"]:8.2f}')
    print(f'{"peak memory, GB":34}{memory["ours"]:15.2f}{memory["textbook"]:18.2f}{r["memory_ratio"]:8.2f}   '
          f'of {r["memory_of"]}')
    loss = r['first_step_loss']
    print(f'{"first loss, in " + loss["precision"]:34}{loss["ours"]:15.7f}{loss["textbook"]:18.7f}   '
          f'{"equal to rounding" if loss["agree"] else "NOT THE SAME: these figures compare different things"}')
    total = sum(r['split_ms_a_step'].values())
    print('a step of ours, ms: ' + ', '.join(f'{k} {v:.1f} ({v / total:.0%})' for k, v in r['split_ms_a_step'].items()))
    print(f'{r["flop_per_image"] / 1e9:.1f} GFLOP an image (multiply and add counted apart), '
          f'{r["flop_per_s"] / 1e9:,.0f} GFLOP/s: {r["share_of_ceiling"]:.0%} of the '
          f'{r["ceiling_flop_per_s"] / 1e9:,.0f} that a large matrix product reaches in {ours}')


def print_data(r):
    print(f'\ndata: {r["files"]} files, {r["input_size"]} pixels')
    print(f'{"images/s":34}{"ours":>15}{"PIL pipeline":>18}{"ratio":>8}')
    for what, rates, ratio in (('one thread', r['images_per_s_a_thread'], r['ratio']),
                               (f'loader, {r["num_workers"]} workers', r['images_per_s_of_loader'], r['ratio_of_loader'])):
        print(f'{what:34}{rates["ours"]:15.1f}{rates["pil"]:18.1f}{ratio:8.2f}')


def print_train(r):
    print(f'\ntrain: {r["model"]}, batch {r["batch_size"]}, {r["files"]} files, {r["num_workers"]} workers: '
          f'{r["images_per_s"]:.1f} images/s, waiting for data {r["share_waiting_for_data"]:.0%} of the time')
    if 'ratio_to_step' in r:
        print(f'{r["ratio_to_step"]:.0%} of the rate of ``step``')


# ---- the command ----

MILAN = ['--use_clip', '--change_decoder', '--attn_mask']


def get_args_parser():
    gpu = torch.cuda.is_available()
    parser = Parser('tools/benchmark.py', description=__doc__, allow_abbrev=False)
    parser.add_argument('what', choices=['step', 'data', 'train', 'all'], help='what to measure, see above')
    parser.add_argument('--rounds', type=bounded(int, 1), default=5, metavar='N', help='measurements, of which the median counts')
    parser.add_argument('--steps', type=bounded(int, 1), default=10 if gpu else 2, metavar='N',
                        help='training steps of a round of step')
    parser.add_argument('--images', type=bounded(int, 1), default=512, metavar='N', help='images a core in a round of data')
    parser.add_argument('--seconds', type=bounded(float, 0), default=60, metavar='S',
                        help='how long train runs after its first log line')
    parser.add_argument('--threads', type=bounded(int, 1), default=torch.get_num_threads(), metavar='N', help="PyTorch's threads")
    parser.add_argument('--json', metavar='FILE', help='write all figures, machine, versions and command')
    return parser


def random_clip(args, folder):
    """The file of a CLIP of random weights with the student's patch size: as large as OpenAI's; tiny for the tiny one."""
    main_pretrain.check_sizes(args, main_pretrain.MODELS)
    patch = int(re.search(r'patch(\d+)', args.model)[1])
    width, layers, dim = {8: (128, 2, 48), 14: (1024, 24, 768)}.get(patch, (768, 12, 512))
    torch.manual_seed(0)
    model = clip.CLIP(dim, args.input_size, layers, width, patch, 1, 1, 64, 1, 1)  # what reads text is as small as can be
    path = os.path.join(folder, 'random_clip.pt')
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    return path


def measure(what, args, device, options, result):
    """Add the entry ``what`` to ``result``, print it, and write what there is so far to --json."""
    if what == 'step':
        result.setdefault('step', []).append(measure_step(args, device, options))
        gc.collect()
        torch.cuda.empty_cache()  # of use to the processes that follow
        print_step(result['step'][-1])
    elif what == 'data':
        result['data'] = measure_data(args, device, options)
        print_data(result['data'])
    else:
        result['train'] = measure_train(args, device, options)
        if 'step' in result:
            result['train']['ratio_to_step'] = result['train']['images_per_s'] / result['step'][0]['images_per_s']['ours']
        print_train(result['train'])
    if options.json:
        with as_user_error(f'--json {options.json} cannot be written', OSError):
            Path(options.json).write_text(json.dumps(result, indent=1) + '\n')


def main(options):
    parser = main_pretrain.get_args_parser()
    parser.set_defaults(model='mae_vit_base_patch16', clip_path='', output_dir='', log_dir='',
                        batch_size=256 if torch.cuda.is_available() else 8)
    args = parser.parse_args([*options.rest, *MILAN])
    if args.teacher or args.use_clip_dino or args.use_clip_slip:
        raise UserError('the formulation to compare with knows one teacher, CLIP; give --clip_path or nothing')
    if options.what != 'step':
        image_files(args)  # what is wrong with --data_path is said now and not after minutes
    with tempfile.TemporaryDirectory() as folder:
        args.clip_path = args.clip_path or random_clip(args, folder)
        main_pretrain.check(args)
        device = start(args, options.threads)
        result = {'command': shlex.join(['python', *sys.argv]), 'machine': describe_machine(),
                  'versions': describe_versions()}
        print(', '.join(f'{k} {v}' for part in ('machine', 'versions') for k, v in result[part].items()))
        for what in ('step', 'data', 'train') if options.what == 'all' else (options.what,):
            measure(what, args, device, options, result)
        if options.what == 'all' and device.type == 'cuda' and 'base_patch16' in args.model:
            large = {'model': args.model.replace('base', 'large'), 'batch_size': max(1, args.batch_size // 2)}
            measure('step', argparse.Namespace(**{**vars(args), **large}), device, options, result)


if __name__ == '__main__':
    options, options.rest = get_args_parser().parse_known_args()
    run(main, options)
