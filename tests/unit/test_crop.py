"""Boxes of random crops."""

import random

import numpy as np
import pytest
import torch
import torchvision
from scipy.stats import ks_2samp

from util.crop import resized_crop_box, single_crop_box
from util.data.image_file import ImageFile
from util.datasets import random_resized_crop

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize('width, height', [(500, 375), (300, 900), (64, 64), (2000, 100)])
def test_resized_crop_box_has_torchvisions_distribution(width, height):
    """Compare area, aspect ratio and position with the Kolmogorov-Smirnov test."""
    random.seed(0)
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params

    def measure(boxes):
        top, left, h, w = np.array(boxes, dtype=float).T
        assert (top + h <= height).all() and (left + w <= width).all()
        return h * w, w / h, top + h / 2, left + w / 2

    def draw_ours(scale):
        return measure([resized_crop_box(width, height, scale, RATIO) for _ in range(2000)])

    ours = draw_ours((0.2, 1.0))
    theirs = measure([draw(blank, (0.2, 1.0), RATIO) for _ in range(2000)])
    for a, b in zip(ours, theirs):
        assert ks_2samp(a, b).pvalue > 1e-3
    if max(width, height) < 1000:  # at 2000 x 100, nearly all boxes are the central fallback
        # check of the test: it notices another scale
        assert ks_2samp(ours[0], draw_ours((0.3, 1.0))[0]).pvalue < 1e-6


@pytest.mark.parametrize('draw', [resized_crop_box, single_crop_box])
@pytest.mark.parametrize('width, height', [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_boxes_of_tiny_images(draw, width, height):
    for _ in range(200):
        top, left, h, w = draw(width, height, SCALE, RATIO)
        assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_single_crop_box():
    """Area and aspect ratio are as drawn if the box fits, and it is cut to the image if not."""
    random.seed(0)
    boxes = [single_crop_box(600, 400, SCALE, RATIO) for _ in range(4000)]
    assert all(0 <= top <= 400 - h and 0 <= left <= 600 - w for top, left, h, w in boxes)
    inside = [(h * w / 240_000, np.log(w / h)) for _, _, h, w in boxes if h < 400 and w < 600]
    assert min(area for area, _ in inside) == pytest.approx(0.08, abs=0.01)
    small = [aspect for area, aspect in inside if area < 0.5]  # these always fit
    assert sum(small) / len(small) == pytest.approx(0, abs=0.02)
    assert max(small) == pytest.approx(np.log(4 / 3), abs=0.02)
    assert any(h == 400 for _, _, h, _ in boxes)  # torchvision would draw again


@pytest.mark.parametrize('draw', [resized_crop_box, single_crop_box])
def test_random_resized_crop(draw):
    image = ImageFile(torchvision.transforms.ToPILImage()(torch.rand(3, 64, 96)))
    crop = random_resized_crop(image, 24, draw=draw)
    assert crop.shape == (3, 24, 24) and crop.dtype == torch.uint8
