"""One image from a file or from memory: RGB and upright, or an error that names it and says why.

- Grey, 1-bit, palette, CMYK, YCbCr and LAB become RGB as Pillow converts them. CMYK in a JPEG is taken to be inverted,
  as Adobe writes it and as nearly all are.
- Transparency of every kind is laid over white: no colour that is hidden under transparent pixels shows.
- 16 bits of grey are scaled by their full range to 8 (Pillow's conversion turns everything above 255 white). Numbers
  of 32 bits, signed numbers and floats are refused: no range is known for them. One taken from the pixels would let
  the brightest of them decide how bright the others are; a fixed one could make the image black without a word.
- EXIF's orientation is applied, in a PNG that of the chunk eXIf. Other metadata may be broken: it is not looked at.
  Colour profiles are ignored, as torchvision and timm do.
- The first frame stands for an animation, the first page for a document.
- A file that ends early is refused: with ``LOAD_TRUNCATED_IMAGES`` the rest would be grey.
- The first bytes choose the format, not the name, and only Pillow's readers of the formats listed in
  ``image_formats.py`` are ever run. ``Image.open`` would try every plugin there is, one of which starts Ghostscript on
  what looks like PostScript.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from .errors import DataError
from .image_formats import open_image, orientation

MAX_PIXELS = 89_478_485
"""Where Pillow itself begins to warn, so that no image accepted makes it warn. At 4 bytes a pixel such an image takes
341 MiB, and more than once while it is converted, in every worker. Few cameras go beyond; what they take is better made
smaller once than decoded in every epoch."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_STEPS = {"L;2": 85, "L;4": 17}  # from one grey to the next of 2 or 4 bits, once they are 8


class UnreadableImage(DataError):  # noqa: N818
    """An image that can't be used.

    Attributes:
        name: of the image, as it was given.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        # One argument is a whole message: so PyTorch makes the error of a worker anew.
        return f"data: {self.name} can't be read: {self.reason}" if self.reason else self.name


def read_image(
    file: str | Path | bytes | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image. Many threads may do so at once.

    Args:
        file: a path, the bytes of an image, or a stream, which is read to its end and left open.
        name: what errors call the image; the path unless given.
        max_pixels: refuse more than these, from the header alone. Beyond the default, Pillow's own limits still hold
            for TIFF, GIF and WebP.

    Returns:
        an RGB image without metadata.

    Raises:
        UnreadableImage: whatever the reason.
    """
    if name is None:
        name = os.fspath(file) if isinstance(file, str | os.PathLike) else "an image in memory"
    try:
        with _stream(file) as stream:
            return _decode(open_image(stream, max_pixels))
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise UnreadableImage(name, _reason(error)) from error


def _stream(file: str | Path | bytes | BinaryIO) -> BinaryIO:
    if not isinstance(file, str | os.PathLike):
        return io.BytesIO(file if isinstance(file, bytes) else file.read())
    if not stat.S_ISREG(Path(file).stat().st_mode):  # to open a named pipe would wait for ever
        raise ValueError("it is not a regular file")
    return Path(file).open("rb")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    plain = isinstance(error, OSError | SyntaxError | ValueError) and str(error)
    return plain or f"{type(error).__name__}: {error}"


def _decode(image: ImageFile.ImageFile) -> Image.Image:
    layout = image.tile[0][3] if image.tile else ""  # how pixels are stored, with other things or alone
    layout = str(layout[0] if isinstance(layout, tuple) else layout)
    image.load()
    rgb = _to_rgb(image, layout)
    turn = TURNS.get(orientation(image.info.get("exif", b"")))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # nobody is to turn it once more by what is there
    return rgb


def _to_rgb(image: ImageFile.ImageFile, layout: str) -> Image.Image:
    if image.mode[0] in "IF":
        return Image.fromarray(_grey(image, layout)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if layout in GREY_STEPS:  # Pillow scales the pixels, but not the grey that is said to be transparent
        image.info["transparency"] *= GREY_STEPS[layout]
    elif layout == "RGB;16B":  # likewise; 8 bits can't tell it from its nearest neighbours
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _grey(image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """The bytes of an image with more than 8 bits of grey."""
    if image.mode.startswith("I;16"):
        full = 4095 if layout == "I;12" else 65535
    elif image.mode == "I" and isinstance(image, PpmImageFile):
        full = 65535  # to which Pillow scales whatever range the header gives
    else:
        raise ValueError("no range is known for pixels of 32 bits, with a sign or with fractions")
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + full // 2) // full).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        grey = 255 - grey  # white is 0, which Pillow heeds for 8 bits only
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey
