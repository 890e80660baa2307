"""Detectors in the training engine: resumed to the same bits, on two processes, measured as COCO's own tools do."""

import json
import signal

import pytest
import torch
from boxed import CATEGORIES, SMALL
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.transforms import v2

from sasa.detection.data import BoxData, BoxedSet, collate, no_boxes
from sasa.detection.module import SUMMARY, Detector
from sasa.train import OptionError, Recipe, fit, load_model
from sasa.train.batch import Batch
from sasa.train.evaluate import evaluate
from sasa.train.fit import train
from sasa.train.predict import predict
from sasa.train.task import build_network, task_of
from tests.train.processes import Running, assert_equal_bits, together, weights


def recipe(data, **changes):
    """A training of seconds."""
    options = {"warmup_epochs": 1, "log_steps": 2, "tensorboard": False, "devices": 1, "data": data}
    return Recipe(**(options | SMALL | changes))


@pytest.fixture(scope="module")
def run(coco_folder, tmp_path_factory):
    """A finished run with several sizes; to be read only."""
    out = tmp_path_factory.mktemp("run") / "run"
    Running(out.parent / "log", train, recipe(coco_folder, train_sizes=[20, 28]), out).succeed()
    return out


def stopped_at(step, *arguments, **options):
    """Train, and be sent a signal in that step."""
    from sasa.train.callbacks import Watch

    begin = Watch.on_train_batch_start

    def signalled(self, trainer, *rest):
        begin(self, trainer, *rest)
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    Watch.on_train_batch_start = signalled
    train(*arguments, **options)


def killed_at(step, *arguments, **options):
    """Train, and be killed in that step."""
    from sasa.train.callbacks import Watch

    begin = Watch.on_train_batch_start

    def killed(self, trainer, *rest):
        begin(self, trainer, *rest)
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGKILL)

    Watch.on_train_batch_start = killed
    train(*arguments, **options)


def test_killed_and_stopped_it_ends_with_the_same_bits(coco_folder, run, tmp_path):
    out, log, options = tmp_path / "run", tmp_path / "log", recipe(coco_folder, train_sizes=[20, 28])
    assert Running(log, killed_at, 3, options, out, resume="auto").end() == -signal.SIGKILL
    assert Running(log, stopped_at, 4, options, out, resume="auto").end() == 128 + signal.SIGTERM
    assert "resuming after step" in Running(log, train, options, out, resume="auto").succeed()
    assert_equal_bits(run, out)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (run, out))
    assert first | {"seconds_per_epoch": 0} == second | {"seconds_per_epoch": 0}
    assert first["train_images"] == 16 and first["val_images"] == 7 and 0 <= first["ap"] <= first["ap50"] <= 1


def without_batch_norms(*arguments):
    """What only GPUs synchronise."""
    network = build_network(*arguments)
    for module in list(network.modules()):
        for name, inner in module.named_children():
            if isinstance(inner, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, inner.num_features))
    return network


def train_without_batch_norms(*arguments, **options):
    fit.build_network = without_batch_norms
    fit.train(*arguments, **options)


def test_two_processes_are_one_to_rounding(coco_folder, tmp_path):
    options = recipe(coco_folder, precision="64-true", optimizer="sgd", learning_rate=0.01)
    Running(tmp_path / "alone.log", train_without_batch_norms, options, tmp_path / "alone").succeed()
    for running in together(tmp_path / "log", 2, train_without_batch_norms, options, tmp_path / "run"):
        running.succeed()
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name].double(), two[name].double(), rtol=1e-8, atol=1e-8)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "run"))
    assert {name: one[name] for name in one if name[0] == "a"} == pytest.approx({n: two[n] for n in two if n[0] == "a"})
    assert one["val_images"] == two["val_images"] == 7


def cocos_own(instances, results):
    """The twelve figures by pycocotools alone."""
    truth = COCO(str(instances))
    measured = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    return measured.stats.tolist()


@pytest.fixture(scope="module")
def untrained(coco_folder, tmp_path_factory):
    """Random weights, and a threshold below which scores are few."""
    from sasa.train.weights import save_weights

    options = recipe(coco_folder, model_options=SMALL["model_options"] | {"score_thresh": 0.001})
    task = task_of("retinanet")
    source = task.open(coco_folder, strict=True)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained") / "model.safetensors"
    save_weights(build_network(options, source), path, task.facts(options, source))
    return path


class Noisy(nn.Module):
    """Knows the boxes of the images, and gets them wrong: some moved, some of another class, some more."""

    def __init__(self, part):
        super().__init__()
        images = [v2.functional.to_image(part.read(number)) for number in range(len(part))]
        self.known = {int(image.sum()): part.label(number) for number, image in enumerate(images)}

    def forward(self, images):
        found = []
        for image in images:
            key = int((image * 255).round().sum())
            generator = torch.Generator().manual_seed(key)
            boxes = self.known[key]["boxes"] if key in self.known else torch.rand(5, 4)  # padding is not counted
            boxes = boxes.repeat(3, 1) + torch.randn(3 * len(boxes), 4, generator=generator)
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            labels = self.known[key]["labels"].repeat(3) if key in self.known else torch.zeros(15, dtype=torch.int64)
            other = torch.rand(len(labels), generator=generator) < 0.2
            scores = torch.rand(len(labels), generator=generator)
            found.append({"boxes": boxes, "labels": torch.where(other, 1 - labels, labels), "scores": scores})
        return found


