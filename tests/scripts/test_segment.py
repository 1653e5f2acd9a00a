"""tools/segment.py: learning, mIoU against its definition, and errors."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import models_vit
from tests.helpers import ok, one_error_line, script, torchrun
from tools import segment
from util.datasets import normalize

tool = script('tools.segment')
IGNORED = segment.IGNORED


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Noise with a red box, whose pixels are class 1, and an unlabeled strip; sizes vary."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 7)):
        for kind in ('images', 'masks'):
            (root / kind / split / 'a').mkdir(parents=True)
        for i in range(count):
            height, width = 60 + 3 * i, 90 - i
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
            box = slice(y, y + height // 2), slice(x, x + width // 2)
            image[box], mask[box] = [250, 20, 20], 1
            mask[:3] = IGNORED
            Image.fromarray(image).save(root / 'images' / split / 'a' / f'{i}.jpg')
            Image.fromarray(mask).save(root / 'masks' / split / 'a' / f'{i}.png')
    return root


@pytest.fixture
def flags(images, pretrained):
    words = '--model vit_tiny_patch8 --input_size 64 --nb_classes 2 --batch_size 8 --num_workers 0'
    words += ' --amp fp32 --lr 0.02 --epochs 3'
    return [*words.split(), '--data_path', images, '--finetune', pretrained]


def test_learns_and_repeats(flags):
    """The number of loader workers does not change the result."""
    outputs = ok(tool(*flags)), ok(tool(*flags, '--num_workers', 1))
    result = re.search(r'mIoU ([\d.]+) %, pixel accuracy ([\d.]+) %.*7 images', outputs[0])
    assert result[0] in outputs[1]
    assert float(result[1]) > 60 and float(result[2]) > 80  # all background: 37.5 and 75


def test_evaluate_equals_the_definition(images):
    """With random weights. A class that is neither in a mask nor predicted does not count."""
    encoder = models_vit.vit_tiny_patch8(num_classes=0)
    model = segment.LinearSegmenter(encoder, num_classes=9, seed=0)
    model.head[1].bias.data[4:] = -1e9
    loader = torch.utils.data.DataLoader(
        segment.ImagesAndMasks(images, 'val', 64, num_classes=9, seed=0),
        sampler=[(0, i) for i in range(7)],
    )
    result = segment.evaluate(model, loader, 9, torch.device('cpu'))
    labels, predicted = [], []
    for image, mask in loader:
        with torch.no_grad():
            logits = F.interpolate(model(normalize(image)), size=mask.shape[1:], mode='bilinear')
        labels.append(mask[mask != IGNORED].numpy())
        predicted.append(logits.argmax(1)[mask != IGNORED].numpy())
    labels, predicted = np.concatenate(labels), np.concatenate(predicted)
    masks = [(labels == c, predicted == c) for c in range(9)]
    ious = [(a & b).sum() / (a | b).sum() for a, b in masks if (a | b).any()]
    accuracy = (labels == predicted).mean()
    assert len(ious) < 9 and result == pytest.approx((100 * np.mean(ious), 100 * accuracy))


def test_image_and_mask_are_cropped_together(images):
    train = segment.ImagesAndMasks(images, 'train', 64, num_classes=2, seed=0)
    crops = [train[epoch, i] for epoch in range(2) for i in range(24)]
    for image, mask in crops:
        red = image[0].int() - image[1].int() > 115
        labeled = mask != IGNORED
        assert (red[labeled] == (mask[labeled] == 1)).float().mean() > 0.85
    assert not torch.equal(crops[0][1], crops[24][1])
    assert torch.equal(train[1, 0][0], crops[24][0])


def damage(root, kind):
    if kind == 'class':
        Image.fromarray(np.full((60, 90), 7, np.uint8)).save(root / 'masks/train/a/0.png')
    elif kind == 'size':
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / 'masks/val/a/0.png')
    elif kind == 'channels':
        Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(root / 'masks/val/a/0.png')
    elif kind == 'bytes':
        (root / 'images/train/a/3.jpg').write_bytes(b'none')
    else:
        (root / 'masks/val/a/2.png').unlink()


@pytest.mark.parametrize(
    'kind, workers, words',
    [
        ('class', 0, ['masks/train/a/0.png', 'class 7', '--nb_classes 2']),
        ('bytes', 0, ['images/train/a/3.jpg']),
        ('size', 0, ['masks/val/a/0.png', '[3, 60, 90]', '[1, 9, 9]']),
        ('channels', 0, ['masks/val/a/0.png', '[3, 60, 90], the mask [3, 60, 90]']),
        ('missing', 0, ['--data_path', 'masks/val/a/2.png']),
        # PyTorch takes 5 s to end a loader worker after an error
        pytest.param('class', 1, ['masks/train/a/0.png', 'class 7'], marks=pytest.mark.slow),
    ],
)
def test_wrong_files(kind, workers, words, flags, images, tmp_path):
    data = shutil.copytree(images, tmp_path / 'data')
    damage(data, kind)
    more = ['--epochs', 1, '--num_workers', workers, '--data_path', data]
    one_error_line(tool(*flags, *more), *words)


@pytest.mark.parametrize(
    'wrong, words',
    [
        (['--batch_size', 25], ['--batch_size 25', '24 training images']),
        (['--data_path', 'no'], ['--data_path no']),
        (['--lr', 1e30, '--epochs', 9], ['epoch 1', '--lr 1e+30']),
        (['--global_pool'], ['--global_pool']),
    ],
    ids=['batch size', 'data', 'divergence', 'pooling'],
)
def test_wrong_flags(wrong, words, flags):
    one_error_line(tool(*flags, *wrong), *words)


@pytest.mark.slow
def test_several_processes_are_rejected(flags):
    one_error_line(tool(*flags, launcher=torchrun(2)), 'torchrun')
