"""What becomes of each odd kind of image, pixel by pixel."""

import io
import struct

import numpy as np
import pytest
from image_bytes import NOISE, chunk, encode, exif, pixels, png, tiff
from PIL import Image

from sasa.train.images import UnreadableImage, read_image

RED_HIDDEN = [(255, 0, 0, 0), (0, 0, 255, 255), (0, 200, 0, 128)]  # transparent, opaque, half
ON_WHITE = [[255, 255, 255], [0, 0, 255], [127, 227, 127]]


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


def test_one_transparent_colour():
    data = png(2, 1, 8, 2, [bytes([200, 0, 0, 0, 0, 200])], chunk(b"tRNS", struct.pack(">3H", 200, 0, 0)))
    assert pixels(data)[0].tolist() == [[255, 255, 255], [0, 0, 200]]
    data = png(2, 1, 8, 0, [bytes([100, 101])], chunk(b"tRNS", struct.pack(">H", 100)))
    assert pixels(data)[0, :, 2].tolist() == [255, 101]


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


def test_16_bits_of_colour():
    row = struct.pack(">4H", 65535, 32896, 0, 65535)
    assert pixels(png(1, 1, 16, 6, [row]))[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    "data",
    [
        encode(np.ones((2, 2), np.int32), "TIFF"),
        encode(np.ones((2, 2), np.float32), "TIFF"),
        tiff(1, 1, 16, b"\0\0", (339, (3, 2))),
        tiff(4, 1, 12, bytes(6)),
        tiff(1, 1, 16, b"\0\0", photometric=0),
        b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5),
    ],
    ids=["int32", "float32", "signed", "12 bits", "white is 0", "float map"],
)
def test_no_range_is_made_up(data):
    with pytest.raises(UnreadableImage, match="no range is known for grey of other than 8 or 16 bits"):
        read_image(data)


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
