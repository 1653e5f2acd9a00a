"""Any ViT of timm as a teacher.

What its tokens are, and what it holds important, follows from how the model itself answers, which its modules tell: there is
no list of names. Registers and other tokens in front of the L patches are left out of both.

* From a class token (CLIP, EVA-CLIP, DINO, DINOv2, DINOv3, TIPSv2, RADIO, DeiT). First of the L+1 tokens: the class token.
  Importance: its attention to each patch in the last block. Sums to 1 less what goes to itself and to registers.
* By attention pooling (SigLIP, SigLIP 2, PE). First: the pooled output. Importance: the pooling's weights. They sum to 1,
  less what goes to tokens in front where those are pooled too (PE's class token).
* From the mean of the patches (AIMv2, EVA, EVA-02, BEiT, SigLIP's gap models). First: the pooled output. Importance: the
  attention that each patch receives in the last block, mean over all tokens that attend. Sums to 1 less what tokens in front
  receive. (A class token that the mean passes over, as EVA-02's, has had nothing to learn from.)

Importance is the mean over heads. Tokens are a block's output through the final norm, or through the norm behind the pooling
where the model has that instead; CLIP's go through its projection too, as MILAN has it.

No attention matrix is ever there as a whole, with one exception: attention received takes that of the last block.
"""

import difflib
import os
import re
import sys

import timm
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, is_model_in_modules
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, ResPostBlock

import clip
from util.checkpoint import misfit, read_weights
from util.errors import UserError, as_user_error, first_line

MODULES = 'vision_transformer', 'eva', 'beit', 'deit'  # of timm.models: their ViTs keep one grid of patches throughout
ATTENTIONS = Attention, EvaAttention, BeitAttention, getattr(timm.layers, 'AttentionRope', None)  # the last is newer timm's
POST_NORM = ResPostBlock, EvaBlockPostNorm  # blocks whose attention takes their input as it is
LABELS = 1000, 11221, 11821, 21841, 21843  # ImageNet's numbers of classes: with a head of these a CLIP was fine-tuned
ONLY_WEIGHTS = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # by this PyTorch runs nothing of a file where older timm would let it
MISFITS = RuntimeError, AssertionError, ValueError, KeyError, AttributeError, TypeError, IndexError  # another model's file
PARTS = 'patch_embed.', 'cls_token', 'reg_token', 'dist_token', 'pos_embed', 'norm_pre.', 'blocks.'  # what tokens come from


class TimmTower(nn.Module):
    """A timm ViT with the interface that util/teacher.py asks for.

    Args:
        model: timm's, for images of one size (without dynamic_img_size).
        project: its head is a projection that the tokens go through.

    Raises:
        ValueError: its patches make no square, or its last block's attention is of an unknown kind.
    """

    def __init__(self, model, project=False):
        super().__init__()
        rows, columns = model.patch_embed.grid_size
        attention = type(getattr(model.blocks[-1], 'attn', None))
        if rows != columns or attention not in ATTENTIONS:
            raise ValueError(f'{rows}x{columns} patches and a last block of {attention.__name__} make no teacher')
        self.model = model
        self.project = project
        self.answer = _answer(model)
        self.grid_size = rows
        self.input_resolution = model.patch_embed.img_size[0]
        self.layers = len(model.blocks)
        self.output_dim = model.head.out_features if project else model.embed_dim
        self.mean, self.std = model.pretrained_cfg['mean'], model.pretrained_cfg['std']
        for module in model.modules():
            if hasattr(module, 'fused_attn'):  # the plain formula, where it is chosen, is for its backward pass
                module.fused_attn = True

    def encode_tokens(self, images, average_targets=1):
        """images [N, 3, R, R] -> (tokens [N, L+1, output_dim], importance [N, L], float32); see above and clip/model.py."""
        in_front = self.model.num_prefix_tokens
        outputs = self.model.forward_intermediates(
            images, max(2, average_targets), return_prefix_tokens=in_front > 0, output_fmt='NLC', intermediates_only=True)
        if in_front:
            outputs = [torch.cat([first, patches], dim=1) for patches, first in outputs]
        tokens = sum(self._finish(x) for x in outputs[-average_targets:]) / average_targets
        if self.project:
            tokens = self.model.head(tokens)
        importance = IMPORTANCE[self.answer](self.model, *outputs[-2:])
        return tokens, importance[:, -self.grid_size**2:]

    def _finish(self, x):
        """A block's output [N, T, D] -> normalised tokens [N, L+1, D]: class token, or what stands for it, and patches."""
        x = self.model.norm(x)
        patches = x[:, -self.grid_size**2:]
        if isinstance(self.model.norm, nn.Identity):
            patches = self.model.fc_norm(patches)
        first = x[:, 0] if self.answer == 'class token' else self.model.forward_head(x, pre_logits=True)
        return torch.cat([first.unsqueeze(1), patches], dim=1)


