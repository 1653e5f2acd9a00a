"""Decoding: pixels as PIL's, every format and mode, damaged files."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from util.crop import resized_crop_box
from util.data import image_file
from util.data.image_file import ImageFile, UnreadableImage


def encode(pixels, form, **kwargs):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, form, **kwargs)
    return file.getvalue()


def ramp(mode='RGB', size=(96, 64)):
    values = np.linspace(20, 235, size[0] * size[1] * 3)
    return Image.fromarray(values.reshape(size[1], size[0], 3).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize('size', [224, 96, 32])
def test_crops_equal_pils(imagenet_samples, size):
    """Crops of JPEG files, decoded at full size or 1/2 to 1/8, are within 2 of 255 on average."""
    random.seed(0)
    differences = []
    for path in sorted(imagenet_samples.rglob('*.JPEG')):
        with Image.open(path) as image:
            whole = image.convert('RGB')
        for _ in range(5):
            top, left, h, w = box = resized_crop_box(*whole.size, (0.2, 1.0), (3 / 4, 4 / 3))
            ours = ImageFile(path).crop(box, size).permute(1, 2, 0).numpy()
            theirs = whole.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
            assert ours.dtype == np.uint8 and ours.shape == np.asarray(theirs).shape
            differences.append(np.abs(ours.astype(float) - np.asarray(theirs)).mean())
    assert np.mean(differences) < 2, differences


@pytest.mark.parametrize('size', [200, 100, 50, 25])
@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_position_of_crops(form, size):
    """An image with one color per corner, decoded at each scale."""
    corners = {(0, 0): 30, (0, 320): 90, (200, 0): 150, (200, 320): 210}
    pixels = np.zeros((400, 640, 3), np.uint8)
    for (top, left), value in corners.items():
        pixels[top : top + 200, left : left + 320] = value
    file = ImageFile(encode(pixels, form))
    for (top, left), value in corners.items():
        crop = file.crop((top + 8, left + 8, 184, 304), size)
        assert (crop.float() - value).abs().max() <= 3, (top, left)


@pytest.mark.parametrize(
    'mode, form, kwargs',
    [
        ('RGB', 'JPEG', {}),
        ('RGB', 'JPEG', {'progressive': True}),
        ('RGB', 'JPEG', {'subsampling': 0}),
        ('L', 'JPEG', {}),
        ('CMYK', 'JPEG', {}),
        ('RGBA', 'PNG', {}),
        ('P', 'PNG', {'transparency': bytes(range(256))}),
        ('P', 'GIF', {'transparency': 3}),
        ('LA', 'PNG', {}),
        ('1', 'PNG', {}),
        ('RGB', 'WEBP', {'lossless': True}),
        ('RGB', 'BMP', {}),
        ('RGB', 'TIFF', {}),
    ],
    ids=str,
)
@pytest.mark.parametrize('with_simplejpeg', [True, False])
def test_formats_and_modes(mode, form, kwargs, with_simplejpeg, monkeypatch, recwarn):
    if not with_simplejpeg:
        monkeypatch.setattr(image_file, 'simplejpeg', None)
    if form != 'TIFF':  # its compression is lossless by default
        kwargs = {'quality': 95, **kwargs}
    image = ramp(mode)
    file = ImageFile(encode(image, form, **kwargs))
    expected = np.asarray(image.convert('RGB')).astype(float)
    assert file.size == (96, 64) and file.rgb().mode == 'RGB'
    assert np.abs(np.asarray(file.rgb()) - expected).mean() < 6
    crop = file.crop((8, 16, 32, 32), 32).permute(1, 2, 0).numpy()
    assert np.abs(crop - expected[8:40, 16:48]).mean() < 6
    assert not recwarn.list


@pytest.mark.parametrize('kind', ['path', 'string', 'bytes', 'file', 'PIL'])
def test_sources(kind, tmp_path):
    data = encode(ramp(), 'PNG')
    path = tmp_path / 'image.png'
    path.write_bytes(data)
    sources = {'path': path, 'string': str(path), 'bytes': data, 'file': io.BytesIO(data)}
    file = ImageFile(sources.get(kind, ramp()))
    assert file.size == (96, 64)
    assert (np.asarray(file.rgb()) == np.asarray(ramp())).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation(orientation):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:10, :20] = 255  # a mark in the upper left corner
    upright = Image.fromarray(pixels)
    inverse = {
        2: Image.FLIP_LEFT_RIGHT,
        3: Image.ROTATE_180,
        4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE,
        6: Image.ROTATE_90,
        7: Image.TRANSVERSE,
        8: Image.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = ImageFile(encode(stored, 'JPEG', quality=95, exif=exif))
    assert file.size == (80, 40)
    assert np.abs(np.asarray(file.rgb()).astype(int) - pixels).mean() < 2
    assert file.crop((0, 0, 8, 16), 8).min() > 200


DAMAGE = {
    'empty': lambda data: b'',
    'text': lambda data: b'not an image',
    'half': lambda data: data[: len(data) // 2],
    '20 bytes': lambda data: data[:20],
    'zeros': lambda data: bytes(len(data)),
    'no header': lambda data: b'\xff\xd8' + data[300:],
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_damaged_files(form, damage):
    data = encode(ramp(), form)
    ImageFile(data).crop((0, 0, 60, 60), 32)
    with pytest.raises(UnreadableImage):
        ImageFile(DAMAGE[damage](data)).crop((0, 0, 60, 60), 32)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / 'missing.jpg', tmp_path):
        with pytest.raises(UnreadableImage):
            ImageFile(path)


def test_decompression_bomb():
    """A small file whose header announces 30,000 x 30,000 pixels."""
    data = bytearray(encode(ramp(), 'JPEG'))
    at = data.index(b'\xff\xc0') + 5
    data[at : at + 4] = (30_000).to_bytes(2, 'big') * 2
    with pytest.raises(UnreadableImage, match='DecompressionBomb'):
        ImageFile(bytes(data))


def test_16_bit_and_float_images(tmp_path):
    pixels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name in ('a.png', 'a.tif'):
        Image.fromarray(pixels).save(tmp_path / name)
        assert (np.asarray(ImageFile(tmp_path / name).rgb()) == (pixels >> 8)[..., None]).all()
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / 'f.tif')
    with pytest.raises(UnreadableImage, match='floating-point'):
        ImageFile(tmp_path / 'f.tif')
