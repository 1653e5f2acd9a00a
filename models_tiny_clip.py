"""A small CLIP for 64-pixel images, trained from scratch: the teacher of the demo and ablation."""

import math
import os

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

import clip
from util.checkpoints.io import save_on_master
from util.datasets import normalize
from util.masking import take
from util.pos_embed import get_2d_sincos_pos_embed

SIZE = 64  # pixels per side
BATCH_SIZE = 64


def build_clip() -> clip.CLIP:
    """Build a CLIP with random weights and as many patches as mae_vit_tiny_patch8."""
    model = clip.CLIP(
        embed_dim=64,
        image_resolution=SIZE,
        vision_layers=3,
        vision_width=128,
        vision_patch_size=8,
        context_length=24,  # the longest caption of the demo has 17 tokens
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    # The training is too short to learn positions from random initial values.
    table = torch.from_numpy(get_2d_sincos_pos_embed(128, SIZE // 8, cls_token=True))
    model.visual.positional_embedding.data.copy_(0.5 * table)
    return model


def train(
    model: clip.CLIP,
    images: torch.Tensor,
    captions: list[str],
    short: list[str],
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
    swap = {'left': 'right', 'right': 'left'}
    mirrored = [' '.join(swap.get(word, word) for word in text.split()) for text in captions]
    ids = torch.stack(
        [clip.tokenize(texts, model.context_length) for texts in (captions, mirrored, short)]
    )
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, 0.05), lr=2e-3, betas=(0.9, 0.98), fused=True
    )
    warmup = max(1, steps // 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.5 + 0.5 * math.cos(math.pi * (max(0, step - warmup) / (steps - warmup))),
        ),
    )
    sampler = torch.utils.data.RandomSampler(
        images, num_samples=steps * BATCH_SIZE, generator=generator
    )
    for step, batch in enumerate(
        torch.utils.data.BatchSampler(sampler, BATCH_SIZE, drop_last=True), 1
    ):
        flip = torch.rand(BATCH_SIZE, generator=generator) < 0.5
        kind = 2 if torch.rand(1, generator=generator) < 0.5 else flip.long()
        loss = _contrastive_loss(
            model, _random_view(images[batch], flip, generator), ids[kind, batch], generator
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f'step {step}/{steps}, contrastive loss {loss.item():.3f}', flush=True)


# A random crop of each uint8 image [N, 3, H, W], mirrored if ``flip`` [N], and normalized. The
# crops are larger than in pretraining: what a caption mentions should stay visible.
def _random_view(images, flip, generator):
    size = torch.empty(len(images), 2).uniform_(0.6, 1, generator=generator)
    center = (1 - size) * torch.empty(len(images), 2).uniform_(-1, 1, generator=generator)
    size[flip, 0] *= -1
    theta = torch.cat([torch.diag_embed(size), center.unsqueeze(2)], dim=2)
    return F.grid_sample(
        normalize(images),
        F.affine_grid(theta, images.shape, align_corners=False),
        align_corners=False,
        padding_mode='reflection',
    )


# CLIP's symmetric loss for normalized images and token ids [N, T]. Images with equal captions
# share their targets. The image tower sees a random half of the patches, which doubles the number
# of steps in the same time (FLIP, arXiv 2212.00794).
def _contrastive_loss(model, images, ids, generator):
    noise = torch.rand(len(images), model.visual.grid_size**2, generator=generator)
    kept = F.pad(1 + noise.argsort(dim=1)[:, : noise.shape[1] // 2], (1, 0))  # 0: class token
    images, ids, kept = (x.to(model.logit_scale.device) for x in (images, ids, kept))
    ids = ids[:, : ids.count_nonzero(dim=1).max()]  # the rest is padding
    x = model.visual.transformer(take(model.visual.embed(images), kept))
    image_features = F.normalize(model.visual.ln_post(x[:, 0]) @ model.visual.proj, dim=-1)
    text_features = F.normalize(model.encode_text(ids), dim=-1)
    logits = model.logit_scale.exp() * image_features @ text_features.t()
    target = F.normalize((ids[:, None] == ids).all(dim=-1).float(), p=1, dim=1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def save(model: clip.CLIP, path: str | os.PathLike) -> None:
    """Save the CLIP for --clip_path, in the format of OpenAI's state dicts."""
    save_on_master(
        {
            **{k: p.cpu().half() if p.ndim > 1 else p.cpu() for k, p in model.state_dict().items()},
            'input_resolution': torch.tensor(SIZE),
            'context_length': torch.tensor(model.context_length),
            'vocab_size': torch.tensor(model.vocab_size),
        },
        path,
    )


@torch.no_grad()
def zero_shot(
    path: str | os.PathLike, images: torch.Tensor, labels: torch.Tensor, prompts: list[str]
) -> float:
    """Return the zero-shot accuracy of a saved CLIP on the CPU, in [0, 1].

    Args:
        path: from ``save``.
        images: uint8 [N, 3, SIZE, SIZE].
        labels: class indices [N].
        prompts: one text per class.
    """
    model, _ = clip.load(str(path), 'cpu')
    ids = clip.tokenize(prompts, model.context_length)
    logits = torch.cat([model(normalize(part), ids)[0] for part in images.split(200)])
    return (logits.argmax(dim=1) == labels).float().mean().item()
