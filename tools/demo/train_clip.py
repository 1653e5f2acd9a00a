"""Trains the demo's teacher: a small CLIP, from scratch, on the captioned pictures that tools.demo.draw has drawn.

The result, clip_demo.pth.tar, has the format of OpenAI's state dicts, so that main_pretrain.py --clip_path takes it.

    python -m tools.demo.train_clip --output_dir demo_output
"""

import argparse
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

import clip
from tools.demo.draw import CLASSES, SIZE
from util.checkpoint import save_on_master
from util.errors import as_user_error
from util.misc import run
from util.parser import Parser, bounded
from util.pos_embed import get_2d_sincos_pos_embed

# MILAN shows its teacher the student's images, which are normalised so (main_pretrain.py --teacher_norm imagenet).
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
CONTEXT = 24  # tokens; the longest caption takes 17
BATCH_SIZE = 64
LR = 2e-3


def build_clip():
    """A CLIP with random weights and as many patches as the student, mae_vit_tiny_patch8."""
    model = clip.CLIP(embed_dim=64, image_resolution=SIZE, vision_layers=3, vision_width=128, vision_patch_size=8,
                      context_length=CONTEXT, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1)
    # There is no time here to learn from noise where a patch is.
    table = get_2d_sincos_pos_embed(128, model.visual.grid_size, cls_token=True)
    model.visual.positional_embedding.data.copy_(0.5 * torch.from_numpy(table))
    return model


def load_split(output_dir, split):
    """All pictures and captions of a split, in memory.

    Returns:
        images: uint8 [N, 3, SIZE, SIZE].
        lines: list of N dicts with file, caption and class.
    """
    where = f'--output_dir {output_dir} does not hold what tools.demo.draw makes'
    with as_user_error(where, OSError, ValueError), open(
            os.path.join(output_dir, f'captions_{split}.jsonl'), encoding='utf-8') as f:
        lines = [json.loads(line) for line in f]
    pixels = np.stack([np.asarray(Image.open(os.path.join(output_dir, 'data', line['file']))) for line in lines])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), lines


def normalise(images):
    """uint8 [N, 3, H, W] -> float32 as the teacher takes it."""
    return (images / 255 - MEAN) / STD


