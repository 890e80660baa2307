"""Images that are damaged, enormous or no images: what is said of them, and what is left behind."""

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
from image_bytes import ENCODED, NOISE, attempt, chunk, pixels, tiff
from PIL import EpsImagePlugin, Image, ImageFile

from sasa.train import images
from sasa.train.errors import DataError
from sasa.train.images import UnreadableImage, read_image

# Files that are not whole


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
        (b"<html>404</html>", r"not an image in a known format \(JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM\)"),
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


@pytest.mark.parametrize("side", [9460, 60_000])  # Pillow warns of more than 9459 x 9459, fails over 13377
@pytest.mark.parametrize("kind", bombs(9, 9))
@pytest.mark.parametrize("action", ["error", "always"])
def test_bomb_is_refused_by_its_header_without_a_warning(monkeypatch, kind, side, action):
    data = bombs(side, side)[kind]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS, warnings.filters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        filters = list(warnings.filters)
        with pytest.raises(UnreadableImage, match=r"more than 89478485 pixels|exceeds limit"):
            read_image(data)
        assert warnings.filters == filters
    assert not caught
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == before


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


def test_limit(monkeypatch):
    for limit in (16 * 24, 16 * 24 - 1):
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        for data in ENCODED.values():
            if limit == 16 * 24:
                assert read_image(data).size == (24, 16)
                continue
            with pytest.raises(UnreadableImage, match="24 x 16 are more than 383 pixels"):
                read_image(data)


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
def test_files_are_closed(tmp_path, monkeypatch, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.write_bytes(ENCODED[name])
    cut.write_bytes(ENCODED[name][:-100])
    opened = []

    def remember(path, *args, open_path=Path.open):
        opened.append(open_path(path, *args))
        return opened[-1]

    monkeypatch.setattr(Path, "open", remember)
    np.testing.assert_array_equal(pixels(whole), pixels(ENCODED[name]))
    with pytest.raises(UnreadableImage):
        read_image(cut)
    assert len(opened) == 2 and all(stream.closed for stream in opened)


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
