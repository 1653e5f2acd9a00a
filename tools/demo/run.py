"""The demo: draw a data set, train a small CLIP on its captions, pretrain MILAN with that teacher, show the results.

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


def stage(number, title, *command):
    """Run one stage as a process of its own, showing its command and its time; its failure ends the demo."""
    print(f'\n=== {number}/4 {title}\n$ {shlex.join(["python", *command])}', flush=True)
    start = time.time()
    status = subprocess.run([sys.executable, *command]).returncode
    if status != 0:
        sys.exit(f'error: the demo ended in stage {number}, status {status}; its message stands above')
    print(f'=== done in {time.time() - start:.0f} s', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output_dir', default='demo_output', metavar='DIR')
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--quick', action='store_true', help='a few pictures and steps, to see that it works')
    args = parser.parse_args()
    out, seed = Path(args.output_dir), ['--seed', str(args.seed)]
    epochs, warmup = (2, 1) if args.quick else (3, 1)
    quick = ['--quick'] if args.quick else []

    out.mkdir(parents=True, exist_ok=True)
    for mine in ('data', 'pretrain'):
        shutil.rmtree(out / mine, ignore_errors=True)
    start = time.time()
    stage(1, 'Drawing captioned pictures: shapes with textures on mixed backgrounds',
          '-m', 'tools.demo.draw', '--output_dir', str(out), *seed, *quick)
    stage(2, 'Training the teacher, a small CLIP, from scratch on pictures and captions',
          '-m', 'tools.demo.train_clip', '--output_dir', str(out), *seed, *quick)
    stage(3, 'Pretraining MILAN with that teacher: the real script, the published flags',
          'main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--input_size', '64', '--batch_size', '64',
          '--mask_ratio', '0.75', '--epochs', str(epochs), '--warmup_epochs', str(warmup), '--blr', '4e-3',
          '--weight_decay', '0.05', '--data_path', str(out / 'data'),
          '--output_dir', str(out / 'pretrain'), '--log_dir', str(out / 'pretrain'),
          '--clip_path', str(out / 'clip_demo.pth.tar'), '--use_clip', '--change_decoder', '--attn_mask',
          '--device', 'cpu', '--num_workers', '2', *seed)
    stage(4, 'Drawing the figures', '-m', 'tools.demo.figure', '--output_dir', str(out))

    losses = [json.loads(line)['train_loss'] for line in (out / 'pretrain' / 'log.txt').read_text().splitlines()]
    print(f"""
The loss went from {losses[0]:.3f} to {losses[-1]:.3f} (mean of the first and the last epoch); 2 means that the predictions have
nothing to do with the teacher's features, 0 that they point the same way for every patch, hidden or seen.

Demo finished in {time.time() - start:.0f} s. The results are in {out.resolve()}:
  figure.png               images, the teacher's importance, sampled masks
  loss.png                 the loss curve
  pretrain/                checkpoints and log.txt; curves: tensorboard --logdir {out / 'pretrain'}
  clip_demo.pth.tar        the teacher, in the format of OpenAI's state dicts
  data/, captions_*.jsonl  the pictures and their captions""")


if __name__ == '__main__':
    main()