def _answer(model):
    """Where a model takes its answer from: a key of IMPORTANCE."""
    if getattr(model, 'attn_pool', None) is not None:
        return 'attention pooling'
    # timm pools DINOv3 by the mean; that its final norm is over all tokens tells that the class token counts
    counts = model.global_pool == 'token' or not isinstance(model.norm, nn.Identity)
    return 'class token' if model.cls_token is not None and counts else 'mean of patches'


# ---- importance ----
# From the model and its last block's input and output [N, T, D]: weights [N, T], of which the last L are the patches'.

def class_row(model, x, _):
    """How the class token attends."""
    return _last_attention(model, x, rows=1).mean(dim=(1, 2))


def attention_received(model, x, _):
    """How all tokens attend on average; takes the matrix [N, heads, T, T]."""
    return _last_attention(model, x, rows=x.shape[1]).mean(dim=(1, 2))


def pooling_weights(model, _, x):
    """How the pooling's query attends."""
    pool = model.attn_pool
    x = model.norm(x)
    if not getattr(model, 'pool_include_prefix', True):
        x = x[:, model.num_prefix_tokens:]
    q = pool.q_norm(_split(pool.q(pool.latent), pool.scale))
    k = pool.k_norm(_split(_part(pool.kv, x, 0, 2), pool.scale))
    return _softmax(q * pool.scale, k).mean(dim=(1, 2))


IMPORTANCE = {'class token': class_row, 'attention pooling': pooling_weights, 'mean of patches': attention_received}


def _last_attention(model, x, rows):
    """The last block's input [N, T, D] -> the first ``rows`` rows of its attention [N, heads, rows, T], float32."""
    block = model.blocks[-1]
    attn = block.attn
    x = x if isinstance(block, POST_NORM) else block.norm1(x)
    rope = getattr(model, 'rope', None)
    rope = None if rope is None else rope.get_embed()
    if getattr(model, 'rope_mixed', False):
        rope = rope[-1]  # every block has its own
    q = _project(attn, x[:, :rows], 'q', rope)
    k = _project(attn, x, 'k', rope)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # heads may share their keys
    bias = None
    if getattr(attn, 'relative_position_bias_table', None) is not None:
        bias = attn._get_rel_pos_bias()[:, :, :rows]
    return _softmax(q * attn.scale, k, bias)


def _project(attn, x, name, rope):
    """Queries ('q') or keys ('k') of tokens [N, T, D] in timm's ``attn`` -> [N, heads, T, d], normalised and rotated."""
    separate = getattr(attn, f'{name}_proj', None)
    y = _part(attn.qkv, x, 'qk'.index(name), 3, getattr(attn, f'{name}_bias', None)) if separate is None else separate(x)
    y = getattr(attn, f'{name}_norm', nn.Identity())(_split(y, attn.scale))
    in_front = getattr(attn, 'num_prefix_tokens', 0)
    if rope is None or y.shape[2] <= in_front:  # tokens in front have no place in the picture
        return y
    half = {'half': True} if getattr(attn, 'rotate_half', False) else {}  # older timm knows one way alone
    rotated = timm.layers.apply_rot_embed_cat(y[:, :, in_front:], rope, **half)
    return torch.cat([y[:, :, :in_front], rotated], dim=2).type_as(y)


def _part(linear, x, part, parts, bias=None):
    """The ``part``-th of the ``parts`` outputs that one linear layer computes side by side."""
    if linear.bias is not None:
        bias = linear.bias.chunk(parts)[part]
    return F.linear(x, linear.weight.chunk(parts)[part], bias)


def _split(x, scale):
    """[N, T, heads * d] -> [N, heads, T, d], where scale is d ** -0.5."""
    return x.unflatten(-1, (-1, round(scale**-2))).transpose(1, 2)


def _softmax(q, k, bias=None):
    """Scaled queries [N, heads, Q, d] and keys [N, heads, T, d] -> attention [N, heads, Q, T], in float32 at least."""
    scores = q @ k.transpose(-2, -1)
    scores = scores if bias is None else scores + bias
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)


# ---- by name ----

