"""Draws what a checkpoint makes of pictures: importance and masks, features as colours, predictions of hidden patches, and
what texts say of them.

    python tools/visualize.py OUT/checkpoint-399.pth dog.jpg cat.png --text "a dog" "a cat" "grass" --output_dir looks

A figure a picture, looks/dog-visualized.png. How the checkpoint was trained is read from it; flags say otherwise.
"""

import argparse
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds its own folder

import main_pretrain  # noqa: E402
from models_milan import MODELS, MaskedAutoencoderViT, count_visible  # noqa: E402
from tools.export import arguments_of, classifier_of  # noqa: E402
from util.arguments import Device, Parser, bounded, choose_device  # noqa: E402
from util.checkpoint import read_weights  # noqa: E402
from util.datasets import build_transform, normalise  # noqa: E402
from util.errors import UserError, as_user_error, first_line  # noqa: E402
from util.images import ImageFile, UnreadableImage  # noqa: E402
from util.misc import run  # noqa: E402
from util.teacher import build_teacher, check_teacher  # noqa: E402
from util.texts import read_texts, text_tower  # noqa: E402
from util.visualize import colours, draw_panels, hide, look, text_maps  # noqa: E402

COLUMNS = 4
TEACHER_FLAGS = 'clip_path', 'teacher', 'teacher_path', 'use_clip_dino', 'use_clip_slip'

TITLES = {
    'image': 'the picture',
    'importance': "importance: the teacher's\nattention (dark: none)",
    'visible_semantic': 'visible patches,\ndrawn by importance',
    'visible_uniform': 'visible patches,\ndrawn uniformly',
    'encoder': 'encoder features,\nall patches visible (PCA)',
    'teacher': "the teacher's tokens, from\nall patches: the target (PCA)",
    'prediction': 'their prediction from\nvisible patches (same PCA)',
    'agreement': 'cosine of prediction and\ntarget (dark: 0, light: 1)',
    'reconstruction': 'visible patches, and predicted\npixels of the hidden ones',
}
NORM_PIX = 'predicted patches, given their\ntrue brightness and contrast'  # reconstruction, with norm_pix_loss


# ---- what the checkpoint is ----

def settings_of(args, checkpoint):
    """The flags of main_pretrain.py: ``args`` where they say so, else the checkpoint's own, else the script's defaults."""
    saved = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else {}
    defaults = vars(main_pretrain.get_args_parser().parse_args([]))
    saved = {name: value for name, value in saved.items()
             if defaults.get(name) is None or isinstance(value, type(defaults[name]))}  # or it is another project's flag
    given = {name: value for name, value in vars(args).items() if value is not None}
    if 'clip_path' in given or 'teacher' in given:  # in place of its own teacher
        saved = {name: value for name, value in saved.items() if name not in TEACHER_FLAGS}
    merged = {**defaults, 'model': None, **saved, **given}
    return argparse.Namespace(**{**merged, 'amp': 'fp32', 'compile': False})


def build_model(settings, state_dict, path):
    """The model with the checkpoint's weights, in eval mode; with decoder_depth=0 where the file has no decoder."""
    build = build_whole if 'decoder_pred.weight' in state_dict else build_encoder
    model = build(settings, state_dict, f'checkpoint {path}')
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f'checkpoint {path} has weights that are not finite; there is nothing to see in them')
    return model.eval()


def build_whole(settings, state_dict, where):
    """Encoder and decoder, as the settings say."""
    if settings.model not in MODELS:
        said = f'names the model {settings.model}, unknown here' if settings.model else 'does not say what its model is'
        raise UserError(f'{where} {said}: give --model, and --use_clip, --change_decoder, --attn_mask, --norm_pix_loss as it '
                        f'was trained; the models are {", ".join(MODELS)}')
    with as_user_error(f'{where}, --model {settings.model}', ValueError, TypeError):
        model = main_pretrain.build_model(settings, state_dict['decoder_pred.weight'].shape[0])
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        reason = textwrap.shorten(''.join(str(e).splitlines()[1:2]), 200, placeholder=' ...')
        raise UserError(f'{where} is not of --model {settings.model} and its flags: {reason}') from e
    return model


def build_encoder(settings, state_dict, where):
    """The encoder alone, as the shapes say; sets settings.input_size."""
    tensors = classifier_of(state_dict)
    with as_user_error(f'{where} is not a plain ViT, or not a whole one', ValueError, AssertionError):
        arguments = arguments_of(tensors, settings.model)
        if arguments['in_chans'] != 3:
            raise ValueError(f'its pictures have {arguments["in_chans"]} channels')
        model = MaskedAutoencoderViT(decoder_depth=0, **arguments)
    # a classifier that pools globally has its norm after the pooling
    tensors = {name.removeprefix('fc_'): value for name, value in tensors.items() if not name.startswith('head')}
    model.load_state_dict(tensors, strict=False)
    settings.input_size = arguments['img_size']
    settings.model = settings.model or 'the encoder'
    return model


