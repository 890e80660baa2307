"""Pictures: drawn from the layer's own weights, at the right place; what they can't draw is said."""

import numpy as np
import pytest
import torch
from torch import nn

from sasa import RelativeSelfAttention
from sasa.models import create_model
from sasa.viz import (
    attention_layers,
    layer_weights,
    look,
    plot_attention,
    plot_curves,
    plot_distances,
    plot_embeddings,
    plot_module,
    plot_position,
    plot_receptive_field,
    receptive_field,
)
from sasa.viz.attention_maps import View
from sasa.viz.curves import read_metric
from sasa.viz.looking import cell
from sasa.viz.module import module_tensors


@pytest.fixture
def network():
    return create_model("sasa_resnet14", in_chans=1).eval()


def test_weights_of_every_layer(network):
    weights = layer_weights(network, torch.randn(2, 1, 28, 28))
    assert list(weights) == list(attention_layers(network))
    assert len(weights) == 5
    assert weights["stem.spatial"].shape == (2, 8, 9, 28, 28)
    assert weights["stages.stage2.1.spatial"].shape == (2, 4, 25, 7, 7)
    for tensor in weights.values():
        torch.testing.assert_close(tensor.sum(2), torch.ones_like(tensor.sum(2)))


def test_looking_leaves_the_network_as_it_was(network):
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layer_weights(network, torch.randn(2, 1, 28, 28))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_figure_has_a_panel_a_head_and_none_is_empty(network):
    figure = plot_attention(network, torch.randn(1, 28, 28), (10, 12), title="title")
    assert len(figure.axes) == (1 + 8) + 4 * (1 + 4) + 1  # and the colour bar
    assert figure.axes[1].get_title().startswith("head 1, largest 0.")
    assert all(panel.has_data() for panel in figure.axes[:-1])
    figure = plot_attention(network, torch.randn(1, 28, 28), (0, 27), layers=["stem.spatial"])
    assert len(figure.axes) == 1 + 8 + 1


def test_every_panel_has_the_image_at_one_scale(network):
    figure = plot_attention(network, torch.randn(1, 27, 30), (26, 0))
    limits = {(panel.get_xlim(), panel.get_ylim()) for panel in figure.axes[:-1]}
    assert len(limits) == 1


def view(layer, size, image, pixel):
    (seen,), _ = look(nn.Sequential(layer), torch.randn(1, *size))
    return View(seen, pixel, image)


def test_window_lies_on_the_pixel():
    layer = RelativeSelfAttention(1, 4, (3, 5), 2, dilation=(1, 2))
    (seen,), _ = look(nn.Sequential(layer), x := torch.randn(1, 12, 12))
    found = View(seen, (4, 6), (12, 12))
    assert found.rows.tolist() == [2.5, 3.5, 4.5, 5.5]  # rows 3, 4, 5: pixel centres at whole numbers
    assert found.cols.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]  # columns 2, 4, 6, 8, 10, each two wide
    assert found.centre == [4.0, 6.0]
    weights = layer.attention_weights(x[None])[0]
    np.testing.assert_allclose(found.weights, weights[:, :, 4, 6].view(2, 3, 5).detach(), rtol=1e-5)


def test_window_on_a_smaller_map_covers_more_of_the_image():
    found = view(RelativeSelfAttention(1, 4, 3, 2), (7, 7), (28, 28), (9, 27))
    assert found.rows.tolist() == [3.5, 7.5, 11.5, 15.5]  # cell 2 of 7 covers rows 8 to 11
    assert found.centre == [9.5, 25.5]


def test_window_on_a_map_that_was_rounded_up_lies_where_the_pixels_are():
    found = view(RelativeSelfAttention(1, 4, 3, 2), (14, 4), (27, 14), (26, 13))  # halved once, and twice
    assert found.rows.tolist() == [23.5, 25.5, 27.5, 29.5]
    assert found.cols.tolist() == [7.5, 11.5, 15.5, 19.5]


@pytest.mark.parametrize(
    ("size", "places", "expected"),
    [(28, 7, 4), (27, 14, 2), (100, 13, 8), (225, 57, 4), (10, 2, 8), (6, 2, 4), (28, 9, 28 / 9), (3, 6, 0.5)],
)  # fmt: skip
def test_cells_of_a_map(size, places, expected):
    assert cell(size, places) == expected


