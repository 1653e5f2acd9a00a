"""The frozen teacher: images in, target tokens and importance out (MILAN sections 3.1 and 3.3).

A teacher is a frozen image tower. A tower is a module with

    encode_tokens(images [N, 3, R, R], average_targets)
        -> (tokens [N, L+1, output_dim], importance [N, L])
    input_resolution   R, the image size in pixels
    grid_size          patches per side; L = grid_size ** 2
    output_dim         width of the tokens
    layers             number of blocks
    mean, std          its own input normalization
    importance_source  where its importance comes from, for the log

Tokens are in image order, after the class token or the model's pooled output. There are two
towers: clip.model.VisionTransformer and util.timm_tower.TimmTower. docs/teachers.md lists the
models that were tried.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import clip
from util.amp import AMP_DTYPES
from util.errors import UserError, as_user_error, refuse
from util.timm_tower import find_timm, load_timm

CLIP_PATH = 'ViT-B/16'  # default of --clip_path: the teacher of the paper

# Flags of the published code: (timm model, file in the working directory).
# SLIP's image tower has the architecture of DINO's.
LEGACY_TEACHERS = {
    'use_clip_dino': ('vit_base_patch16_224.dino', 'dino_vitbase16_pretrain.pth'),
    'use_clip_slip': ('vit_base_patch16_224.dino', 'slip_vit_base_16.pth.tar'),
}


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher a run uses and how.

    Attributes:
        flag: flag that names the teacher, without dashes. With 'clip_path' the teacher must have
            the student's image size and patch size, as published; others are resized.
        name: model name (CLIP's or timm's). With --clip_path: its value, a name or a file.
        path: file with the weights; '' downloads them by ``name`` or reads the cache.
        kind: 'clip' (OpenAI's architecture, clip/) or 'timm' (any ViT of timm).
        norm: normalization of the teacher's input; see Teacher.
        average_targets: see Teacher.
    """

    flag: str
    name: str
    path: str
    kind: str
    norm: str = 'imagenet'
    average_targets: int = 1

    @property
    def text_tower(self) -> str:
        """Name or file of the CLIP that encodes texts; '' if this teacher has no text tower."""
        return (self.path or self.name) if self.kind == 'clip' else ''

    @classmethod
    def from_args(cls, flags: Namespace) -> TeacherSpec | None:
        """Validate the teacher flags and return the teacher that they name.

        --teacher, --use_clip_dino and --use_clip_slip imply --use_clip. Nothing is loaded, so
        that a mistake is reported before the images are listed, which can take minutes.

        Returns:
            The spec, or None if no teacher is asked for.

        Raises:
            UserError: if two teachers are named, or one that does not exist.
        """
        path, clip_names = flags.teacher_path, clip.available_models()
        named = [flag for flag in ('teacher', *LEGACY_TEACHERS) if vars(flags)[flag]]
        if path and not named:
            raise UserError(f'--teacher_path {path} needs --teacher NAME, the model of the file')
        if not (named or flags.use_clip):
            return None
        if not named or flags.clip_path != CLIP_PATH:
            named.append('clip_path')
        flag = named[0]
        name, file = LEGACY_TEACHERS.get(flag, (vars(flags)[flag], ''))
        is_clip = flag == 'clip_path' or name in clip_names
        refuse(
            (named[1:], f'--{" and --".join(named)} name different teachers; give only one'),
            (path and not os.path.isfile(path), f'--teacher_path {path}: file not found'),
            (
                file and not os.path.isfile(path or file),
                f'--{flag}: {file} not found in the working directory; give --teacher_path FILE',
            ),
            (
                is_clip and not (name in clip_names or os.path.isfile(name)),
                f'--clip_path {name} is neither a file nor a CLIP name ({", ".join(clip_names)})',
            ),
        )
        path, kind = path or file, 'clip' if is_clip else 'timm'
        if not is_clip:
            find_timm(name, path, clip_names)
        return cls(flag, name, path, kind, flags.teacher_norm, flags.average_targets)


