"""Any ViT of timm as a teacher's image tower (for the interface, see models_teacher.py).

Tokens and importance are derived from the model's own pooling, which is detected from its
modules; there is no list of names. Registers and other prefix tokens are dropped from both.

=================  ==================  ===============================================
pooling            first token         importance of a patch
=================  ==================  ===============================================
class token        the class token     attention of the class token to it, last block
attention pooling  the pooled output   weight of it in the pooling
mean of patches    the pooled output   attention it receives in the last block, mean
                                       over all tokens that attend
=================  ==================  ===============================================

Importance is averaged over heads. It sums to 1 minus the attention to prefix tokens.
(A class token that the mean ignores, as in EVA-02, was never trained to summarize the image.)

* class token: CLIP, EVA-CLIP, DINO, DINOv2, DINOv3, TIPSv2, RADIO, DeiT
* attention pooling: SigLIP, SigLIP 2, PE
* mean of patches: AIMv2, EVA, EVA-02, BEiT, the gap variants of SigLIP

Patch tokens are a block's output after the final norm, or after the norm that follows the
pooling if the model has that one instead. CLIP's are also projected, as MILAN does.

This file relies on details of timm: names of classes and modules, and the fact that attention
ends in F.scaled_dot_product_attention. Tried with timm 1.0.12 to 1.0.31.
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model_in_modules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from util.checkpoints.io import difference, read_weights
from util.errors import UserError, as_user_error, refuse

# modules of timm.models whose ViTs keep one grid of patches from the first block to the last
VIT_MODULES = ('vision_transformer', 'eva', 'beit', 'deit')
# names of timm's classes with one softmax over all tokens
ATTENTIONS = ('Attention', 'AttentionRope', 'EvaAttention')
# number of ImageNet classes: a CLIP with a head of such a size was fine-tuned on labels
IMAGENET_HEAD_SIZES = (1000, 11221, 11821, 21841, 21843)
# names of the tensors that compute the tokens
ENCODER_PREFIXES = (
    'patch_embed.',
    'cls_token',
    'reg_token',
    'dist_token',
    'pos_embed',
    'norm_pre.',
    'blocks.',
)


class TimmTower(nn.Module):
    """A timm ViT with the tower interface that models_teacher.py describes.

    Args:
        model: a ViT of timm for one image size (without dynamic_img_size), with a square grid
            of patches. The attention of its last block is one of ATTENTIONS. Its head is the
            identity, or a projection, which the tokens then pass through.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.project = model, isinstance(model.head, nn.Linear)
        self.importance_source = _pooling(model)
        self.grid_size, self.layers = model.patch_embed.grid_size[0], len(model.blocks)
        self.input_resolution = model.patch_embed.img_size[0]
        self.output_dim = model.head.out_features if self.project else model.embed_dim
        self.mean, self.std = model.pretrained_cfg['mean'], model.pretrained_cfg['std']
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = True  # off only helps backward passes, and here is none

    def encode_tokens(self, images: Tensor, average_targets: int = 1) -> tuple[Tensor, Tensor]:
        """Return tokens and importance; see the top of this file.

        Args:
            images: [N, 3, R, R], normalized.
            average_targets: average the tokens of this many last blocks; 1 is the last block.

        Returns:
            tokens [N, L+1, output_dim] and importance [N, L] float32, both in image order.
        """
        last_attention = []
        with _LastAttention(last_attention):
            outputs = self.model.forward_intermediates(
                images,
                average_targets,
                return_prefix_tokens=self.model.num_prefix_tokens > 0,
                output_fmt='NLC',
                intermediates_only=True,
            )
            tokens = self.model.head(sum(self._finish(x) for x in outputs) / average_targets)
        return tokens, self._importance(*last_attention)

    # a block's output, which is patches or (patches, prefix tokens) -> tokens [N, L+1, D]
    def _finish(self, x):
        if self.model.num_prefix_tokens:
            x = torch.cat([x[1], x[0]], dim=1)
        x = self.model.norm(x)
        # of norm and fc_norm, at most one is not the identity
        patches = self.model.fc_norm(x[:, -(self.grid_size**2) :])
        pooled = self.importance_source != 'class token'
        first = self.model.forward_head(x, pre_logits=True) if pooled else x[:, 0]
        return torch.cat([first.unsqueeze(1), patches], dim=1)

    # queries [N, heads, Q, d] and keys [N, heads, T, d] -> attention to the patches [N, L].
    # Only the class token's row is computed, or the pooling's; the whole matrix of the last
    # block is computed for the mean of the patches.
    def _importance(self, q, k, bias):
        if self.importance_source == 'class token':
            q = q[:, :, :1]
            bias = None if bias is None else bias[:, :, :1]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # heads may share keys
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + (0 if bias is None else bias)
        wide = torch.promote_types(scores.dtype, torch.float32)  # they are sampling weights
        return scores.softmax(dim=-1, dtype=wide).mean(dim=(1, 2))[:, -(self.grid_size**2) :]


# Stores query, key and mask of the last attention that is computed in the list ``last``. The
# pooling's attention comes after that of the last block. torch.compile traces this mode, which it
# could not if the mode set an attribute.
class _LastAttention(TorchFunctionMode):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            self.last[:] = [args[0], args[1], (kwargs or {}).get('attn_mask')]
        return func(*args, **(kwargs or {}))


# how a timm ViT pools: 'class token', 'attention pooling' or 'mean of patches'
def _pooling(model):
    if getattr(model, 'attn_pool', None) is not None:
        return 'attention pooling'
    # timm pools DINOv3 by the mean, but its final norm covers all tokens, as for a class token
    uses_class = model.global_pool == 'token' or not isinstance(model.norm, nn.Identity)
    return 'class token' if model.cls_token is not None and uses_class else 'mean of patches'


