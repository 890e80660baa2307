"""Images as bytes: by Pillow, and by hand those that Pillow does not write; and what is read of them."""

import io
import struct
import zlib
from unittest import mock

import numpy as np
from PIL import Image

from sasa.train.images import UnreadableImage, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    """The bytes of an image or of an array."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def pixels(file):
    image = read_image(file)
    assert type(image) is Image.Image and image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def attempt(data):
    """The pixels, or None for an unreadable image; any other error is none that should come."""
    try:
        with mock.patch("sasa.train.images.MAX_PIXELS", 10**6):
            return pixels(data)
    except UnreadableImage:
        return None


def chunk(name, data, checksum=None):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum or zlib.crc32(name + data))


def png(width, height, depth, colour, rows, *chunks):
    """A PNG by hand: of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, height, bits, data, *tags, order="<", photometric=1, samples=1):
    """A TIFF by hand, with one strip."""
    entries = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1), 262: (3, photometric)}
    entries |= {277: (3, samples), 278: (4, height), 279: (4, len(data)), **dict(tags)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = (4, start)
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        packed = struct.pack(f"{order}{'HI'[kind == 4]}", value).ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    return head + directory + b"\0\0\0\0" + data


def exif(orientation, order="<"):
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, 1)
    return b"Exif\0\0" + head + entry + b"\0\0\0\0"


ENCODED = {
    "jpeg": encode(NOISE, "JPEG"),
    "progressive jpeg": encode(NOISE, "JPEG", progressive=True),
    "png": encode(NOISE),
    "gif": encode(NOISE, "GIF"),
    "bmp": encode(NOISE, "BMP"),
    "ppm": encode(NOISE, "PPM"),
    "tiff": encode(NOISE, "TIFF"),
    "lzw tiff": encode(NOISE, "TIFF", compression="tiff_lzw"),
    "webp": encode(NOISE, "WEBP"),
    "lossless webp": encode(NOISE, "WEBP", lossless=True),
}
