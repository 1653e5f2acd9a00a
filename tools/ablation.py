"""The paper's question in miniature: what do target, decoder and masking each bring?

On CIFAR-10: a small CLIP learns from captions of the training images; every combination of target (pixels, CLIP's features),
decoder (MAE's, prompting) and masking (uniform, semantic aware) is pretrained by main_pretrain.py; each result, and random
weights, is linear-probed and fine-tuned with the same labels and epochs, for several seeds.

    python tools/ablation.py --data_path DATA --output_dir OUT

Give the same command again and it goes on where it was stopped. results.jsonl has a line a run; ablation.md and ablation.png
are made of them at the end, or earlier by --report. What the captions say is the class, so that the teacher has seen the
labels of all training images, and whatever learns from it has learned from them at second hand.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # of a script, Python adds only its own folder

import clip  # noqa: E402
from tools import ablation_report as report  # noqa: E402
from tools.demo import train_clip  # noqa: E402
from tools.demo.run import last_line  # noqa: E402
from util.errors import UserError, as_user_error  # noqa: E402
from util.logs import write_whole  # noqa: E402
from util.misc import run  # noqa: E402
from util.parser import Parser, bounded  # noqa: E402
from util.provenance import available_cores  # noqa: E402

# Images are enlarged to 64 pixels: 64 patches, each 4 pixels of the original. Counts of images are over all ten classes.
# The setting gpu has not been run yet.
SETTINGS = {
    'gpu': dict(images=50_000, val=10_000, labels=50_000, teacher_steps=10_000, epochs=200, warmup_epochs=10, probe_epochs=50,
                finetune_epochs=50, batch_size=256),
    'cpu': dict(images=20_000, val=2_000, labels=2_000, teacher_steps=6_000, epochs=2, warmup_epochs=1, probe_epochs=3,
                finetune_epochs=3, batch_size=64),
    'quick': dict(images=160, val=20, labels=80, teacher_steps=2, epochs=2, warmup_epochs=1, probe_epochs=1, finetune_epochs=1,
                  batch_size=16),
}


# ---- data ----

def find_images(data_path, out):
    """The folder of train/CLASS/ and test/CLASS/ (or val/): ``data_path`` itself, or what torchvision has or downloads there."""
    if (data_path / 'train').is_dir():
        return data_path
    folder = out / 'cifar10'
    for split in ('train', 'test'):
        if (folder / split).is_dir():
            continue
        with as_user_error(f'--data_path {data_path} has no train/ in it, and torchvision could not provide CIFAR-10', OSError,
                           RuntimeError):
            source = CIFAR10(data_path, split == 'train', download=True)
        part = folder / f'{split}.part'
        for i, (image, label) in enumerate(source):
            path = part / source.classes[label] / f'{i:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        part.rename(folder / split)
    return folder


def choose(source, target, count):
    """Links in ``target`` to the first images of each class in ``source``, ``count`` in all; returns their paths and classes."""
    with as_user_error(f'--data_path: {source} cannot be read', OSError):
        classes = sorted(entry.name for entry in os.scandir(source) if entry.is_dir())
        files = {name: sorted(Path(source, name).iterdir())[:count // len(classes)] for name in classes}
    if len(classes) != 10:
        raise UserError(f'--data_path: {source} has {len(classes)} class folders, and CIFAR-10 has ten')
    if min(len(found) for found in files.values()) < count // 10:
        raise UserError(f'--data_path: {source} has not {count} images, as many of each class, which this setting takes')
    for name, found in files.items():
        (target / name).mkdir(parents=True, exist_ok=True)
        for path in found:
            if not (target / name / path.name).is_symlink():
                (target / name / path.name).symlink_to(path.resolve())
    return [(path, name) for name, found in files.items() for path in found]


def prepare_data(args, setting, out):
    """out/data to pretrain on and out/labelled to learn from; both have the same val/.

    Returns:
        the training and the validation images, lists of (path, class).
    """
    source = find_images(args.data_path, out)
    test = source / ('test' if (source / 'test').is_dir() else 'val')
    train = choose(source / 'train', out / 'data' / 'train', setting['images'])
    choose(source / 'train', out / 'labelled' / 'train', setting['labels'])
    choose(test, out / 'data' / 'val', setting['val'])
    return train, choose(test, out / 'labelled' / 'val', setting['val'])


# ---- teacher ----

def caption(name):
    return f'a photo of a {name}'


def read_pixels(images):
    """Images, as (path, class), in memory, as large as the teacher takes them: uint8 [N, 3, SIZE, SIZE]."""
    size = (train_clip.SIZE, train_clip.SIZE)
    with as_user_error('--data_path', OSError):
        pixels = [np.asarray(Image.open(path).convert('RGB').resize(size, Image.Resampling.BICUBIC)) for path, _ in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def train_teacher(setting, out, train, val, device):
    """out/clip.pth.tar, a CLIP that has learned captions, and in out/teacher.json how often it is right on val by captions."""
    if (out / 'teacher.json').exists():
        return
    torch.manual_seed(0)
    captions = [caption(name) for _, name in train]
    model = train_clip.build_clip().to(device)
    train_clip.train(model, read_pixels(train), captions, captions, setting['teacher_steps'], torch.Generator().manual_seed(0))
    train_clip.save(model, out / 'clip.pth.tar')
    model, _ = clip.load(str(out / 'clip.pth.tar'), 'cpu')
    names = sorted({name for _, name in val})
    classes = torch.tensor([names.index(name) for _, name in val])
    accuracy = train_clip.zero_shot(model, read_pixels(val), classes, [caption(name) for name in names])
    write_whole(out / 'teacher.json', json.dumps({'zero_shot': 100 * accuracy}))
    print(f'The teacher: {accuracy:.1%} of the validation images by captions')


# ---- runs ----

def pretrain_flags(target, decoder, masking, teacher):
    """The flags of main_pretrain.py that make the variant."""
    flags = ['--norm_pix_loss'] if target == 'pixels' else []
    if target == 'CLIP' or masking == 'semantic':
        flags += ['--use_clip', '--clip_path', teacher]
    if target == 'pixels' and masking == 'semantic':
        flags.append('--pixel_target')
    return flags + ['--change_decoder'] * (decoder == 'prompting') + ['--attn_mask'] * (masking == 'semantic')


class Runs:
    """Runs the three scripts as processes of their own, which are ended with this one."""

    def __init__(self, args, setting, out, lock):
        self.setting, self.out, self.lock = setting, out, lock
        self.common = ['--input_size', 64, '--batch_size', setting['batch_size'], '--device', args.device,
                       '--num_workers', args.num_workers, '--resume', 'auto']
        self.env = dict(os.environ)
        if args.device == 'cpu':
            self.env['OMP_NUM_THREADS'] = str(max(1, available_cores() // args.jobs))
        self.processes, self.stopped = [], False
        gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))).split(',')
        self.gpus = SimpleQueue()  # one for each script that runs at a time
        for job in range(args.jobs):
            self.gpus.put(gpus[job % len(gpus)])

    def run(self, variant, seed):
        """Pretrain, probe and fine-tune: the line of results.jsonl, a dict."""
        setting = self.setting
        name = '-'.join(word for word in variant if word).replace(' ', '-')
        folder = self.out / 'runs' / f'{name}-seed{seed}'
        common = [*self.common, '--seed', seed]
        start = ''
        if variant != report.RANDOM:
            self.script(
                folder / 'pretrain', 'main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--data_path', self.out / 'data',
                '--epochs', setting['epochs'], '--warmup_epochs', setting['warmup_epochs'], '--lr', '1e-3',
                *pretrain_flags(*variant, self.out / 'clip.pth.tar'), *common)
            start = folder / 'pretrain' / f'checkpoint-{setting["epochs"] - 1}.pth'
        common += ['--model', 'vit_tiny_patch8', '--nb_classes', 10, '--data_path', self.out / 'labelled', '--warmup_epochs', 0,
                   '--finetune', start]
        self.script(
            folder / 'linear', 'main_linprobe.py', '--epochs', setting['probe_epochs'], '--blr', 1, 4, 16, *common)
        self.script(
            folder / 'finetune', 'main_finetune.py', '--epochs', setting['finetune_epochs'], '--lr', '1e-3', '--global_pool',
            '--aa', '', '--reprob', 0, *common)
        accuracies = {kind: last_line(folder / kind)['test_acc1'] for kind in ('linear', 'finetune')}
        return {**dict(zip(('target', 'decoder', 'masking'), variant)), 'seed': seed, **accuracies}

    def script(self, folder, *command):
        """One script with ``folder`` as its output_dir; what it prints is in output.txt there."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(word) for word in (*command, '--output_dir', folder, '--log_dir', folder)]
        if self.stopped:
            raise UserError('stopped')
        gpu = self.gpus.get()
        with open(folder / 'output.txt', 'a', encoding='utf-8') as output:
            print(f'$ {shlex.join(["python", *command])}', file=output, flush=True)
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                       start_new_session=True, pass_fds=[self.lock.fileno()],  # Ctrl-C is for us alone
                                       env={**self.env, 'CUDA_VISIBLE_DEVICES': gpu})
        self.processes.append(process)
        status = process.wait()
        self.gpus.put(gpu)
        if status:
            raise UserError(f'{command[0]} ended with status {status}; the end of {folder}/output.txt says why')

    def stop(self):
        """The scripts that run save their step and end; the next call goes on behind it."""
        self.stopped = True
        for process in self.processes:
            process.terminate()


