"""Draw the demo's data set: captioned images of one patterned shape on a busy background.

The class of an image is the pattern on its object, such as 'zigzag'. Shape, color, size, angle,
position, background and scattered specks are drawn independently of it, so that neither the mean
color nor any single pixel reveals the class.
"""

import json
import math
import random
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from util import files

SIZE = 64  # pixels per side of a finished image
SCALE = 3  # images are drawn this much larger and then reduced, which smooths edges
CANVAS = SIZE * SCALE

# class: rule that marks points of the object. A rule takes two coordinates, float32 arrays [H, W]
# that grow by 1 from one stripe, dot or brick to the next, and returns booleans [H, W].
CLASSES = {
    'plain': lambda x, y: np.zeros_like(x, dtype=bool),
    'striped': lambda x, y: _cell(y) < 0,
    'checkered': lambda x, y: (_cell(x) < 0) ^ (_cell(y) < 0),
    'dotted': lambda x, y: _cell(x) ** 2 + _cell(y) ** 2 < 0.1,
    'ringed': lambda x, y: abs(np.hypot(_cell(x), _cell(y)) - 0.33) < 0.1,
    'gridded': lambda x, y: np.maximum(abs(_cell(x)), abs(_cell(y))) > 0.38,
    'bricked': lambda x, y: (abs(_cell(x / 2 + np.floor(y) / 2)) > 0.44) | (abs(_cell(y)) > 0.38),
    'zigzag': lambda x, y: _cell(y + abs(_cell(x))) < 0,
}
SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')
COLORS = {
    'red': (214, 40, 40),
    'orange': (245, 140, 30),
    'yellow': (248, 220, 60),
    'green': (50, 160, 70),
    'blue': (40, 90, 210),
    'purple': (135, 60, 170),
    'pink': (245, 150, 190),
    'white': (245, 245, 245),
    'black': (25, 25, 25),
    'brown': (125, 80, 45),
}
# kind: the pattern of its marks, if any
BACKGROUNDS = {
    'plain': None,
    'shaded': None,
    'noisy': None,
    'banded': 'striped',
    'tiled': 'checkered',
}
POSITIONS = (
    ('in the upper left', 'at the top', 'in the upper right'),
    ('on the left', 'in the middle', 'on the right'),
    ('in the lower left', 'at the bottom', 'in the lower right'),
)


# ---- patterns and shapes ----


# Position within the period, in [-0.5, 0.5).
def _cell(c):
    return c - np.floor(c) - np.float32(0.5)


# The matrix that rotates rows (x, y) by ``angle`` degrees.
def _rotation(angle):
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[cos, sin], [-sin, cos]])


# A pattern, a key of CLASSES, as a PIL mask of the canvas's size: 255 on the marks, 0 elsewhere.
# ``period`` is the distance from one stripe, dot or brick to the next and ``offset`` the origin
# (x, y), both in pixels of the canvas; ``angle`` is in degrees.
def _pattern_mask(name, period, angle, offset=(0, 0)):
    y, x = np.ogrid[:CANVAS, :CANVAS]
    (a, b), (c, d) = np.float32(_rotation(angle) / period)
    x, y = np.float32(x - offset[0]), np.float32(y - offset[1])
    return Image.fromarray(CLASSES[name](a * x + c * y, b * x + d * y).astype(np.uint8) * 255)


# Corners [n, 2] of a shape around the origin, at most ``radius`` away from it.
def _outline(shape, radius):
    if shape == 'cross':
        arm = radius * np.array([[0.36, 0.36], [0.36, 0.93], [-0.36, 0.93]])
        return np.concatenate([arm @ _rotation(90 * k) for k in range(4)])
    corners, radii, start = {
        'square': (4, [radius], 45),
        'triangle': (3, [radius], -90),
        'star': (10, [radius, 0.45 * radius], -90),
        'circle': (60, [0.9 * radius], -90),
    }[shape]
    angles = np.radians(start + 360 * np.arange(corners) / corners)
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# A light color made darker, or a dark one lighter, by the fraction ``by``.
def _shade(color, by):
    goal = 0 if sum(color) > 3 * 128 else 255
    return tuple(round(c + by * (goal - c)) for c in color)


# Values in [0, 255] for the finished image, [SIZE, SIZE] or [SIZE, SIZE, 3], as a canvas.
def _enlarge(values):
    image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


# ---- images ----


