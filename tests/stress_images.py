"""An epoch of two processes over good images and broken ones: it ends, and the count of those that cannot be read is exact.

A case is a folder of 200 images, 100 of them mutated. What can be read is asked of PIL, file by file.
"""

import io
import random
import re
import warnings

from conftest import pretrain, torchrun
from PIL import Image

FORMATS = {'jpg': 'JPEG', 'png': 'PNG', 'webp': 'WEBP', 'bmp': 'BMP', 'tif': 'TIFF'}


def mutate(data, rng):
    """One of the ways in which files go bad."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(['cut', 'cut', 'flip', 'flip', 'zeros', 'noise', 'empty', 'text', 'head'])
    if kind == 'cut':
        return bytes(data[:at])
    if kind == 'flip':
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 'head':
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif kind in ('zeros', 'noise'):
        length = rng.randrange(1, 2000)
        data[at:at + length] = bytes(length) if kind == 'zeros' else rng.randbytes(length)
    else:
        return b'' if kind == 'empty' else b'<html>404 Not Found</html>'
    return bytes(data)


def readable(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                if image.mode == 'F':
                    return False
                image.convert('RGB')
                return True
    except Exception:
        return False


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        root, out = self.folder / f'data{number}', self.folder / f'out{number}'
        (root / 'train' / 'all').mkdir(parents=True)
        for i in range(200):
            suffix, form = rng.choice(list(FORMATS.items()))
            picture = Image.frombytes('RGB', (4, 4), rng.randbytes(48)).resize((rng.randrange(20, 90), rng.randrange(20, 90)))
            file = io.BytesIO()
            picture.save(file, form)
            data = file.getvalue() if i % 2 else mutate(file.getvalue(), rng)
            (root / 'train' / 'all' / f'{i:03d}.{suffix}').write_bytes(data)
        broken = {str(path) for path in root.rglob('*.*') if not readable(path)}
        result = pretrain(
            '--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--batch_size', 10, '--epochs', 1, '--warmup_epochs', 0,
            '--amp', 'fp32', '--data_path', root, '--num_workers', 1, '--max_bad_images', 200, '--output_dir', out,
            '--log_dir', '', launcher=torchrun(2), timeout=900)
        what = f'{len(broken)} broken'
        if result.returncode != 0 or 'Traceback' in result.stderr:
            return f'WRONG: status {result.returncode}', what + result.stderr[-2000:]
        told = re.search(r'(\d+) of 200 images could not be read', result.stdout)
        listed = {line.split('\t')[0] for line in (out / 'unreadable_images.txt').read_text().splitlines()}
        if int(told[1]) != len(broken) or listed != broken:
            return 'WRONG: another count', f'{what}, told {told[1]}, differing: {sorted(listed ^ broken)[:3]}'
        return 'folders of 100 mutated images with the exact count', what

    def close(self):
        pass
