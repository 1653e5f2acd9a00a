"""Two processes train on intact and damaged images and count the unreadable ones exactly.

A case is a folder of 200 images, 100 of them mutated. PIL decides which ones can be read.
"""

import io
import random
import re
import warnings

from PIL import Image

from tests.helpers import pretrain, torchrun
from tests.stress.runs import FLAGS

FORMATS = {'jpg': 'JPEG', 'png': 'PNG', 'webp': 'WEBP', 'bmp': 'BMP', 'tif': 'TIFF'}


def mutate(data, rng):
    """Return the bytes of a file after random damage."""
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
        data[at : at + length] = bytes(length) if kind == 'zeros' else rng.randbytes(length)
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
            image = Image.frombytes('RGB', (4, 4), rng.randbytes(48))
            image = image.resize((rng.randrange(20, 90), rng.randrange(20, 90)))
            file = io.BytesIO()
            image.save(file, form)
            data = file.getvalue() if i % 2 else mutate(file.getvalue(), rng)
            (root / 'train' / 'all' / f'{i:03d}.{suffix}').write_bytes(data)
        broken = {str(path) for path in root.rglob('*.*') if not readable(path)}
        flags = '--batch_size 10 --epochs 1 --num_workers 1 --max_bad_images 200'
        flags = [*FLAGS, *flags.split(), '--data_path', root, '--output_dir', out, '--log_dir', '']
        result = pretrain(*flags, launcher=torchrun(2), timeout=900)
        description = f'{len(broken)} broken'
        if result.returncode != 0 or 'Traceback' in result.stderr:
            return f'WRONG: status {result.returncode}', description + result.stderr[-2000:]
        reported = int(re.search(r'(\d+) of 200 images', result.stdout)[1])
        lines = (out / 'unreadable_images.txt').read_text().splitlines()
        listed = {line.split('\t')[0] for line in lines}
        if reported != len(broken) or listed != broken:
            description += f', {reported} reported, differing: {sorted(listed ^ broken)[:3]}'
            return 'WRONG: another count', description
        return 'folders of 100 mutated images with the exact count', description

    def close(self):
        pass
