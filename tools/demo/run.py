"""Run the demo: draw a data set, train a CLIP, pretrain MILAN and MAE, compare by classification.

The CLIP learns from the captions of the data set and is MILAN's teacher. MILAN, MAE and random
weights are then compared by linear probing and fine-tuning with few labels.

    python -m tools.demo.run --output_dir demo_output
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.demo.draw import CLASSES, draw_data
from tools.demo.figure import draw_figures
from tools.demo.train_clip import train_teacher
from util import cli, errors, files

# Everything that the demo writes, and may therefore delete.
OUTPUTS = """data labeled milan mae linear finetune captions_train.jsonl captions_val.jsonl
    clip_demo.pth.tar teacher.json results.json figure.png loss.png results.png
    text_query.png""".split()
EPOCHS = 2  # of pretraining

# Flags by script. --aa '' turns off augmentation that would hide the patterns.
PRETRAIN = f"""main_pretrain.py --model mae_vit_tiny_patch8 --batch_size 64 --mask_ratio 0.75
    --epochs {EPOCHS} --warmup_epochs 1 --blr 4e-3 --weight_decay 0.05""".split()
CLASSIFY = f"""--model vit_tiny_patch8 --nb_classes {len(CLASSES)} --batch_size 32
    --warmup_epochs 0""".split()
SCRIPTS = {
    'linear': 'main_linprobe.py --epochs 3 --lr 8'.split(),
    'finetune': [
        *'main_finetune.py --epochs 2 --lr 1e-3 --global_pool --reprob 0 --aa'.split(),
        '',
    ],
}


def clear(out: Path) -> None:
    """Delete the outputs of an earlier demo in ``out``, and nothing else."""
    marker = out / '.made_by_the_demo'
    found = [out / name for name in OUTPUTS if (out / name).exists()]
    if found and not marker.exists():
        raise errors.UserError(
            f'--output_dir {out} has {[path.name for path in found]}, which the demo did not '
            'write; choose another folder'
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def run(*command: object) -> float:
    """Print a command, run it, and return its seconds.

    Raises:
        UserError: if it fails.
    """
    command = [str(word) for word in command]
    print(f'$ {shlex.join(["python", *command])}', flush=True)
    start = time.time()
    if status := subprocess.run([sys.executable, *command]).returncode:
        raise errors.UserError(f'{command[0]} failed with status {status}; its message is above')
    print(f'=== done in {time.time() - start:.0f} s', flush=True)
    return time.time() - start


# The flags for data and output.
def _folders(data, out):
    return ['--data_path', data, '--output_dir', out, '--log_dir', out]


FLAGS = {
    '--output_dir': dict(
        type=Path,
        default='demo_output',
        metavar='DIR',
        help='folder of all files of the demo',
    ),
    '--seed': dict(
        type=cli.bounded(int, 0, 2**63 - 1), default=0, metavar='N', help='seed of all draws'
    ),
    '--quick': dict(
        action='store_true', help='few images and steps, to test that everything works'
    ),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser('python -m tools.demo.run', description=__doc__)
    cli.add_flags(parser, FLAGS)
    return parser


# Run all stages, and print the results.
@errors.as_user_error('--output_dir cannot be written to', OSError)
def main(args: argparse.Namespace) -> None:
    begin, out = time.time(), args.output_dir
    clear(out)
    teacher = out / 'clip_demo.pth.tar'
    common = ['--input_size', 64, '--device', 'cpu', '--num_workers', 2, '--seed', args.seed]
    print('\n=== 1/7 Drawing captioned images: textured shapes on varied backgrounds')
    draw_data(out, args.seed, 0.1 if args.quick else 1)
    # labeled/ has the first training images per class, and the whole val/, whose classes are small
    data, labeled, per_class = out / 'data', out / 'labeled', 8 if args.quick else 125
    shutil.copytree(data, labeled, ignore=lambda folder, names: sorted(names)[per_class:])
    print('\n=== 2/7 Training the teacher, a small CLIP, from scratch on images and captions')
    start = time.time()
    zero_shot = train_teacher(out, args.seed, 20 if args.quick else 600)
    teacher_seconds = time.time() - start

    methods = {
        'MILAN': ['--clip_path', teacher, '--use_clip', '--change_decoder', '--attn_mask'],
        'MAE': ['--norm_pix_loss'],
    }
    starts = {name: {'pretraining': 0.0} for name in (*methods, 'random weights')}
    for stage, (name, method) in enumerate(methods.items(), 3):
        print(f'\n=== {stage}/7 Pretraining {name}: main_pretrain.py with the published flags')
        where = _folders(data, out / name.lower())
        starts[name]['pretraining'] = run(*PRETRAIN, *where, *method, *common)
    for stage, (kind, script) in enumerate(SCRIPTS.items(), 5):
        print(f'\n=== {stage}/7 {script[0]} from three starts, with few labels')
        for name, row in starts.items():
            checkpoint = out / name.lower() / f'checkpoint-{EPOCHS - 1}.pth'
            start = ['--finetune', checkpoint if name in methods else '']
            folder = out / kind / name.split()[0].lower()
            seconds = run(*script, *CLASSIFY, *start, *_folders(labeled, folder), *common)
            last = json.loads((folder / 'log.txt').read_text().splitlines()[-1])
            row[kind] = {'top1': last['test_acc1'], 'seconds': seconds}

    results = {
        'teacher': zero_shot,
        'seed': args.seed,
        'teacher_seconds': teacher_seconds,
        'images': len(list((data / 'val').rglob('*.png'))),
        'labels': len(list((labeled / 'train').rglob('*.png'))),
        'starts': starts,
    }
    files.atomic_write_text(out / 'results.json', json.dumps(results, indent=2))
    print('\n=== 7/7 Drawing the figures')
    draw_figures(out)

    print(f'\n{"start":16}{"pretraining":>14}{"linear top-1":>22}{"fine-tuned top-1":>22}')
    for name, row in starts.items():
        cells = [f'{row[kind]["top1"]:.1f} %  ({row[kind]["seconds"]:.0f} s)' for kind in SCRIPTS]
        print(f'{name:16}{row["pretraining"]:>12.0f} s{cells[0]:>22}{cells[1]:>22}')
    print(f"""
{results['images']} validation images, {results['labels']} labeled training images, \
seed {args.seed}, equal epochs for all starts. Chance is {100 / len(CLASSES):.1f} %.
The zero-shot top-1 of the teacher is {results['teacher']:.1%}. Its training took another \
{teacher_seconds:.0f} s.
Its captions name the classes: MILAN learns from labels indirectly, and MAE does not.

Demo finished in {time.time() - begin:.0f} s. The results are in {out.resolve()}:
  figure.png               images, the teacher's importance, sampled masks
  text_query.png           texts compared with MILAN's predictions for hidden patches
  results.png              the table above as a plot (results.json: the numbers)
  loss.png                 MILAN's pretraining loss
  milan/, mae/             pretraining checkpoints and log.txt
  linear/, finetune/       classifiers from the three starts; tensorboard --logdir {out}
  clip_demo.pth.tar        the teacher, in the format of OpenAI's state dicts
  data/, captions_*.jsonl  the images and their captions""")


if __name__ == '__main__':
    cli.run(main, get_args_parser().parse_args())
