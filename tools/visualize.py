"""Draw masks, features and predictions of a checkpoint: one figure per image.

    python -m tools.visualize OUT/checkpoint-399.pth dog.jpg --text "a dog" "grass"

A figure such as visualized/dog-visualized.png shows importance and masks, encoder features
as colors, predictions for masked patches, and how well texts match the patches. Training
settings are read from the checkpoint; flags override them.
"""

import argparse
import os
import textwrap
from pathlib import Path

import numpy as np
import torch

from models_infer import classifier_tensors, infer_arguments
from models_milan import MODELS, MaskedAutoencoderViT
from models_teacher import (
    CLIP_PATH,
    LEGACY_TEACHERS,
    Teacher,
    TeacherSpec,
    build_teacher,
    read_texts,
)
from util import panels
from util.checkpoints.io import difference, read_weights
from util.cli import Parser, add_flags, bounded, run
from util.data.image_file import ImageFile, UnreadableImage
from util.datasets import build_transform, normalize
from util.errors import UserError, as_user_error, refuse
from util.masking import count_visible
from util.runtime import choose_device

# The flags of main_pretrain.py that model and teacher depend on, with their defaults.
DEFAULTS = {
    'model': '',
    'input_size': 224,
    'mask_ratio': 0.75,
    'use_clip': False,
    'pixel_target': False,
    'change_decoder': False,
    'attn_mask': False,
    'norm_pix_loss': False,
    'average_targets': 1,
    'clip_path': CLIP_PATH,
    'teacher': '',
    'teacher_path': '',
    'teacher_norm': 'imagenet',
    'use_clip_dino': False,
    'use_clip_slip': False,
}

TITLES = {
    'image': 'image',
    'importance': "importance: the teacher's\nattention (dark: none)",
    'visible_semantic': 'visible patches,\ndrawn by importance',
    'visible_uniform': 'visible patches,\ndrawn uniformly',
    'encoder': 'encoder features,\nall patches visible (PCA)',
    'teacher': 'target: tokens of the teacher\nfor all patches (PCA)',
    'prediction': 'prediction of the target from\nvisible patches (same PCA)',
    'agreement': 'cosine of prediction and\ntarget (dark: 0, light: 1)',
    'reconstruction': 'visible patches, and\npredictions of masked pixels',
    'norm_pix_loss': 'predicted patches with the true\nbrightness and contrast',
}


# ---- the model and its teacher ----


def resolve_settings(given: dict[str, object], checkpoint: dict) -> argparse.Namespace:
    """Return the value of each flag in DEFAULTS: as given, else the checkpoint's, else the default.

    Args:
        given: values of flags by name. Names that are not in DEFAULTS and values that are
            None are ignored.
        checkpoint: content of the checkpoint file. Flags of another type than ours are
            ignored: they belong to another project.
    """
    given = {k: v for k, v in given.items() if k in DEFAULTS and v is not None}
    args = checkpoint.get('args')
    saved = vars(args) if isinstance(args, argparse.Namespace) else {}
    saved = {k: saved[k] for k, v in DEFAULTS.items() if type(saved.get(k)) is type(v)}
    # naming a teacher implies --use_clip
    saved['use_clip'] = any(map(saved.get, ('use_clip', 'teacher', *LEGACY_TEACHERS)))
    # a given teacher replaces the checkpoint's
    if given.keys() & {'clip_path', 'teacher'}:
        names = 'clip_path', 'teacher', 'teacher_path', *LEGACY_TEACHERS
        saved |= {name: DEFAULTS[name] for name in names}
    return argparse.Namespace(**{**DEFAULTS, **saved, **given})


def build_model(
    settings: argparse.Namespace, state_dict: dict[str, torch.Tensor], context: str
) -> MaskedAutoencoderViT:
    """Return the model with the weights of a checkpoint, in eval mode.

    Args:
        settings: how it was trained, see ``resolve_settings``.
        state_dict: its tensors. Without a decoder among them, the model has
            decoder_depth=0 and its arguments follow from the shapes.
        context: start of error messages.

    Raises:
        UserError: if the tensors do not fit the settings or are not finite.
    """
    whole, name = 'decoder_pred.weight' in state_dict, settings.model
    if whole and name not in MODELS:
        raise UserError(
            f'{context}: {f"unknown model {name}" if name else "model not recorded"}; give --model '
            'and, as in training, --use_clip, --change_decoder, --attn_mask, --norm_pix_loss; '
            f'models: {", ".join(MODELS)}'
        )
    problem = (
        f'{context} does not fit --model {name} and the other settings'
        if whole
        else f'{context} is not a complete plain ViT'
    )
    with as_user_error(problem, ValueError, TypeError, AssertionError):
        if whole:
            model = MODELS[name](
                img_size=settings.input_size,
                norm_pix_loss=settings.norm_pix_loss,
                use_clip=settings.use_clip and not settings.pixel_target,
                attn_mask=settings.attn_mask,
                change_decoder=settings.change_decoder,
                target_dim=state_dict['decoder_pred.weight'].shape[0],
            )
        else:
            state_dict = classifier_tensors(state_dict)
            model = MaskedAutoencoderViT(decoder_depth=0, **infer_arguments(state_dict, name))
            # a classifier with global pooling has fc_norm after the pooling instead of norm
            state_dict = {
                k.removeprefix('fc_'): v for k, v in state_dict.items() if k[:4] != 'head'
            }
    different = whole and difference(model.state_dict(), state_dict)
    refuse(
        (different, f'{problem}: {different}'),
        (
            model.patch_embed.proj.in_channels != 3,
            f'{problem}: its images have {model.patch_embed.proj.in_channels} channels, not 3',
        ),
        (
            not all(x.isfinite().all() for x in state_dict.values()),
            f'{context}: its weights contain NaN or Inf; training has diverged',
        ),
    )
    model.load_state_dict(state_dict, strict=whole)
    return model.eval()