def load_timm(name, grid_size, path='', **kwargs):
    """A TimmTower in eval mode on the CPU, for images of grid_size x grid_size of its patches.

    Args:
        name: timm's, with the tag of its weights after a dot or without.
        path: a file with the weights in a format that timm converts for this model (its own, mostly also the authors' and
            open_clip's), or SLIP's; '': timm's hub, or its cache.
        kwargs: timm.create_model's.

    Raises:
        UserError: no such model or tag, none that can be a teacher, weights that cannot be fetched or do not fit.
    """
    where = f'--teacher {name}'
    cfg = find_timm(name, path)
    patch = re.search(r'patch(\d+)', name)
    kwargs['img_size'] = grid_size * (int(patch[1]) if patch else 16)
    if not is_model_in_modules(name, ['beit']):  # whose images are of one size anyway
        kwargs['dynamic_img_size'] = False
    language = '_clip_' in name.partition('.')[0]
    if path:
        model = timm.create_model(name, num_classes=cfg.num_classes if language else 0, **kwargs)
        _load_file(model, name, path, language)
    else:
        width = cfg.num_classes if language and cfg.num_classes not in LABELS else 0
        model = _fetch(where, name, num_classes=width, **kwargs)
        if cfg.num_classes in LABELS:
            print(f'Note: the weights {cfg.tag} of {cfg.architecture} have seen the labels of {cfg.num_classes} classes')
    with as_user_error(where, ValueError):
        tower = TimmTower(model.eval(), project=isinstance(model.head, nn.Linear))
    if tower.grid_size != grid_size:
        raise UserError(f'{where} has {tower.grid_size}x{tower.grid_size} patches and not {grid_size}x{grid_size}')
    return tower


def find_timm(name, path=''):
    """timm's config of the model and weights ``name``; UserError, with names that may be meant, if there are none."""
    where = f'--teacher {name}'
    if os.path.isfile(name):
        raise UserError(f'{where} is a file; name its model there and give the file by --teacher_path')
    known = [*clip.available_models(), *(m for module in MODULES for tagged in (False, True)
                                         for m in timm.list_models(module=module, pretrained=tagged))]
    close = ' or '.join(difflib.get_close_matches(name, known, cutoff=0.5))
    hint = f', did you mean {close}?' if close else ''
    if not timm.is_model(name):
        raise UserError(f"{where} is neither one of CLIP's names nor a model of timm {timm.__version__}{hint}")
    if not is_model_in_modules(name, MODULES):
        raise UserError(f'{where} is no ViT that keeps one square grid of patches (docs/teachers.md)')
    try:
        cfg = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        raise UserError(f'{where}: timm {timm.__version__} knows no weights of that name{hint}') from None
    if not path and not cfg.has_weights:
        raise UserError(f'{where}: timm has no weights for it; give a file, --teacher_path FILE')
    return cfg


def _fetch(where, name, **kwargs):
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = '1'
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as e:  # hub, cache and network have each their own kinds
        raise UserError(f"{where}: its weights could not be fetched from timm's hub ({first_line(e)}); "
                        'fetch them by other means and give --teacher_path FILE') from e
    finally:
        os.environ.pop(ONLY_WEIGHTS) if before is None else os.environ.update({ONLY_WEIGHTS: before})


def _load_file(model, name, path, language):
    """The weights in ``path`` into timm's ``model``; with ``language`` its head becomes the file's projection, if any."""
    where = f'the teacher in {path}'
    _, state_dict = read_weights(path)
    if 'image_projection' in state_dict:
        state_dict, language = _from_slip(state_dict), True
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn  # every file of timm's has its own
    with as_user_error(f'{where} is no {name}', *MISFITS):
        state_dict = convert(state_dict, model)
    width = len(state_dict.get('head.weight', ())) if language else 0
    model.reset_classifier(0 if width in LABELS else width)
    state_dict.setdefault('head.bias', torch.zeros(width))
    ours = model.state_dict()
    for key, value in ours.items():
        if key not in state_dict:
            raise UserError(f'{where} is no {name}: it has no {key}')
        if unlike := misfit(value, state_dict[key]):
            raise UserError(f'{where} is no {name}: {key} is {unlike}')
    extra = [key for key in state_dict if key not in ours and key.startswith(PARTS)]
    if extra:
        raise UserError(f'{where} is no {name}: it has {extra[0]} too')
    model.load_state_dict({key: state_dict[key] for key in ours})


def _from_slip(state_dict):
    """SLIP's state dict (arXiv 2112.12750) as that of timm's ViT, with image_projection [D, dim] as its head."""
    projection = state_dict['image_projection']
    tower = {name.removeprefix('visual.'): value for name, value in state_dict.items() if name.startswith('visual.')}
    return {**tower, 'head.weight': projection.t(), 'head.bias': torch.zeros(projection.shape[1])}
