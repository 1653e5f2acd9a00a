"""From files to crops: the boxes are torchvision's, the pixels PIL's, and every kind of file is read properly or refused."""

import io
import os
import random
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import draw_photo
from PIL import Image
from scipy.stats import ks_2samp

from util import folder, images
from util.crop import RandomResizedCrop, resized_crop_box, single_crop_box
from util.images import ImageFile, UnreadableImage, read_image


@pytest.mark.parametrize('width, height', [(500, 375), (300, 900), (64, 64), (2000, 100)])
def test_boxes_are_distributed_as_torchvision_s(width, height):
    """Area, aspect and position of 8,000 boxes of each: Kolmogorov and Smirnov find no difference."""
    random.seed(0)
    torch.manual_seed(0)
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    blank = torch.empty(1, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    ours = np.array([resized_crop_box(width, height, scale, ratio) for _ in range(8000)], dtype=float)
    theirs = np.array([draw(blank, scale, ratio) for _ in range(8000)], dtype=float)
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()

    def looks(boxes):
        top, left, h, w = boxes.T
        return h * w, w / h, top + h / 2, left + w / 2

    for a, b in zip(looks(ours), looks(theirs)):
        assert ks_2samp(a, b).pvalue > 1e-3
    other = [resized_crop_box(width, height, (0.3, 1.0), ratio) for _ in range(8000)]
    if max(width, height) < 1000:  # there, most boxes are the central one that comes after ten tries
        assert ks_2samp(looks(ours)[0], looks(np.array(other, dtype=float))[0]).pvalue < 1e-6  # the test can fail


def test_boxes_of_pictures_of_a_few_pixels():
    for draw in (resized_crop_box, single_crop_box):
        for size in ((1, 1), (1, 50), (50, 1), (2, 3)):
            for _ in range(200):
                top, left, h, w = draw(*size, (0.08, 1.0), (3 / 4, 4 / 3))
                assert h >= 1 and w >= 1 and 0 <= top <= size[1] - h and 0 <= left <= size[0] - w


@pytest.mark.parametrize('size', [224, 96, 32])
def test_crops_agree_with_pil(imagenet_samples, size):
    """Bicubic, of whole JPEG files and of ones that are decoded at a half to an eighth: on average within 2 of 255."""
    random.seed(0)
    differences = []
    for path in sorted(imagenet_samples.rglob('*.JPEG')):
        with Image.open(path) as image:
            whole = image.convert('RGB')
        for _ in range(10):
            top, left, h, w = box = resized_crop_box(*whole.size, (0.2, 1.0), (3 / 4, 4 / 3))
            ours = ImageFile(path).crop(box, size).permute(1, 2, 0).numpy()
            theirs = np.asarray(whole.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC))
            assert ours.dtype == np.uint8 and ours.shape == theirs.shape
            differences.append(np.abs(ours.astype(float) - theirs).mean())
    assert np.mean(differences) < 2, differences


def test_a_crop_is_where_it_should_be():
    """Left and right, top and bottom: a picture of four colours, one in each corner, in every format and at every scale."""
    corners = np.zeros((400, 640, 3), np.uint8)
    corners[:200, :320], corners[:200, 320:], corners[200:, :320], corners[200:, 320:] = 30, 90, 150, 210
    for form in ('PNG', 'JPEG'):
        for size in (200, 100, 50, 25):
            for top, left, value in ((0, 0, 30), (0, 320, 90), (200, 0, 150), (200, 320, 210)):
                crop = ImageFile(encode(corners, form)).crop((top + 8, left + 8, 184, 304), size)
                assert (crop.float() - value).abs().max() <= 3, (form, size, top, left)


def encode(pixels, form, **kwargs):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, form, **kwargs)
    return file.getvalue()