def open_teacher(
    settings: argparse.Namespace,
    given: dict[str, object],
    model: MaskedAutoencoderViT,
    device: torch.device,
) -> tuple[Teacher | None, str]:
    """Load the given teacher, else the one that the model was trained with.

    Args:
        settings: see ``resolve_settings``.
        given: values of flags by name. An empty --clip_path asks for no teacher.
        model: see ``build_model``.
        device: device to put the teacher on.

    Returns:
        The teacher, or None, and name or file of its text tower, or ''.

    Raises:
        UserError: if the flags or the teacher do not fit.
    """
    named = [given[k] for k in ('clip_path', 'teacher') if given.get(k) is not None]
    if not (any(named) if named else settings.use_clip):
        return None, ''
    spec = TeacherSpec.from_args(argparse.Namespace(**{**vars(settings), 'use_clip': True}))
    teacher = build_teacher(
        spec,
        grid_size=model.patch_embed.grid_size[0],
        input_size=model.patch_embed.img_size[0],
        model_name=settings.model or 'the encoder',
        device=device,
    )
    predicted = model.decoder_pred.out_features
    if model.decoder_blocks and model.use_clip and teacher.dim != predicted:
        raise UserError(
            f'the teacher {spec.name} has tokens of size {teacher.dim} and the model predicts '
            f'size {predicted}; name the teacher that it was trained with'
        )
    return teacher, spec.text_tower


def read_image(path: str, size: int) -> torch.Tensor:
    """Return an image file as evaluation sees it: [1, 3, size, size], normalized."""
    with as_user_error(f'{path} is not a readable image', UnreadableImage):
        return normalize(build_transform(False, size)(ImageFile(path))[None])


# ---- the figure ----


def draw_figure(
    out: panels.Outputs,
    name: str,
    texts: list[str],
    encoded: tuple[torch.Tensor, float] | None = None,
    norm_pix_loss: bool = False,
) -> object:
    """Draw the outputs for one image: all panels, and below them the text maps.

    Args:
        out: outputs for one image.
        name: title of the figure.
        texts: K texts, or none.
        encoded: features [K, D] of the texts and a scale, see models_teacher.read_texts.
        norm_pix_loss: whether the model was trained with it.

    Returns:
        A matplotlib.figure.Figure.

    Raises:
        UserError: if matplotlib is not installed.
    """
    drawn = panels.draw_panels(out)
    columns = min(max(len(drawn), 1 + len(texts)), 4)
    titles = TITLES | {'reconstruction': TITLES['norm_pix_loss']} if norm_pix_loss else TITLES
    # {(row, column): (image, text above, text below, text on the left)}
    cells = {
        divmod(i, columns): (pixels[0], titles[panel], '', '')
        for i, (panel, pixels) in enumerate(drawn.items())
    }
    first_row = max(cells)[0] + 1
    maps, (low, high, scale) = panels.text_maps(out, *encoded) if texts else ({}, (0, 1, ()))
    seen = {
        'teacher': (out.pixels, 'the teacher sees\nthe whole image'),
        'model': (panels.hide(out.pixels, out.visible), 'the model sees\nonly these patches'),
    }
    for k, text in enumerate(texts):
        for line, (owner, (pixels, scores)) in enumerate(maps.items()):
            row = first_row + k // (columns - 1) * len(maps) + line
            above = '' if line else textwrap.fill(f'"{text}"', 28)
            score = format(scores[0, k], '.0%' if len(texts) > 1 else '+.3f')
            cells[row, 1 + k % (columns - 1)] = pixels[k, 0], above, f'whole image: {score}', ''
            cells[row, 0] = seen[owner][0][0], '', '', seen[owner][1]

    fig, axes = panels.draw_grid(cells, 2.6, 2.9, space=0.8)  # space for the color scale
    fig.suptitle(name, fontsize=12, parse_math=False)
    from matplotlib import cm, colors  # panels.draw_grid has found it

    for ax in axes[first_row:, -1]:  # the color scale of text maps, on the right
        color_map = colors.ListedColormap(panels.colors(np.linspace(0, 1, 256), 0, 1, scale) / 255)
        fig.colorbar(
            cm.ScalarMappable(colors.Normalize(low, high), color_map),
            cax=ax.inset_axes([1.05, 0, 0.06, 1]),
            label='how well the text fits,\ncompared with the others'
            if len(texts) > 1
            else 'cosine to the text, minus\nits mean over the image',
        )
    return fig


