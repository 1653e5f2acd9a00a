"""tools/segment.py: it learns to segment, counts as the definition says, and names what is wrong."""

import argparse
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import script, torchrun
from PIL import Image

from tools import segment

tool = script('tools/segment')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Noise in which the pixels of a box, class 1, are red; a strip without a class; sizes and shapes mixed."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 7)):
        for i in range(count):
            height, width = 60 + 3 * i, 90 - i
            image, mask = rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.zeros((height, width), np.uint8)
            y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
            box = slice(y, y + height // 2), slice(x, x + width // 2)
            image[box], mask[box] = [250, 20, 20], 1
            mask[:3] = 255
            for kind, content, name in (('images', image, f'{i}.jpg'), ('masks', mask, f'{i}.png')):
                (root / kind / split / 'a').mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(root / kind / split / 'a' / name)
    return root


@pytest.fixture
def flags(pictures, pretrained):
    return ['--model', 'vit_tiny_patch8', '--input_size', 64, '--nb_classes', 2, '--batch_size', 8, '--num_workers', 0,
            '--data_path', pictures, '--amp', 'fp32', '--finetune', pretrained, '--lr', 0.02, '--epochs', 4]


def test_it_learns_and_repeats(flags):
    first, second = tool(*flags), tool(*flags, '--num_workers', 2)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    result = re.search(r'mIoU ([\d.]+) %, ([\d.]+) % of the pixels are right \(7 images, 2 classes\)', first.stdout)
    assert result[0] in second.stdout
    assert float(result[1]) > 60 and float(result[2]) > 80  # all background: 37.5 and 75


def test_counts_as_the_definition_says(pictures):
    """On predictions of random weights; a class that never occurs and is never predicted does not count."""
    args = argparse.Namespace(data_path=str(pictures), input_size=64, nb_classes=9, seed=0, print_freq=9, amp='fp32')
    model = segment.LinearSegmenter(segment.MODELS['vit_tiny_patch8'](num_classes=0), args)
    model.head[1].bias.data[4:] = -1e9
    loader = torch.utils.data.DataLoader(segment.Pictures(args, 'val'), sampler=[(0, i) for i in range(7)])
    found = segment.evaluate(model, loader, torch.device('cpu'), args)
    truth, guess = [], []
    for image, mask, _ in loader:
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(image), size=mask.shape[1:], mode='bilinear')
        truth.append(mask[mask != 255].numpy())
        guess.append(logits.argmax(1)[mask != 255].numpy())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    present = [c for c in range(9) if (truth == c).any() or (guess == c).any()]
    ious = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in present]
    assert len(present) < 9 and found == pytest.approx((100 * np.mean(ious), 100 * (truth == guess).mean()))


def test_an_image_and_its_mask_are_cropped_alike(pictures):
    args = argparse.Namespace(data_path=str(pictures), input_size=64, nb_classes=2, seed=0)
    train = segment.Pictures(args, 'train')
    crops = [train[epoch, i] for epoch in range(2) for i in range(24)]
    for image, mask, _ in crops:
        red = image[0] - image[1] > 2
        assert (red[mask != 255] == (mask[mask != 255] == 1)).float().mean() > 0.85
    assert not torch.equal(crops[0][1], crops[24][1]) and torch.equal(train[1, 0][0], crops[24][0])


def broken(root, pictures, kind):
    shutil.copytree(pictures, root)
    if kind == 'class':
        Image.fromarray(np.full((60, 90), 7, np.uint8)).save(root / 'masks/train/a/0.png')
    elif kind == 'size':
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / 'masks/val/a/0.png')
    elif kind == 'colours':
        Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(root / 'masks/val/a/0.png')
    elif kind == 'bytes':
        (root / 'images/train/a/3.jpg').write_bytes(b'none')
    else:
        (root / 'masks/val/a/2.png').unlink()
    return root


@pytest.mark.parametrize('kind, workers, message', [
    ('class', 0, 'masks/train/a/0.png: class 7, but --nb_classes 2'),
    ('class', 1, 'masks/train/a/0.png: class 7, but --nb_classes 2'),
    ('bytes', 1, 'images/train/a/3.jpg and its mask'),
    ('size', 0, 'masks/val/a/0.png: [60, 90] and [9, 9]; a mask has its image'),
    ('colours', 0, '[60, 90] and [60, 90, 3]; a mask'),
    ('missing', 0, '--data_path: there is no ')])
def test_wrong_files(kind, workers, message, flags, pictures, tmp_path):
    result = tool(*flags, '--epochs', 1, '--num_workers', workers, '--data_path', broken(tmp_path / 'data', pictures, kind))
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode == 1 and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], errors
    assert 'Traceback' not in errors[0]


@pytest.mark.parametrize('wrong, message', [
    (['--batch_size', 25], '--batch_size 25: there are only 24 training images'),
    (['--data_path', 'no'], '--data_path no is not a folder'),
    (['--lr', 1e30, '--epochs', 9], 'not one step of epoch 1 had gradients that are finite'),
    (['--global_pool'], 'unrecognized arguments: --global_pool')])
def test_wrong_flags(wrong, message, flags):
    result = tool(*flags, *wrong)
    assert result.returncode in (1, 2) and message in result.stderr.splitlines()[-1]


def test_two_processes(flags):
    result = tool(*flags, launcher=torchrun(2))
    assert result.returncode == 1 and 'error: tools/segment.py runs as one process' in result.stderr
