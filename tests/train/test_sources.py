"""Images from the package, from IDX files and from folders, and what is said of bad ones."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from image_files import write_idx, write_images

from sasa.train.data import ImageData
from sasa.train.errors import DataError
from sasa.train.recipe import Recipe
from sasa.train.sources import open_source
from sasa.train.walk import walk


def labels_of(images):
    return sorted(images.label(i) for i in range(len(images)))


def test_packaged_images_are_balanced():
    source = open_source(None)
    train, val = source.train, source.val
    assert (len(train), len(val)) == (2000, 500)
    assert np.bincount(labels_of(train)).tolist() == [200] * 10
    assert np.bincount(labels_of(val)).tolist() == [50] * 10
    assert source.classes[0] == "T-shirt/top" and source.classes[9] == "Ankle boot"
    assert train.read(0).shape == (1, 28, 28)


def test_no_packaged_validation_image_is_trained_on():
    source = open_source(None)
    train, val = source.train, source.val
    trained = {train.read(i).numpy().tobytes() for i in range(2000)}
    assert not any(val.read(i).numpy().tobytes() in trained for i in range(500))


def test_batches_are_normalised_and_augmented_only_in_training():
    data = ImageData(open_source(None), Recipe(batch_size=500, channels_last=False))
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch.images.shape == (500, 1, 28, 28) and batch.labels.shape == (500,)
    assert abs(batch.images.mean().item()) < 0.1 and abs(batch.images.std().item() - 1) < 0.1
    assert torch.equal(data.val_set[0].image, data.val_set[0].image)
    draws = [data.train_set[(epoch, 0)].image for epoch in range(8)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(draws[3], data.train_set[(3, 0)].image)  # the epoch says what is drawn
    plain = ImageData(open_source(None), Recipe(augment="none"))
    assert torch.equal(plain.train_set[(0, 0)].image, plain.train_set[(1, 0)].image)


def test_idx_files(idx_folder):
    source = open_source(idx_folder)
    assert (len(source.train), len(source.val)) == (12, 6)
    assert source.classes == ["0", "1", "2"] and source.channels == 1
    assert labels_of(source.val) == [0, 0, 1, 1, 2, 2]


def test_idx_file_missing(idx_folder):
    next(idx_folder.glob("t10k-labels*")).unlink()
    with pytest.raises(DataError, match=r"data: expected t10k-labels-idx1-ubyte \(or .*gz\) beside the other"):
        open_source(idx_folder)


def test_idx_file_cut_short(idx_folder):
    path = next(idx_folder.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\S* is not a complete IDX file"):
        open_source(idx_folder)


def test_images_of_one_grey_are_refused(tmp_path):
    """Their deviation is 0: what is divided by it would be no number."""
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.zeros(4, 28, 28, dtype=torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.arange(4, dtype=torch.uint8) % 2)
    with pytest.raises(DataError, match="training images that are not all of one grey"):
        open_source(tmp_path)


def test_idx_counts_differ(tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.zeros(4, 28, 28, dtype=torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(DataError, match="expected as many train images as labels, got 4 and 3"):
        open_source(tmp_path)


def test_one_folder_a_class_is_split_the_same_way_every_time(tmp_path):
    write_images(tmp_path, each=10)
    first, second = open_source(tmp_path), open_source(tmp_path)
    assert first.classes == ["cat", "dog"] and first.channels == 3
    assert labels_of(first.train) == [0] * 8 + [1] * 8
    assert labels_of(first.val) == [0, 0, 1, 1]
    assert first.val == second.val


@pytest.mark.parametrize("name", ["val", "test", "valid", "validation"])
def test_train_and_validation_folders(tmp_path, name):
    write_images(tmp_path / "train", each=3)
    write_images(tmp_path / name, each=2)
    source = open_source(tmp_path)
    assert (len(source.train), len(source.val)) == (6, 4)


def test_folder_images_become_rgb_squares(tmp_path):
    from PIL import Image

    write_images(tmp_path / "train")
    write_images(tmp_path / "val")
    Image.new("L", (40, 9)).save(tmp_path / "val" / "cat" / "0.png")
    Image.new("RGBA", (9, 40)).save(tmp_path / "val" / "cat" / "1.png")
    for augment in ("none", "shift", "imagenet"):
        data = ImageData(open_source(tmp_path), Recipe(image_size=16, augment=augment))
        for images in (data.train_set, data.val_set):
            assert {tuple(images[i].image.shape) for i in range(len(images))} == {(3, 16, 16)}
            assert {images[i].image.dtype for i in range(len(images))} == {torch.uint8}


def test_a_hugging_face_dataset_becomes_batches(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    write_images(tmp_path / "images")
    rows = {"image": [str(path) for path in sorted(tmp_path.glob("images/*/*.png"))], "label": [0] * 5 + [1] * 5}
    parts = {part: datasets.Dataset.from_dict(rows, features=features) for part in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_proc=None)
    source = open_source(tmp_path / "saved")
    assert source.classes == ["cat", "dog"] and len(source.train) == 10
    for workers in (0, 1):
        data = ImageData(source, Recipe(image_size=16, batch_size=5, workers=workers))
        (batch, _) = list(data.train_dataloader())
        assert batch.images.shape == (5, 3, 16, 16) and set(batch.labels.tolist()) <= {0, 1}


def test_label_folder_missing_from_validation(tmp_path):
    write_images(tmp_path / "train", classes=("cat", "dog", "owl"))
    write_images(tmp_path / "val", classes=("cat", "dog", "emu"))
    with pytest.raises(DataError, match="missing from val: owl, only in val: emu"):
        open_source(tmp_path)


def test_validation_folder_missing(tmp_path):
    write_images(tmp_path / "train")
    with pytest.raises(DataError, match=r"data: expected a folder val beside .*train"):
        open_source(tmp_path)


def test_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"expected one folder of images a class in .*, found no folders"):
        open_source(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"data: no images below .*looked for \.jpg"):
        open_source(tmp_path)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data: expected a folder, got .*nowhere"):
        open_source(tmp_path / "nowhere")


def test_empty_class_folder_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "owl").mkdir()
    with pytest.raises(DataError, match=r"data: no readable images in .*owl"):
        open_source(tmp_path)


def test_class_of_one_image_can_not_be_split(tmp_path):
    write_images(tmp_path)
    write_images(tmp_path, classes=("owl",), each=1)
    with pytest.raises(DataError, match=r"two images or more a class.*\['owl'\]"):
        open_source(tmp_path)


def test_unreadable_image_is_named_skipped_and_counted(tmp_path):
    write_images(tmp_path)
    whole = (tmp_path / "cat" / "3.png").read_bytes()
    (tmp_path / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"skipped an image that can't be read: .*(cat.3|dog.4)\.png \(\w+") as caught:
        source = open_source(tmp_path)
    assert len(caught) == 2
    assert source.skipped == 2
    assert len(source.train) + len(source.val) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_of(source.train) == [0, 0, 0, 1, 1, 1]


def test_strict_refuses_unreadable_images(tmp_path):
    write_images(tmp_path)
    (tmp_path / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"data: 1 of 10 images can't be read: .*dog.4\.png \(it is not"):
        open_source(tmp_path, strict=True)


SYSTEM = (".ipynb_checkpoints", ".Trash", "__MACOSX", "@eaDir", "lost+found", ".hidden")


@pytest.mark.parametrize("split", [True, False])
def test_hidden_and_system_files_are_skipped_and_real_folders_are_read_once(tmp_path, split):
    """By training and by prediction: of links that run in a circle, into the folder and out of it."""
    for part in ("train", "val") if split else ("",):
        folder = tmp_path / "data" / part
        write_images(folder)
        write_images(tmp_path / f"elsewhere{part}", classes=("owl", "far"), each=2)
        shutil.move(tmp_path / f"elsewhere{part}" / "far", tmp_path / f"far{part}")
        (folder / "owl").symlink_to(tmp_path / f"elsewhere{part}" / "owl")
        (folder / "dog" / "deeper").symlink_to(tmp_path / f"far{part}")
        (folder / "dog" / "same").symlink_to(tmp_path / f"far{part}")
        for link, target in (("loop", "."), ("cat/up", ".."), ("dog/self", "self")):
            (folder / link).symlink_to(target)
        for name in SYSTEM:
            for place in (folder, folder / "cat"):
                (place / name).mkdir()
                shutil.copy(folder / "cat" / "0.png", place / name / "0.png")
        for name in (".x.png", "._0.png"):
            (folder / "cat" / name).write_bytes(b"not an image")
    source = open_source(tmp_path / "data", strict=True)
    assert source.classes == ["cat", "dog", "owl"]
    each = np.bincount(labels_of(source.train)) + (0 if split else np.bincount(labels_of(source.val)))
    assert each.tolist() == [5, 7, 2]
    paths = {source.train.name(i) for i in range(len(source.train))}
    paths |= {source.val.name(i) for i in range(len(source.val))}
    assert {str(tmp_path / "data" / path) for path in walk(tmp_path / "data")} == paths


def test_a_class_that_is_a_link_to_another_is_refused(tmp_path):
    write_images(tmp_path)
    (tmp_path / "kitty").symlink_to("cat")
    with pytest.raises(DataError, match=r"no readable images in \S+kitty"):
        open_source(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "cat").chmod(0)
    with pytest.raises(DataError, match=r"data: \S+cat can't be read: Permission denied"):
        open_source(tmp_path)


def test_class_left_without_a_readable_image_is_named(tmp_path):
    write_images(tmp_path, each=2)
    for path in (tmp_path / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError, match=r"no readable images in .*dog"):
        open_source(tmp_path)
