"""What becomes of each odd kind of image, pixel by pixel, and what is said of those that can't be read."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile

from sasa.train.errors import DataError
from sasa.train.images import MAX_PIXELS, UnreadableImage, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
RED_HIDDEN = [(255, 0, 0, 0), (0, 0, 255, 255), (0, 200, 0, 128)]  # transparent, opaque, half
ON_WHITE = [[255, 255, 255], [0, 0, 255], [127, 227, 127]]


def encode(image, kind="PNG", **options):
    """The bytes of an image or of an array."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def pixels(file, **options):
    image = read_image(file, **options)
    assert type(image) is Image.Image and image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def attempt(data):
    """The pixels, or None for an unreadable image; any other error is none that should come."""
    try:
        return pixels(data, max_pixels=10**6)
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


# Colours


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_colours_are_kept(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(NOISE, kind, **options)), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF"])
def test_grey_has_three_equal_channels(kind):
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(pixels(encode(grey, kind)), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF"])
def test_one_bit_is_black_and_white(kind):
    bits = NOISE[..., 0] > 127
    np.testing.assert_array_equal(pixels(encode(bits, kind))[..., 1], np.where(bits, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette(kind):
    image = Image.fromarray(NOISE[:4, :4]).quantize(16)
    np.testing.assert_array_equal(pixels(encode(image, kind)), np.asarray(image.convert("RGB")))


# Transparency


def strip(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata(RED_HIDDEN)
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(strip("RGBA"), kind, **options)
    assert np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 0].tolist() == [255, 0, 0]  # what was hidden
    np.testing.assert_allclose(pixels(data)[0], ON_WHITE, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparent_grey(kind):
    image = Image.new("LA", (3, 1))
    image.putdata([(10, 0), (10, 255), (10, 128)])
    np.testing.assert_allclose(pixels(encode(image, kind))[0, :, 1], [255, 10, 132], atol=1)


def test_premultiplied_alpha():
    rgb = bytes([0, 0, 0, 0, 0, 0, 255, 255, 0, 100, 0, 128])
    bits = (3, 8)
    data = tiff(3, 1, 8, rgb, (338, (3, 1)), (258, bits), photometric=2, samples=4)
    np.testing.assert_allclose(pixels(data)[0], ON_WHITE, atol=1)
    data = tiff(3, 1, 8, bytes([0, 0, 10, 255, 5, 128]), (338, (3, 1)), samples=2)
    np.testing.assert_allclose(pixels(data)[0, :, 0], [255, 10, 132], atol=1)


def test_palette_with_alpha_for_each_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([value for colour in RED_HIDDEN for value in colour[:3]])
    image.putdata([0, 1, 2])
    np.testing.assert_allclose(pixels(encode(image, transparency=bytes([0, 255, 128])))[0], ON_WHITE, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_one_transparent_colour(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert pixels(encode(image, kind, transparency=0))[0].tolist() == ON_WHITE[:2]


def test_palette_and_alpha_apart():
    image = Image.new("P", (3, 1))
    image.putpalette([value for colour in RED_HIDDEN for value in colour[:3]])
    image.putdata([0, 1, 2])
    image = image.convert("PA")
    image.putalpha(Image.fromarray(np.array([[0, 255, 128]], dtype=np.uint8)))
    data = encode(image, "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "PA"
    np.testing.assert_allclose(pixels(data)[0], ON_WHITE, atol=1)


@pytest.mark.parametrize(
    ("depth", "row", "hidden", "expected"),
    [
        (1, [0b10000000], 1, [255, 0]),
        (1, [0b10000000], 0, [255, 255]),
        (2, [0b01100000], 1, [255, 170]),
        (4, [0x12], 1, [255, 34]),
        (8, [100, 101], 100, [255, 101]),
        (16, [0x12, 0x34, 0x12, 0x35], 0x1234, [255, 18]),
    ],
)
def test_one_transparent_grey(depth, row, hidden, expected):
    data = png(2, 1, depth, 0, [bytes(row)], chunk(b"tRNS", struct.pack(">H", hidden)))
    assert pixels(data)[0, :, 2].tolist() == expected


@pytest.mark.parametrize(("depth", "letter", "value"), [(8, "B", 200), (16, "H", 200 * 256 + 100)])
def test_one_transparent_colour(depth, letter, value):
    row = struct.pack(f">6{letter}", value, 0, 0, 0, 0, value)
    data = png(2, 1, depth, 2, [row], chunk(b"tRNS", struct.pack(">3H", value, 0, 0)))
    assert pixels(data)[0].tolist() == [[255, 255, 255], [0, 0, 200]]


# CMYK


def flat(*colours):
    """Squares of colour, large enough to survive a JPEG."""
    return np.repeat(np.repeat(np.array([colours], dtype=np.uint8), 16, 0), 16, 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    inks = flat((255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encode(Image.fromarray(inks, "CMYK"), kind, **options)
    expected = [[0, 255, 255], [255, 0, 0], [0, 0, 0], [255, 255, 255], [127, 127, 127]]
    np.testing.assert_allclose(pixels(data)[8, 8::16], expected, atol=3)


def test_ycck():
    """The same file as YCCK: the marker of Adobe says which of both it is."""
    wanted = [(0, 255, 255), (255, 0, 0), (0, 0, 0), (255, 255, 255), (60, 120, 200)]
    ycc = np.array(Image.fromarray(255 - flat(*wanted)).convert("YCbCr"))  # of the inks, and no black
    stored = 255 - np.concatenate([ycc, np.full_like(ycc[..., :1], 255)], -1)  # Pillow inverts what it writes
    data = encode(Image.fromarray(stored, "CMYK"), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    np.testing.assert_allclose(pixels(data[:at] + b"\2" + data[at + 1 :])[8, 8::16], wanted, atol=4)


# More than 8 bits


@pytest.mark.parametrize("how", ["png", "tiff", "big-endian tiff", "compressed tiff", "pgm"])
def test_16_bits_of_grey_are_scaled_by_their_range(how):
    values = np.array([[0, 128, 129, 255, 256, 257, 32896, 65278, 65535]], dtype=np.uint16)
    if how == "big-endian tiff":
        data = tiff(9, 1, 16, values.astype(">u2").tobytes(), order=">")
    else:
        options = {"compression": "tiff_lzw"} if how == "compressed tiff" else {}
        data = encode(values, {"png": "PNG", "pgm": "PPM"}.get(how, "TIFF"), **options)
    expected = [0, 0, 1, 1, 1, 1, 128, 254, 255]
    assert pixels(data)[0, :, 0].tolist() == expected
    naive = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, :, 0]
    assert naive.tolist() == [0, 128, 129, 255, 255, 255, 255, 255, 255]


def test_other_ranges_of_grey():
    assert pixels(b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(b"P2 3 1 1000\n0 500 1000\n")[0, :, 0].tolist() == [0, 128, 255]
    twelve = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 2048, 4095, 0
    assert pixels(tiff(4, 1, 12, twelve))[0, :, 0].tolist() == [0, 128, 255, 0]
    white_is_0 = tiff(3, 1, 16, struct.pack("<3H", 0, 257, 65535), photometric=0)
    assert pixels(white_is_0)[0, :, 0].tolist() == [255, 254, 0]


def test_16_bits_of_colour():
    row = struct.pack(">4H", 65535, 32896, 0, 65535)
    assert pixels(png(1, 1, 16, 6, [row]))[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_no_range_is_made_up(dtype):
    with pytest.raises(UnreadableImage, match="no range is known for pixels of 32 bits"):
        read_image(encode(np.ones((2, 2), dtype), "TIFF"))


def test_signed_and_float_files():
    with pytest.raises(UnreadableImage, match="with a sign"):
        read_image(tiff(1, 1, 16, b"\0\0", (339, (3, 2))))
    with pytest.raises(UnreadableImage, match="with fractions"):
        read_image(b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5))


# Which way up


def turned(stored, orientation):
    """By the letter of EXIF: which side of the scene row 0 and column 0 of what is stored are."""
    rows_are_columns = orientation >= 5
    upright = stored.swapaxes(0, 1) if rows_are_columns else stored
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    return upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "compressed TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(kind, orientation):
    options = {"WEBP": {"lossless": True}, "compressed TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    kind = kind.split()[-1]
    stored = pixels(encode(NOISE, kind, **options))
    if kind == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    else:
        options["exif"] = exif(orientation)
    image = read_image(encode(NOISE, kind, **options))
    np.testing.assert_array_equal(np.asarray(image), turned(stored, orientation))
    assert not dict(image.getexif())


def test_orientation_of_other_byte_order_and_type():
    long = exif(0, ">").replace(b"\0\3\0\0\0\1\0\0\0\0", b"\0\4\0\0\0\1\0\0\0\6")
    for tag in (exif(6, ">"), long):
        data = encode(NOISE, exif=tag)
        np.testing.assert_array_equal(pixels(data), turned(NOISE, 6))


def test_16_bits_and_transparency_are_turned_too():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    np.testing.assert_array_equal(pixels(encode(values, exif=exif(6)))[..., 0], turned(values // 257, 6))
    np.testing.assert_array_equal(
        pixels(encode(values, "TIFF", tiffinfo={0x0112: 6}))[..., 0], turned(values // 257, 6)
    )
    np.testing.assert_allclose(pixels(encode(strip("RGBA"), exif=exif(6)))[:, 0], ON_WHITE, atol=1)


# Metadata

GARBAGE = {
    "random": bytes(NOISE[0].ravel()),
    "header alone": b"II*\0\x08\0\0\0",
    "far away": b"II*\0\xff\xff\xff\x7f",
    "many entries": b"MM\0*\0\0\0\x08\xff\xff\x01\x0f\0\2\0\0\xff\xff\xff\xff\0\0",
    "text beyond the end": b"II*\0\x08\0\0\0\1\0\x0f\1\2\0\xff\xff\xff\x7f\xff\xff\xff\x7f\0\0\0\0",
    "no such way": exif(77)[6:],
    "empty": b"",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_exif_does_not_matter(kind, garbage):
    options = {"lossless": True} if kind == "WEBP" else {}
    whole = pixels(encode(NOISE, kind, **options))
    np.testing.assert_array_equal(pixels(encode(NOISE, kind, exif=b"Exif\0\0" + garbage, **options)), whole)


def test_garbage_in_exif_of_a_tiff_does_not_matter():
    data = tiff(2, 1, 8, b"\1\2", (0x8769, (4, 150)), (0x0112, (3, 2)))
    assert pixels(data)[0, :, 0].tolist() == [2, 1]
    data = tiff(2, 1, 8, b"\1\2", (0x8769, (4, 2**31)), (0x8825, (4, 8)), (0x0112, (3, 2)))
    assert pixels(data)[0, :, 0].tolist() == [2, 1]


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"tEXt", b"Comment\0wrong checksum", 1),
        chunk(b"eXIf", exif(1), 1),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"zTXt", b"Comment\0\7" + b"unknown compression"),
        chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"iCCP", b"sRGB\0\0garbage"),
        chunk(b"acTL", bytes(8)),
        chunk(b"acTL", b"short"),
        chunk(b"fcTL", bytes(26)),
        chunk(b"pHYs", b""),
        chunk(b"gAMA", b""),
    ],
    ids=lambda broken: f"{broken[4:8].decode()} {len(broken)}",
)
def test_broken_metadata_of_a_png_does_not_matter(broken):
    assert pixels(png(2, 1, 8, 0, [b"\1\2"], broken))[0, :, 0].tolist() == [1, 2]


def test_colour_profile_is_ignored():
    np.testing.assert_array_equal(pixels(encode(NOISE, icc_profile=b"no profile")), NOISE)


# Frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == [0, 0, 255]).all()


def test_first_of_many_pictures_in_a_jpeg():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "red")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(data), np.broadcast_to([0, 0, 255], (16, 16, 3)), atol=2)


# Files that are not whole


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


@pytest.mark.parametrize("data", ENCODED.values(), ids=ENCODED)
def test_cut_short_anywhere_it_is_whole_or_refused(data):
    whole = pixels(data)
    for length in {*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 14, len(data))}:
        cut = attempt(data[:length])
        if cut is not None:
            assert length > 0.8 * len(data), "what is left can't be all of it"
            np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("name", ["jpeg", "png"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path, name, part):
    path = tmp_path / f"cut.{name}"
    path.write_bytes(ENCODED[name][: int(part * len(ENCODED[name]))])
    with pytest.raises(UnreadableImage, match=rf"^data: \S*cut\.{name} can't be read: \w+") as caught:
        read_image(path)
    assert caught.value.name == str(path) and isinstance(caught.value, DataError)


def test_not_an_image():
    for data, reason in [
        (b"", "it is empty"),
        (b"<html>404</html>", r"not an image in a known format \(JPEG, PNG, WebP, GIF, BMP, TIFF, PPM\)"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"\xff\xd8\xff", "."),
    ]:
        with pytest.raises(UnreadableImage, match=rf"^data: leaf 7 can't be read: .*{reason}"):
            read_image(data, name="leaf 7")


def test_extension_does_not_matter(tmp_path):
    for name in ("image.jpg", "image.gif", "image", "image.eps"):
        (tmp_path / name).write_bytes(ENCODED["png"])
        np.testing.assert_array_equal(pixels(tmp_path / name), NOISE)
        np.testing.assert_array_equal(pixels(str(tmp_path / name)), NOISE)


def test_no_program_is_started_for_postscript(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with Image.open(path) as image:
        assert image.format == "EPS"  # which Pillow alone would have made of it
    with pytest.raises(UnreadableImage, match="known format"):
        read_image(path)
    assert not started


@settings(max_examples=150, deadline=None)
@given(head=st.sampled_from([b"", *(data[:n] for data in ENCODED.values() for n in (4, 16, 40))]), rest=st.binary())
def test_whatever_comes_it_is_an_image_or_unreadable(head, rest):
    attempt(head + rest)


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from(list(ENCODED.values())),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_however_it_is_damaged_it_is_an_image_or_unreadable(data, edits):
    damaged = bytearray(data)
    for where, value in edits:
        damaged[int(where**2 * len(data))] = value  # more often near the start
    attempt(bytes(damaged))


# Size


def bombs(width, height):
    """Headers that claim a size, and a little more."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    jpeg = ENCODED["jpeg"]
    size_at = jpeg.index(b"\xff\xc0") + 5
    webp = bytearray(ENCODED["lossless webp"])
    if max(width, height) <= 2**14:
        webp[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        webp[12:30] = b"VP8X\n\0\0\0\0\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = b"!\xf9\4\x08\0\0\0\0," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\x08\0;"
    return {
        "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")),
        "jpeg": jpeg[:size_at] + struct.pack(">HH", height, width) + jpeg[size_at + 4 :],
        "gif": b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame,
        "gif with a large frame": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 128, 0, 0) + bytes(6) + frame,
        "bmp": ENCODED["bmp"][:18] + struct.pack("<II", width, height) + ENCODED["bmp"][26:],
        "ppm": f"P6 {width} {height} 255\n".encode(),
        "tiff": tiff(width, height, 8, b""),
        "tiff of large tiles": tiff(9, 9, 8, b"", (322, (4, width)), (323, (4, height)), (324, (4, 8)), (325, (4, 9))),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("side", [9460, 10_000, 60_000])  # Pillow warns of more than 9459 x 9459, fails over 13377
@pytest.mark.parametrize("kind", bombs(9, 9))
@pytest.mark.parametrize("action", ["error", "always"])
def test_bomb_is_refused_by_its_header_without_a_warning(monkeypatch, kind, side, action):
    data = bombs(side, side)[kind]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS, warnings.filters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        filters = list(warnings.filters)
        with pytest.raises(UnreadableImage, match=r"more than 89478485 pixels|exceeds limit") as raised:
            read_image(data)
        assert warnings.filters == filters
    assert not caught
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == before
    assert kind == "webp" or f"{side} x {side} are" in raised.value.reason


@pytest.mark.parametrize("width", [60_000, 9])
def test_nothing_is_read_that_is_not_needed(tmp_path, width):
    """Of a large file, or of a small one that says it is large."""
    header = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"\x7f\xff\xff\xffIDAT")
    if width > 9:
        os.truncate(path, 2**27)  # without taking room
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage):
            read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_limit():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS  # unless set by the user: see where it is defined
    for data in ENCODED.values():
        assert read_image(data, max_pixels=16 * 24).size == (24, 16)
        with pytest.raises(UnreadableImage, match="24 x 16 are more than 383 pixels"):
            read_image(data, max_pixels=16 * 24 - 1)


def test_a_larger_limit_allows_what_pillow_would_refuse(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("jpeg", "png", "bmp", "ppm"):
        assert read_image(ENCODED[name]).size == (24, 16)


def test_many_threads_leave_warnings_as_they_are():
    large = list(bombs(10_000, 10_000).values()) * 10
    filters = list(warnings.filters)

    def refused(data):
        with pytest.raises(UnreadableImage):
            read_image(data)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, large))
    assert warnings.filters == filters


# Files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(20)
def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, reason in [
        ("pipe.png", "not a regular file"),
        ("link.png", "not a regular file"),
        ("", "not a regular file"),
        ("dangling.png", "No such file"),
        ("nowhere.png", "No such file"),
        ("loop.png", "symbolic links"),
        ("a\0b.png", "null"),
    ]:
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)


def test_a_link_to_an_image_is_read(tmp_path):
    (tmp_path / "image.png").write_bytes(ENCODED["png"])
    (tmp_path / "link.png").symlink_to(tmp_path / "image.png")
    np.testing.assert_array_equal(pixels(tmp_path / "link.png"), NOISE)


@pytest.mark.parametrize("name", ENCODED)
def test_files_are_closed_and_streams_left_open(tmp_path, monkeypatch, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.write_bytes(ENCODED[name])
    cut.write_bytes(ENCODED[name][:-100])
    opened = []

    def remember(path, *args, open_path=Path.open):
        opened.append(open_path(path, *args))
        return opened[-1]

    with whole.open("rb") as stream:
        np.testing.assert_array_equal(pixels(stream), pixels(ENCODED[name]))
        assert not stream.closed
    monkeypatch.setattr(Path, "open", remember)
    np.testing.assert_array_equal(pixels(whole), pixels(ENCODED[name]))
    with pytest.raises(UnreadableImage):
        read_image(cut)
    assert len(opened) == 2 and all(stream.closed for stream in opened)


def test_stream_that_can_not_be_rewound():
    reading, writing = os.pipe()
    os.write(writing, ENCODED["png"])
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        np.testing.assert_array_equal(pixels(stream), NOISE)


# Errors


def test_error_survives_another_process():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "it is empty")))
    assert (error.name, error.reason) == ("a.png", "it is empty")
    assert str(error) == "data: a.png can't be read: it is empty"
    assert str(UnreadableImage("Caught in a worker")) == "Caught in a worker"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "there is not enough memory"),
        (KeyError(5), "KeyError: 5"),
        (OSError(24, "Too many"), "Too many"),
    ],
)
def test_whatever_pillow_raises_is_a_reason(monkeypatch, error, reason):
    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImage) as caught:
        read_image(ENCODED["png"])
    assert caught.value.reason == reason and caught.value.__cause__ is error


def test_an_interrupt_is_not_an_unreadable_image(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(ENCODED["png"])
