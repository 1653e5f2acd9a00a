"""The demo: draw a data set, train a small CLIP on its captions, pretrain MILAN with that teacher and MAE without, and compare
the two with random weights by linear probing and fine-tuning.

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

from tools.demo.draw import CLASSES
from util.errors import one_line
from util.parser import Parser, bounded

# everything the demo writes, and so may delete
MADE = ('data', 'labelled', 'milan', 'mae', 'linear', 'finetune', 'captions_train.jsonl', 'captions_val.jsonl',
        'clip_demo.pth.tar', 'teacher.json', 'results.json', 'figure.png', 'loss.png', 'results.png',
        'text_query.png')
STAGES = 7


def clear(out):
    """Delete what an earlier demo left in ``out``, and nothing that somebody else put there."""
    marker = out / '.made_by_the_demo'
    there = [name for name in MADE if (out / name).exists()]
    if there and not marker.exists():
        sys.exit(f'error: --output_dir {out} has {there[0]} in it, which the demo did not make; name another folder')
    for name in there:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def stage(number, title):
    print(f'\n=== {number}/{STAGES} {title}', flush=True)


def run(*command):
    """One script as a process of its own, its command shown first; its failure ends the demo. Returns the seconds it took."""
    command = [str(c) for c in command]
    print(f'$ {shlex.join(["python", *command])}', flush=True)
    start = time.time()
    status = subprocess.run([sys.executable, *command]).returncode
    if status != 0:
        sys.exit(f'error: the demo ended here, status {status}; the message stands above')
    print(f'=== done in {time.time() - start:.0f} s', flush=True)
    return time.time() - start


def last_line(folder):
    return json.loads((folder / 'log.txt').read_text().splitlines()[-1])


def label_some(out, count):
    """labelled/: the first ``count`` training pictures of each class, as links, and the whole validation set."""
    for name in CLASSES:
        folder = out / 'labelled' / 'train' / name
        folder.mkdir(parents=True)
        for picture in sorted((out / 'data' / 'train' / name).iterdir())[:count]:
            (folder / picture.name).symlink_to(picture.resolve())
    (out / 'labelled' / 'val').symlink_to((out / 'data' / 'val').resolve())


def pretrain(out, name, epochs, common, *flags):
    return run('main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--batch_size', 64, '--mask_ratio', 0.75, '--epochs', epochs,
               '--warmup_epochs', 1, '--blr', '4e-3', '--weight_decay', 0.05, '--data_path', out / 'data',
               '--output_dir', out / name, '--log_dir', out / name, *flags, *common)


def classify(out, kind, start, common):
    """Probe (kind linear) or fine-tune (finetune) from each start; rows of the table.

    start: {name: checkpoint, '' for random weights}.
    """
    script, flags = {
        'linear': ('main_linprobe.py', ['--epochs', 3, '--lr', 8]),
        'finetune': ('main_finetune.py', ['--epochs', 2, '--lr', '1e-3', '--global_pool', '--aa', '', '--reprob', 0]),
    }[kind]
    rows = {}
    for name, checkpoint in start.items():
        folder = out / kind / name.split()[0].lower()
        seconds = run(script, '--model', 'vit_tiny_patch8', '--nb_classes', len(CLASSES), '--batch_size', 32,
                      '--warmup_epochs', 0, '--data_path', out / 'labelled', '--finetune', checkpoint,
                      '--output_dir', folder, '--log_dir', folder, *flags, *common)
        rows[name] = {'top1': last_line(folder)['test_acc1'], 'seconds': seconds}
    return rows


def print_table(results):
    print(f'\n{"start":16}{"pretraining":>14}{"linear top-1":>22}{"fine-tuned top-1":>22}')
    for start, row in results['starts'].items():
        cells = [f'{of["top1"]:.1f} %  ({of["seconds"]:.0f} s)' for of in (row['linear'], row['finetune'])]
        print(f'{start:16}{row["pretraining"]:>12.0f} s{cells[0]:>22}{cells[1]:>22}')
    print(f'\n{results["images"]} validation pictures, {results["labels"]} labelled ones to learn from, seed {results["seed"]}, '
          f'the same epochs for each start. Chance is {100 / len(CLASSES):.1f} %.\n'
          f'The teacher, told the classes by captions alone, is right in {results["teacher"]:.1%}; its own training took '
          f'{results["teacher_seconds"]:.0f} s more.\nIts captions name the classes, so that MILAN learns from labels at second '
          'hand, and MAE from none.')


def get_args_parser():
    parser = Parser('tools.demo.run', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output_dir', default='demo_output', metavar='DIR', help='where all files of the demo go')
    parser.add_argument('--seed', default=0, type=bounded(int, 0, 2**63 - 1), metavar='N', help='of all draws')
    parser.add_argument('--quick', action='store_true', help='a few pictures and steps, to see that it works')
    return parser


def main(args):
    out, seed = Path(args.output_dir), ['--seed', args.seed]
    quick = ['--quick'] if args.quick else []
    common = ['--input_size', 64, '--device', 'cpu', '--num_workers', 2, *seed]
    epochs = 2
    clear(out)
    start = time.time()

    stage(1, 'Drawing captioned pictures: shapes with textures on mixed backgrounds')
    run('-m', 'tools.demo.draw', '--output_dir', out, *seed, *quick)
    label_some(out, 8 if args.quick else 125)
    stage(2, 'Training the teacher, a small CLIP, from scratch on pictures and captions')
    teacher_seconds = run('-m', 'tools.demo.train_clip', '--output_dir', out, *seed, *quick)

    stage(3, 'Pretraining MILAN with that teacher: the real script, the published flags')
    seconds = {'MILAN': pretrain(out, 'milan', epochs, common, '--clip_path', out / 'clip_demo.pth.tar', '--use_clip',
                                 '--change_decoder', '--attn_mask')}
    stage(4, 'Pretraining MAE: the same script without these flags')
    seconds['MAE'] = pretrain(out, 'mae', epochs, common, '--norm_pix_loss')
    seconds['random weights'] = 0.0
    starts = {'MILAN': out / f'milan/checkpoint-{epochs - 1}.pth', 'MAE': out / f'mae/checkpoint-{epochs - 1}.pth',
              'random weights': ''}

    stage(5, 'Linear probing from three starts: a linear classifier on frozen features, few labels')
    linear = classify(out, 'linear', starts, common)
    stage(6, 'Fine-tuning from the same starts with the same labels')
    finetune = classify(out, 'finetune', starts, common)

    results = {
        'teacher': json.loads((out / 'teacher.json').read_text())['zero_shot'], 'seed': args.seed,
        'teacher_seconds': teacher_seconds, 'images': len(list((out / 'data' / 'val').rglob('*.png'))),
        'labels': len(list((out / 'labelled' / 'train').rglob('*.png'))),
        'starts': {name: {'pretraining': seconds[name], 'linear': linear[name], 'finetune': finetune[name]} for name in starts}}
    (out / 'results.json').write_text(json.dumps(results, indent=2))
    stage(7, 'Drawing the figures')
    run('-m', 'tools.demo.figure', '--output_dir', out)

    print_table(results)
    print(f"""
Demo finished in {time.time() - start:.0f} s. The results are in {out.resolve()}:
  figure.png               images, the teacher's importance, sampled masks
  text_query.png           texts compared with what MILAN predicts for hidden patches
  results.png              the table above as a picture (results.json: as numbers)
  loss.png                 the curve of MILAN's pretraining loss
  milan/, mae/             pretraining checkpoints and log.txt
  linear/, finetune/       classifiers from the three starts; curves: tensorboard --logdir {out}
  clip_demo.pth.tar        the teacher, in the format of OpenAI's state dicts
  data/, captions_*.jsonl  the pictures and their captions""")


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except OSError as e:
        sys.exit(f'error: --output_dir cannot be written to: {one_line(str(e))}')
