"""A small CLIP for 64-pixel images, trained from scratch: the teacher of the demo and ablation."""

import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor

import clip
from util.checkpoints.io import save_on_master
from util.datasets import normalize
from util.pos_embed import get_2d_sincos_pos_embed

SIZE = 64  # pixels per side
CONTEXT = 24  # tokens per caption; the longest caption of the demo has 17
BATCH_SIZE = 64
LR = 2e-3


def build_clip() -> clip.CLIP:
    """Build a CLIP with random weights and as many patches as mae_vit_tiny_patch8."""
    model = clip.CLIP(
        embed_dim=64,
        image_resolution=SIZE,
        vision_layers=3,
        vision_width=128,
        vision_patch_size=8,
        context_length=CONTEXT,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    # The training is too short to learn positions from random initial values.
    table = get_2d_sincos_pos_embed(128, model.visual.grid_size, cls_token=True)
    model.visual.positional_embedding.data.copy_(0.5 * torch.from_numpy(table))
    return model


def train(
    model: clip.CLIP,
    images: Tensor,
    captions: Sequence[str],
    short: Sequence[str],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train with AdamW, linear warm-up and a cosine schedule, on the model's device.

    Args:
        model: from ``build_clip``.
        images: uint8 [N, 3, SIZE, SIZE].
        captions: N texts. If an image is mirrored, its caption swaps left and right.
        short: N texts that name only the class. A random half of the batches uses them.
        steps: number of steps, of BATCH_SIZE images each.
        generator: for all random draws.
    """
    other = {'left': 'right', 'right': 'left'}
    mirrored = [' '.join(other.get(word, word) for word in text.split()) for text in captions]
    full, mirrored, short = [clip.tokenize(part, CONTEXT) for part in (captions, mirrored, short)]
    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), fused=True)
    warmup, every = max(1, steps // 12), max(1, steps // 10)
    order, losses = torch.empty(0, dtype=torch.int64), []
    for step in range(1, steps + 1):
        progress = max(0, step - 1 - warmup) / (steps - warmup)
        for group in optimizer.param_groups:
            group['lr'] = LR * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        if len(order) < BATCH_SIZE:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        flip = torch.rand(BATCH_SIZE, generator=generator) < 0.5
        ids = torch.where(flip[:, None], mirrored[batch], full[batch])
        ids = short[batch] if torch.rand(1, generator=generator) < 0.5 else ids
        loss = _contrastive_loss(
            model, _random_view(images[batch], flip, generator), ids, generator
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % every == 0:
            mean = sum(losses[-every:]) / every
            print(f'step {step}/{steps}, contrastive loss {mean:.3f}', flush=True)


# A random crop of each uint8 image [N, 3, H, W], mirrored if ``flip`` [N], normalized, and resized
# to SIZE. The crops are larger than in pretraining: what a caption mentions should stay visible.
def _random_view(images, flip, generator):
    n = len(images)
    size = torch.empty(n, 2).uniform_(0.6, 1, generator=generator)
    center = (1 - size) * torch.empty(n, 2).uniform_(-1, 1, generator=generator)
    size[flip, 0] *= -1
    theta = torch.cat([torch.diag_embed(size), center.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, [n, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(normalize(images), grid, align_corners=False, padding_mode='reflection')


# CLIP's symmetric loss for normalized images and token ids [N, T] on the CPU. Images with equal
# captions share their targets.
def _contrastive_loss(model, images, ids, generator):
    images, ids = images.to(model.logit_scale.device), ids.to(model.logit_scale.device)
    ids = ids[:, : int((ids > 0).sum(dim=1).max())]  # the rest is padding
    image_features = F.normalize(_encode_half(model.visual, images, generator), dim=-1)
    text_features = F.normalize(model.encode_text(ids), dim=-1)
    logits = model.logit_scale.exp() * image_features @ text_features.t()
    same = (ids[:, None] == ids[None]).all(dim=-1).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


# Image features [N, D] from a random half of the patches, which doubles the number of steps in the
# same time (FLIP, arXiv 2212.00794).
def _encode_half(visual, images, generator):
    x = visual.embed(images)
    n, length = len(x), x.shape[1] - 1
    kept = 1 + torch.rand(n, length, generator=generator).argsort(dim=1)[:, : length // 2]
    kept = torch.cat([torch.zeros(n, 1, dtype=torch.int64), kept], dim=1).to(x.device)
    x = x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
    return visual.ln_post(visual.transformer(x)[:, 0]) @ visual.proj


def save(model: clip.CLIP, path: str | os.PathLike) -> None:
    """Save the CLIP for --clip_path, in the format of OpenAI's state dicts."""
    sizes = {'input_resolution': SIZE, 'context_length': CONTEXT, 'vocab_size': model.vocab_size}
    weights = {k: p.cpu().half() if p.ndim > 1 else p.cpu() for k, p in model.state_dict().items()}
    save_on_master({**weights, **{k: torch.tensor(size) for k, size in sizes.items()}}, path)


@torch.no_grad()
def zero_shot(
    path: str | os.PathLike, images: Tensor, labels: Tensor, prompts: Sequence[str]
) -> float:
    """Return the zero-shot accuracy of a saved CLIP on the CPU, in [0, 1].

    Args:
        path: from ``save``.
        images: uint8 [N, 3, SIZE, SIZE].
        labels: class indices [N].
        prompts: one text per class.
    """
    model, _ = clip.load(str(path), 'cpu')
    ids = clip.tokenize(prompts, CONTEXT)
    logits = torch.cat([model(normalize(part), ids)[0] for part in images.split(200)])
    return (logits.argmax(dim=1) == labels).float().mean().item()
