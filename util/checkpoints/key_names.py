"""Names of tensors in the checkpoints of other projects.

MAE, MILAN, timm and this repository share one set of names (``blocks.0.attn.qkv.weight``).
OpenMMLab has its own. Data-parallel wrappers and torch.compile add a prefix.
"""

import re

import torch

# parts of names: ours after 'backbone.' -> OpenMMLab's; those of whole modules come first
_OPENMMLAB = {
    'backbone.norm.': 'backbone.ln1.',
    'backbone.fc_norm.': 'backbone.ln2.',
    'backbone.head.': 'head.fc.',
    'backbone.patch_embed.proj.': 'backbone.patch_embed.projection.',
    'backbone.blocks.': 'backbone.layers.',
    '.norm1.': '.ln1.',
    '.norm2.': '.ln2.',
    '.mlp.fc1.': '.ffn.layers.0.0.',
    '.mlp.fc2.': '.ffn.layers.1.',
}


def to_timm_names(checkpoint: object) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint of any known format, under timm's names.

    Args:
        checkpoint: the content of a file: a state dict, or a dict that has one under 'model'
            (MAE, MILAN) or 'state_dict' (mmengine, timm and many others).

    Returns:
        The tensors by name, in the order of the file. Unknown names are kept.

    Raises:
        ValueError: if there is no state dict.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    nested = content.get('model'), content.get('state_dict'), content
    content = next(value for value in nested if isinstance(value, dict))
    if not content or not all(
        isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)
        for name, value in content.items()
    ):
        raise ValueError('it has no state dict')
    state_dict = {re.sub(r'^(module\.|_orig_mod\.)+', '', k): v for k, v in content.items()}
    if any(name.endswith('patch_embed.projection.weight') for name in state_dict):
        pairs = [(theirs, ours) for ours, theirs in _OPENMMLAB.items()]
        # an encoder that was saved alone has no 'backbone.'
        whole = {
            re.sub(r'^(?!backbone\.|head\.)', 'backbone.', k): v for k, v in state_dict.items()
        }
        state_dict = {_replace(k, pairs).removeprefix('backbone.'): v for k, v in whole.items()}
        if 'fc_norm.weight' in state_dict:
            # the classifier does not use the last norm of pretraining, which may still be there
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith('norm.')}
    return state_dict


def to_openmmlab(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of a classifier or encoder under the names of mmpretrain."""
    return {_replace(f'backbone.{k}', _OPENMMLAB.items()): v for k, v in state_dict.items()}


def _replace(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name