def open_teacher(args, settings, model, device):
    """The teacher that the model learned from, or the one of the flags; None without, and with --clip_path ''."""
    given = [name for name in (args.clip_path, args.teacher) if name is not None]
    if not (any(given) if given else settings.use_clip):
        return None
    check_teacher(argparse.Namespace(**vars(settings)))
    teacher = build_teacher(settings, model.patch_embed.grid_size[0], device)
    if len(model.decoder_blocks) and model.use_clip and teacher.dim != model.decoder_pred.out_features:
        raise UserError(f'the tokens of this teacher are {teacher.dim} wide and the model predicts '
                        f'{model.decoder_pred.out_features}: name the one that it was trained with')
    return teacher


def left_out(model, teacher, texts):
    """What cannot be drawn and why, in one line; '' if all is."""
    parts = []
    if teacher is None:
        parts.append('importance and masks by it (no teacher: give --clip_path)')
    if not len(model.decoder_blocks):
        parts.append('predictions of hidden patches (no decoder in the checkpoint)')
    elif not model.use_clip and texts:
        parts.append('texts beside the predictions (which are pixels)')
    return '; '.join(parts)


# ---- the figure ----

def show(ax, panel, title='', below='', left=''):
    """One panel [H, W, 3] without ticks; whatever stands in the texts is no formula."""
    ax.imshow(panel, interpolation='nearest')
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set_xlabel(below, fontsize=9, parse_math=False)
    ax.set_ylabel(left, fontsize=10, parse_math=False)


def text_rows(seen, features, scale):
    """What texts say of the pictures: a row for the teacher's tokens and, where there are any, one for predictions.

    Returns:
        rows: [(who sees what, what is seen [N, H, W, 3], K maps [N, H, W, 3], scores [N, K] of whole pictures)].
        value_range: of the maps' colours; see score_range.
    """
    drawn, value_range = text_maps(seen, features, scale)
    kinds = [('the teacher sees\nthe whole picture', seen.pixels),
             ('the model sees\nonly these patches', hide(seen.pixels, seen.visible))]
    return [(*kind, *maps) for kind, maps in zip(kinds, drawn.values())], value_range


def add_text_maps(axes, n, texts, rows, value_range, first=0):
    """Rows of text_rows for the n-th picture into ``axes`` [rows, 1 + texts], as many of texts[first:] as have room."""
    several = len(texts) > 1
    for row, (line, (label, panel, maps, whole)) in enumerate(zip(axes, rows)):
        show(line[0], panel[n], left=label)
        shown = range(first, min(first + len(line) - 1, len(texts)))
        for ax, k in zip(line[1:], shown):
            value = f'{whole[n, k]:.0%}' if several else f'{whole[n, k]:+.3f}'
            title = textwrap.fill(f'"{texts[k]}"', 28) if row == 0 else ''
            show(ax, maps[k][n], title, f'the picture as a whole: {value}')
        for ax in line[1 + len(shown):]:
            ax.set_axis_off()
        add_bar(line[len(shown)], value_range, 'how well the text fits,\ncompared with the others' if several
                else 'cosine to the text, minus\nits mean over the picture')


def add_bar(ax, value_range, label):
    """The colours of a value_range and their numbers, to the right of a panel."""
    low, high, scale = value_range
    bar = ax.inset_axes([1.05, 0, 0.06, 1])
    bar.imshow(colours(np.linspace(1, 0, 256), 0, 1, scale)[:, None], aspect='auto', extent=[0, 1, low, high])
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position('right')
    bar.tick_params(labelsize=8)
    bar.set_ylabel(label, fontsize=9)


