"""Train the demo's teacher: a small CLIP, from scratch, on the images of tools.demo.draw.

The result, clip_demo.pth.tar, has the format of OpenAI's state dicts, so that main_pretrain.py
--clip_path reads it.

    python -m tools.demo.train_clip --output_dir demo_output
"""

import argparse
import json
import os

import numpy as np
import torch
from PIL import Image

import models_tiny_clip
from tools.demo.draw import CLASSES, demo_parser
from util import cli, errors, files


def load_split(output_dir: str, split: str) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Read all images and captions of a split into memory.

    Returns:
        images: uint8 [N, 3, SIZE, SIZE].
        lines: N dicts with file, caption and class.

    Raises:
        UserError: if tools.demo.draw has not written them.
    """
    context = f'--output_dir {output_dir} lacks files of python -m tools.demo.draw'
    file = os.path.join(output_dir, f'captions_{split}.jsonl')
    with errors.as_user_error(context, OSError, ValueError), open(file, encoding='utf-8') as f:
        lines = [json.loads(line) for line in f]
        paths = [os.path.join(output_dir, 'data', line['file']) for line in lines]
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), lines


def prompt(name: str) -> str:
    """Return the text for a class."""
    return f'a {name} shape'


def get_args_parser() -> argparse.ArgumentParser:
    return demo_parser('train_clip', __doc__, 'a few steps')


# Train, write clip_demo.pth.tar, and its zero-shot accuracy to teacher.json.
def main(args: argparse.Namespace) -> None:
    out, steps = args.output_dir, 20 if args.quick else 600
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model, path = models_tiny_clip.build_clip(), os.path.join(out, 'clip_demo.pth.tar')
    images, lines = load_split(out, 'train')
    captions, short = [line['caption'] for line in lines], [prompt(line['class']) for line in lines]
    models_tiny_clip.train(model, images, captions, short, steps, generator)
    models_tiny_clip.save(model, path)

    images, lines = load_split(out, 'val')
    labels = torch.tensor([list(CLASSES).index(line['class']) for line in lines])
    accuracy = models_tiny_clip.zero_shot(path, images, labels, [prompt(name) for name in CLASSES])
    files.atomic_write_text(os.path.join(out, 'teacher.json'), json.dumps({'zero_shot': accuracy}))
    print(f'{path}: zero-shot top-1 on val {accuracy:.1%}, chance {1 / len(CLASSES):.1%}')


if __name__ == '__main__':
    cli.run(main, get_args_parser().parse_args())
