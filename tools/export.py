"""Convert a checkpoint for other projects, and print the code that loads the result.

    python -m tools.export OUT/checkpoint-399.pth --format timm --output milan_vit_base.safetensors

The input is any checkpoint that --finetune reads: from pretraining, fine-tuning or linear
probing, written by this repository or another project.
"""

import argparse
import os

import timm
import torch

from models_infer import classifier_tensors, infer_arguments
from util.checkpoints.io import read_weights, save_on_master
from util.checkpoints.key_names import to_openmmlab
from util.checkpoints.verify import save_safetensors
from util.cli import Parser, add_flags, run
from util.errors import as_user_error, refuse

# The suffix of a file determines how timm and this repository read it.
SUFFIXES = {
    'timm': ('.pth', '.pt', '.bin', '.safetensors'),
    'safetensors': ('.safetensors',),
    'openmmlab': ('.pth', '.pt'),
}

# Flags that describe the weights. Others, such as the owner's paths, are not exported.
EXPORTED_FLAGS = (
    'model',
    'input_size',
    'nb_classes',
    'global_pool',
    'global_pool_wcls',
    'mask_ratio',
    'use_clip',
    'change_decoder',
    'attn_mask',
    'pixel_target',
    'norm_pix_loss',
    'average_targets',
    'teacher',
    'teacher_norm',
)

# (embed_dim, depth, num_heads) of the sizes in timm's model names
TIMM_SIZES = {
    (192, 12, 3): 'tiny',
    (384, 12, 6): 'small',
    (768, 12, 12): 'base',
    (1024, 24, 16): 'large',
    (1280, 32, 16): 'huge',
}


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a checkpoint under our names, and its epoch and flags as text."""
    checkpoint, state_dict = read_weights(path)
    known = isinstance(checkpoint.get('args'), argparse.Namespace)
    metadata = {
        'epoch': checkpoint.get('epoch'),
        **{k: vars(checkpoint['args']).get(k) for k in EXPORTED_FLAGS if known},
    }
    return {
        # A tensor may be a view of a larger storage, which would be saved completely.
        name: torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }, {k: str(v) for k, v in metadata.items() if isinstance(v, (str, int, float))}


def timm_code(
    state_dict: dict[str, torch.Tensor],
    arguments: dict[str, int | float],
    pool_class_token: bool,
    path: str,
) -> str:
    """Return Python code that builds timm's model with the weights in ``path``.

    Args:
        state_dict: the tensors in the file.
        arguments: see models_infer.infer_arguments.
        pool_class_token: whether the mean over all tokens includes the class token.
        path: the exported file.
    """
    size = TIMM_SIZES.get(tuple(arguments[k] for k in ('embed_dim', 'depth', 'num_heads')))
    name = f'vit_{size}_patch{arguments["patch_size"]}_224'
    implied = {'img_size': 224, 'in_chans': 3, 'mlp_ratio': 4.0}
    shown = {
        **{
            k: arguments[k]
            for k in (implied if timm.is_model(name) else arguments)
            if arguments[k] != implied.get(k)
        },
        'num_classes': len(state_dict.get('head.weight', ())),
        'global_pool': 'avg' if 'fc_norm.weight' in state_dict else 'token',
        **({'pool_include_prefix': True} if pool_class_token else {}),
    }
    flags = ', '.join(f'{k}={v!r}' for k, v in shown.items())
    return (
        f'import timm\nmodel = timm.create_model({name!r}, {flags}, checkpoint_path={path!r})'
        if timm.is_model(name)
        else 'from timm.models import VisionTransformer, load_checkpoint\n'
        f'model = VisionTransformer({flags})\nload_checkpoint(model, {path!r})'
    )


FLAGS = {
    'checkpoint': dict(
        metavar='CHECKPOINT',
        help='any checkpoint that --finetune reads: pretraining, fine-tuning, linear probing',
    ),
    '--format': dict(
        required=True,
        choices=SUFFIXES,
        help='timm: for timm.create_model; safetensors: all tensors under our names; '
        'openmmlab: their names',
    ),
    '--output': dict(required=True, metavar='FILE', help='file to write: .pth or .safetensors'),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        'python -m tools.export',
        description='Convert a checkpoint for other projects, and print the code that loads it.',
        allow_abbrev=False,
    )
    add_flags(parser, FLAGS)
    return parser


def main(args: argparse.Namespace) -> None:
    refuse(
        (
            not args.output.endswith(SUFFIXES[args.format]),
            f'--output {args.output}: --format {args.format} needs a name ending in '
            f'{" or ".join(SUFFIXES[args.format])}',
        ),
        (
            not os.path.isdir(os.path.dirname(args.output) or '.') or os.path.isdir(args.output),
            f'--output {args.output}: must be a file in an existing folder',
        ),
        (
            os.path.exists(args.output)
            and os.path.exists(args.checkpoint)
            and os.path.samefile(args.output, args.checkpoint),
            f'--output {args.output} is the checkpoint itself; give another name',
        ),
    )
    everything, metadata = read_checkpoint(args.checkpoint)
    pool_class_token = metadata.get('global_pool_wcls') == 'True'
    refuse(
        (
            not any(name.startswith('blocks.') for name in everything),
            f'{args.checkpoint}: no encoder found; its tensors are '
            f'{", ".join(list(everything)[:3])}, ...',
        ),
        (
            args.format == 'openmmlab' and pool_class_token,
            f'{args.checkpoint} was trained with --global_pool_wcls; OpenMMLab cannot '
            'include the class token in the pooling',
        ),
    )
    tensors = everything if args.format == 'safetensors' else classifier_tensors(everything)
    content = tensors
    code = f'import safetensors.torch\nstate_dict = safetensors.torch.load_file({args.output!r})'
    if args.format != 'safetensors':
        with as_user_error(
            f'{args.checkpoint} is not a complete plain ViT', ValueError, AssertionError
        ):
            arguments = infer_arguments(tensors, metadata.get('model'))
            code = timm_code(tensors, arguments, pool_class_token, args.output)
    if args.format == 'openmmlab':
        content = {'meta': metadata, 'state_dict': to_openmmlab(tensors)}
        code = (
            f'load_from = {args.output!r}'
            if 'head.weight' in tensors  # a whole classifier, not only its backbone
            else f"init_cfg=dict(type='Pretrained', checkpoint={args.output!r}, prefix='backbone.')"
        )
    if args.output.endswith('.safetensors'):
        save_safetensors(content, args.output, metadata)
    else:
        save_on_master(content, args.output)
    groups = [{name.partition('.')[0] for name in x} for x in (everything, tensors)]
    print(
        f'{args.output}: {len(tensors)} tensors, '
        f'{sum(x.numel() for x in tensors.values()) / 1e6:.1f} M parameters; '
        f'not exported: {", ".join(sorted(groups[0] - groups[1])) or "nothing"}. '
        f'To load it:\n\n{code}'
    )


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
