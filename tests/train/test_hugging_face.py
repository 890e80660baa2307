"""Data sets that the package datasets saved: which columns and splits are taken, and what is said of bad ones."""

import io
import json
import pickle
import re
import socket
import sys

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from sasa.train.errors import DataError
from sasa.train.hugging_face import HubImages, is_hugging_face, open_hugging_face
from sasa.train.images import UnreadableImage

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True, scope="module")
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(value, **options):
    stream = io.BytesIO()
    Image.new("RGB", (4, 2), (value, 0, 255)).save(stream, "PNG", **options)
    return {"bytes": stream.getvalue(), "path": None}


def split(count=4, start=0, *, label=None, labels=None, column="label", image="image", padding=0, **others):
    """Images whose red is their number, and labels from 0 to 2 in turn."""
    images = [encoded(start + index) for index in range(count)]
    for encoded_image in images:
        encoded_image["bytes"] += bytes(padding)
    labels = [index % 3 for index in range(count)] if labels is None else labels
    types = {image: datasets.Image(), column: label or datasets.ClassLabel(names=NAMES)}
    columns = {image: images, column: labels}
    for name, (kind, values) in others.items():
        types[name], columns[name] = kind, values
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def reds(images):
    return [images.read(index).getpixel((3, 1))[0] for index in range(len(images))]


def test_images_labels_and_names(tmp_path):
    save(tmp_path, train=split(5), validation=split(3, start=50))
    assert is_hugging_face(tmp_path) and not is_hugging_face(tmp_path / "train")
    train, val, classes = open_hugging_face(tmp_path)
    assert classes == NAMES
    assert (len(train), len(val)) == (5, 3)
    assert reds(train) == [0, 1, 2, 3, 4] and reds(val) == [50, 51, 52]
    assert [train.label(index) for index in range(5)] == [0, 1, 2, 0, 1]
    assert type(train.label(0)) is int
    assert train.name(4) == "train/4" and val.name(0) == "validation/0"
    assert train.read(0).mode == "RGB" and train.read(0).size == (4, 2)


def test_images_of_files_are_named_by_them(tmp_path):
    (tmp_path / "leaf.png").write_bytes(encoded(9)["bytes"])
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "leaf.png")], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    save(tmp_path / "saved", train=rows, val=rows)
    (tmp_path / "leaf.png").unlink()  # a saved data set holds the bytes
    train, _, _ = open_hugging_face(tmp_path / "saved")
    assert reds(train) == [9]
    assert re.fullmatch(r"train/0 \(\S*leaf\.png\)", train.name(0))


def test_image_that_is_only_a_path(tmp_path):
    (tmp_path / "leaf.png").write_bytes(encoded(9)["bytes"])
    rows = [{"photo": {"bytes": None, "path": str(tmp_path / name)}} for name in ("leaf.png", "gone.png")]
    images = HubImages(rows, "photo", "train", np.zeros(2, dtype=np.int64))
    assert images.read(0).size == (4, 2)
    with pytest.raises(UnreadableImage, match=r"train/1 \(\S*gone\.png\) can't be read: No such file"):
        images.read(1)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["test", "validation", "valid", "val"], "val"),
        (["test", "validation", "valid"], "valid"),
        (["test", "validation"], "validation"),
        (["unsupervised", "test"], "test"),
    ],
)
def test_split_to_validate_on(tmp_path, there, taken):
    save(tmp_path, train=split(3), **{name: split(1, start=20 + len(name)) for name in there})
    _, val, _ = open_hugging_face(tmp_path)
    assert reds(val) == [20 + len(taken)] and val.name(0) == f"{taken}/0"


def test_split_left_over_from_before_is_not_taken(tmp_path):
    save(tmp_path, train=split(3), validation=split(1, start=40))
    save(tmp_path, train=split(3), test=split(1, start=70))
    assert (tmp_path / "validation").is_dir()
    assert reds(open_hugging_face(tmp_path)[1]) == [70]


def test_a_column_may_have_another_name_if_it_is_the_only_one(tmp_path):
    rows = split(3, image="photo", column="species", text=(datasets.Value("string"), ["a", "b", "c"]))
    save(tmp_path, train=rows, val=rows)
    train, _, classes = open_hugging_face(tmp_path)
    assert reds(train) == [0, 1, 2] and classes == NAMES


