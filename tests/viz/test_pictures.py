"""Pictures: drawn from the layer's own weights, at the right place; what they can't draw is said."""

import numpy as np
import pytest
import torch
from torch import nn

from sasa import RelativeSelfAttention
from sasa.models import create_model
from sasa.viz import attention_layers, layer_weights, plot_attention, plot_curves
from sasa.viz.attention_maps import _View
from sasa.viz.curves import read_metric


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


def test_figure_has_a_row_a_layer_and_a_panel_a_head(network):
    figure = plot_attention(network, torch.randn(1, 28, 28), (10, 12), title="title")
    assert len(figure.axes) == 5 * (1 + 8) + 1  # and the colour bar
    assert [panel.get_title() for panel in figure.axes[1:5]] == [f"head {i}" for i in range(1, 5)]
    figure = plot_attention(network, torch.randn(1, 28, 28), (0, 27), layers=["stem.spatial"])
    assert len(figure.axes) == 1 + 8 + 1


def test_window_lies_on_the_pixel():
    layer = RelativeSelfAttention(1, 4, (3, 5), 2, dilation=(1, 2))
    weights = layer.attention_weights(torch.randn(1, 1, 12, 12))[0]
    view = _View(layer, weights, (12, 12), (4, 6), (12, 12))
    assert view.rows.tolist() == [2.5, 3.5, 4.5, 5.5]  # rows 3, 4, 5: pixel centres at whole numbers
    assert view.cols.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]  # columns 2, 4, 6, 8, 10, each two wide
    assert view.centre == [4.0, 6.0]
    np.testing.assert_allclose(view.weights, weights[:, :, 4, 6].view(2, 3, 5).detach())


def test_window_on_a_smaller_map_covers_more_of_the_image():
    layer = RelativeSelfAttention(1, 4, 3, 2)
    weights = layer.attention_weights(torch.randn(1, 1, 7, 7))[0]
    view = _View(layer, weights, (7, 7), (9, 27), (28, 28))
    assert view.rows.tolist() == [3.5, 7.5, 11.5, 15.5]  # cell 2 of 7 covers rows 8 to 11
    assert view.centre == [9.5, 25.5]


def test_window_of_a_valid_border_starts_inside():
    layer = RelativeSelfAttention(1, 4, 3, 2, border="valid")
    weights = layer.attention_weights(torch.randn(1, 1, 8, 8))[0]
    view = _View(layer, weights, (8, 8), (0, 7), (8, 8))
    assert view.rows.tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert view.cols.tolist() == [4.5, 5.5, 6.5, 7.5]


def test_window_of_a_strided_layer_is_the_nearest():
    layer = RelativeSelfAttention(1, 4, 3, 2, stride=2)
    weights = layer.attention_weights(torch.randn(1, 1, 9, 9))[0]
    view = _View(layer, weights, (9, 9), (4, 8), (9, 9))
    assert view.centre == [4.0, 8.0]
    np.testing.assert_allclose(view.weights, weights[:, :, 2, 4].view(2, 3, 3).detach())


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