def smooth(mode='RGB', size=(96, 64)):
    ramp = np.linspace(20, 235, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize('mode, form, kwargs', [
    ('RGB', 'JPEG', {}), ('RGB', 'JPEG', {'progressive': True}), ('L', 'JPEG', {}), ('CMYK', 'JPEG', {}), ('RGBA', 'PNG', {}),
    ('P', 'PNG', {'transparency': bytes(range(256))}), ('P', 'GIF', {'transparency': 3}), ('LA', 'PNG', {}), ('1', 'PNG', {}),
    ('RGB', 'WEBP', {'lossless': True}), ('RGB', 'BMP', {}), ('RGB', 'TIFF', {}), ('RGB', 'JPEG', {'subsampling': 0}),
], ids=lambda value: str(value))
@pytest.mark.parametrize('with_simplejpeg', [True, False])
def test_formats_and_modes(mode, form, kwargs, with_simplejpeg, monkeypatch, recwarn):
    if not with_simplejpeg:
        monkeypatch.setattr(images, 'simplejpeg', None)
    image = smooth(mode)
    file = ImageFile(encode(image, form, quality=95, **kwargs) if form != 'TIFF' else encode(image, form))
    expected = np.asarray(image.convert('RGB')).astype(float)
    assert file.size == (96, 64) and file.rgb().mode == 'RGB'
    assert np.abs(np.asarray(file.rgb()) - expected).mean() < 6
    crop = file.crop((8, 16, 32, 32), 32).permute(1, 2, 0).numpy()
    assert np.abs(crop - expected[8:40, 16:48]).mean() < 6
    assert not recwarn.list


@pytest.mark.parametrize('orientation', range(1, 9))
def test_cameras_that_were_held_another_way(orientation, tmp_path):
    """The picture is upright, whichever of EXIF's eight ways it is stored in."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:10, :20] = 255  # a mark in the upper left corner
    upright = Image.fromarray(pixels)
    back = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_90,
            7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = ImageFile(encode(stored, 'JPEG', quality=95, exif=exif))
    assert file.size == (80, 40)
    assert np.abs(np.asarray(file.rgb()).astype(int) - pixels).mean() < 2
    assert file.crop((0, 0, 8, 16), 8).min() > 200


@pytest.mark.parametrize('break_it', [
    lambda data: b'', lambda data: b'not an image', lambda data: data[:len(data) // 2], lambda data: data[:20],
    lambda data: bytes(len(data)), lambda data: b'\xff\xd8' + data[300:],
], ids=['empty', 'text', 'half', '20 bytes', 'zeros', 'no header'])
@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_broken_files_are_refused(form, break_it):
    data = encode(smooth(), form)
    ImageFile(data).crop((0, 0, 60, 60), 32)
    with pytest.raises(UnreadableImage):
        ImageFile(break_it(data)).crop((0, 0, 60, 60), 32)


def test_what_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / 'nothing.jpg', tmp_path):
        with pytest.raises(UnreadableImage):
            ImageFile(path)


def test_a_picture_that_would_fill_the_memory_is_refused():
    """A small file that says it is 30,000 pixels wide and high."""
    data = bytearray(encode(smooth(), 'JPEG'))
    at = data.index(b'\xff\xc0') + 5
    data[at:at + 4] = (30_000).to_bytes(2, 'big') * 2
    with pytest.raises(UnreadableImage, match='DecompressionBomb'):
        ImageFile(bytes(data))


def test_deep_images_keep_their_values(tmp_path):
    """16 bits become 8 without clipping, from PNG and TIFF; floating-point pictures are refused."""
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name in ('a.png', 'a.tif'):
        Image.fromarray(ramp).save(tmp_path / name)
        assert (np.asarray(read_image(tmp_path / name)) == (ramp >> 8)[..., None]).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / 'f.tif')
    with pytest.raises(ValueError, match='no known range'):
        read_image(tmp_path / 'f.tif')


def test_crop_draws_once():
    """Linear probing's: area and aspect as drawn where the box fits; cut to the image where it does not."""
    random.seed(0)
    boxes = [single_crop_box(600, 400, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    assert all(0 <= top <= 400 - h and 0 <= left <= 600 - w for top, left, h, w in boxes)
    inside = [(h * w / 240_000, np.log(w / h)) for _, _, h, w in boxes if h < 400 and w < 600]
    assert min(area for area, _ in inside) == pytest.approx(0.08, abs=0.01)
    small = [aspect for area, aspect in inside if area < 0.5]  # a box of half the area always fits
    assert sum(small) / len(small) == pytest.approx(0, abs=0.02)
    assert max(small) == pytest.approx(np.log(4 / 3), abs=0.02)
    assert any(h == 400 for _, _, h, _ in boxes)  # torchvision's would draw again
    assert RandomResizedCrop(24, draw=single_crop_box)(ImageFile(smooth())).shape == (3, 24, 24)


# ---- the list of a folder ----

@pytest.fixture
def tree(tmp_path):
    """Three classes, one with a folder inside, one empty; files that are no images; and a hidden folder."""
    root = tmp_path / 'tree'
    for name in ('b/2.png', 'b/1.JPEG', 'b/deeper/0.png', 'a/ü.png', 'a/notes.txt', '.hidden/x.png'):
        draw_photo(root / f'{name}.png', name, (40, 30))
        (root / f'{name}.png').rename(root / name)
    (root / 'c').mkdir()
    return root


def paths(images):
    return [os.path.normpath(images.path(i)) for i in range(len(images))]


def test_a_folder_is_listed_as_by_torchvision(tree):
    ours, theirs = folder.ImageFolder(tree), torchvision.datasets.ImageFolder(tree, allow_empty=True)
    assert ours.classes == ['a', 'b', 'c']
    theirs = [(os.path.normpath(path), theirs.classes[target]) for path, target in theirs.samples if '.hidden' not in path]
    assert [(path, ours.classes[target]) for path, target in zip(paths(ours), ours.targets)] == theirs and len(theirs) == 4
    assert [ours[i][1] for i in range(4)] == ours.targets.tolist()


def test_the_list_is_kept_until_a_folder_changes(tree, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    folder.ImageFolder(tree)
    assert not (tmp_path / 'cache').exists()  # not for a few files
    monkeypatch.setattr(folder, 'CACHE_FROM', 1)
    folder.ImageFolder(tree)
    assert not (tmp_path / 'cache').exists()  # nor for folders that have just changed
    past = time.time() - 100
    for path in (tree, *(p for p in tree.rglob('*') if p.is_dir())):
        os.utime(path, (past, past))
    listed = folder.ImageFolder(tree)
    cache, = (tmp_path / 'cache' / 'milan').iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(folder.ImageFolder, '_list', lambda *_: pytest.fail('listed again'))
        again = folder.ImageFolder(tree)
    assert paths(again) == paths(listed) and again.targets.tolist() == listed.targets.tolist()

    (tree / 'b' / 'deeper' / '00.png').write_bytes(b'')
    assert len(folder.ImageFolder(tree)) == len(listed) + 1
    (tree / 'b' / 'deeper' / '00.png').unlink()
    os.utime(tree / 'b' / 'deeper', (past, past))
    whole = cache.read_bytes()
    for damaged in (b'', whole[:100], whole[:-100], b'x' * 1000):
        cache.write_bytes(damaged)
        assert paths(folder.ImageFolder(tree)) == paths(listed)