@pytest.mark.parametrize("name", ["image", "img"])
def test_one_of_many_columns_of_images(tmp_path, name):
    rows = split(2, image=name, start=30, mask=(datasets.Image(), [encoded(200)] * 2))
    save(tmp_path, train=rows, val=rows)
    assert reds(open_hugging_face(tmp_path)[0]) == [30, 31]


def test_fine_labels_rather_than_coarse_ones(tmp_path):
    coarse = datasets.ClassLabel(names=["animal", "plant"]), [1, 1, 1]
    rows = split(3, column="fine_label", coarse_label=coarse)
    save(tmp_path, train=rows, val=rows)
    train, _, classes = open_hugging_face(tmp_path)
    assert classes == NAMES and train.label(2) == 2


def test_class_names_rather_than_other_labels(tmp_path):
    rows = split(3, column="species").add_column("label", ["x", "y", "z"])
    save(tmp_path, train=rows, val=rows)
    assert open_hugging_face(tmp_path)[2] == NAMES


def test_format_that_was_saved_is_undone(tmp_path):
    rows = split(3).with_format("torch", columns=["label"])
    save(tmp_path, train=rows, val=rows)
    train, _, _ = open_hugging_face(tmp_path)
    assert reds(train) == [0, 1, 2]


def test_images_are_read_as_everywhere(tmp_path):
    """Upright, for one; and encoded until then, whatever other columns hold."""
    turned = encoded(1, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
    rows = split(1, image="photo", img=(datasets.Image(), [turned]), broken=(datasets.Image(), [{"bytes": b"no"}]))
    save(tmp_path, train=rows, val=rows)
    assert open_hugging_face(tmp_path)[0].read(0).size == (2, 4)


def test_pickled_without_its_images(tmp_path):
    rows = split(40, padding=10_000)
    save(tmp_path, train=rows, val=rows)
    train = open_hugging_face(tmp_path)[0]
    data = pickle.dumps(train)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert reds(again) == list(range(40)) and again.label(5) == 2 and again.name(5) == "train/5"


def test_other_columns_are_not_read(tmp_path):
    rows = split(1, views=(datasets.List(datasets.Image()), [[{"bytes": b"no image"}]]))
    with pytest.raises(UnidentifiedImageError):
        rows[0]
    save(tmp_path, train=rows, val=rows)
    assert reds(open_hugging_face(tmp_path)[0]) == [0]


def test_unreadable_images_are_named_when_read(tmp_path):
    rows = split(1, image="photo", image2=(datasets.Image(), [None])).remove_columns("photo")
    save(tmp_path, train=rows, val=split(1, image="photo", img=(datasets.Image(), [{"bytes": b"", "path": "a.png"}])))
    train, val, _ = open_hugging_face(tmp_path)
    assert train.label(0) == 0
    with pytest.raises(UnreadableImage, match=r"^data: train/0 can't be read: there is no image"):
        train.read(0)
    with pytest.raises(UnreadableImage, match=r"^data: val/0 \(a\.png\) can't be read: it is empty"):
        val.read(0)


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    save(tmp_path, train=split(2), val=split(1))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    assert reds(open_hugging_face(tmp_path)[0]) == [0, 1]


# What can't be used


def refused(folder, match):
    with pytest.raises(DataError, match=match) as caught:
        open_hugging_face(folder)
    assert str(caught.value).startswith("data: ") and str(folder) in str(caught.value)


def test_splits_missing(tmp_path):
    save(tmp_path / "a", test=split(1))
    refused(tmp_path / "a", r"expected a split train in \S+, got test$")
    save(tmp_path / "b", train=split(1), extra=split(1))
    refused(tmp_path / "b", r"expected a split val or valid or validation or test in \S+, got train, extra$")
    save(tmp_path / "c", train=split(1), val=split(0))
    refused(tmp_path / "c", r"expected \S+val as .* writes it, got ValueError\('no images'\)")


def test_columns_missing(tmp_path):
    rows = split(2)
    save(tmp_path / "a", train=rows.remove_columns("image"), val=rows)
    refused(
        tmp_path / "a", r"column of type Image, of several one called image or img, in \S+, got label \(ClassLabel\)"
    )
    save(tmp_path / "b", train=rows.remove_columns("label"), val=rows)
    refused(tmp_path / "b", r"column of type ClassLabel, of several one called label or .*, got image \(Image\)")
    save(tmp_path / "c", train=rows, val=rows.remove_columns("label"))
    refused(tmp_path / "c", r"expected the same classes in column label of train and val")
    save(tmp_path / "d", train=split(1, image="a", b=(datasets.Image(), [None])), val=rows)
    refused(
        tmp_path / "d",
        r"of several one called image or img, in \S+, got a \(Image\), label \(ClassLabel\), b \(Image\)",
    )
    save(tmp_path / "e", train=split(1, column="a", b=(datasets.ClassLabel(names=NAMES), [0])), val=rows)
    refused(
        tmp_path / "e", r"of several one called label or .* got image \(Image\), a \(ClassLabel\), b \(ClassLabel\)"
    )


def test_labels_that_are_no_classes_become_some(tmp_path):
    rows = split(3, label=datasets.Value("string"), labels=["dog", "ant", "dog"])
    save(tmp_path / "text", train=rows, val=rows)
    refused(tmp_path / "text", r"column of type ClassLabel, .* got image \(Image\), label \(Value\)")
    encoded_rows = rows.class_encode_column("label")
    save(tmp_path / "classes", train=encoded_rows, val=encoded_rows)
    train, _, classes = open_hugging_face(tmp_path / "classes")
    assert classes == ["ant", "dog"] and [train.label(index) for index in range(3)] == [1, 0, 1]


def test_classes_of_the_splits_differ(tmp_path):
    save(tmp_path / "a", train=split(2), val=split(2, label=datasets.ClassLabel(names=NAMES[::-1])))
    refused(tmp_path / "a", "expected the same classes in column label of train and val")
    save(tmp_path / "b", train=split(2), val=split(2, label=datasets.Value("int64")))
    refused(tmp_path / "b", "expected the same classes in column label of train and val")


@pytest.mark.parametrize(
    ("train", "val", "match"),
    [
        ([0, -1, 2], [0], r"expected one of 3 classes for every image in \S+train, got -1 for image 1 \(1 of 3"),
        ([0, 1, None, None], [0], r"in \S+train, got None for image 2 \(2 of 4 labels are no class\)"),
        ([0], [None], r"in \S+val, got None for image 0"),
    ],
)
def test_labels_missing_or_of_no_class(tmp_path, train, val, match):
    save(tmp_path, train=split(len(train), labels=train), val=split(len(val), labels=val))
    refused(tmp_path, match)


def test_label_beyond_the_classes(tmp_path):
    """Which datasets itself never saves: the names were shortened afterwards."""
    save(tmp_path, train=split(3), val=split(3))
    for name in ("train", "val"):
        path = tmp_path / name / "dataset_info.json"
        info = json.loads(path.read_text())
        info["features"]["label"]["names"] = NAMES[:2]
        path.write_text(json.dumps(info))
    refused(tmp_path, r"expected one of 2 classes for every image in \S+train, got 2 for image 2")


def break_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def wrong_offset(path):
    """Of the first image: far beyond the end of the file, which would end the process."""
    data = path.read_bytes()
    first = len(encoded(0)["bytes"])
    offsets = np.cumsum([0, first, first, first], dtype=np.int32).tobytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:4] + (2**30).to_bytes(4, "little") + offsets[8:]))


@pytest.mark.parametrize(
    "damage", [break_off, wrong_offset, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_broken_arrow_file(tmp_path, damage):
    rows = datasets.Dataset.from_dict(
        {"image": [encoded(0)] * 3, "label": [0] * 3},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    save(tmp_path, train=rows, val=split(1))
    damage(next((tmp_path / "train").glob("*.arrow")))
    refused(tmp_path, r"expected \S+train as DatasetDict.save_to_disk writes it, got \w+\(")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"splits": 3}', "\xff"])
def test_broken_list_of_splits(tmp_path, text):
    (tmp_path / "dataset_dict.json").write_text(text, "latin-1")
    refused(tmp_path, r"expected a list of splits in \S+dataset_dict.json, got \w+\(")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_split_without_its_description(tmp_path, name):
    save(tmp_path, train=split(1), val=split(1))
    (tmp_path / "train" / name).unlink()
    refused(tmp_path, "expected .*train as DatasetDict")


def test_package_missing(tmp_path, monkeypatch):
    save(tmp_path, train=split(1), val=split(1))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets, which is not installed: pip install 'sasa-torch\[data\]'"):
        open_hugging_face(tmp_path)