# The canvas, PIL RGB, in shades of ``color``.
def _draw_background(rng, kind, color):
    canvas, angle = Image.new('RGB', (CANVAS, CANVAS), color), rng.uniform(0, 360)
    if kind == 'noisy':
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 28, (SIZE, SIZE, 3))
        return _enlarge(color + noise)
    if kind == 'shaded':
        points = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].transpose(1, 2, 0)
        mask = _enlarge(255 * (points @ _rotation(angle)[0] / 3 + 0.5))
        canvas.paste(_shade(color, 0.7), mask=mask)
    elif kind != 'plain':
        pattern, shade = BACKGROUNDS[kind], _shade(color, rng.uniform(0.2, 0.35))
        canvas.paste(shade, mask=_pattern_mask(pattern, SCALE * rng.uniform(9, 18), angle))
    return canvas


# Small spots and strokes of any color, which carry no information.
def _draw_specks(rng, canvas):
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(2, 6)):
        x, y = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS)
        color = rng.choice(list(COLORS.values()))
        if rng.random() < 0.5:
            r = SCALE * rng.uniform(1, 2.2)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        else:
            angle, r = rng.uniform(0, 2 * math.pi), SCALE * rng.uniform(3, 6)
            end = x + r * math.cos(angle), y + r * math.sin(angle)
            pen.line([(x, y), end], fill=color, width=SCALE)


def draw_image(seed: int, split: str, index: int) -> tuple[Image.Image, str, str]:
    """Draw an image, as a function of the arguments alone.

    Returns:
        The image, PIL RGB [SIZE, SIZE]; its class, number ``index`` modulo len(CLASSES); and
        its caption.
    """
    rng = random.Random(f'{seed}/{split}/{index}')
    name = list(CLASSES)[index % len(CLASSES)]
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    ground = rng.choice([c for c in COLORS if math.dist(COLORS[c], COLORS[color]) > 130])
    kind, radius = rng.choice(list(BACKGROUNDS)), rng.uniform(17, 27)
    center = [rng.uniform(radius, SIZE - radius) for _ in range(2)]

    canvas = _draw_background(rng, kind, COLORS[ground])
    _draw_specks(rng, canvas)
    silhouette = Image.new('L', canvas.size)
    corners = SCALE * (_outline(shape, radius) @ _rotation(rng.uniform(-25, 25)) + center)
    ImageDraw.Draw(silhouette).polygon([tuple(c) for c in corners], fill=255)
    canvas.paste(COLORS[color], mask=silhouette)
    marks = _pattern_mask(
        name,
        period=SCALE * rng.uniform(8, 10),
        angle=rng.uniform(-20, 20),
        offset=[SCALE * c for c in center],
    )
    canvas.paste(_shade(COLORS[color], 0.8), mask=ImageChops.multiply(silhouette, marks))

    # The caption always names the class. It mentions every other fact with a probability of 40 %.
    size = 'large' if radius > 24 else 'small' if radius < 20 else ''
    place = POSITIONS[int(3 * center[1] / SIZE)][int(3 * center[0] / SIZE)]
    background = ground if kind == 'plain' else f'{ground} {kind}'
    facts = size, color, shape, place, f'on a {background} background'
    size, color, shape, *rest = (x if x and rng.random() < 0.4 else '' for x in facts)
    words = ' '.join(filter(None, ['a', size, color, name, shape or 'shape', *rest]))
    return canvas.reduce(SCALE), name, re.sub(r'\ba (?=[aeiou])', 'an ', words)


# Draw and write one image; return its line of captions_SPLIT.jsonl.
def _save_image(index, seed, split, out):
    image, name, caption = draw_image(seed, split, index)
    file = f'{split}/{name}/{index:05d}.png'
    image.save(out / 'data' / file)
    return json.dumps({'file': file, 'caption': caption, 'class': name}) + '\n'


def draw_data(out: Path, seed: int, share: float = 1.0) -> None:
    """Write data/SPLIT/CLASS/*.png and captions_SPLIT.jsonl for both splits.

    Args:
        out: folder for them.
        seed: of all draws.
        share: fraction of the images to draw.
    """
    for split, count in (('train', 4500), ('val', 640)):
        count = int(count * share)
        for name in CLASSES:
            (out / 'data' / split / name).mkdir(parents=True, exist_ok=True)
        save = partial(_save_image, seed=seed, split=split, out=out)
        with ProcessPoolExecutor(2) as pool:
            lines = ''.join(pool.map(save, range(count), chunksize=50))
        files.atomic_write_text(out / f'captions_{split}.jsonl', lines)
        print(f'{count} images of {len(CLASSES)} classes in {out}/data/{split}', flush=True)
