"""Image files, decoded only as far as needed."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

try:
    import simplejpeg
except ImportError:  # PIL decodes JPEG files like all others: slower, nothing else changes
    simplejpeg = None


class UnreadableImage(Exception):
    """A file that is damaged or not an image; the message is the reason."""


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """Turn any exception into UnreadableImage: PIL and timm's readers raise many types."""
    try:
        yield
    except Exception as e:
        raise UnreadableImage(f'{type(e).__name__}: {e}') from e


class ImageFile:
    """Lazily decoded image: its size is known up front, pixels are decoded only as needed.

    A random crop that is drawn from the size alone does not have to decode at a resolution
    that it throws away: a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size in less time.

    Args:
        source: a path, an open binary file, the file's bytes, or a PIL image.

    Attributes:
        size: (width, height) in pixels, after EXIF rotation.

    Raises:
        UnreadableImage: here, or when pixels are decoded.
    """

    def __init__(self, source: str | Path | io.IOBase | bytes | Image.Image) -> None:
        with unreadable():
            self.image = _to_rgb(source) if isinstance(source, Image.Image) else None
            if isinstance(source, str | Path):
                source = Path(source).read_bytes()
            self.data = source.read() if hasattr(source, 'read') else source
        self.size = self._jpeg_size() or self.rgb().size

    @unreadable()
    def rgb(self) -> Image.Image:
        """Decode the whole image with PIL, apply its EXIF rotation, and convert it to RGB.

        16-bit images keep their upper 8 bits, where PIL would clip at 255. Transparency is
        ignored.
        """
        self.image = self.image or _to_rgb(Image.open(io.BytesIO(self.data)))
        return self.image

    def crop(self, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
        """Crop and resize bicubically.

        Args:
            box: (top, left, height, width) in pixels.

        Returns:
            uint8 [3, size, size].
        """
        top, left, height, width = box
        pixels, shrink = self._decode(min(height, width) // size)
        if shrink > 1:  # the box is now fractional, which torch cannot crop
            box = left / shrink, top / shrink, (left + width) / shrink, (top + height) / shrink
            image = Image.fromarray(pixels).resize((size, size), Image.BICUBIC, box=box)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        x = torch.from_numpy(pixels)[top : top + height, left : left + width].permute(2, 0, 1)
        # takes a quarter of PIL's time
        return torch.nn.functional.interpolate(
            x[None], (size, size), mode='bicubic', antialias=True
        )[0]

    def _decode(self, max_shrink: int) -> tuple[np.ndarray, int]:
        # Decodes at 1/shrink of the size, for the largest shrink of 1, 2, 4, 8 <= max_shrink.
        # Returns (uint8 [H, W, 3], shrink). Only JPEG files can be shrunk.
        shrink = max(s for s in (1, 2, 4, 8) if s <= max(max_shrink, 1))
        width, height = (-(-side // shrink) for side in self.size)
        with contextlib.suppress(ValueError):  # PIL tolerates more damage: fall back to it
            if self.image is None:
                return simplejpeg.decode_jpeg(
                    self.data, min_width=width, min_height=height, min_factor=shrink
                ), shrink
        return np.array(self.rgb()), 1

    def _jpeg_size(self) -> tuple[int, int] | None:
        # Returns the size of a JPEG file that simplejpeg can decode as it is. Returns None if
        # PIL has to decode the file: other formats and color spaces, EXIF rotation, damage, and
        # images above PIL's size limit, which PIL warns of or refuses.
        with contextlib.suppress(Exception):  # no JPEG file, or no simplejpeg
            height, width, colors, _ = simplejpeg.decode_jpeg_header(self.data)
            plain = colors in ('YCbCr', 'Gray', 'RGB') and (
                width * height <= (Image.MAX_IMAGE_PIXELS or float('inf'))
            )
            if plain and b'Exif\0\0' in self.data[:65536]:  # 0x0112 is the orientation
                plain = Image.open(io.BytesIO(self.data)).getexif().get(0x0112, 1) == 1
            return (width, height) if plain else None


def _to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == 'F':
        raise ValueError('floating-point pixels have no known range')
    if image.mode.startswith('I'):  # 16 bits: PIL's modes I;16 and I
        image = Image.fromarray((np.array(image).clip(0, 65535) >> 8).astype(np.uint8))
    image.info.pop('transparency', None)  # PIL would warn that it is ignored
    return image.convert('RGB')