def test_window_of_a_valid_border_starts_inside():
    found = view(RelativeSelfAttention(1, 4, 3, 2, border="valid"), (8, 8), (8, 8), (0, 7))
    assert found.rows.tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert found.cols.tolist() == [4.5, 5.5, 6.5, 7.5]


def test_window_of_a_strided_layer_is_the_nearest():
    found = view(RelativeSelfAttention(1, 4, 3, 2, stride=2), (9, 9), (9, 9), (4, 8))
    assert found.centre == [4.0, 8.0]


def test_figures_of_a_network(network):
    image = torch.randn(1, 28, 28)
    assert len(plot_embeddings(attention_layers(network)["stem.spatial"]).axes) == 3
    assert [len(part.axes) for part in plot_position(network, image).subfigs] == [8, 4, 4, 4, 4]
    far, even = plot_distances(network, image).axes
    assert len(far.lines) == 2 * 5 and len(even.lines) == 3 * 5
    assert len(plot_receptive_field(network, image[None], ["stem.spatial", "stages.stage2"]).axes) == 3
    with pytest.raises(ValueError, match="layer: expected position='relative', got 'none'"):
        plot_embeddings(RelativeSelfAttention(4, 4, 3, 2, position="none"))


@pytest.mark.parametrize(("pixel", "head"), [((9, 12), 1), ((0, 27), 3)])
def test_the_drawing_computes_what_the_layer_does(network, pixel, head):
    name, outputs = "stages.stage1.0.spatial", []
    layer = attention_layers(network)[name]
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = module_tensors(network, image := torch.randn(1, 28, 28), name, pixel, head)
    channels = slice(head * 8, head * 8 + 8)
    torch.testing.assert_close(found.output, outputs[0][0, channels, pixel[0] // 2, pixel[1] // 2])
    logits = (found.keys + found.relative) @ found.query
    torch.testing.assert_close(logits.view(5, 5), found.content + found.position)
    assert len(plot_module(network, image, name, pixel, head).axes) == 11
    with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
        module_tensors(network, image, name, pixel, 4)


def test_receptive_field_is_the_window():
    layer = nn.Sequential(RelativeSelfAttention(2, 4, 3, 2))
    found = receptive_field(layer, torch.randn(2, 2, 9, 9), "0", (4, 2))
    assert (found[3:6, 1:4] > 0).all() and found.max() == 1
    found[3:6, 1:4] = 0
    assert (found == 0).all()
    with pytest.raises(ValueError, match=r"pixel: expected \(row, column\) inside the 9x9 map, got \(9, 0\)"):
        receptive_field(layer, torch.randn(1, 2, 9, 9), "0", (9, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image": torch.zeros(1, 1, 28, 28)},
            r"image: expected shape \(channels, .*got \(1, 1, 28, 28\)",
        ),
        ({"pixel": (28, 0)}, r"pixel: expected \(row, column\) inside the 28x28 image, got \(28, 0\)"),
        ({"layers": ["fc"]}, r"layers: expected names among stem.spatial, .*, got 'fc'"),
        ({"network": nn.Conv2d(1, 1, 3)}, r"network: expected at least one RelativeSelfAttention layer, found none"),
    ],
)
def test_bad_arguments(network, arguments, message):
    good = {"network": network, "image": torch.zeros(1, 28, 28), "pixel": (0, 0)}
    with pytest.raises(ValueError, match=message):
        plot_attention(**(good | arguments))


def test_curves_are_read_from_the_log(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train_loss,val_top1\n0,9,,0.5\n0,9,2.0,\n1,19,,0.75\n1,19,1.0,\n")
    assert read_metric(log, "val_top1") == ([1, 2], [0.5, 0.75])
    figure = plot_curves({"attention": log, "convolution": log}, "title")
    loss, accuracy = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert accuracy.get_legend().get_texts()[0].get_text() == "attention: 75.0% at the end"


def test_log_without_the_metric_is_named(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step\n0,1\n")
    with pytest.raises(ValueError, match=r"name: expected a column with values in .*metrics.csv, got 'val_top1'"):
        read_metric(log, "val_top1")