# ---- by name ----


def load_timm(name: str, grid_size: int, path: str | os.PathLike = '', **kwargs: Any) -> TimmTower:
    """Build a tower for images of grid_size x grid_size patches, in eval mode on the CPU.

    Args:
        name: timm's name, with or without the tag of the weights after a dot.
        grid_size: patches per side.
        path: file with the weights, in a format that timm converts for this model (timm's,
            usually also the authors' and open_clip's), or SLIP's. '' reads timm's hub or its
            cache.
        kwargs: passed to timm.create_model.

    Raises:
        UserError: if there is no such model or tag, the model cannot be a teacher, or the
            weights cannot be downloaded or do not fit.
    """
    cfg = find_timm(name, path)
    kwargs['img_size'] = grid_size * int((re.findall(r'patch(\d+)', name) or [16])[0])
    if not is_model_in_modules(name, ['beit']):  # BEiT always has one image size
        kwargs['dynamic_img_size'] = False
    is_clip = '_clip_' in name.partition('.')[0]
    has_labels = not path and cfg.num_classes in IMAGENET_HEAD_SIZES
    # without a head, timm would not convert the projection in the file of a CLIP
    kwargs['num_classes'] = cfg.num_classes if is_clip and not has_labels else 0
    model = timm.create_model(name, **kwargs) if path else _fetch(name, **kwargs)
    if path:
        _load_file(model, name, path, is_clip)
    elif has_labels:
        print(
            f'Note: the weights {cfg.tag} of {cfg.architecture} were trained on labels '
            f'({cfg.num_classes} classes)'
        )
    grid = tuple(model.patch_embed.grid_size)
    attention = type(getattr(model.blocks[-1], 'attn', None)).__name__
    refuse(
        (
            attention not in ATTENTIONS,
            f'--teacher {name}: not a teacher, because the attention of its last block is '
            f'{attention}',
        ),
        (
            grid != (grid_size, grid_size),
            f'--teacher {name} has {grid[0]}x{grid[1]} patches instead of '
            f'{grid_size}x{grid_size}; choose another teacher or --input_size',
        ),
    )
    return TimmTower(model.eval())


def find_timm(
    name: str, path: str | os.PathLike = '', other_names: Sequence[str] = ()
) -> PretrainedCfg:
    """Return timm's config of the model and weights ``name``.

    Args:
        name: see load_timm.
        path: file with the weights, if they do not come from timm's hub.
        other_names: names of other teachers, to suggest in error messages.

    Raises:
        UserError: if there is no such model or tag; suggests similar names.
    """
    context, version = f'--teacher {name}', f'timm {timm.__version__}'
    known = [*other_names, *timm.list_models(module=VIT_MODULES, include_tags=True)]
    similar = ' or '.join(difflib.get_close_matches(name, known, cutoff=0.5))
    hint = f', did you mean {similar}?' if similar else ''
    refuse(
        (
            os.path.isfile(name),
            f'{context} is a file; give it by --teacher_path, and its model here',
        ),
        (
            not timm.is_model(name),
            f'{context} is neither a CLIP name nor a model of {version}{hint}',
        ),
        (
            not is_model_in_modules(name, VIT_MODULES),
            f'{context} is not a ViT that keeps one square grid of patches; see docs/teachers.md',
        ),
    )
    with as_user_error(f'{context}: {version} has no such weights{hint}', RuntimeError):
        cfg = get_pretrained_cfg(name, allow_unregistered=False)
    if not (path or cfg.has_weights):
        raise UserError(f'{context}: timm has no weights for it; give --teacher_path FILE')
    return cfg


# Create a model with weights from timm's hub. For some files timm 1.0.12 calls torch.load without
# weights_only=True. With the environment variable PyTorch refuses to run code all the same. Hub,
# cache and network raise many exception types.
def _fetch(name, **kwargs):
    is_set = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' in os.environ  # by the user, for the whole process
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    try:
        with as_user_error(
            f"--teacher {name}: cannot download its weights from timm's hub; download them by "
            'other means and give --teacher_path FILE',
            Exception,
        ):
            return timm.create_model(name, pretrained=True, **kwargs)
    finally:
        if not is_set:
            del os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD']


# load the file ``path``; the head of a CLIP becomes the projection in the file, if any
def _load_file(model, name, path, is_clip):
    context = f'the teacher in {path} does not match {name}'
    state_dict = read_weights(path)[1]
    if 'image_projection' in state_dict:  # SLIP, arXiv 2112.12750
        head, is_clip = state_dict['image_projection'].t(), True  # [output_dim, D]
        tower = {k.removeprefix('visual.'): v for k, v in state_dict.items() if 'visual.' in k}
        state_dict = {**tower, 'head.weight': head}
    # each module of timm.models has a converter of this name, which can raise almost anything
    # if the file belongs to another model
    with as_user_error(context, Exception):
        state_dict = sys.modules[type(model).__module__].checkpoint_filter_fn(state_dict, model)
    width = len(state_dict.get('head.weight', ())) if is_clip else 0
    model.reset_classifier(0 if width in IMAGENET_HEAD_SIZES else width)
    state_dict.setdefault('head.bias', torch.zeros(width))
    expected = model.state_dict()
    encoder = {
        key: value
        for key, value in state_dict.items()
        if key in expected or key.startswith(ENCODER_PREFIXES)
    }
    if different := difference(expected, encoder):
        raise UserError(f'{context}: {different}')
    model.load_state_dict(encoder)
