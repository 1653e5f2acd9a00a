"""The patterns that the demo's objects and backgrounds carry, as rules that say of every point whether it is marked.

A rule takes two coordinates, float32 arrays [H, W] that grow by 1 from one stripe, dot or brick to the next, and gives booleans
[H, W].
"""

import numpy as np
from PIL import Image


def turn(angle):
    """The matrix that turns rows (x, y) by ``angle`` degrees."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[cos, sin], [-sin, cos]])


def mask(rule, size, period, angle, offset):
    """A pattern as a PIL mask of ``size`` x ``size`` pixels, 255 on the marks and 0 elsewhere.

    Args:
        period: pixels from one stripe, dot or brick to the next.
        angle: degrees.
        offset: (x, y) of the pattern's origin.
    """
    y, x = np.ogrid[:size, :size]
    (a, b), (c, d) = turn(angle) / period
    x, y = np.float32(x - offset[0]), np.float32(y - offset[1])
    marks = rule(np.float32(a) * x + np.float32(c) * y, np.float32(b) * x + np.float32(d) * y)
    return Image.fromarray(marks.astype(np.uint8) * 255)


def _cell(c):
    """Place within its period, in [-0.5, 0.5)."""
    return c - np.floor(c) - np.float32(0.5)


def nothing(x, y):
    return np.zeros_like(x, dtype=bool)


def stripes(x, y):
    return _cell(y) < 0


def checks(x, y):
    return (_cell(x) < 0) ^ (_cell(y) < 0)


def grid(x, y):
    return np.maximum(abs(_cell(x)), abs(_cell(y))) > 0.38


def dots(x, y):
    return _cell(x) ** 2 + _cell(y) ** 2 < 0.1


def rings(x, y):
    return abs(np.hypot(_cell(x), _cell(y)) - 0.33) < 0.1


def bricks(x, y):
    return (abs(_cell(x / 2 + np.floor(y) / 2)) > 0.44) | (abs(_cell(y)) > 0.38)


def zigzag(x, y):
    return stripes(x, y + abs(_cell(x)))
