"""Checkpoints of other projects under this repository's names, and back.

MAE, MILAN, timm and this repository share one set of names (``blocks.0.attn.qkv.weight``). OpenMMLab has its own; data-parallel
wrappers and torch.compile put a prefix in front.
"""

import torch

_PREFIXES = ('module.', '_orig_mod.')
_STATE_DICT_KEYS = ('model', 'state_dict')  # where MAE and MILAN, and where mmengine, timm and many others, keep the weights

# module names: ours -> OpenMMLab's. Everything of the encoder stands under backbone. there.
_OPENMMLAB = {'patch_embed.proj': 'patch_embed.projection', 'norm': 'ln1', 'fc_norm': 'ln2'}
_OPENMMLAB_BLOCK = {'norm1': 'ln1', 'norm2': 'ln2', 'mlp.fc1': 'ffn.layers.0.0', 'mlp.fc2': 'ffn.layers.1'}


def to_ours(checkpoint):
    """The state dict inside a checkpoint of any known format, under our names.

    Args:
        checkpoint: what the file holds: a state dict, or a dict with one under 'model' or 'state_dict'.

    Returns:
        dict from name to tensor, in the file's order. Names that mean nothing here are kept as they are.

    Raises:
        ValueError: there is no state dict in it.
    """
    state_dict = checkpoint
    for key in _STATE_DICT_KEYS:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            state_dict = checkpoint[key]
            break
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(k, str) and k.isprintable() and isinstance(v, torch.Tensor) for k, v in state_dict.items()):
        raise ValueError('there are no weights in it')
    state_dict = {_strip(name): value for name, value in state_dict.items()}
    if any(name.endswith('patch_embed.projection.weight') for name in state_dict):
        state_dict = {_from_openmmlab(name): value for name, value in state_dict.items()}
        if 'fc_norm.weight' in state_dict:  # their classifier may carry the norm of pretraining along, which it does not use
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith('norm.')}
    return state_dict


def to_openmmlab(state_dict):
    """A classifier's or encoder's state dict under OpenMMLab's names (mmpretrain: backbone., head.fc.)."""
    return {_to_openmmlab(name): value for name, value in state_dict.items()}


def _strip(name):
    while name.startswith(_PREFIXES):
        name = name.partition('.')[2]
    return name


def _from_openmmlab(name):
    if name.startswith('head.fc.'):
        return name.replace('head.fc.', 'head.', 1)
    module, _, leaf = name.removeprefix('backbone.').rpartition('.')
    if module.startswith('layers.'):
        _, number, inner = module.split('.', 2)
        return f'blocks.{number}.{_inverse(_OPENMMLAB_BLOCK).get(inner, inner)}.{leaf}'
    module = _inverse(_OPENMMLAB).get(module, module)
    return f'{module}.{leaf}' if module else leaf


def _to_openmmlab(name):
    module, _, leaf = name.rpartition('.')
    if module == 'head':
        return f'head.fc.{leaf}'
    if module.startswith('blocks.'):
        _, number, inner = module.split('.', 2)
        return f'backbone.layers.{number}.{_OPENMMLAB_BLOCK.get(inner, inner)}.{leaf}'
    module = _OPENMMLAB.get(module, module)
    return f'backbone.{module}.{leaf}' if module else f'backbone.{leaf}'


def _inverse(table):
    return {theirs: ours for ours, theirs in table.items()}
