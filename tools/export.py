"""Turns a checkpoint into what other projects load, and says how they load it.

    python tools/export.py OUT/checkpoint-399.pth --format timm --output milan_vit_base_timm.safetensors

It reads whatever --finetune reads: pretraining, fine-tuned and linear probing checkpoints, ours or another project's.
"""

import argparse
import math
import os
import sys

import safetensors.torch
import timm
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds only its own folder

import models_milan  # noqa: E402
import models_vit  # noqa: E402
from util import formats, integrity  # noqa: E402
from util.arguments import Parser  # noqa: E402
from util.checkpoint import read_weights, save_on_master  # noqa: E402
from util.errors import UserError, as_user_error, first_line  # noqa: E402
from util.misc import run  # noqa: E402

# By its ending a file is read later on, by timm and by us.
ENDINGS = {'timm': ('.pth', '.pt', '.bin', '.safetensors'), 'safetensors': ('.safetensors',), 'openmmlab': ('.pth', '.pt')}

# What belongs to a classifier or its encoder, or would in one of another kind (reg_token, norm_pre); the rest can go.
CLASSIFIER = ('cls_token', 'pos_embed', 'reg_token', 'patch_embed.', 'blocks.', 'norm', 'fc_norm.', 'attn_pool', 'head')

PROBE = ('head.0.running_mean', 'head.0.running_var', 'head.1.weight', 'head.1.bias')  # the head of main_linprobe.py

# The flags that say what the weights are. A file that is passed on need not tell of its owner's folders.
TOLD = ('model', 'input_size', 'nb_classes', 'global_pool', 'global_pool_wcls', 'mask_ratio', 'use_clip', 'change_decoder',
        'attn_mask', 'pixel_target', 'norm_pix_loss', 'average_targets', 'teacher', 'teacher_norm')


# ---- the weights ----

def read(path):
    """(state dict under our names, dict of text that says what it is: epoch and flags) of a checkpoint file."""
    checkpoint, state_dict = read_weights(path)
    # a tensor may be a window onto a larger storage, all of which would be saved with it
    state_dict = {name: torch.as_tensor(value).clone(memory_format=torch.contiguous_format) for name, value in state_dict.items()}
    args = checkpoint.get('args')
    flags = vars(args) if isinstance(args, argparse.Namespace) else {}
    about = {'epoch': checkpoint.get('epoch'), **{name: flags.get(name) for name in TOLD}}
    return state_dict, {name: str(value) for name, value in about.items() if isinstance(value, (str, int, float))}


def classifier_of(state_dict):
    """The tensors of the classifier, or of the encoder where there is no head; a linear probe's head becomes one Linear."""
    state_dict = {name: value for name, value in state_dict.items() if name.startswith(CLASSIFIER)}
    return fold_probe(state_dict) if state_dict.keys() >= set(PROBE) else state_dict


def fold_probe(state_dict):
    """head = BatchNorm1d without affine, then Linear, as the one Linear that computes the same in eval mode.

    W (x - mean) / sqrt(var + eps) + b  =  W' x + (b - W' mean)  with  W' = W / sqrt(var + eps), columnwise.
    """
    mean, var, weight, bias = (state_dict[name] for name in PROBE)
    folded = weight.double() / (var.double() + 1e-6).sqrt()
    rest = {name: value for name, value in state_dict.items() if not name.startswith('head.')}
    return {**rest, 'head.weight': folded.to(weight.dtype), 'head.bias': (bias.double() - folded @ mean.double()).to(bias.dtype)}


