"""Random crops whose box is drawn from the size alone, before anything is decoded."""

import math
import random


def resized_crop_box(width, height, scale, ratio):
    """(top, left, height, width) of a random crop in pixels, with the distribution of torchvision's RandomResizedCrop.

    Area uniform in ``scale`` of the picture's, logarithm of the aspect uniform in that of ``ratio``, position uniform. A box that
    does not fit into the picture is drawn anew; after ten of them the largest central one of an allowed aspect is taken.
    """
    for _ in range(10):
        w, h = _draw(width, height, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def single_crop_box(width, height, scale, ratio):
    """The same drawn once: a box that does not fit is cut to the picture. Linear probing's (MAE, appendix A.1)."""
    w, h = _draw(width, height, scale, ratio)
    w, h = min(max(w, 1), width), min(max(h, 1), height)  # a picture of few pixels could round to none
    return random.randint(0, height - h), random.randint(0, width - w), h, w


def _draw(width, height, scale, ratio):
    area = width * height * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


class RandomResizedCrop:
    """ImageFile -> uint8 [3, size, size]: a random box of it, resized bicubically.

    Args:
        draw: resized_crop_box or single_crop_box.
    """

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), draw=resized_crop_box):
        self.size, self.scale, self.ratio, self.draw = size, scale, ratio, draw

    def __call__(self, image):
        return image.crop(self.draw(*image.size, self.scale, self.ratio), self.size)
