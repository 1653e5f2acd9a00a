"""Train the demo's teacher: a small CLIP, from scratch, on the images of tools.demo.draw.

The result, clip_demo.pth.tar, has the format of OpenAI's state dicts, so that main_pretrain.py
--clip_path reads it.

    python -m tools.demo.train_clip --output_dir demo_output
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import models_tiny_clip
from tools.demo.draw import CLASSES, demo_parser
from util import cli, errors, files

PROMPT = 'a {} shape'  # the text for a class


def load_split(out: Path, split: str) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Read all images and captions of a split into memory.

    Returns:
        images: uint8 [N, 3, SIZE, SIZE].
        lines: N dicts with file, caption and class.

    Raises:
        UserError: if tools.demo.draw has not written them.
    """
    context = f'--output_dir {out} lacks files of python -m tools.demo.draw'
    with errors.as_user_error(context, OSError, ValueError):
        lines = [json.loads(x) for x in (out / f'captions_{split}.jsonl').read_text().splitlines()]
        images = [pil_to_tensor(Image.open(out / 'data' / line['file'])) for line in lines]
    return torch.stack(images), lines


def get_args_parser() -> argparse.ArgumentParser:
    return demo_parser('train_clip', __doc__, 'a few steps')


# Train, write clip_demo.pth.tar, and its zero-shot accuracy to teacher.json.
def main(args: argparse.Namespace) -> None:
    out, path = args.output_dir, args.output_dir / 'clip_demo.pth.tar'
    torch.manual_seed(args.seed)
    model = models_tiny_clip.build_clip()
    images, lines = load_split(out, 'train')
    models_tiny_clip.train(
        model,
        images,
        captions=[line['caption'] for line in lines],
        short=[PROMPT.format(line['class']) for line in lines],
        steps=20 if args.quick else 600,
        generator=torch.Generator().manual_seed(args.seed),
    )
    models_tiny_clip.save(model, path)

    images, lines = load_split(out, 'val')
    labels = torch.tensor([list(CLASSES).index(line['class']) for line in lines])
    prompts = [PROMPT.format(name) for name in CLASSES]
    accuracy = models_tiny_clip.zero_shot(path, images, labels, prompts)
    files.atomic_write_text(out / 'teacher.json', json.dumps({'zero_shot': accuracy}))
    print(f'{path}: zero-shot top-1 on val {accuracy:.1%}, chance {1 / len(CLASSES):.1%}')


if __name__ == '__main__':
    cli.run(main, get_args_parser().parse_args())
