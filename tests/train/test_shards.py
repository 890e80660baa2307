"""WebDataset shards: what is in them, and who takes what in which order."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from processes import Running, assert_equal_bits, recipe, together, weights

from sasa.train import DataError, checkpoints, train
from sasa.train.batch import IGNORED
from sasa.train.data import ImageData
from sasa.train.images import UnreadableImage
from sasa.train.sources import open_source


def picture(label, size=12):
    """A JPEG whose brightness tells its class."""
    pixels = np.random.default_rng(label).integers(0, 60, (size, size, 3)) + 60 * label
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_shards(folder, train=(7, 7, 6, 8), val=(5, 4), bad=()):
    """Shards as the library itself writes them; ``bad`` images are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for part, sizes in (("train", train), ("val", val)):
        for shard, size in enumerate(sizes):
            with webdataset.TarWriter(str(folder / f"{part}-{shard:04d}.tar")) as writer:
                for _ in range(size):
                    image = b"no image" if count in bad else picture(count % 3)
                    writer.write({"__key__": f"{count:05d}", "jpg": image, "cls": str(count % 3).encode()})
                    count += 1
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def batches(folder, **changes):
    return ImageData(open_source(folder), recipe(folder, **({"batch_size": 4} | changes)))


def test_shards_are_counted_and_their_labels_found(shards):
    source = open_source(shards)
    assert (len(source.train), len(source.val), source.classes) == (28, 9, ["0", "1", "2"])
    (shards / "classes.txt").write_text("cat\ndog\nowl\n")
    assert open_source(shards).classes == ["cat", "dog", "owl"]
    (shards / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"data: expected labels below 2, the lines of .*classes.txt; found 2"):
        open_source(shards)


def test_folders_of_shards_and_what_is_missing(tmp_path):
    write_shards(tmp_path / "flat")
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for path in (tmp_path / "flat").glob(f"{part}-*.tar"):
            path.rename(tmp_path / part / path.name)
    assert len(open_source(tmp_path).train) == 28
    for path in (tmp_path / "val").glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"data: expected validation shards \(val\*.tar, .* in"):
        open_source(tmp_path)


