"""One image from a file or from memory: RGB and upright, or an error with its name and the reason.

- Grey, 1-bit, palette, CMYK, YCbCr and LAB become RGB as Pillow converts them; colour profiles are ignored.
- Transparent images are composited onto white, so that colours hidden under transparent pixels don't show. (Except for
  the single transparent colour of a PNG with other than 8 bits per channel, which Pillow scales differently from the
  pixels.)
- 16-bit grey is scaled to 8 bits by its full range (Pillow's conversion turns everything above 255 white). Signed
  numbers, fractions and other depths are rejected: their range is unknown.
- EXIF orientation is applied; malformed EXIF is ignored.
- Of an animation the first frame is used, of a document the first page.
- A truncated file is rejected: with ``LOAD_TRUNCATED_IMAGES`` the rest would be grey.
- The format is determined by the content, not the name, and only the readers of ``FORMATS`` are run. By default Pillow
  tries every plugin, one of which starts Ghostscript on anything that looks like PostScript.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH

from .errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

MAX_PIXELS = 89_478_485
"""The size above which Pillow itself warns. At 4 bytes per pixel such an image takes 341 MiB, and several times that
while it is converted, in every worker.
"""

_LOCK = threading.Lock()


class UnreadableImage(DataError):  # noqa: N818
    """An image that can't be used.

    Attributes:
        name: the image's name, as given.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        # A single argument is a complete message: PyTorch re-raises a worker's error that way.
        return f"data: {self.name} can't be read: {self.reason}" if self.reason else self.name


def read_image(file: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decode an image. Many threads may do so at once.

    Args:
        file: a path, or the bytes of an image.
        name: what errors call the image; the path by default.

    Returns:
        an RGB image without metadata.

    Raises:
        UnreadableImage: the image can't be read, for any reason.
    """
    if name is None:
        name = "an image in memory" if isinstance(file, bytes) else os.fspath(file)
    try:
        with _opened(file) as stream:
            return _decode(stream)
    except Exception as error:  # Pillow may raise anything for a damaged file
        raise UnreadableImage(name, _reason(error)) from error


def _opened(file: str | Path | bytes) -> BinaryIO:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if not stat.S_ISREG(Path(file).stat().st_mode):  # opening a named pipe would block
        raise ValueError("it is not a regular file")
    return Path(file).open("rb")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    plain = isinstance(error, OSError | SyntaxError | ValueError) and str(error)
    return plain or f"{type(error).__name__}: {error}"


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings on metadata and sizes; filters are process-wide, so one thread at a time."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(stream: BinaryIO) -> Image.Image:
    if not stream.read(1):
        raise ValueError("it is empty")
    stream.seek(0)
    with _no_warnings():
        image = Image.open(stream, formats=FORMATS)
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TILEWIDTH, 1), tags.get(TILELENGTH, 1)  # decoded in full, however little of it lies in the image
    for width, height in (image.size, tile):
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} are more than {MAX_PIXELS} pixels")
    image.load()
    rgb = _to_rgb(image, tags)
    rgb.info.clear()
    with _no_warnings(), suppress(Exception):  # broken EXIF
        rgb.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    ImageOps.exif_transpose(rgb, in_place=True)
    rgb.getexif().clear()  # so that the image isn't rotated again
    return rgb


def _to_rgb(image: Image.Image, tags: dict) -> Image.Image:
    """A new image, without transparency."""
    if image.mode[0] in "IF":
        return Image.fromarray(_grey(image, tags)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _grey(image: Image.Image, tags: dict) -> np.ndarray:
    """The bytes of a grey image with more than 8 bits per pixel."""
    plain = tags.get(BITSPERSAMPLE, (16,)) == (16,) and tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 1
    # Pillow scales a PPM to 16 bits, whatever range its header gives.
    if not (plain and (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"))):
        raise ValueError("no range is known for grey of other than 8 or 16 bits without a sign, or with 0 for white")
    values = np.asarray(image).astype(np.uint32)
    return ((values * 255 + 32767) // 65535).astype(np.uint8)
