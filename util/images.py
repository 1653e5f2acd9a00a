"""Image files, decoded no further than what is made of them needs."""

import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

try:
    import simplejpeg
except ImportError:  # JPEG files are then decoded by PIL, as all others are: slower, and nothing else changes
    simplejpeg = None


class UnreadableImage(Exception):
    """A file that is no image, or a broken one; the message says why."""


class ImageFile:
    """An image whose size is known and whose pixels wait for what a transform wants of them.

    A random crop that is drawn from the size alone spares decoding at a resolution that would be thrown away: a JPEG file gives
    itself at a half, a quarter or an eighth of its size in less time than as a whole.

    Args:
        source: a path, an open binary file, the file's bytes, or a PIL image.

    Attributes: size, (width, height) in pixels, after the turn that the camera noted.

    Raises:
        UnreadableImage: here or when pixels are asked for.
    """

    def __init__(self, source):
        try:
            if isinstance(source, Image.Image):
                self.data, self.image = None, _to_rgb(source)
            else:
                self.data, self.image = _read_bytes(source), None
            self.size = self._jpeg_size() or self.rgb().size
        except UnreadableImage:
            raise
        except Exception as e:  # whatever PIL and timm's readers raise on broken files, and files that have gone away
            raise UnreadableImage(f'{type(e).__name__}: {e}') from e

    def rgb(self):
        """The whole picture: PIL image, RGB."""
        if self.image is None:
            try:
                self.image = read_image(io.BytesIO(self.data))
            except Exception as e:
                raise UnreadableImage(f'{type(e).__name__}: {e}') from e
        return self.image

    def crop(self, box, size):
        """The part inside ``box`` = (top, left, height, width), resized bicubically: uint8 [3, size, size]."""
        top, left, height, width = box
        pixels, shrink = self._decode(min(height, width) // size)
        if shrink > 1:  # the box now has fractions of pixels, which of the two only PIL can resize
            box = left / shrink, top / shrink, (left + width) / shrink, (top + height) / shrink
            image = Image.fromarray(pixels).resize((size, size), Image.BICUBIC, box=box)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        x = torch.from_numpy(pixels)[top:top + height, left:left + width].permute(2, 0, 1)
        return F.interpolate(x[None], (size, size), mode='bicubic', antialias=True)[0]  # a quarter of PIL's time

    def _decode(self, shrink):
        """(uint8 [H, W, 3], by how much it is smaller than ``size``: the largest of 1, 2, 4, 8 that is not above ``shrink``)."""
        if self.image is None:
            shrink = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
            smaller = [-(-side // shrink) for side in self.size] if shrink > 1 else (0, 0)
            try:
                return simplejpeg.decode_jpeg(self.data, min_width=smaller[0], min_height=smaller[1], min_factor=shrink), shrink
            except ValueError:
                pass  # damage, of which PIL forgives more: it has the last word
        return np.array(self.rgb()), 1

    def _jpeg_size(self):
        """(width, height) of a JPEG file that is to be decoded as it stands; None: PIL has to look at it."""
        if simplejpeg is None or self.data is None or self.data[:2] != b'\xff\xd8':
            return None
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(self.data)
        except ValueError:
            return None
        too_large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS  # PIL says so, or refuses
        if colours not in ('YCbCr', 'Gray', 'RGB') or too_large:
            return None
        if b'Exif\0\0' in self.data[:65536] and Image.open(io.BytesIO(self.data)).getexif().get(0x0112, 1) != 1:
            return None  # to be turned
        return width, height


def read_image(file):
    """PIL RGB image of a path or an open file, turned upright as the camera noted.

    Of 16-bit pictures the upper 8 bits are kept, where PIL would cut off at 255; what is transparent shows its colours.

    Raises:
        OSError, ValueError and whatever else PIL has for files that it cannot read.
    """
    with Image.open(file) as image:
        return _to_rgb(image)


def _to_rgb(image):
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I'):  # 16 bits, in PIL's words I;16 or I
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == 'F':
        raise ValueError('floating-point pixels have no known range')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # of transparent palettes, which are only looked at for their colours
        return image.convert('RGB')


def _read_bytes(source):
    if isinstance(source, bytes):
        return source
    if hasattr(source, 'read'):
        return source.read()
    with open(source, 'rb') as f:
        return f.read()