def test_images_and_labels_are_read_from_their_places(shards):
    source = open_source(shards)
    for images, first in ((source.train, 0), (source.val, 28)):
        for index in range(len(images)):
            number = index + first
            assert images.name(index).endswith(f".tar/{number:05d}") and images.label(index) == number % 3
            expected = Image.open(io.BytesIO(picture(number % 3)))
            assert np.array_equal(np.asarray(images.read(index)), np.asarray(expected))
    (shards / "train-0000.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"train-0000.tar/00002 can't be read: No such file"):
        source.train.read(2)


def test_an_unreadable_image_gives_way_to_the_next_and_is_told(tmp_path):
    folder = write_shards(tmp_path / "shards", bad=(3, 4, 30))
    for workers in (0, 2):
        found = list(batches(folder, workers=workers).train_dataloader())
        assert sum(bool(reason) for batch in found for reason in batch.unreadable) == 2
        assert all(IGNORED not in batch.labels for batch in found)
        val = list(batches(folder, workers=workers).val_dataloader())
        assert [int(label) for batch in val for label in batch.labels].count(IGNORED) == 1 + 3
    with pytest.raises(UnreadableImage, match=r"0000[34]"):
        list(batches(folder, strict=True).train_dataloader())


def test_a_cut_shard_is_read_as_far_as_it_goes(shards):
    path = shards / "train-0001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[-2]
    path.write_bytes(path.read_bytes()[: member.offset_data + 10])
    with pytest.warns(
        UserWarning, match=r"1 left out of \S+train-0001.tar, which has [56] images: the rest of it: unex"
    ):
        source = open_source(shards)
    assert source.skipped == 1 and 26 <= len(source.train) <= 27
    with pytest.raises(DataError, match=r"data: 1 left out of \S+train-0001.tar"):
        open_source(shards, strict=True)
    with pytest.warns(UserWarning, match="the rest of it"):
        found = list(batches(shards).train_dataloader())
    assert len(found) == 6 and not any(reason for batch in found for reason in batch.unreadable)


def tar(path, *members, compressed=False):
    """A shard of (name, content); without content, a link to the first member."""
    with tarfile.open(path, "w:gz" if compressed else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.LNKTYPE, members[0][0]
            info.size = len(content or b"")
            file.addfile(info, io.BytesIO(content or b""))


def sample(key, label=0):
    return (f"{key}.jpg", picture(0)), (f"{key}.cls", str(label).encode())


def replace(path, **options):
    with tarfile.open(path) as file:
        members = [(m.name, file.extractfile(m).read()) for m in file]
    tar(path, *members, **options)


def cut_in_a_header(path):
    with tarfile.open(path) as file:
        member = file.getmembers()[8]
    path.write_bytes(path.read_bytes()[: member.offset + 100])


ODD = {
    "gzip": (lambda path: replace(path, compressed=True), 0, "it is compressed"),
    "keys with dots": (lambda path: tar(path, *sample("a"), *sample("IMG_2024.01.0"), *sample("b")), 2, r"01.0.jpg"),
    "parts of a sample": (lambda path: tar(path, *sample("a"), ("a.seg.png", b""), *sample("b")), 2, None),
    "repeated key": (lambda path: tar(path, *sample("a"), *sample("b"), *sample("a")), 2, r"1 left out .*: a\.jpg"),
    "repeated file": (lambda path: tar(path, *sample("a"), *sample("a")[:1]), 1, r"1 left out .*: a\.jpg"),
    "no image": (lambda path: tar(path, *sample("a"), ("b.heic", b""), ("b.cls", b"1")), 1, r"1 left out .*: b\.cls"),
    "a link": (lambda path: tar(path, *sample("a"), ("b.jpg", None), ("b.cls", b"1")), 1, r"1 left out .*: b\.jpg"),
    "hidden": (lambda path: tar(path, *sample("a"), *sample("._b"), *sample("__MACOSX/c")), 1, None),
    "cut in a header": (cut_in_a_header, 3, "without the mark of an end"),
    "cut at a header": (lambda p: p.write_bytes(p.read_bytes().rstrip(b"\0")[:1024]), 0, "the rest of it: "),
    "two in one": (lambda path: path.write_bytes(path.read_bytes() * 2), 6, "more follows its end"),
    "no label": (lambda path: tar(path, *sample("a"), *sample("b")[:1]), 1, r"1 left out .*: b\.jpg"),
    "other labels": (lambda p: tar(p, *sample("a", -1), *sample("b", 2**63), *sample("c")), 1, r"a\.jpg .*, b\.jpg"),
    "named pipe": (lambda path: (path.unlink(), os.mkfifo(path)), 0, "it is not a regular file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), 0, "the rest of it: it is not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), 0, "the rest of it: empty file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("odd", ODD)
def test_counting_is_reading_and_what_is_not_read_is_named(shards, odd):
    make, count, reason = ODD[odd]
    make(shards / "train-0000.tar")
    if reason is None:
        source = open_source(shards, strict=True)
    else:
        with pytest.warns(UserWarning, match=rf"left out of \S+train-0000.tar.*{reason.removeprefix('1 left out .*')}"):
            source = open_source(shards)
        with pytest.raises(DataError, match=r"left out of \S+train-0000.tar"):
            open_source(shards, strict=True)
    assert (source.skipped > 0) == (reason is not None)
    assert len(source.train) - 21 == count
    assert all(source.train.read(index).size == (12, 12) for index in range(len(source.train)))
    assert len({source.train.name(index) for index in range(len(source.train))}) == len(source.train)


def test_training_on_shards_goes_on_to_the_same_bits_and_on_two_processes(shards, tmp_path):
    options = recipe(shards, batch_size=4, workers=2, checkpoint_steps=2, epochs=2)
    Running(tmp_path / "log", train, options, tmp_path / "whole").succeed()
    Running(tmp_path / "log", train, options, tmp_path / "run").succeed()
    assert_equal_bits(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for path in checkpoints.checkpoints(tmp_path / "run")[:2]:  # as if it had been killed before those
        path.unlink()
    Running(tmp_path / "log", train, options, tmp_path / "run", resume="auto").succeed()
    assert_equal_bits(tmp_path / "whole", tmp_path / "run")
    few = recipe(shards, batch_size=4, epochs=1)
    for running in together(tmp_path / "log", 2, train, few, tmp_path / "two"):
        running.succeed()
    assert weights(tmp_path / "two")
