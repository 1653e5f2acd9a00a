"""The demo's pictures: what the teacher attends to, which patches that leaves visible, what texts say of hidden ones, how
the loss went, what came of it.

    python -m tools.demo.figure --output_dir demo_output
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
from models_milan import count_visible, patch_order
from tools import visualize
from tools.demo.draw import CLASSES
from tools.demo.train_clip import load_split, normalise, prompt
from util.misc import run
from util.parser import Parser
from util.seeding import sample_noise
from util.visualize import first_patches, heat_over, hide, look

try:
    import matplotlib
except ImportError:
    sys.exit('error: the figures need matplotlib; pip install matplotlib')
matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

MASK_RATIO = 0.75


@torch.no_grad()
def masks(output_dir, count=5):
    """figure.png: a column a validation picture of another class; rows from picture to masks."""
    images, lines = load_split(output_dir, 'val')
    by_class = {line['class']: i for i, line in reversed(list(enumerate(lines)))}
    names = sorted(by_class)
    chosen = [by_class[names[k * len(names) // count]] for k in range(count)]
    images, lines = images[chosen], [lines[i] for i in chosen]

    model, _ = clip.load(str(Path(output_dir) / 'clip_demo.pth.tar'), 'cpu')
    _, importance = model.encode_tokens(normalise(images))
    length = importance.shape[1]
    noise = [sample_noise(0, epoch, torch.tensor(chosen), length) for epoch in range(3)]
    orders = [patch_order(noise[0], importance), patch_order(noise[1], importance), patch_order(noise[2])]
    pixels = images.permute(0, 2, 3, 1).numpy()
    panels = [pixels, heat_over(pixels, importance)]
    panels += [hide(pixels, first_patches(ids, count_visible(length, MASK_RATIO))) for ids in orders]

    rows = ['image', "teacher's\nimportance", 'visible,\nsemantic aware', 'visible,\nanother draw', 'visible,\nuniform']
    figure, axes = plt.subplots(len(rows), count, figsize=(1.5 * count, 1.5 * len(rows)), dpi=100)
    for column in range(count):
        axes[0, column].set_title(lines[column]['class'], fontsize=10)
        for ax, panel in zip(axes[:, column], panels):
            ax.imshow(panel[column])
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=10)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(output_dir) / 'figure.png')
    plt.close(figure)


def text_query(output_dir, classes=('striped', 'bricked'), others=('ringed', 'plain')):
    """text_query.png: the first validation picture of two classes, and what texts say of patches hidden from MILAN."""
    out = Path(output_dir)
    files = [min((out / 'data' / 'val' / name).iterdir()) for name in classes]
    texts = [prompt(name) for name in (*classes, *others)]
    flags = [out / 'milan' / 'checkpoint-last.pth', *files, '--text', *texts, '--clip_path', out / 'clip_demo.pth.tar',
             '--device', 'cpu']
    parts = visualize.prepare(visualize.get_args_parser().parse_args([str(flag) for flag in flags]))
    seen = look(parts.model, parts.teacher, torch.cat(parts.images), parts.settings.mask_ratio)
    rows, value_range = visualize.text_rows(seen, parts.features, parts.scale)
    figure = visualize.new_figure(1 + len(texts), len(rows) * len(files))
    figure.suptitle('What is hidden here? Texts compared with the tokens that MILAN predicts for patches it does not see\n'
                    f"Light: the text fits. Upper rows: the demo's teacher; lower rows: MILAN after "
                    f'{parts.settings.epochs} epochs')
    axes = figure.subplots(len(rows) * len(files), 1 + len(texts))
    for n in range(len(files)):
        visualize.add_text_maps(axes[n * len(rows):(n + 1) * len(rows)], n, texts, rows, value_range)
    figure.savefig(out / 'text_query.png', dpi=80)


def loss_curve(output_dir):
    """loss.png from the TensorBoard events of the pretraining, a point a step."""
    events = EventAccumulator(str(Path(output_dir) / 'milan')).Reload()
    loss = events.Scalars('train_loss')
    figure, ax = plt.subplots(figsize=(6, 3.5), dpi=100)
    ax.plot([e.step / 1000 for e in loss], [e.value for e in loss])
    ax.set_ylim(bottom=0)
    ax.set_xlabel('epoch')
    ax.set_ylabel('loss: 2 - 2 cos(prediction, target)')
    ax.set_title('MILAN pretraining')
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(output_dir) / 'loss.png')
    plt.close(figure)


def bars(output_dir):
    """results.png from results.json: top-1 of each start beside the teacher's own and chance."""
    results = json.loads((Path(output_dir) / 'results.json').read_text())
    figure, ax = plt.subplots(figsize=(6, 3.5), dpi=100)
    kinds = {'linear': 'linear probing', 'finetune': 'fine-tuning'}
    for k, (kind, label) in enumerate(kinds.items()):
        values = [row[kind]['top1'] for row in results['starts'].values()]
        drawn = ax.bar([i + 0.36 * (k - 0.5) for i in range(len(values))], values, width=0.34, label=label)
        ax.bar_label(drawn, fmt='%.1f', fontsize=8)
    ax.axhline(100 * results['teacher'], color='black', linestyle='--', zorder=0, label='teacher, zero-shot by captions')
    ax.axhline(100 / len(CLASSES), color='gray', linestyle=':', zorder=0, label='chance')
    ax.set_xticks(range(len(results['starts'])), results['starts'])
    ax.set_ylim(0, 100)
    ax.set_ylabel('top-1 accuracy, %')
    ax.set_title(f'{results["labels"]} labels, {results["images"]} validation pictures, seed {results["seed"]}', fontsize=10)
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(output_dir) / 'results.png')
    plt.close(figure)


def get_args_parser():
    parser = Parser('tools.demo.figure', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output_dir', default='demo_output', metavar='DIR', help='where all files of the demo are')
    return parser


def main(args):
    masks(args.output_dir)
    text_query(args.output_dir)
    loss_curve(args.output_dir)
    bars(args.output_dir)


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
