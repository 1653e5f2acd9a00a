"""Draws the demo's data set: captioned pictures of one textured shape on a busy background.

The class of a picture is the texture and the shape of its object ('striped star'). Colour, size, angle, place, background
and the small things strewn about are drawn independently of it, so that no mean colour or single pixel tells the class.

    python -m tools.demo.draw --output_dir demo_output
"""

import argparse
import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels a side of a finished picture
SCALE = 4  # pictures are drawn that many times larger, and smoothed by the reduction

TEXTURES = ('plain', 'striped', 'dotted', 'checkered')
SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')
CLASSES = [f'{texture} {shape}' for texture in TEXTURES for shape in SHAPES]
COLOURS = {'red': (214, 40, 40), 'orange': (245, 140, 30), 'yellow': (248, 220, 60), 'green': (50, 160, 70),
           'blue': (40, 90, 210), 'purple': (135, 60, 170), 'pink': (245, 150, 190), 'white': (245, 245, 245),
           'black': (25, 25, 25), 'brown': (125, 80, 45)}
BACKGROUNDS = ('plain', 'gradient', 'noisy', 'striped', 'checkered')


def outline(shape, radius):
    """Corners of ``shape`` around the origin, [n, 2], none farther away than ``radius``."""
    if shape == 'square':
        return _ring(4, [radius], start=math.pi / 4)
    if shape == 'triangle':
        return _ring(3, [radius])
    if shape == 'star':
        return _ring(10, [radius, 0.42 * radius])
    if shape == 'cross':
        long, short = 0.95 * radius, 0.31 * radius
        arm = np.array([[short, short], [short, long], [-short, long]])
        quarter_turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])
    return _ring(60, [0.9 * radius])


def _ring(corners, radii, start=-math.pi / 2):
    angles = start + 2 * math.pi * np.arange(corners) / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def pattern(kind, period, angle, offset):
    """A texture over the whole canvas as the share of the second colour, [H, W] in [0, 1].

    Args:
        kind: one of TEXTURES.
        period: canvas pixels from one stripe, dot or square to the next of its colour.
        angle: radians.
        offset: (x, y) of the origin.
    """
    y, x = np.mgrid[:SIZE * SCALE, :SIZE * SCALE].astype(np.float32)
    x, y = x - offset[0], y - offset[1]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == 'striped':
        return (u % period < period / 2).astype(np.float32)
    if kind == 'checkered':
        return ((u % period < period / 2) ^ (v % period < period / 2)).astype(np.float32)
    if kind == 'dotted':
        return (np.hypot(u % period - period / 2, v % period - period / 2) < 0.32 * period).astype(np.float32)
    return np.zeros_like(x)


def blend(first, second, share):
    """Two RGB colours mixed by ``share`` [H, W] -> [H, W, 3] float."""
    return np.asarray(first) + share[..., None] * (np.asarray(second, dtype=np.float32) - np.asarray(first))


def draw_background(rng, kind, colour):
    """Canvas [H, W, 3] float in the two tones of ``colour`` that the kind needs."""
    other = _shade(colour, rng.choice((-1, 1)) * rng.uniform(0.2, 0.35))
    angle = rng.uniform(0, 2 * math.pi)
    if kind == 'gradient':
        y, x = np.mgrid[-1:1:SIZE * SCALE * 1j, -1:1:SIZE * SCALE * 1j]
        return blend(colour, _shade(colour, rng.choice((-0.7, 0.7))), (x * math.cos(angle) + y * math.sin(angle)) / 3 + 0.5)
    if kind == 'noisy':
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 28, (SIZE, SIZE, 3))
        return np.asarray(colour) + noise.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return blend(colour, other, pattern(kind, SCALE * rng.uniform(8, 18), angle, (0, 0)))


def _shade(colour, by):
    """``colour`` moved towards white (by > 0) or black (by < 0), by that share of the way."""
    goal = 255 if by > 0 else 0
    return tuple(c + abs(by) * (goal - c) for c in colour)


def draw_crumbs(rng, canvas):
    """Small spots and strokes of any colour, which mean nothing."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(2, 6)):
        x, y = (SCALE * rng.uniform(0, SIZE) for _ in range(2))
        colour = rng.choice(list(COLOURS.values()))
        if rng.random() < 0.5:
            r = SCALE * rng.uniform(1, 2.2)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            angle, r = rng.uniform(0, 2 * math.pi), SCALE * rng.uniform(3, 6)
            pen.line((x, y, x + r * math.cos(angle), y + r * math.sin(angle)), fill=colour, width=SCALE)


def contrast(a, b):
    return math.dist(COLOURS[a], COLOURS[b])


def draw_picture(seed, split, number):
    """The picture and its words, a function of the arguments alone.

    Returns:
        (image, class name, caption): PIL RGB [SIZE, SIZE]; the class is that of ``number`` modulo len(CLASSES).
    """
    rng = random.Random(f'{seed}/{split}/{number}')
    name = CLASSES[number % len(CLASSES)]
    texture, shape = name.split()
    colour = rng.choice(list(COLOURS))
    ground = rng.choice([c for c in COLOURS if contrast(c, colour) > 130])
    kind = rng.choice(BACKGROUNDS)
    radius = rng.uniform(13, 23)
    centre = [rng.uniform(radius, SIZE - radius) for _ in range(2)]

    canvas = draw_background(rng, kind, COLOURS[ground])
    canvas = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw_crumbs(rng, canvas)

    angle = math.radians(rng.uniform(-25, 25))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    mask = Image.new('L', canvas.size)
    corners = SCALE * (outline(shape, radius) @ turn + centre)
    ImageDraw.Draw(mask).polygon([tuple(c) for c in corners], fill=255)
    second = rng.choice([c for c in COLOURS if contrast(c, colour) > 130 and c != ground])
    share = pattern(texture, SCALE * rng.uniform(7, 10), rng.uniform(0, 2 * math.pi), [SCALE * c for c in centre])
    canvas.paste(Image.fromarray(blend(COLOURS[colour], COLOURS[second], share).astype(np.uint8)), mask=mask)

    caption = describe(rng, name, colour, radius, centre, f'{kind} {ground}')
    return canvas.reduce(SCALE), name, caption


def describe(rng, name, colour, radius, centre, background):
    """A caption that always names the class, and mentions each other fact now and then, as people do."""
    size = 'large' if radius > 19.5 else 'small' if radius < 16.5 else ''
    rows, columns = ([words[int(3 * c / SIZE)] for words, c in zip((('left', '', 'right'), ('upper', '', 'lower')), centre)])
    return ' '.join((size, colour, name, rows, columns, background))
