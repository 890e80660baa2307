"""Detectors: what attends in them, what they learn from, the tables, files, compilation and export."""

import json
from pathlib import Path

import pytest
import torch

import sasa
from sasa.cli import main
from sasa.export import to_onnx
from sasa.models.detection_tables import TABLE_2, detection_tables

SMALL = {"num_classes": 3, "channels": 32, "kernel_size": 3, "num_heads": 4, "min_size": 64, "max_size": 96}


def detector(backbone="sasa_resnet14", heads="attention", **options):
    torch.manual_seed(0)
    return sasa.models.retinanet(backbone, heads, **SMALL | options)


def attending(model):
    return {name for name, module in model.named_modules() if isinstance(module, sasa.RelativeSelfAttention)}


# --- what it is ---


def test_attention_is_where_it_is_asked_for():
    towers = {f"head.{head}_head.conv.{i}.0" for head in ("classification", "regression") for i in range(4)}
    last = {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}
    pyramid = {"backbone.fpn.layer_blocks.0.0", "backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"}
    assert not attending(detector("resnet14", "convolution"))
    assert attending(detector("resnet14")) == towers | last
    assert attending(detector("resnet14", "convolution", pyramid="attention")) == pyramid
    assert attending(detector(pyramid="attention").backbone.body)


def test_the_backbone_takes_the_classifiers_weights():
    options = {"layers": [1, 1, 1, 1], "attention_stages": [3, 4], "kernel_size": 3}
    network = sasa.models.create_model("sasa_resnet26", **options)
    body = detector("sasa_resnet26", "convolution", backbone_options=options).backbone.body
    loaded = body.load_state_dict(network.state_dict(), strict=False)
    assert not loaded.missing_keys and set(loaded.unexpected_keys) == {"fc.weight", "fc.bias"}
    x = torch.randn(1, 3, 48, 64)
    wanted = network.eval().forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(body.eval()(x), wanted, strict=True))


@pytest.mark.parametrize("position", ["relative", "only"])
def test_an_object_is_as_rare_everywhere_at_first(position):
    """Borders and maps smaller than the window included, as with a convolution's bias."""
    with torch.no_grad():
        boxes, scores = detector(kernel_size=7, position=position).eval().dense()(torch.rand(1, 3, 32, 64))
    assert boxes.shape == (1, 9 * (8 * 16 + 4 * 8 + 2 * 4), 4) and scores.shape == (*boxes.shape[:2], 3)
    assert scores.min() > 0.005 and scores.max() < 0.02


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backbone": "vgg"}, "backbone"),
        ({"heads": "both"}, "heads"),
        ({"pyramid": True}, "pyramid"),
        ({"num_classes": 0}, "num_classes"),
        ({"anchor_scales": 0}, "anchor_scales"),
        ({"channels": 48, "group_norm": True}, "channels"),
        ({"implementation": "fastest"}, "implementation"),
        ({"backbone_options": {"width": -1.0}}, "width"),
        ({"weights": "x.pth"}, "weights"),
        ({"backbone_options": {"checkpoint_path": "x.pth"}}, "checkpoint_path"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        detector(**options)


def test_an_implementation_is_that_of_the_whole_network():
    model = detector(implementation="reference")
    assert {model.get_submodule(name).implementation for name in attending(model)} == {"reference"}


# --- what it does ---


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("sasa_resnet14", {"pyramid": "attention", "group_norm": True}),
        ("resnet14", {"heads": "convolution"}),
        ("sasa_resnet26", {"backbone_options": {"layers": [1, 1, 1, 1], "kernel_size": 3}}),
    ],
)
def test_it_learns_from_odd_images_of_unequal_sizes_and_from_one_without_boxes(backbone, options):
    model = detector(backbone, **options)
    images = [torch.rand(3, 61, 83), torch.rand(3, 97, 45)]
    targets = [
        {"boxes": torch.tensor([[3.0, 4, 50, 60], [20, 20, 40, 50]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model(images, targets)
    assert set(losses) == {"classification", "bbox_regression"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.fixture(scope="module")
def trained():
    """A detector whose scores differ, which shows boxes."""
    model = detector(pyramid="attention", score_thresh=0.02, nms_thresh=1.0, topk_candidates=10**6)
    model.detections_per_img = 10**6
    torch.nn.init.normal_(model.head.classification_head.cls_logits.qkv.weight)
    return model.eval()


def test_dense_is_the_detector_without_suppression(trained):
    image = torch.rand(3, 64, 90)  # not resized, but padded
    with torch.no_grad():
        found = trained([image])[0]
        boxes, scores = trained.dense()(image[None])
    anchors, labels = torch.nonzero(scores[0] > 0.02, as_tuple=True)
    assert 0 < len(labels) == len(found["labels"]) < scores.numel()
    order = scores[0, anchors, labels].argsort(descending=True, stable=True)
    torch.testing.assert_close(found["scores"], scores[0, anchors, labels][order])
    torch.testing.assert_close(found["boxes"], boxes[0, anchors][order])
    assert torch.equal(found["labels"], labels[order])


def test_it_is_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = type(trained).from_pretrained(tmp_path)
    image = torch.rand(3, 50, 70)
    with torch.no_grad():
        boxes, again = (model.dense()(image[None]) for model in (trained, loaded))
    assert all(torch.equal(one, other) for one, other in zip(boxes, again, strict=True))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"heads": "convolution"}))
    with pytest.raises(ValueError, match=r"(?s)weights of another network.*cls_logits"):
        type(trained).from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"layers": [1, 1, 1, 1]}))
    with pytest.raises(ValueError, match="expected the arguments of a SasaRetinaNet"):
        type(trained).from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_backbone_compiles_whole(trained):
    x = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(trained.backbone, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ours, eager in zip(compiled(x).values(), trained.backbone(x).values(), strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.slow
def test_onnxruntime_finds_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    dense = detector("resnet14", min_size=32).eval().dense()
    image = torch.rand(1, 3, 33, 47)
    to_onnx(dense, image, tmp_path / "detector.onnx", dynamic=False, optimize=False)
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for ours, theirs in zip(dense(image), session.run(None, {"images": image.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


# --- the paper's table 2 ---


def test_the_reductions_are_the_papers():
    table, with_pyramid = detection_tables()
    baseline = table.rows[0]
    assert len(table.rows) == len(TABLE_2)
    assert abs(baseline.flops_difference) < 1
    for row in table.rows:
        assert abs(row.flops_difference) <= 0.02 * row.paper_flops, row
        assert abs(row.parameters_difference) <= 0.01 * row.paper_parameters, row
    for row in table.rows[3:]:
        assert abs(row.flops / baseline.flops - 1 + 0.39) < 0.01, row
    assert with_pyramid.rows[0].parameters < 20.5  # the text's reading isn't the table's


def test_the_command_prints_table_2(capsys):
    assert main(["tables", "--detection"]) == 0
    printed = capsys.readouterr().out
    assert "one image of 640x640" in printed and "FLOPs -39.4% (paper -39.0%)" in printed
    assert printed in (Path(__file__).parents[2] / "docs/detection.md").read_text()