def random_view(images, flip, generator):
    """A random part of every picture, resized to the whole, and mirrored where asked.

    The parts are not as small as those of the pretraining: what is cut off must not make the caption untrue too often.

    Args:
        images: uint8 [N, 3, H, W].
        flip: bool [N].

    Returns:
        float32 [N, 3, SIZE, SIZE], normalised.
    """
    n = len(images)
    size = torch.empty(n, 2).uniform_(0.6, 1, generator=generator)
    centre = (1 - size) * torch.empty(n, 2).uniform_(-1, 1, generator=generator)
    size[flip, 0] *= -1
    theta = torch.cat([torch.diag_embed(size), centre.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, [n, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(normalise(images), grid, align_corners=False, padding_mode='reflection')


def encode_half(visual, images, generator):
    """Features of images of which a random half of the patches is left out: FLIP (arXiv 2212.00794), for twice the steps."""
    x = visual.embed(images)
    n, length = len(x), x.shape[1] - 1
    kept = 1 + torch.rand(n, length, generator=generator).argsort(dim=1)[:, :length // 2]
    kept = torch.cat([torch.zeros(n, 1, dtype=torch.int64), kept], dim=1).to(x.device)
    x = x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
    return visual.ln_post(visual.transformer(x)[:, 0]) @ visual.proj


def contrastive_loss(model, images, ids, generator):
    """CLIP's symmetric loss for images and token ids [N, T]. Equal captions are equally right for each other's images."""
    ids = ids[:, :int((ids > 0).sum(dim=1).max())]  # the rest is padding
    image_features = F.normalize(encode_half(model.visual, images, generator), dim=-1)
    text_features = F.normalize(model.encode_text(ids), dim=-1)
    logits = model.logit_scale.exp() * image_features @ text_features.t()
    same = (ids[:, None] == ids[None]).all(dim=-1).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def mirrored(caption):
    """The caption of the mirrored picture."""
    other = {'left': 'right', 'right': 'left'}
    return ' '.join(other.get(word, word) for word in caption.split())


def prompt(name):
    return f'a {name} shape'


def train(model, images, captions, short, steps, generator):
    """AdamW with warm-up and a cosine to zero, on the model's device.

    Args:
        images: uint8 [N, 3, H, W].
        captions: N texts; of a mirrored picture, left and right change places in them.
        short: N texts that name nothing but the class. Every other batch, on average, learns from them.
    """
    full, full_mirrored, short = [clip.tokenize(texts, CONTEXT) for texts in (captions, list(map(mirrored, captions)), short)]
    device = model.logit_scale.device
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{'params': matrices, 'weight_decay': 0.05}, {'params': others, 'weight_decay': 0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warmup) / (steps - warmup))))
    on_terminal = sys.stderr.isatty()
    order, losses = torch.empty(0, dtype=torch.int64), []
    for step in tqdm(range(1, steps + 1), desc='CLIP', disable=not on_terminal):
        if len(order) < BATCH_SIZE:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        flip = torch.rand(BATCH_SIZE, generator=generator) < 0.5
        ids = torch.where(flip[:, None], full_mirrored[batch], full[batch])
        if torch.rand(1, generator=generator) < 0.5:
            ids = short[batch]
        views = random_view(images[batch], flip, generator)
        loss = contrastive_loss(model, views.to(device), ids.to(device), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not on_terminal and step % max(1, steps // 10) == 0:
            recent = losses[-max(1, steps // 10):]
            print(f'step {step}/{steps}, contrastive loss {sum(recent) / len(recent):.3f}', flush=True)


@torch.no_grad()
def zero_shot(model, images, classes, prompts):
    """Share of pictures [N, 3, SIZE, SIZE] of classes [N] nearer to their own class's prompt than to others, in [0, 1]."""
    ids = clip.tokenize(prompts, CONTEXT)
    guesses = torch.cat([model(normalise(part), ids)[0].argmax(dim=1) for part in images.split(200)])
    return (guesses == classes).float().mean().item()


def save(model, path):
    """The CLIP as a file for --clip_path, in the format of OpenAI's state dicts."""
    sizes = {'input_resolution': SIZE, 'context_length': CONTEXT, 'vocab_size': model.vocab_size}
    state_dict = {name: p.cpu().half() if p.ndim > 1 else p.cpu() for name, p in model.state_dict().items()}
    save_on_master({**state_dict, **{name: torch.tensor(size) for name, size in sizes.items()}}, path)


def get_args_parser():
    parser = Parser('tools.demo.train_clip', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output_dir', default='demo_output', metavar='DIR', help='where all files of the demo go')
    parser.add_argument('--seed', type=bounded(int, 0, 2**63 - 1), default=0, metavar='N', help='of all draws')
    parser.add_argument('--quick', action='store_true', help='a few steps')
    return parser


def main(args):
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_clip()
    images, lines = load_split(args.output_dir, 'train')
    captions, short = [line['caption'] for line in lines], [prompt(line['class']) for line in lines]
    train(model, images, captions, short, 20 if args.quick else 600, generator)

    path = os.path.join(args.output_dir, 'clip_demo.pth.tar')
    save(model, path)
    model, _ = clip.load(path, 'cpu')
    images, lines = load_split(args.output_dir, 'val')
    names = list(CLASSES)
    classes = torch.tensor([names.index(line['class']) for line in lines])
    accuracy = zero_shot(model, images, classes, [prompt(name) for name in names])
    with open(os.path.join(args.output_dir, 'teacher.json'), 'w', encoding='utf-8') as f:
        json.dump({'zero_shot': accuracy}, f)
    print(f'{path}: zero-shot top-1 by captions on val {accuracy:.1%}, chance {1 / len(CLASSES):.1%}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