# ---- the command ----

FLAGS = {
    'checkpoint': dict(
        metavar='CHECKPOINT',
        help='a pretraining checkpoint; from any other, only its encoder is shown',
    ),
    'images': dict(
        nargs='+',
        metavar='IMAGE',
        help='images of any format and size; resized and cropped as in evaluation',
    ),
    '--text': dict(
        nargs='+',
        default=[],
        metavar='TEXT',
        help='draw how well each text describes the patches, including masked ones: a softmax '
        'over several texts, or for a single text its cosine minus the mean over the image',
    ),
    '--output_dir': dict(
        default='./visualized',
        metavar='DIR',
        help='folder for NAME-visualized.png, one per image',
    ),
    '--seed': dict(
        default=0,
        type=bounded(int, 0, 2**63 - 1),
        metavar='N',
        help='random seed of the masks',
    ),
    '--device': dict(metavar='DEVICE', help='cuda or cpu; default: cuda if there is a GPU'),
}
SETTINGS = {
    '--model': dict(choices=MODELS, metavar='NAME', help=', '.join(MODELS)),
    '--input_size': dict(type=bounded(int, 1, 4096), metavar='PIXELS', help='pixels per side'),
    '--mask_ratio': dict(
        type=bounded(float, 0, 1, open_high=True),
        metavar='SHARE',
        help='share of masked patches',
    ),
    '--clip_path': dict(
        metavar='FILE|NAME', help="the teacher, which also encodes --text; '': no teacher"
    ),
    '--teacher': dict(metavar='NAME', help='teacher instead of --clip_path'),
    '--teacher_path': dict(metavar='FILE', help='weights of --teacher'),
    '--teacher_norm': dict(
        choices=['imagenet', 'own'], help="normalization of the teacher's input"
    ),
    **{
        flag: dict(action=argparse.BooleanOptionalAction, help=text)
        for flag, text in {
            '--use_clip': "model predicts the teacher's features",
            '--pixel_target': 'model predicts pixels but was masked by a teacher',
            '--change_decoder': 'model has the prompting decoder',
            '--attn_mask': 'predict from patches drawn by importance',
            '--norm_pix_loss': 'model predicts pixels normalized per patch',
        }.items()
    },
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        'python -m tools.visualize', description=__doc__.split('\n\n')[0], allow_abbrev=False
    )
    add_flags(parser, FLAGS)
    group = parser.add_argument_group('model settings (default: read from the checkpoint)')
    add_flags(group, SETTINGS)
    return parser


def main(args: argparse.Namespace) -> None:
    device, given = choose_device(args.device), vars(args)
    checkpoint, state_dict = read_weights(args.checkpoint)
    settings = resolve_settings(given, checkpoint)
    model = build_model(settings, state_dict, f'checkpoint {args.checkpoint}').to(device)
    patches, ratio = model.patch_embed, settings.mask_ratio
    if count_visible(patches.num_patches, ratio) < 1:
        raise UserError(f'--mask_ratio {ratio} masks all of the {patches.num_patches} patches')
    images = [read_image(path, patches.img_size[0]).to(device) for path in args.images]
    teacher, text_tower = open_teacher(settings, given, model, device)
    encoded = read_texts('--text', args.text, text_tower) if args.text else None
    with as_user_error(f'--output_dir {args.output_dir} cannot be created', OSError):
        os.makedirs(args.output_dir, exist_ok=True)
    missing = {
        'importance and semantic masks (no teacher: give --clip_path)': teacher is None,
        'predictions (no decoder in the checkpoint)': not model.decoder_blocks,
        'texts for the predictions (which are pixels)': model.decoder_blocks
        and args.text
        and not model.use_clip,
    }
    if any(missing.values()):
        print('Not drawn:', '; '.join(text for text, applies in missing.items() if applies))
    stems = [f'{Path(path).stem}-visualized' for path in args.images]
    stems = panels.number_repeats(stems, '-', str.lower)
    for path, image, stem in zip(args.images, images, stems):
        out = panels.run_model(model, teacher, image, ratio, args.seed)
        figure = draw_figure(out, Path(path).name, args.text, encoded, model.norm_pix_loss)
        file = os.path.join(args.output_dir, f'{stem}.png')
        with as_user_error(f'{file} could not be written', OSError):
            figure.savefig(file, dpi=110)
        print(f'{path} -> {file}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