class Teacher(nn.Module):
    """A frozen image tower: no gradients, eval mode.

    Never call train() on it; nothing in this repository does.

    Args:
        visual: the tower; see the top of this file.
        norm: 'imagenet' passes the student's normalized images unchanged (as published);
            'own' renormalizes them with the tower's mean and std.
        average_targets: average the tokens of this many last blocks.
        dtype: of weights and activations; None keeps them. Storing the weights in bf16 saves
            the casts that autocast would repeat in every step.

    Attributes:
        dim: width D of the tokens.
        grid_size: patches per side.
    """

    def __init__(
        self,
        visual: nn.Module,
        norm: str = 'imagenet',
        average_targets: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.visual, self.average_targets = visual.to(dtype), average_targets
        self.dim, self.grid_size = visual.output_dim, visual.grid_size
        student = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        own = (visual.mean, visual.std) if norm == 'own' else student
        (mean, std), (own_mean, own_std) = torch.tensor([student, own]).view(2, 2, 3, 1, 1)
        self.register_buffer('scale', std / own_std, persistent=False)
        self.register_buffer('shift', (mean - own_mean) / own_std, persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target tokens and the importance of every patch.

        Images of another size are resized to the tower's (bicubic, antialiased). If student and
        teacher have the same grid, their patches then cover the same parts of the image.

        Args:
            imgs: [N, 3, H, H], normalized with the ImageNet mean and std.

        Returns:
            tokens [N, L+1, D] and importance [N, L].
        """
        imgs = imgs * self.scale + self.shift
        size = self.visual.input_resolution
        if imgs.shape[-1] != size:
            imgs = nn.functional.interpolate(imgs, (size, size), mode='bicubic', antialias=True)
        dtype = next(self.visual.parameters()).dtype
        return self.visual.encode_tokens(imgs.to(dtype), self.average_targets)


def build_teacher(
    spec: TeacherSpec,
    *,
    grid_size: int,
    input_size: int,
    model_name: str,
    device: torch.device | str,
    amp: str = 'fp32',
    compile: bool = False,
) -> Teacher:
    """Load a teacher.

    Args:
        spec: which teacher.
        grid_size: patches per side of the student.
        input_size: image size of the student in pixels.
        model_name: name of the student, for error messages.
        device: device to put the teacher on.
        amp: 'fp32', 'bf16' or 'fp16': precision of its weights and activations.
        compile: compile it with torch.compile.

    Raises:
        UserError: if the weights cannot be loaded, or the teacher does not suit the student.
    """
    published = spec.flag == 'clip_path'
    if spec.kind == 'timm':
        visual = load_timm(spec.name, grid_size, spec.path)
    else:
        context = f'--teacher_path {spec.path}' if spec.path else f'--{spec.flag} {spec.name}'
        with as_user_error(context, OSError, ValueError):
            visual = clip.load(spec.text_tower, 'cpu')[0].visual
        if not published:
            visual.set_grid_size(grid_size)
    size, grid = visual.input_resolution, visual.grid_size
    refuse(
        (
            published and size != input_size,
            f'the teacher --clip_path {spec.name} takes images of {size} pixels; '
            f'give --input_size {size} instead of {input_size}, or another teacher',
        ),
        (
            grid != grid_size,
            f'the teacher --{spec.flag} {spec.name} has {grid}x{grid} patches and {model_name} '
            f'at --input_size {input_size} has {grid_size}x{grid_size}; choose a teacher with '
            'the same patch size',
        ),
        (
            spec.average_targets > visual.layers,
            f'--average_targets {spec.average_targets}: the teacher {spec.name} has '
            f'{visual.layers} blocks',
        ),
    )
    teacher = Teacher(visual, spec.norm, spec.average_targets, AMP_DTYPES[amp]).to(device)
    print(
        f'Teacher {spec.name}: {grid}x{grid} patches at {size} pixels, {teacher.dim} wide, '
        f'importance from its {visual.importance_source}, --teacher_norm {spec.norm}'
    )
    if compile:
        teacher.compile()
    return teacher


# ---- texts ----


def check_texts(flag: str, texts: Sequence[str], tower: str) -> None:
    """Check the texts of ``flag`` without loading anything.

    Args:
        flag: the flag with its dashes, for error messages.
        texts: the texts.
        tower: name or file of a CLIP; see TeacherSpec.text_tower.

    Raises:
        UserError: if a text is empty or the teacher has no text tower.
    """
    refuse(
        (
            not tower,
            f'{flag} compares texts with the tokens of a CLIP, and this teacher has no text '
            'tower: give --clip_path, or --teacher with a CLIP name',
        ),
        (
            not all(text.strip() for text in texts),
            f'{flag}: one of the texts is empty',
        ),
    )


def read_texts(flag: str, texts: Sequence[str], tower: str) -> tuple[Tensor, float]:
    """Encode the texts of ``flag`` with the text tower of a CLIP.

    The CLIP is read from its file again and freed afterwards: a teacher keeps only its image
    tower.

    Args:
        flag, texts, tower: see check_texts.

    Returns:
        features [K, D] of length 1, and CLIP's logit scale.

    Raises:
        UserError: see check_texts; if the CLIP cannot be read or a text is too long for it.
    """
    check_texts(flag, texts, tower)
    errors = OSError, ValueError, RuntimeError
    with torch.no_grad(), as_user_error(f'{flag} with the CLIP {tower}', *errors):
        model, _ = clip.load(tower, 'cpu')
        ids = clip.tokenize(texts, model.context_length)
        if ids.max() >= model.vocab_size:
            raise ValueError(f'the texts need tokens beyond its vocabulary of {model.vocab_size}')
        features = nn.functional.normalize(model.encode_text(ids), dim=-1)
        return features, model.logit_scale.exp().item()
