"""Draw the demo's figures: masks, text queries, the loss, and the results.

python -m tools.demo.figure --output_dir demo_output
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
from models_milan import MODELS
from models_teacher import Teacher, read_texts
from tools.demo.draw import CLASSES, demo_parser
from tools.demo.train_clip import load_split, prompt
from util import cli, datasets, errors, masking, panels
from util.checkpoints.io import read_weights
from util.data.image_file import ImageFile

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit('error: the figures need matplotlib; pip install matplotlib')

MASK_RATIO = 0.75


# A figure of pictures in rows: (label, pictures, text below each picture) each.
def _draw_grid(rows, titles, width, height, **options):
    figure = Figure((width * len(titles), height * len(rows)), **options)
    axes = figure.subplots(len(rows), len(titles))
    for line, (label, pictures, notes) in zip(axes, rows):
        line[0].set_ylabel(label, fontsize=10)
        for ax, panel, note in zip(line, pictures, notes):
            ax.imshow(panel)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(note, fontsize=9)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=10)
    return figure


# figure.png: a column per validation image, each of another class.
@torch.no_grad()
def _draw_masks(out, teacher):
    images, lines = load_split(str(out), 'val')
    by_class = {line['class']: i for i, line in reversed(list(enumerate(lines)))}
    names = [sorted(by_class)[k * len(by_class) // 5] for k in range(5)]
    ids = torch.tensor([by_class[name] for name in names])
    _, importance = teacher(datasets.normalize(images[ids]))
    noise = [masking.sample_noise(0, epoch, ids, importance.shape[1]) for epoch in range(3)]
    orders = {
        'visible,\nsemantic aware': masking.patch_order(noise[0], importance),
        'visible,\nanother draw': masking.patch_order(noise[1], importance),
        'visible,\nuniform': masking.patch_order(noise[2]),
    }
    visible = masking.count_visible(importance.shape[1], MASK_RATIO)
    pixels = images[ids].permute(0, 2, 3, 1).numpy()
    rows = {'image': pixels, "teacher's\nimportance": panels.heat_over(pixels, importance)}
    rows |= {k: panels.hide(pixels, order.argsort(dim=1) < visible) for k, order in orders.items()}
    rows = [(label, pictures, [''] * len(names)) for label, pictures in rows.items()]
    figure = _draw_grid(rows, names, 1.5, 1.5, dpi=100)
    figure.tight_layout(pad=0.4)
    figure.savefig(out / 'figure.png')


# text_query.png: how well texts match two validation images and their hidden parts.
def _draw_text_query(out, teacher, clip_path):
    checkpoint, weights = read_weights(out / 'milan' / 'checkpoint-last.pth')
    flags = checkpoint['args']
    model = MODELS[flags.model](
        img_size=flags.input_size,
        target_dim=teacher.dim,
        use_clip=True,
        attn_mask=True,
        change_decoder=True,
    )
    model.load_state_dict(weights)

    texts = [prompt(name) for name in ('striped', 'bricked', 'ringed', 'plain')]
    files = [min((out / 'data' / 'val' / name).iterdir()) for name in ('striped', 'bricked')]
    transform = datasets.build_transform(False, flags.input_size)
    images = datasets.normalize(torch.stack([transform(ImageFile(file)) for file in files]))
    outputs = panels.run_model(model, teacher, images, flags.mask_ratio)
    maps, _ = panels.text_maps(outputs, *read_texts('--text', texts, clip_path))
    rows = [
        (label, [left[n], *pictures[:, n]], ['', *(f'whole image: {s:.0%}' for s in scores[n])])
        for n in range(len(files))
        for label, left, (pictures, scores) in zip(
            ('teacher,\nall patches', 'MILAN,\nvisible patches'),
            (outputs.pixels, panels.hide(outputs.pixels, outputs.visible)),
            maps.values(),
        )
    ]
    figure = _draw_grid(rows, ['', *texts], 2.6, 2.9, layout='constrained')
    figure.suptitle(
        'Texts compared with the tokens of the teacher (upper rows) and with those that MILAN '
        f'predicts for hidden patches\nafter {flags.epochs} epochs (lower rows). '
        'Light: the text fits better than the others'
    )
    figure.savefig(out / 'text_query.png', dpi=80)


# loss.png: a point per step, from the TensorBoard events of MILAN's pretraining.
def _draw_loss(out):
    loss = EventAccumulator(str(out / 'milan')).Reload().Scalars('train_loss')
    ax = Figure((6, 3.5), dpi=100, layout='tight').subplots()
    ax.plot([e.step / 1000 for e in loss], [e.value for e in loss])
    ax.set(xlabel='epoch', ylabel='loss: 2 - 2 cos(prediction, target)')
    ax.set(ylim=(0, None), title='MILAN pretraining')
    ax.grid(alpha=0.3)
    ax.figure.savefig(out / 'loss.png')


# results.png from results.json: top-1 of each start, of the teacher, and by chance.
def _draw_results(out):
    results = json.loads((out / 'results.json').read_text())
    starts, teacher = results['starts'], 100 * results['teacher']
    ax = Figure((6, 3.5), dpi=100, layout='tight').subplots()
    for shift, kind, label in (
        (-0.18, 'linear', 'linear probing'),
        (0.18, 'finetune', 'fine-tuning'),
    ):
        values = [row[kind]['top1'] for row in starts.values()]
        bars = ax.bar([i + shift for i in range(len(starts))], values, width=0.34, label=label)
        ax.bar_label(bars, fmt='%.1f', fontsize=8)
    ax.axhline(teacher, color='black', linestyle='--', zorder=0, label='teacher, zero-shot')
    ax.axhline(100 / len(CLASSES), color='gray', linestyle=':', zorder=0, label='chance')
    ax.set_xticks(range(len(starts)), starts)
    ax.set(ylim=(0, 100), ylabel='top-1 accuracy, %')
    numbers = f'{results["labels"]} labels, {results["images"]} validation images'
    ax.set_title(f'{numbers}, seed {results["seed"]}', fontsize=10)
    ax.legend(fontsize=8)
    ax.figure.savefig(out / 'results.png')


def get_args_parser() -> argparse.ArgumentParser:
    return demo_parser('figure', __doc__)


def main(args: argparse.Namespace) -> None:
    out = Path(args.output_dir)
    clip_path = str(out / 'clip_demo.pth.tar')
    context = f'--output_dir {out}: the figures need all files of python -m tools.demo.run'
    with errors.as_user_error(context, OSError, ValueError, KeyError):
        teacher = Teacher(clip.load(clip_path, 'cpu')[0].visual)
        _draw_masks(out, teacher)
        _draw_text_query(out, teacher, clip_path)
        _draw_loss(out)
        _draw_results(out)


if __name__ == '__main__':
    cli.run(main, get_args_parser().parse_args())
