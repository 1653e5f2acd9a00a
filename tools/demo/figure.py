"""Draw the demo's figures: masks, text queries, the loss, and the results."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
from models_milan import MODELS
from models_teacher import Teacher, read_texts
from tools.demo.draw import CLASSES
from tools.demo.train_clip import PROMPT, load_split
from util import datasets, masking, panels
from util.checkpoints.io import read_weights
from util.data.image_file import ImageFile


# The cells of panels.draw_grid. Each row is (label, images, texts below the images).
def _cells(rows, titles):
    return {
        (r, c): (picture, '' if r else titles[c], note, '' if c else label)
        for r, (label, *columns) in enumerate(rows)
        for c, (picture, note) in enumerate(zip(*columns))
    }


# figure.png: a column per validation image, each of another class.
@torch.no_grad()
def _draw_masks(out, teacher):
    names = ['bricked', 'checkered', 'gridded', 'plain', 'striped']
    ids = torch.tensor([list(CLASSES).index(name) for name in names])  # the first of each class
    images = load_split(out, 'val')[0][ids]
    _, importance = teacher(datasets.normalize(images))
    length = importance.shape[1]
    first, second, third = (masking.sample_noise(0, draw, ids, length) for draw in range(3))
    orders = {
        'visible,\nsemantic aware': masking.patch_order(first, importance),
        'visible,\nanother draw': masking.patch_order(second, importance),
        'visible,\nuniform': masking.patch_order(third),
    }
    pixels, visible = images.permute(0, 2, 3, 1).numpy(), masking.count_visible(length, 0.75)
    rows = {'image': pixels, "teacher's\nimportance": panels.heat_over(pixels, importance)}
    rows |= {k: panels.hide(pixels, order.argsort(dim=1) < visible) for k, order in orders.items()}
    cells = _cells([(*row, [''] * len(names)) for row in rows.items()], names)
    panels.draw_grid(cells, 1.5, 1.5)[0].savefig(out / 'figure.png')


# text_query.png: how well texts match two validation images and their hidden parts.
def _draw_text_query(out, teacher, clip_path):
    checkpoint, weights = read_weights(out / 'milan' / 'checkpoint-last.pth')
    flags = checkpoint['args']
    method = dict(use_clip=True, attn_mask=True, change_decoder=True)
    model = MODELS[flags.model](img_size=flags.input_size, target_dim=teacher.dim, **method)
    model.load_state_dict(weights)
    texts = [PROMPT.format(name) for name in ('striped', 'bricked', 'ringed', 'plain')]
    files = [min((out / 'data' / 'val' / name).iterdir()) for name in ('striped', 'bricked')]
    transform = datasets.build_transform(False, flags.input_size)  # as tools.visualize sees them
    images = datasets.normalize(torch.stack([transform(ImageFile(file)) for file in files]))
    outputs = panels.run_model(model, teacher, images, flags.mask_ratio)
    maps, _ = panels.text_maps(outputs, *read_texts('--text', texts, clip_path))
    seen = {
        'teacher,\nall patches': outputs.pixels,
        'MILAN,\nvisible patches': panels.hide(outputs.pixels, outputs.visible),
    }
    rows = [
        (label, [left[n], *pictures[:, n]], ['', *(f'whole image: {s:.0%}' for s in scores[n])])
        for n in range(len(images))
        for (label, left), (pictures, scores) in zip(seen.items(), maps.values())
    ]
    figure, _ = panels.draw_grid(_cells(rows, ['', *texts]), 2.6, 2.9)
    figure.suptitle(
        'Texts compared with the tokens of the teacher (upper rows) and with those that MILAN '
        f'predicts for hidden patches\nafter {flags.epochs} epochs (lower rows). '
        'Light: the text fits better than the others'
    )
    figure.savefig(out / 'text_query.png', dpi=80)


# loss.png: a point per step, from the TensorBoard events of MILAN's pretraining. results.png from
# results.json: top-1 of each start, of the teacher, and by chance.
def _draw_plots(out):
    from matplotlib.figure import Figure  # panels.draw_grid has found it

    loss = EventAccumulator(str(out / 'milan')).Reload().Scalars('train_loss')
    ax = Figure((6, 3.5), dpi=100, layout='tight').subplots()
    ax.plot([e.step / 1000 for e in loss], [e.value for e in loss])
    ylabel = 'loss: 2 - 2 cos(prediction, target)'
    ax.set(xlabel='epoch', ylabel=ylabel, ylim=(0, None), title='MILAN pretraining')
    ax.grid(alpha=0.3)
    ax.figure.savefig(out / 'loss.png')

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


def draw_figures(out: Path) -> None:
    """Write all figures. ``out`` has the other files of the demo.

    Raises:
        UserError: if matplotlib is not installed.
    """
    clip_path = str(out / 'clip_demo.pth.tar')
    teacher = Teacher(clip.load(clip_path, 'cpu')[0].visual)
    _draw_masks(out, teacher)
    _draw_text_query(out, teacher, clip_path)
    _draw_plots(out)