def arguments_of(state_dict, model=''):
    """The arguments, as timm and models_milan.py call them, of the plain ViT that these tensors are all of.

    model: the name of the model it was made with, which tells the number of heads. Raises ValueError where it is no such ViT.
    """
    for name in ('patch_embed.proj.weight', 'pos_embed', 'blocks.0.mlp.fc1.weight'):
        if name not in state_dict:
            raise ValueError(f'{name} is missing')
    width, channels, patch, _ = state_dict['patch_embed.proj.weight'].shape
    models = {**models_milan.MODELS, **models_vit.MODELS}
    known = [make.keywords for make in [models.get(model), *models.values()] if make and make.keywords.get('embed_dim') == width]
    arguments = dict(
        img_size=patch * math.isqrt(state_dict['pos_embed'].shape[1] - 1), patch_size=patch, in_chans=channels, embed_dim=width,
        depth=sum(name.startswith('blocks.') and name.endswith('.norm1.weight') for name in state_dict),
        num_heads=known[0]['num_heads'] if known else max(1, width // 64),  # the shapes do not tell; most are 64 wide
        mlp_ratio=state_dict['blocks.0.mlp.fc1.weight'].shape[0] / width)
    check_structure(state_dict, arguments)
    return arguments


def check_structure(state_dict, arguments):
    """ValueError unless these are the tensors of the ViT with these arguments, no fewer and no more."""
    with torch.device('meta'):
        model = models_milan.MaskedAutoencoderViT(decoder_depth=0, **arguments).state_dict()
    pooled = 'fc_norm.weight' in state_dict
    due = {f'fc_{name}' if pooled and name.startswith('norm.') else name: list(value.shape)
           for name, value in model.items() if name.startswith(CLASSIFIER)}
    if 'head.weight' in state_dict:
        classes = len(state_dict['head.weight'])
        due.update({'head.weight': [classes, arguments['embed_dim']], 'head.bias': [classes]})
    for name in {**due, **state_dict}:
        given = list(state_dict[name].shape) if name in state_dict else 'missing'
        if given != due.get(name):
            raise ValueError(f'{name} is {given} and should ' + (f'be {due[name]}' if name in due else 'not be there'))


# ---- the files, and how to load them ----

def timm_code(state_dict, arguments, wcls, path):
    """Python that builds timm's model with the weights in the file at ``path``; wcls: the class token is pooled too."""
    sizes = {(192, 12, 3): 'tiny', (384, 12, 6): 'small', (768, 12, 12): 'base', (1024, 24, 16): 'large', (1280, 32, 16): 'huge'}
    size = sizes.get((arguments['embed_dim'], arguments['depth'], arguments['num_heads']))
    name = f'vit_{size}_patch{arguments["patch_size"]}_224'
    implied = dict(img_size=224, in_chans=3, mlp_ratio=4.0)
    named = timm.is_model(name)
    shown = {k: v for k, v in arguments.items() if v != implied.get(k) and (k in implied or not named)}
    shown['num_classes'] = len(state_dict.get('head.weight', ()))
    shown['global_pool'] = 'avg' if 'fc_norm.weight' in state_dict else 'token'
    if wcls and shown['global_pool'] == 'avg':
        shown['pool_include_prefix'] = True
    shown = ', '.join(f'{k}={v!r}' for k, v in shown.items())
    if named:
        return f'import timm\nmodel = timm.create_model({name!r}, {shown}, checkpoint_path={path!r})'
    return ('from timm.models import VisionTransformer, load_checkpoint\n'
            f'model = VisionTransformer({shown})\nload_checkpoint(model, {path!r})')


def openmmlab_code(state_dict, path):
    """Line of an mmpretrain config that loads it: into the whole classifier, or an encoder into its backbone."""
    if 'head.weight' in state_dict:
        return f'load_from = {path!r}'
    return f"init_cfg=dict(type='Pretrained', checkpoint={path!r}, prefix='backbone.')"


def save(content, path, about):
    """Write the file, which has its name only when it is whole."""
    if not path.endswith('.safetensors'):
        return save_on_master(content, path)
    part = f'{path}.tmp'
    try:
        metadata = {'format': 'pt', **about, integrity.SEAL: integrity.digest(content)}
        safetensors.torch.save_file(content, part, metadata=metadata)
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as e:
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f'{path} could not be written (disk full?): {first_line(e)}') from e


# ---- the command ----

def check_paths(args):
    """UserError for an output that cannot be, before the work and not after it."""
    if not args.output.endswith(ENDINGS[args.format]):
        endings = ' or '.join(ENDINGS[args.format])
        raise UserError(f'--output {args.output}: the name of a file for --format {args.format} ends in {endings}')
    folder = os.path.dirname(args.output) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'--output {args.output}: there is no folder {folder}; create it first')
    if os.path.isdir(args.output):
        raise UserError(f'--output {args.output} is a folder; name a file')
    if os.path.exists(args.output) and os.path.exists(args.checkpoint) and os.path.samefile(args.output, args.checkpoint):
        raise UserError(f'--output {args.output} is the checkpoint itself; name another file')


def get_args_parser():
    parser = Parser('tools/export.py', description='Checkpoints for other projects', allow_abbrev=False)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='pretraining, fine-tuned or linear probing; any known format')
    parser.add_argument('--format', required=True, choices=ENDINGS,
                        help='timm: for timm.create_model; safetensors: everything under our names; openmmlab: their names')
    parser.add_argument('--output', required=True, metavar='FILE', help='the file to write: .pth or .safetensors')
    return parser


def main(args):
    check_paths(args)
    everything, about = read(args.checkpoint)
    if not any(name.startswith('blocks.') for name in everything):
        raise UserError(f'{args.checkpoint}: no encoder is in it; its names are {", ".join(list(everything)[:3])}, ...')
    if args.format == 'safetensors':
        tensors = content = everything
        code = f'import safetensors.torch\nstate_dict = safetensors.torch.load_file({args.output!r})'
    else:
        tensors = content = classifier_of(everything)
        with as_user_error(f'{args.checkpoint} is not a plain ViT, or not a whole one', ValueError, AssertionError):
            arguments = arguments_of(tensors, about.get('model'))
        wcls = about.get('global_pool_wcls') == 'True'
        code = timm_code(tensors, arguments, wcls, args.output)
    if args.format == 'openmmlab':
        if wcls:
            raise UserError(f'{args.checkpoint} is of --global_pool_wcls, and OpenMMLab pools without the class token')
        content = {'meta': about, 'state_dict': formats.to_openmmlab(tensors)}
        code = openmmlab_code(tensors, args.output)
    save(content, args.output, about)
    left_out = sorted({name.partition('.')[0] for name in everything} - {name.partition('.')[0] for name in tensors})
    print(f'{args.output}: {len(tensors)} tensors, {sum(v.numel() for v in tensors.values()) / 1e6:.1f} M parameters; '
          f'left out: {", ".join(left_out) or "nothing"}. To load it:\n\n{code}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
