"""Train the demo's teacher: a small CLIP, from scratch, on the images of draw.py.

The result, clip_demo.pth.tar, has the format of OpenAI's state dicts, so that main_pretrain.py
--clip_path reads it.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import models_tiny_clip
from tools.demo.draw import CLASSES

PROMPT = 'a {} shape'  # the text for a class


def load_split(out: Path, split: str) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Read all images and captions of a split into memory.

    Returns:
        images: uint8 [N, 3, SIZE, SIZE].
        lines: N dicts with file, caption and class.
    """
    lines = [json.loads(x) for x in (out / f'captions_{split}.jsonl').read_text().splitlines()]
    images = [pil_to_tensor(Image.open(out / 'data' / line['file'])) for line in lines]
    return torch.stack(images), lines


def train_teacher(out: Path, seed: int, steps: int) -> float:
    """Train the CLIP and write it to clip_demo.pth.tar.

    Returns:
        Its zero-shot top-1 accuracy on the validation images, in [0, 1].
    """
    path = out / 'clip_demo.pth.tar'
    torch.manual_seed(seed)
    model = models_tiny_clip.build_clip()
    images, lines = load_split(out, 'train')
    models_tiny_clip.train(
        model,
        images,
        captions=[line['caption'] for line in lines],
        short=[PROMPT.format(line['class']) for line in lines],
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    models_tiny_clip.save(model, path)

    images, lines = load_split(out, 'val')
    labels = torch.tensor([list(CLASSES).index(line['class']) for line in lines])
    prompts = [PROMPT.format(name) for name in CLASSES]
    accuracy = models_tiny_clip.zero_shot(path, images, labels, prompts)
    print(f'{path}: zero-shot top-1 on val {accuracy:.1%}, chance {1 / len(CLASSES):.1%}')
    return accuracy
