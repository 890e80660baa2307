"""Annotations of COCO and Pascal VOC: the sound are read exactly; the rest is named, counted, left out or refused."""

import copy
import json
import math
import warnings

import pytest
import torch
from boxed import CATEGORIES, image_with_boxes, voc_object

from sasa.detection import open_boxes, problems, read_coco, voc_to_coco
from sasa.train import DataError
from sasa.train.images import UnreadableImage


@pytest.fixture
def instances(coco_folder):
    """The training part's annotations, to be changed, and the folder of its images."""
    return json.loads((coco_folder / "annotations" / "instances_train2017.json").read_text())


@pytest.fixture
def read(tmp_path, coco_folder):
    """Reads changed annotations; returns them with the warnings."""

    def read(found, **options):
        file = tmp_path / "instances.json"
        file.write_text(found if isinstance(found, str) else json.dumps(found))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            annotations = read_coco(file, coco_folder / "train2017", **options)
        return annotations, [str(one.message) for one in warned]

    return read


def test_coco_is_read_as_it_is_written(coco_folder, instances):
    source = open_boxes(coco_folder, strict=True)
    assert (source.classes, source.category_ids) == (["dark", "light"], [3, 7])
    assert (len(source.train), len(source.val), source.skipped) == (16, 7, 0)
    for place, listed in enumerate(instances["images"]):
        own = [one for one in instances["annotations"] if one["image_id"] == listed["id"]]
        target = source.train.label(place)
        corners = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in own)]
        assert target["boxes"].tolist() == corners
        assert target["labels"].tolist() == [list(CATEGORIES).index(one["category_id"]) for one in own]
        assert target["area"].tolist() == [one["area"] for one in own]
        assert source.train.read(place).size == (listed["width"], listed["height"])


def test_voc_is_coco(voc_folder):
    source = open_boxes(voc_folder, strict=True)
    generator = torch.Generator().manual_seed(0)
    for part, places in ((source.train, range(4)), (source.val, range(2))):
        for place in places:
            _, found = image_with_boxes(generator)
            target = part.label(place)
            assert target["boxes"].tolist() == [[x, y, x + side, y + side] for x, y, side, _ in found]
            assert [source.classes[label] for label in target["labels"]] == [CATEGORIES[c] for *_, c in found]
    voc_to_coco(voc_folder, "val", source.classes, voc_folder / "val.json")
    again = read_coco(voc_folder / "val.json", voc_folder / "JPEGImages", strict=True)
    assert again.images == source.val.images


BOXES = [
    ([30, 30, 50, 50], problems.CLIPPED, 1),
    ([-5, -5, 10, 10], problems.CLIPPED, 1),
    ([500, 3, 5, 5], problems.OUTSIDE, 0),
    ([-10, 3, 5, 5], problems.OUTSIDE, 0),
    ([3, 3, 0, 5], problems.EMPTY, 0),
    ([20, 20, -5, 5], problems.SWAPPED, 0),
    ([math.nan, 3, 5, 5], problems.NOT_FINITE, 0),
    ([3, 3, math.inf, 5], problems.NOT_FINITE, 0),
    ([3, 3, 5, 1e308], problems.NOT_FINITE, 0),
]


@pytest.mark.parametrize(("bbox", "kind", "kept"), BOXES)
def test_a_bad_box_is_named_counted_and_clipped_or_left_out(instances, read, bbox, kind, kept):
    instances["annotations"][4]["bbox"] = bbox
    annotations, warned = read(instances)
    assert annotations.problems.counts[kind] == 1
    assert len(warned) == 1 and f"1 {kind}" in warned[0] and "annotation 5: bbox" in warned[0]
    boxes = [box for image in annotations.images for box in image.boxes]
    assert len(boxes) == 29 + kept
    for image in annotations.images:
        for left, top, right, bottom in (box.corners for box in image.boxes):
            assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
    with pytest.raises(DataError, match=rf"expected sound annotations, got 1 {kind[:20]}"):
        read(instances, strict=True)


def test_boxes_of_unknown_categories_and_images_are_counted(instances, read):
    instances["annotations"][0]["category_id"] = 4
    instances["annotations"][1]["image_id"] = 9
    annotations, warned = read(instances)
    assert annotations.problems.counts == {problems.NO_CATEGORY: 1, problems.NO_IMAGE: 1, problems.NO_BOXES: 2}
    assert "annotation 1: category 4" in warned[0] and "annotation 2: image 9" in warned[1]


def test_categories_are_those_of_the_training_part(instances, read):
    instances["categories"].append({"id": 1, "name": "new"})
    instances["annotations"][0]["category_id"] = 1
    annotations, _ = read(instances, categories=CATEGORIES)
    assert annotations.categories == CATEGORIES
    assert annotations.problems.counts[problems.NO_CATEGORY] == 1


