"""Infer which plain ViT the tensors of a checkpoint belong to: arguments, structure, head."""

import math
from collections.abc import Callable

import torch

import models_milan
import models_vit
from util.checkpoints.io import difference

# Prefixes of the tensors that belong to a classifier or its encoder. reg_token, norm_pre and
# attn_pool would belong to another kind of encoder: infer_arguments rejects them.
CLASSIFIER = (
    'cls_token',
    'pos_embed',
    'reg_token',
    'patch_embed.',
    'blocks.',
    'norm',
    'fc_norm.',
    'attn_pool',
    'head',
)

# the head that main_linprobe.py trains: BatchNorm1d without affine, then Linear
PROBE = 'head.0.running_mean', 'head.0.running_var', 'head.1.weight', 'head.1.bias'


def classifier_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of the classifier, or of the encoder if there is no head.

    The head of a linear probe is folded into one Linear, see ``fold_probe``.
    """
    state_dict = {name: x for name, x in state_dict.items() if name.startswith(CLASSIFIER)}
    return fold_probe(state_dict) if state_dict.keys() >= set(PROBE) else state_dict


def fold_probe(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the head of a linear probe by the Linear that computes the same in eval mode.

    W (x - mean) / sqrt(var + eps) + b = W' x + (b - W' mean), W' = W / sqrt(var + eps)
    """
    mean, var, weight, bias = (state_dict[name] for name in PROBE)
    folded = weight.double() / (var.double() + 1e-6).sqrt()
    return {
        **{name: x for name, x in state_dict.items() if not name.startswith('head.')},
        'head.weight': folded.to(weight.dtype),
        'head.bias': (bias.double() - folded @ mean.double()).to(bias.dtype),
    }


def infer_arguments(
    state_dict: dict[str, torch.Tensor], model_name: str | None = None
) -> dict[str, int | float]:
    """Return the arguments of the plain ViT whose tensors these are.

    Args:
        state_dict: all tensors of a classifier or encoder, see ``classifier_tensors``.
        model_name: the --model of the checkpoint if known. It determines the number of
            heads, which tensor shapes do not show.

    Returns:
        Arguments of models_milan.MaskedAutoencoderViT and of timm's VisionTransformer.

    Raises:
        ValueError, AssertionError: if the tensors are not exactly those of a plain ViT.
    """
    if missing := [
        name
        for name in ('patch_embed.proj.weight', 'pos_embed', 'blocks.0.mlp.fc1.weight')
        if name not in state_dict
    ]:
        raise ValueError(f'{missing[0]} is missing')
    width, channels, patch_size, _ = state_dict['patch_embed.proj.weight'].shape
    arguments = dict(
        img_size=patch_size * math.isqrt(state_dict['pos_embed'].shape[1] - 1),
        patch_size=patch_size,
        in_chans=channels,
        embed_dim=width,
        depth=sum(n.startswith('blocks.') and n.endswith('.norm1.weight') for n in state_dict),
        num_heads=_count_heads(width, model_name),
        mlp_ratio=state_dict['blocks.0.mlp.fc1.weight'].shape[0] / width,
    )
    expected = build_on_meta(
        models_vit.VisionTransformer,
        num_classes=len(state_dict.get('head.weight', ())),
        global_pool='fc_norm.weight' in state_dict,
        **arguments,
    )
    if different := difference(expected.state_dict(), state_dict):
        raise ValueError(different)
    return arguments


def build_on_meta(make: Callable[..., torch.nn.Module], **arguments) -> torch.nn.Module:
    """Return ``make(**arguments)`` on the meta device, where it takes neither memory nor time."""
    try:
        with torch.device('meta'):
            return make(**arguments)
    except RuntimeError:  # timm < 1.0.20 reads values of tensors
        return make(**arguments)


# Return the number of heads of the named model, else the usual one for this width.
def _count_heads(width, model_name):
    make = (models_milan.MODELS | models_vit.MODELS).get(model_name)
    if make and (model := build_on_meta(make)).cls_token.shape[-1] == width:
        return model.blocks[0].attn.num_heads
    return 16 if width == 1280 else max(1, width // 64)  # 1280: ViT-H