def new_figure(columns, rows):
    """An empty matplotlib figure for ``rows`` x ``columns`` panels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError('figures need matplotlib, which is not here: pip install matplotlib') from e
    return Figure(figsize=(2.6 * columns + 0.8, 2.9 * rows), layout='constrained')


def draw_figure(panels, titles, name, texts, rows, value_range):
    """The panels of one picture, and the text maps below them, as a matplotlib figure."""
    panel_rows = math.ceil(len(panels) / COLUMNS)
    columns = max(min(len(panels), COLUMNS), min(1 + len(texts), COLUMNS))
    groups = range(0, len(texts), columns - 1)
    heights = [panel_rows, *[len(rows) for _ in groups]]
    figure = new_figure(columns, sum(heights))
    figure.suptitle(name, fontsize=12, parse_math=False)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(panel_rows, columns, squeeze=False).ravel()
    for ax, (panel, pixels) in zip(axes, panels.items()):
        show(ax, pixels[0], titles[panel])
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    for part, first in zip(parts[1:], groups):
        add_text_maps(part.subplots(len(rows), columns, squeeze=False), 0, texts, rows, value_range, first)
    return figure


def output_names(paths):
    """dog-visualized.png for a/dog.jpg, and dog-visualized-2.png for the next picture of that name."""
    names = []
    for path in paths:
        stem, k = f'{Path(path).stem}-visualized', 1
        while (name := f'{stem}.png' if k == 1 else f'{stem}-{k}.png').lower() in [n.lower() for n in names]:
            k += 1
        names.append(name)
    return names


# ---- the command ----

def get_args_parser():
    parser = Parser('tools/visualize.py', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='of pretraining; of any other, what its encoder shows')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='pictures of any format and size, cut as in evaluation')
    parser.add_argument('--text', nargs='+', metavar='TEXT',
                        help='draw how well each text describes the patches, hidden ones too: its share among several texts '
                             '(softmax), or the cosine minus its mean where it is the only one')
    parser.add_argument('--output_dir', default='./visualized', metavar='DIR', help='a NAME-visualized.png for each picture')
    parser.add_argument('--seed', default=0, type=bounded(int, 0, 2**63 - 1), metavar='N', help='of the masks')
    parser.add_argument('--device', default='cuda', action=Device, metavar='DEVICE',
                        help='cuda or cpu; without CUDA the default is cpu')

    group = parser.add_argument_group('how it was trained, where the checkpoint does not say or you want to see otherwise')
    group.add_argument('--model', choices=MODELS, metavar='NAME', help=', '.join(MODELS))
    group.add_argument('--input_size', type=bounded(int, 1, 4096), metavar='PIXELS', help='pixels along a side')
    group.add_argument('--mask_ratio', type=bounded(float, 0, 1, open_high=True), metavar='SHARE', help='share of patches hidden')
    group.add_argument('--clip_path', metavar='FILE|NAME', help="the teacher, which --text asks too; '': none")
    group.add_argument('--teacher', metavar='NAME', help="a teacher in place of --clip_path's")
    group.add_argument('--teacher_path', metavar='FILE', help='its weights')
    group.add_argument('--teacher_norm', choices=['imagenet', 'own'], help="what normalises the teacher's input")
    for name, text in (('use_clip', "it predicts the teacher's features"),
                       ('pixel_target', 'or pixels, with the masks of its teacher'),
                       ('change_decoder', 'it has the prompting decoder'),
                       ('attn_mask', 'predict from patches drawn by importance'),
                       ('norm_pix_loss', 'its pixels are normalised per patch')):
        group.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, help=text)
    return parser


def prepare(args):
    """All that the flags name, read and checked.

    Returns:
        Namespace of settings (see settings_of), model, teacher (or None), images (a list of [1, 3, H, W] on the device), and
        features and scale of the texts (see read_texts), which are None where there is no text.
    """
    args.text = args.text or []
    choose_device(args)
    device = torch.device(args.device)
    checkpoint, state_dict = read_weights(args.checkpoint)
    settings = settings_of(args, checkpoint)
    model = build_model(settings, state_dict, args.checkpoint).to(device)
    length = model.patch_embed.num_patches
    if count_visible(length, settings.mask_ratio) < 1:
        raise UserError(f'--mask_ratio {settings.mask_ratio} leaves none of {length} patches visible')
    transform = build_transform(False, settings)
    images = [read_picture(path, transform)[None].to(device) for path in args.images]
    teacher = open_teacher(args, settings, model, device)
    tower = text_tower(settings) if teacher else ''
    features, scale = read_texts('--text', args.text, tower) if args.text else (None, None)
    return argparse.Namespace(settings=settings, model=model, teacher=teacher, images=images, features=features,
                              scale=scale)


def main(args):
    parts = prepare(args)
    with as_user_error(f'--output_dir {args.output_dir} cannot be written to', OSError):
        os.makedirs(args.output_dir, exist_ok=True)
    missing = left_out(parts.model, parts.teacher, args.text)
    if missing:
        print(f'Left out: {missing}')
    titles = {**TITLES, 'reconstruction': NORM_PIX} if parts.model.norm_pix_loss else TITLES
    for path, image, name in zip(args.images, parts.images, output_names(args.images)):
        seen = look(parts.model, parts.teacher, image, parts.settings.mask_ratio, args.seed)
        rows, value_range = text_rows(seen, parts.features, parts.scale) if args.text else ([], None)
        figure = draw_figure(draw_panels(seen), titles, os.path.basename(path), args.text, rows, value_range)
        out = os.path.join(args.output_dir, name)
        with as_user_error(f'{out} could not be written', OSError):
            figure.savefig(out, dpi=110)
        print(f'{path} -> {out}')


def read_picture(path, transform):
    """Picture file -> [3, H, W] as evaluation sees it, normalised."""
    try:
        return normalise(transform(ImageFile(path)))
    except UnreadableImage as e:
        reason = re.sub(r' <_io\.\S+ object at \S+>', '', first_line(e))
        raise UserError(f'{path} cannot be read as a picture: {reason}') from e


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
