"""Draws the demo's data set: captioned pictures of one patterned shape on a busy background.

The class of a picture is the pattern on its object, 'zigzag' say. Shape, colour, size, angle, place, background and the specks
strewn about are drawn independently of it, so that neither the mean colour nor any single pixel tells the class.

    python -m tools.demo.draw --output_dir demo_output
"""

import argparse
import json
import math
import os
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from tools.demo import patterns
from util.errors import one_line
from util.parser import Parser, bounded

SIZE = 64  # pixels a side of a finished picture
SCALE = 3  # pictures are drawn that many times larger, and smoothed by the reduction
CANVAS = SIZE * SCALE

# class: the marks on the object
CLASSES = {'plain': patterns.nothing, 'striped': patterns.stripes, 'checkered': patterns.checks, 'dotted': patterns.dots,
           'ringed': patterns.rings, 'gridded': patterns.grid, 'bricked': patterns.bricks, 'zigzag': patterns.zigzag}
SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')
COLOURS = {'red': (214, 40, 40), 'orange': (245, 140, 30), 'yellow': (248, 220, 60), 'green': (50, 160, 70),
           'blue': (40, 90, 210), 'purple': (135, 60, 170), 'pink': (245, 150, 190), 'white': (245, 245, 245),
           'black': (25, 25, 25), 'brown': (125, 80, 45)}
BACKGROUNDS = ('plain', 'shaded', 'noisy', 'banded', 'tiled')
PLACES = (('in the upper left', 'at the top', 'in the upper right'), ('on the left', 'in the middle', 'on the right'),
          ('in the lower left', 'at the bottom', 'in the lower right'))


def outline(shape, radius):
    """Corners of ``shape`` around the origin, [n, 2], none farther away than ``radius``."""
    if shape == 'square':
        return _ring(4, [radius], start=45)
    if shape == 'triangle':
        return _ring(3, [radius])
    if shape == 'star':
        return _ring(10, [radius, 0.45 * radius])
    if shape == 'cross':
        long, short = 0.93 * radius, 0.36 * radius
        arm = np.array([[short, short], [short, long], [-short, long]])
        return np.concatenate([arm @ patterns.turn(90 * k) for k in range(4)])
    return _ring(60, [0.9 * radius])


def _ring(corners, radii, start=-90):
    angles = np.radians(start + 360 * np.arange(corners) / corners)
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw_background(rng, kind, colour):
    """The canvas, PIL RGB, in tones of ``colour``."""
    canvas = Image.new('RGB', (CANVAS, CANVAS), colour)
    angle = rng.uniform(0, 360)
    if kind == 'shaded':
        slope = np.mgrid[-1:1:SIZE * 1j, -1:1:SIZE * 1j].transpose(1, 2, 0) @ patterns.turn(angle)[0]
        canvas.paste(shade(colour, 0.7), mask=_enlarged(255 * (slope / 3 + 0.5)))
    elif kind == 'noisy':
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 28, (SIZE, SIZE, 3))
        canvas = _enlarged(colour + noise)
    elif kind != 'plain':
        rule = patterns.stripes if kind == 'banded' else patterns.checks
        canvas.paste(shade(colour, rng.uniform(0.2, 0.35)),
                     mask=patterns.mask(rule, CANVAS, SCALE * rng.uniform(9, 18), angle, (0, 0)))
    return canvas


def shade(colour, by):
    """A light colour made darker, or a dark one lighter, by the share ``by`` of the way to black or white."""
    goal = 0 if sum(colour) > 3 * 128 else 255
    return tuple(round(c + by * (goal - c)) for c in colour)


def _enlarged(pixels):
    """Numbers for the finished picture, [SIZE, SIZE] or [SIZE, SIZE, 3] in [0, 255], as an image of the canvas's size."""
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


