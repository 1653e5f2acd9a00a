"""The frozen teacher: images in, target tokens and importance out.

Which teachers there are and what they hold important: util/teachers_timm.py, docs/teachers.md. A teacher's image tower is a
module with

    encode_tokens(images [N, 3, R, R], average_targets) -> (tokens [N, L+1, output_dim], importance [N, L])
    input_resolution (R), grid_size (patches along a side), output_dim, layers (the number of blocks)
    mean, std (of its own normalisation), answer (in words, what its importance comes from)

where the L = grid_size ** 2 patches stand in image order, behind the class token or what the teacher has in its place.
clip.model.VisionTransformer is one, TimmTower the other.
"""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import clip
from util import misc
from util.errors import UserError, first_line
from util.teachers_timm import find_timm, load_timm

CLIP_PATH = 'ViT-B/16'  # the published teacher

# The published code's flags: (timm's model, the file in the working directory). SLIP's tower is built as DINO's.
PUBLISHED = {'use_clip_dino': ('vit_base_patch16_224.dino', 'dino_vitbase16_pretrain.pth'),
             'use_clip_slip': ('vit_base_patch16_224.dino', 'slip_vit_base_16.pth.tar')}


class Teacher(nn.Module):
    """An image tower that never learns and stays in eval mode.

    Args:
        visual: the tower.
        norm: what it sees of the student's ImageNet-normalised images: those (imagenet, as published), or the same
            renormalised with the tower's own mean and deviation (own).
        average_targets: see clip.model.VisionTransformer.encode_tokens.
        dtype: of weights and activations; None: as they are. In bf16 nothing is cast in every step, as autocast would.

    Attributes: dim, the width of its tokens; grid_size, its patches along a side.
    """

    def __init__(self, visual, norm='imagenet', average_targets=1, dtype=None):
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        self.dim = visual.output_dim
        self.grid_size = visual.grid_size
        self.average_targets = average_targets
        ours, own = [torch.tensor(v).view(2, 3, 1, 1) for v in
                     ((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (visual.mean, visual.std))]
        own = own if norm == 'own' else ours
        self.register_buffer('scale', ours[1] / own[1], persistent=False)
        self.register_buffer('shift', (ours[0] - own[0]) / own[1], persistent=False)
        self.visual.to(dtype)

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, imgs):
        """imgs [N, 3, H, H], ImageNet-normalised -> (tokens [N, L+1, dim], importance [N, L]).

        Images of another size than the tower's are resized (bicubic, antialiased): its patches then cover the same parts of
        the image as the student's, as long as there are as many of them.
        """
        imgs = imgs * self.scale + self.shift
        size = self.visual.input_resolution
        if imgs.shape[-1] != size:
            imgs = F.interpolate(imgs, size=(size, size), mode='bicubic', antialias=True)
        return self.visual.encode_tokens(imgs.to(next(self.visual.parameters()).dtype), self.average_targets)


def check_teacher(args):
    """UserError where the flags name no teacher or two, or one that is not there; one that is named turns args.use_clip on.

    This is said before the images are listed, which can take minutes.
    """
    named = [name for name in ('teacher', *PUBLISHED) if getattr(args, name)]
    if args.teacher_path and not named:
        raise UserError('--teacher_path is the file of a model; name that by --teacher')
    both = [*named, 'clip_path'] if args.clip_path != CLIP_PATH else named
    if named and len(both) > 1:
        raise UserError(f'--{both[0]} and --{both[1]} name two teachers; give one of them')
    if args.teacher_path and not os.path.isfile(args.teacher_path):
        raise UserError(f'--teacher_path {args.teacher_path} does not exist, or is no file')
    for flag, (_, file) in PUBLISHED.items():
        if getattr(args, flag) and not os.path.isfile(args.teacher_path or file):
            raise UserError(f'--{flag}: {file} is not in the working directory; put it there or give --teacher_path FILE')
    if args.teacher and args.teacher not in clip.available_models():
        find_timm(args.teacher, args.teacher_path)
    if args.use_clip and not named and args.clip_path not in clip.available_models() and not os.path.isfile(args.clip_path):
        raise UserError(f"--clip_path {args.clip_path} is neither a file nor one of CLIP's names: "
                        f'{", ".join(clip.available_models())}')
    args.use_clip = args.use_clip or bool(named)


def build_teacher(args, grid_size, device):
    """The teacher of the flags on ``device``, for grid_size x grid_size patches.

    Raises:
        UserError: what is wrong with the flag or the file.
    """
    name, visual = _load(args, grid_size)
    if args.average_targets > visual.layers:
        raise UserError(f'--average_targets {args.average_targets}: the teacher {name} has {visual.layers} blocks')
    teacher = Teacher(visual, args.teacher_norm, args.average_targets, misc.AMP_DTYPES[args.amp]).to(device)
    print(f'Teacher {name}: {grid_size}x{grid_size} patches at {visual.input_resolution} pixels, {visual.output_dim} wide, '
          f'importance from its {visual.answer}, --teacher_norm {args.teacher_norm}')
    if args.compile:
        teacher.compile()
    return teacher


def _load(args, grid_size):
    """(name, tower) of the teacher that the flags choose."""
    for flag, (name, file) in PUBLISHED.items():
        if getattr(args, flag):
            path = args.teacher_path or file
            return path, load_timm(name, grid_size, path)
    if args.teacher and args.teacher not in clip.available_models():
        return args.teacher, load_timm(args.teacher, grid_size, args.teacher_path)

    flag = 'teacher_path' if args.teacher_path else 'teacher' if args.teacher else 'clip_path'
    path = getattr(args, flag)
    try:
        visual = clip.load(path, 'cpu')[0].visual
    except (OSError, ValueError) as e:
        raise UserError(f'--{flag} {path}: {first_line(e)}') from e
    if args.teacher:
        visual.set_grid_size(grid_size)
    else:
        _check_clip(args, visual, grid_size)
    return args.teacher or path, visual


def _check_clip(args, visual, grid_size):
    """The published --clip_path takes images as they are: UserError if they are not what the teacher takes."""
    if visual.input_resolution != args.input_size:
        raise UserError(f'the teacher {args.clip_path} takes images of {visual.input_resolution} pixels; '
                        f'give --input_size {visual.input_resolution} instead of {args.input_size}, or another teacher')
    if visual.grid_size != grid_size:
        raise UserError(f'the teacher {args.clip_path} has {visual.grid_size}x{visual.grid_size} patches and {args.model} '
                        f'at --input_size {args.input_size} has {grid_size}x{grid_size}; take a teacher of the same patch size')