def test_eval_and_predict_agree_with_cocos_tools(coco_folder, untrained, tmp_path, capsys, monkeypatch):
    _, facts = load_model(untrained, detectors=True)
    noisy = Noisy(task_of("retinanet").open(coco_folder, strict=True).val)
    monkeypatch.setattr("sasa.train.evaluate.trained", lambda path: (noisy, facts))
    figures = evaluate(untrained, coco_folder, tmp_path / "eval.json", batch_size=3, devices=1)
    assert "Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ]" in capsys.readouterr().out
    assert (figures["images"], figures["skipped"]) == (7, 0)
    out, drawn = tmp_path / "found.json", tmp_path / "drawn"
    assert predict(coco_folder / "val2017", out, untrained, pictures=drawn, batch_size=2, devices=1) == 7
    found = json.loads(out.read_text())
    assert {one["category_id"] for one in found} <= set(CATEGORIES)
    assert {one["image_id"] for one in found} == set(range(100, 107))
    own = cocos_own(coco_folder / "annotations" / "instances_val2017.json", out)
    assert [figures[name] for name in SUMMARY] == pytest.approx(own, abs=2e-3)
    assert 0.2 < figures["ap"] < figures["ap50"] < 1
    assert len(list(drawn.glob("*.png"))) == 7


def test_predictions_resume_and_name_what_cannot_be_read(coco_folder, untrained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for place, path in enumerate(sorted((coco_folder / "val2017").iterdir())):
        (images / f"{'ab'[place % 2]}{place}.png").write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"no image")
    whole = tmp_path / "whole.json"
    with pytest.warns(UserWarning, match=r"1 images can't be read: broken.png"):
        assert predict(images, whole, untrained, batch_size=2, devices=1) == 8
    part = tmp_path / "found.json.parts"
    part.mkdir()
    from sasa.train.predict import _check_same_rows

    _check_same_rows(part, untrained, 2, images, True)
    (part / "run-0000-00000.jsonl").write_text('["a0.png", "[]", ""]\n["a2.png", "[[9, [1, 2, 3, 4], 0.5]]", ""]\n["a4')
    with pytest.warns(UserWarning, match=r"1 images can't be read"):
        predict(images, tmp_path / "found.json", untrained, batch_size=2, devices=1)
    expected = [one for one in json.loads(whole.read_text()) if one["file_name"] != "a0.png"]
    assert json.loads((tmp_path / "found.json").read_text()) == expected


def test_boxes_are_flipped_with_their_image(coco_folder):
    source = task_of("retinanet").open(coco_folder, strict=True)
    blank = torch.zeros(3, 32, 32, dtype=torch.uint8)
    plain, flipped = (BoxedSet(source.train, None, vary, blank) for vary in (None, v2.RandomHorizontalFlip(1.0)))
    for place in range(len(plain)):
        a, b = plain[0, place], flipped[0, place]
        assert torch.equal(a.image.flip(-1), b.image)
        for target, image in ((a.label, a.image), (b.label, b.image)):
            for label, (left, top, right, bottom) in zip(target["labels"], target["boxes"].int().tolist(), strict=True):
                inside = image[:, top:bottom, left:right]
                assert label == 0 or inside.eq(255).all()  # a light one may be over a dark one
        width = a.image.shape[-1]
        assert torch.equal(width - a.label["boxes"][:, [2, 0]], b.label["boxes"][:, [0, 2]])


def test_the_loss_is_finite_without_any_boxes(coco_folder):
    options = recipe(coco_folder)
    source = task_of("retinanet").open(coco_folder, strict=True)
    detector = Detector(build_network(options, source), options, 1)
    detector.log = lambda *arguments, **more: None
    images = [torch.rand(3, 30, 41), torch.rand(3, 25, 33)]
    loss = detector.training_step(Batch(images, [no_boxes(), no_boxes()], ["a", "b"], ["", ""]), 0)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_images_that_cannot_be_read_are_replaced_in_training_and_not_counted_in_validation(coco_folder):
    source = task_of("retinanet").open(coco_folder, strict=True)
    for part in (source.train, source.val):
        part.images[1].height += 1
    data = BoxData(source, recipe(coco_folder))
    replaced, left_out = data.train_set[0, 1], data.val_set[0, 1]
    assert replaced.name == source.train.name(2) and "annotated as" in replaced.unreadable
    assert left_out.label["image_id"] == -1 and "annotated as" in left_out.unreadable
    batch = collate([left_out, data.val_set[0, 2]])
    assert [int(target["image_id"]) for target in batch.labels] == [-1, 102]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "shift"}, r"augment: expected none or flip for a detector, got shift"),
        ({"mixup": 0.2}, r"mixup: expected 0.0 for a detector"),
        ({"compile": True}, r"compile: expected False for a detector"),
        ({"strategy": "fsdp"}, r"strategy: expected auto or ddp for a detector, got fsdp"),
        ({"train_sizes": [24.5]}, r"train_sizes: expected a list of whole numbers, got \[24.5\]"),
        ({"train_sizes": [0]}, r"train_sizes: expected at least 1, got 0"),
        ({"model": "resnet14", "model_options": {}}, r"expected with a detector, got them with a classifier"),
    ],
)
def test_options_that_do_not_fit_are_refused(coco_folder, changes, message):
    with pytest.raises(OptionError, match=message):
        recipe(coco_folder, **changes).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backbone": "vgg"}, r"model_options: backbone"), ({"min_size": 3}, r"model_options: .*image_size.*min_size")],
)
def test_options_of_the_network_are_named(coco_folder, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        train(recipe(coco_folder, model_options=options), tmp_path / "run")


def test_what_needs_a_classifier_refuses_a_detector(untrained):
    with pytest.raises(ValueError, match="expected a classifier, got a detector"):
        load_model(untrained)
    network, facts = load_model(untrained, detectors=True)
    assert facts["category_ids"] == [3, 7] and not network.training
