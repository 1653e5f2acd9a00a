"""The frozen teacher: images in, target tokens and importance out."""

import torch
import torch.nn as nn
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import clip
from clip.clip import MEAN, STD
from util import misc
from util.errors import UserError, first_line


class Teacher(nn.Module):
    """A CLIP image tower that never learns and stays in eval mode.

    Args:
        visual: clip.model.VisionTransformer.
        norm: what it sees of the student's ImageNet-normalised images: those (imagenet, as published), or the same renormalised
            with CLIP's own mean and deviation (own).
        average_targets: see encode_tokens.
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
                     ((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (MEAN, STD))]
        own = own if norm == 'own' else ours
        self.register_buffer('scale', ours[1] / own[1], persistent=False)
        self.register_buffer('shift', (ours[0] - own[0]) / own[1], persistent=False)
        self.visual.to(dtype)

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, imgs):
        """imgs [N, 3, H, W], ImageNet-normalised -> (tokens [N, L+1, dim], importance [N, L])."""
        imgs = (imgs * self.scale + self.shift).to(self.visual.proj.dtype)
        return self.visual.encode_tokens(imgs, self.average_targets)


def build_teacher(args, device):
    """The teacher of --clip_path on ``device``; raises UserError with what is wrong with the flag or the file."""
    try:
        model, _ = clip.load(args.clip_path, 'cpu')
    except (OSError, ValueError) as e:
        raise UserError(f'--clip_path {args.clip_path}: {first_line(e)}') from e
    visual = model.visual
    if visual.input_resolution != args.input_size:
        raise UserError(f'the teacher {args.clip_path} takes images of {visual.input_resolution} pixels; '
                        f'give --input_size {visual.input_resolution} instead of {args.input_size}, or another teacher')
    layers = len(visual.transformer.resblocks)
    if args.average_targets > layers:
        raise UserError(f'--average_targets {args.average_targets}: the teacher {args.clip_path} has {layers} blocks')
    teacher = Teacher(visual, args.teacher_norm, args.average_targets, misc.AMP_DTYPES[args.amp]).to(device)
    if args.compile:
        teacher.compile()
    return teacher
