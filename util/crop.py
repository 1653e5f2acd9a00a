"""Random crops whose box is drawn from the image size alone, before decoding."""

import math
import random
from collections.abc import Sequence


def resized_crop_box(
    width: int, height: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draw the box of a random crop, distributed as in torchvision's RandomResizedCrop.

    Area fraction ~ U(scale), log aspect ratio ~ U(log ratio), position uniform. A box that does
    not fit into the image is drawn again. After ten attempts the largest central box with an
    allowed aspect ratio is used.

    Returns:
        (top, left, height, width) in pixels.
    """
    for _ in range(10):
        w, h = _draw(width, height, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def single_crop_box(
    width: int, height: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draw a box once, and cut it to the image if it does not fit.

    For linear probing (MAE, appendix A.1). See resized_crop_box.
    """
    w, h = _draw(width, height, scale, ratio)
    # at least one pixel: one side of a tiny image can round to 0
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    return random.randint(0, height - h), random.randint(0, width - w), h, w


def _draw(width, height, scale, ratio):
    area = width * height * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
