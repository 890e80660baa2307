"""Small data sets with boxes, in the layouts of COCO and Pascal VOC."""

import json

import torch
from torchvision.transforms.v2.functional import to_pil_image

CATEGORIES = {3: "dark", 7: "light"}  # ids as COCO's: neither from 0 nor one after another

SMALL = {
    "model": "retinanet",
    "model_options": {
        "backbone": "sasa_resnet14",
        "heads": "attention",
        "backbone_options": {"width": 0.5},
        "channels": 16,
        "num_heads": 2,
        "kernel_size": 3,
        "anchor_scales": 1,
    },
    "image_size": 24,
    "augment": "flip",
    "epochs": 2,
    "batch_size": 4,
    "checkpoint_steps": 2,
}


def image_with_boxes(generator, boxes=2):
    """Grey noise with filled squares, dark and light; and the boxes (x, y, side, category)."""
    width, height = (int(side) for side in torch.randint(30, 42, (2,), generator=generator))
    pixels = torch.randint(90, 130, (3, height, width), generator=generator, dtype=torch.uint8)
    found = []
    for number, category in zip(range(boxes), CATEGORIES, strict=False):
        side = int(torch.randint(8, 14, (), generator=generator))
        x, y = (int(torch.randint(0, most - side, (), generator=generator)) for most in (width, height))
        pixels[:, y : y + side, x : x + side] = 255 * number
        found.append((x, y, side, category))
    return pixels, found


def coco(folder, train=16, val=7):
    """COCO's layout; one image of the training part has no boxes."""
    generator = torch.Generator().manual_seed(0)
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train2017", train), ("val2017", val)):
        (folder / part).mkdir()
        images, annotations = [], []
        for number in range(100, 100 + count):
            boxes = 0 if (part, number) == ("train2017", 103) else 2
            pixels, found = image_with_boxes(generator, boxes)
            name = f"{number:012d}.png"
            to_pil_image(pixels).save(folder / part / name)
            images.append({"id": number, "file_name": name, "height": pixels.shape[1], "width": pixels.shape[2]})
            for x, y, side, category in found:
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                annotations.append(entry | {"bbox": [x, y, side, side], "area": side * side})
        instances = {"images": images, "annotations": annotations}
        instances["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(instances))
    return folder


def voc(folder, count=6):
    """Pascal VOC's layout: corners counted from 1, both inside."""
    generator = torch.Generator().manual_seed(0)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        pixels, found = image_with_boxes(generator)
        to_pil_image(pixels).save(folder / "JPEGImages" / f"{number}.png")
        objects = "".join(voc_object(x + 1, y + 1, x + side, y + side, CATEGORIES[c]) for x, y, side, c in found)
        (folder / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename><size><width>{pixels.shape[2]}</width>"
            f"<height>{pixels.shape[1]}</height><depth>3</depth></size>{objects}</annotation>"
        )
    names = [str(number) for number in range(count)]
    for part, own in (("train", names[:-2]), ("val", names[-2:])):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(own) + "\n")
    return folder


def voc_object(left, top, right, bottom, name):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (left, top, right, bottom), strict=True)
    inner = "".join(f"<{side}>{value}</{side}>" for side, value in corners)
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{inner}</bndbox></object>"
