"""Pillow's readers of image formats, kept from what is not pixels and from sizes they would warn of.

Pillow warns of large images and of broken metadata, or refuses an image for it. A warning can't be held back in one
thread alone, and is an error where the user wants it so. Here the size is compared with a limit, and metadata is cut
out or left unread. What remains: a damaged directory of a TIFF makes Pillow warn, for its pixels are found by that.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

ORIENTATION = 0x0112


def open_image(stream: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """The image in ``stream`` before its pixels are decoded. Its EXIF is in ``info``, unless it is a TIFF's.

    Raises:
        ValueError: it is empty, of no format here, or larger than ``max_pixels``.
        Exception: whatever else Pillow makes of a broken file.
    """
    head = stream.read(16)
    if not head:
        raise ValueError("it is empty")
    readers = [reader for magic, reader in READERS.values() if re.match(magic, head, re.DOTALL)]
    if not readers:
        raise ValueError(f"it is not an image in a known format ({', '.join(READERS)})")
    stream.seek(0)
    image = readers[0](stream, max_pixels)
    _check(image.size, max_pixels)
    return image


def orientation(exif: bytes) -> int:
    """From 1 to 8; 1, which is upright, unless EXIF says something else."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order:
            (start,) = struct.unpack_from(f"{order}I", exif, 4)
            (entries,) = struct.unpack_from(f"{order}H", exif, start)
            for at in range(start + 2, start + 2 + 12 * entries, 12):
                tag, kind = struct.unpack_from(f"{order}HH", exif, at)
                if tag == ORIENTATION:
                    return struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", exif, at + 8)[0]
    except struct.error:  # it is cut short
        pass
    return 1


def _check(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} are more than {max_pixels} pixels")


class _Jpeg(JpegImageFile):
    """Of many pictures the first. Pillow would look for the resolution in EXIF, where there may be garbage."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _jpeg(stream: BinaryIO, _: int) -> ImageFile.ImageFile:
    return _Jpeg(stream)


def _png(stream: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """Only the chunks that make pixels: of an animation they are the picture shown where nothing moves."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    kept, exif, name = io.BytesIO(), b"", b""
    kept.write(stream.read(8))
    while name != b"IEND" and len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        body = min(length + 4, end - stream.tell())  # with its checksum
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            data = stream.read(body)
            if name == b"IHDR":
                _check(struct.unpack_from(">II", data), max_pixels)
            kept.write(head + data)
        elif name == b"eXIf":
            exif = stream.read(body)
        else:
            stream.seek(body, os.SEEK_CUR)
    kept.seek(0)
    image = PngImageFile(kept)
    image.info["exif"] = exif
    return image


def _webp(stream: BinaryIO, _: int) -> ImageFile.ImageFile:
    return WebPImageFile(stream)


def _gif(stream: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """Pillow warns of a large frame while it opens the file: the size is looked up before."""
    width, height, flags = struct.unpack_from("<HHB", stream.read(13), 6)
    if flags & 128:
        stream.seek(6 << (flags & 7), os.SEEK_CUR)  # colours
    while (mark := stream.read(1)) not in (b"", b",", b";"):
        if mark == b"!":  # an extension, in blocks, of which an empty one is the last
            stream.seek(1, os.SEEK_CUR)
            while (length := stream.read(1)) not in (b"", b"\0"):
                stream.seek(length[0], os.SEEK_CUR)
    if mark == b",":  # the first frame, which may be larger than the screen
        left, top, frame_width, frame_height = struct.unpack("<4H", stream.read(8))
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    _check((width, height), max_pixels)
    stream.seek(0)
    return GifImageFile(stream)


def _bmp(stream: BinaryIO, _: int) -> ImageFile.ImageFile:
    return BmpImageFile(stream)


class _Tiff(TiffImageFile):
    """Pillow turns it upright, here by its own directory: EXIF, to which that points, may be garbage."""

    def getexif(self) -> Image.Exif:
        exif = Image.Exif()
        exif[ORIENTATION] = self.tag_v2.get(ORIENTATION, 1)
        return exif


def _tiff(stream: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    image = _Tiff(stream)
    tile = image.tag_v2.get(TILEWIDTH, 1), image.tag_v2.get(TILELENGTH, 1)
    _check(tile, max_pixels)  # it is decoded whole, however little of it is in the image
    return image


def _ppm(stream: BinaryIO, _: int) -> ImageFile.ImageFile:
    return PpmImageFile(stream)


READERS: dict[str, tuple[bytes, Callable[[BinaryIO, int], ImageFile.ImageFile]]] = {
    "JPEG": (rb"\xff\xd8\xff", _jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n", _png),
    "WebP": (rb"RIFF....WEBP", _webp),
    "GIF": (rb"GIF8[79]a", _gif),
    "BMP": (rb"BM", _bmp),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", _tiff),
    "PPM": (rb"P[1-6f]\s", _ppm),
}
"""What a file of each format begins with, and what opens it, given a stream and the number of pixels allowed."""
