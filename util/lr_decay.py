"""Layer-wise learning-rate decay (ELECTRA, BEiT)."""

from collections.abc import Collection

import torch


def param_groups_lrd(
    model: torch.nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
) -> list[dict]:
    """Return parameter groups of a ViT, one per layer and weight decay.

    Each has an ``lr_scale`` of layer_decay ** (depth + 1 - layer).

    Args:
        model: a ViT whose transformer blocks are ``model.blocks``.
        weight_decay: for all parameters but 1-D ones and those in ``no_weight_decay_list``.
        no_weight_decay_list: names of parameters.
        layer_decay: 1 gives all layers the same rate.
    """
    num_layers = len(model.blocks) + 1
    groups = {}
    for name, param in model.named_parameters():
        decay = 0.0 if param.ndim == 1 or name in no_weight_decay_list else weight_decay
        layer = get_layer_id_for_vit(name, num_layers)
        scale = layer_decay ** (num_layers - layer)
        if param.requires_grad:
            group = {'lr_scale': scale, 'weight_decay': decay, 'params': []}
            groups.setdefault((layer, decay), group)['params'].append(param)
    return list(groups.values())


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """Return 0 for embeddings, i + 1 for block i, and num_layers for everything after them."""
    first, *rest = name.split('.')
    if first == 'blocks':
        return int(rest[0]) + 1
    return 0 if first in ('cls_token', 'pos_embed', 'patch_embed') else num_layers