def draw_specks(rng, canvas):
    """Small spots and strokes of any colour, which mean nothing."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(2, 6)):
        x, y = (rng.uniform(0, CANVAS) for _ in range(2))
        colour = rng.choice(list(COLOURS.values()))
        if rng.random() < 0.5:
            r = SCALE * rng.uniform(1, 2.2)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            angle, r = rng.uniform(0, 2 * math.pi), SCALE * rng.uniform(3, 6)
            pen.line((x, y, x + r * math.cos(angle), y + r * math.sin(angle)), fill=colour, width=SCALE)


def draw_picture(seed, split, number):
    """The picture and its words, a function of the arguments alone.

    Returns:
        (image, class, caption): PIL RGB [SIZE, SIZE]; the class is that of ``number`` modulo len(CLASSES).
    """
    rng = random.Random(f'{seed}/{split}/{number}')
    name = list(CLASSES)[number % len(CLASSES)]
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    ground = rng.choice([c for c in COLOURS if math.dist(COLOURS[c], COLOURS[colour]) > 130])
    kind = rng.choice(BACKGROUNDS)
    radius = rng.uniform(17, 27)
    centre = [rng.uniform(radius, SIZE - radius) for _ in range(2)]

    canvas = draw_background(rng, kind, COLOURS[ground])
    draw_specks(rng, canvas)
    silhouette = Image.new('L', canvas.size)
    corners = SCALE * (outline(shape, radius) @ patterns.turn(rng.uniform(-25, 25)) + centre)
    ImageDraw.Draw(silhouette).polygon([tuple(c) for c in corners], fill=255)
    canvas.paste(COLOURS[colour], mask=silhouette)
    marks = patterns.mask(CLASSES[name], CANVAS, SCALE * rng.uniform(8, 10), rng.uniform(-20, 20), [SCALE * c for c in centre])
    canvas.paste(shade(COLOURS[colour], 0.8), mask=ImageChops.multiply(silhouette, marks))

    words = describe(rng, colour, name, shape, radius, centre, ground if kind == 'plain' else f'{ground} {kind}')
    return canvas.reduce(SCALE), name, words


def describe(rng, colour, name, shape, radius, centre, background):
    """A caption that always names the class, and mentions each other fact now and then, as people do."""
    def mentioned(words):
        return [words] if words and rng.random() < 0.4 else []

    size = 'large' if radius > 24 else 'small' if radius < 20 else ''
    words = ['a', *mentioned(size), *mentioned(colour), name, *(mentioned(shape) or ['shape'])]
    place = PLACES[int(3 * centre[1] / SIZE)][int(3 * centre[0] / SIZE)]
    caption = ' '.join(words + mentioned(place) + mentioned(f'on a {background} background'))
    return re.sub(r'\ba (?=[aeiou])', 'an ', caption)


def save_picture(number, seed, split, output_dir):
    """Draw and write one picture; returns its line of captions_SPLIT.jsonl as a dict."""
    image, name, caption = draw_picture(seed, split, number)
    file = f'{split}/{name}/{number:05d}.png'
    image.save(os.path.join(output_dir, 'data', file))
    return {'file': file, 'caption': caption, 'class': name}


def draw_split(output_dir, split, count, seed):
    """Write ``count`` pictures under output_dir/data/SPLIT/CLASS, and their captions as output_dir/captions_SPLIT.jsonl."""
    for name in CLASSES:
        os.makedirs(os.path.join(output_dir, 'data', split, name), exist_ok=True)
    save = partial(save_picture, seed=seed, split=split, output_dir=output_dir)
    with ProcessPoolExecutor(2) as pool:
        lines = list(pool.map(save, range(count), chunksize=50))
    with open(os.path.join(output_dir, f'captions_{split}.jsonl'), 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(line) + '\n' for line in lines)


def get_args_parser():
    parser = Parser('tools.demo.draw', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output_dir', default='demo_output', metavar='DIR', help='where all files of the demo go')
    parser.add_argument('--seed', type=bounded(int, 0, 2**63 - 1), default=0, metavar='N', help='of all draws')
    parser.add_argument('--quick', action='store_true', help='a tenth of the pictures')
    return parser


def main(args):
    for split, count in (('train', 4500), ('val', 640)):
        count = count // 10 if args.quick else count
        draw_split(args.output_dir, split, count, args.seed)
        print(f'{count} pictures in {args.output_dir}/data/{split}, {len(CLASSES)} classes: {", ".join(CLASSES)}')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except OSError as e:
        sys.exit(f'error: --output_dir cannot be written to: {one_line(str(e))}')