def test_images_without_a_file_are_left_out_and_those_without_boxes_kept(instances, read):
    instances["images"][0]["file_name"] = "gone.png"
    annotations, warned = read(instances)
    assert annotations.problems.counts == {problems.NO_FILE: 1, problems.NO_BOXES: 1}
    assert len(warned) == 1 and "gone.png" in warned[0]
    assert len(annotations.images) == 15 and any(not image.boxes for image in annotations.images)
    for image in instances["images"]:
        image["file_name"] = f"gone-{image['id']}.png"
    with pytest.raises(DataError, match=r"found none of the 16 listed"):
        read(instances)


def cut(found):
    text = json.dumps(found)
    return text[: len(text) // 2]


def changed(section, place, **fields):
    def change(found):
        found[section][place] |= fields
        return found

    return change


def without(section):
    return lambda found: {name: value for name, value in found.items() if name != section}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"can't be read: it is cut short or damaged"),
        (lambda found: "", r"cut short or damaged"),
        (lambda found: "[" * 100_000, r"cut short or damaged"),
        (lambda found: json.dumps(found["images"]), r"expected a mapping of COCO's format, got \["),
        (without("images"), r"images: expected a list, got None"),
        (without("annotations"), r"annotations: expected a list, got None"),
        (without("categories"), r"categories: expected a list, got None"),
        (lambda found: found | {"categories": [], "annotations": []}, r"categories: expected one or more"),
        (lambda found: found | {"annotations": [5]}, r"annotations\[0\]: expected a mapping, got 5"),
        (changed("annotations", 2, bbox=[1, 2, 3]), r"annotations\[2\].bbox: expected four numbers, got \[1, 2, 3\]"),
        (changed("annotations", 2, bbox=[1, 2, 3, True]), r"annotations\[2\].bbox: expected four numbers"),
        (changed("annotations", 2, image_id="100"), r"annotations\[2\].image_id: expected a whole number, got '100'"),
        (changed("images", 1, width=0), r"images\[1\].width: expected pixels, got 0"),
        (changed("images", 1, file_name="../../passwd"), r"file_name: expected a path inside"),
        (changed("images", 1, file_name="/etc/passwd"), r"file_name: expected a path inside"),
        (changed("images", 1, id=100), r"images: expected different ids, got 1 more than once: 100"),
        (changed("images", 1, file_name="000000000100.png"), r"images: expected different file names"),
        (changed("annotations", 1, id=1), r"annotations: expected different ids, got 1 more than once: 1"),
        (changed("categories", 1, id=3), r"categories: expected different ids, got 1 more than once: 3"),
        (changed("categories", 1, name="dark"), r"expected different names of the categories, got dark, dark"),
    ],
)
def test_a_file_of_another_shape_is_refused(instances, read, change, message):
    with pytest.raises(DataError, match=rf"data: \S+instances.json.*{message}"):
        read(change(copy.deepcopy(instances)))


def test_an_image_of_another_size_than_its_boxes_are_for_is_unreadable(coco_folder, instances, read):
    instances["images"][0]["width"] += 1
    annotations, _ = read(instances)
    from sasa.detection.source import BoxedImages

    with pytest.raises(UnreadableImage, match=r"annotated as \d+ x \d+ pixels, it has"):
        BoxedImages(annotations.images).read(0)


def test_bad_voc_files_are_counted(voc_folder):
    files = [voc_folder / "Annotations" / f"{number}.xml" for number in range(4)]
    files[0].write_text(files[0].read_text()[:50])
    files[1].write_text('<!DOCTYPE a [<!ENTITY b "b">]>' + files[1].read_text())
    bad = voc_object(9, 9, 9, 9, "dark") + voc_object(20, 9, 9, 20, "dark") + voc_object("nan", 9, 12, 12, "dark")
    files[2].write_text(files[2].read_text().replace("</annotation>", f"{bad}</annotation>"))
    val = voc_folder / "Annotations" / "4.xml"
    val.write_text(val.read_text().replace("dark", "new"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        source = open_boxes(voc_folder)
    assert (len(source.train), len(source.val), source.skipped) == (2, 2, 2)
    said = "\n".join(str(one.message) for one in warned)
    for count, kind in (
        (2, problems.NO_ANNOTATION),
        (1, problems.EMPTY),
        (1, problems.SWAPPED),
        (1, problems.NOT_FINITE),
        (1, problems.NO_CATEGORY),
    ):
        assert f"{count} {kind}" in said
    assert "category new" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "Annotations").rename(folder / "labels"), r"found neither"),
        (lambda folder: (folder / "ImageSets" / "Main" / "val.txt").unlink(), r"val.txt can't be read"),
    ],
)
def test_a_folder_without_a_layout_is_refused(voc_folder, change, message):
    change(voc_folder)
    with pytest.raises(DataError, match=message):
        open_boxes(voc_folder)