# ---- all of it ----

def get_args_parser():
    parser = Parser('tools/ablation.py', description=__doc__)
    group = parser.add_argument_group('data and files')
    group.add_argument('--data_path', type=Path, metavar='DIR', required=True,
                        help='train/CLASS/ and test/CLASS/ of CIFAR-10, or where torchvision finds it or downloads it to')
    group.add_argument('--output_dir', type=Path, default=Path('ablation'), metavar='DIR', help='where all files go')
    group = parser.add_argument_group('runs')
    group.add_argument('--setting', choices=['auto', *SETTINGS], default='auto', help='how much of everything')
    group.add_argument('--seeds', type=bounded(int, 1, 1000), default=3, metavar='N', help='runs of each variant')
    group.add_argument('--jobs', type=bounded(int, 1, 64), default=1, metavar='N', help='runs at a time')
    group.add_argument('--num_workers', type=bounded(int, 0, 64), default=1, metavar='N', help='loader processes of each')
    group.add_argument('--device', choices=['cuda', 'cpu'], default='cuda' if torch.cuda.is_available() else 'cpu',
                       help='of the runs; several at a time are spread over the GPUs that there are')
    group.add_argument('--report', action='store_true', help='table and plot of what there is, and no more runs')
    return parser


def open_folder(args, out):
    """Setting and data, which stay the same in a folder, and its lock, which is held as long as anything works in there."""
    name = {'cuda': 'gpu'}.get(args.device, args.device) if args.setting == 'auto' else args.setting
    setting = {'setting': name, 'data_path': str(args.data_path.resolve()), **SETTINGS[name]}
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / '.lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'--output_dir {out}: an ablation, or a script that it has left, still works in there') from None
    file = out / 'setting.json'
    if file.exists() and report.read_json(file) != setting:
        raise UserError(f'--output_dir {out} has results of another setting or of other data ({file}); name another folder')
    write_whole(file, json.dumps(setting))
    return setting, lock


def main(args):
    out = args.output_dir.resolve()
    if args.report:
        return report.write(out)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    # data and teacher
    with as_user_error(f'--output_dir {args.output_dir} cannot be written to', OSError):
        setting, lock = open_folder(args, out)
    train, val = prepare_data(args, setting, out)
    train_teacher(setting, out, train, val, args.device)

    # runs
    done = report.read_results(out)
    missing = [(variant, seed) for seed in range(args.seeds) for variant in report.VARIANTS if (*variant, seed) not in done]
    print(f'{len(missing)} of {len(report.VARIANTS) * args.seeds} runs to do, {args.jobs} at a time', flush=True)
    runs = Runs(args, setting, out, lock)
    with lock, ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(runs.run, variant, seed) for variant, seed in missing]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                report.add_result(out, future.result())
                print(f'{count}/{len(missing)} {report.in_words(future.result())}', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.stop()
            raise
    report.write(out)


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
