"""What a conversion says: a sentence that tells what to do, warnings, and what it can't reach."""

import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import sasa


def depthwise(count):
    return nn.ModuleList([nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(count))])


def test_all_of_a_kind():
    with pytest.raises(ValueError, match=r"that can be converted\. All 53 are left alone") as caught:
        sasa.convert(nn.ModuleList(nn.Conv2d(8, 8, 3, groups=8) for _ in range(53)), where=lambda *_: True)
    first = str(caught.value).splitlines()[0]
    assert "All 53 are left alone: depthwise; grouped=True would convert the depthwise ones" in first
    assert first.endswith("keep_function=True keeps them light.")


def test_only_a_stem():
    with pytest.raises(ValueError, match="The only one is left alone: stem; stem=True would convert the stem"):
        sasa.convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="All 4 are left alone: stem; stem=True would convert the stem"):
        sasa.convert(timm.create_model("levit_128s"))


def test_few_of_many_is_a_warning():
    model = depthwise(10)
    model.extend([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])
    with pytest.warns(UserWarning, match=r"2 converted to attention, 11 left alone \(1 stem, 10 depthwise\); grouped"):
        sasa.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "2 converted" in sasa.conversion_report(model).summary  # the report itself does not warn
        sasa.convert(model, grouped=True)
        sasa.convert(model, keep_function=True)
        sasa.convert(model, where=lambda name, module: name == "11")  # what was not asked for is not missed


def test_what_is_no_plain_convolution_is_not_missed():
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), *(nn.ConvTranspose2d(8, 8, 2, 2) for _ in range(9)), nn.Conv1d(8, 8, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sasa.convert(model, where=lambda name, module: True)


def test_the_first_line_of_the_table_is_the_sentence():
    report = sasa.conversion_report(timm.create_model("resnet18"))
    assert str(report).splitlines()[0] == report.summary == "16 converted to attention, 1 left alone (1 stem)."
    assert sasa.conversion_report(nn.Conv2d(3, 4, 3)).summary == "1 converted to attention, 0 left alone."


class Aliased(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.ReLU())
        keep(self, self.conv)

    def forward(self, x):
        return self.conv(self.stem(x))


KEEPS = {
    "tuple": (lambda m, c: setattr(m, "held", (c,)), r"held\[0\]"),
    "list": (lambda m, c: setattr(m, "held", [[None, c]]), r"held\[0\]\[1\]"),
    "dict": (lambda m, c: setattr(m, "held", {"a": c}), r"held\['a'\]"),
    "bound method": (lambda m, c: setattr(m, "call", c.forward), "call"),
    "partial": (lambda m, c: setattr(m, "call", functools.partial(c)), "call"),
    "in a submodule": (lambda m, c: setattr(m.inner, "held", [c]), r"inner\.held\[0\]"),
}


@pytest.mark.parametrize("name", KEEPS)
def test_convolutions_kept_outside_the_module_tree_are_listed(name):
    keep, path = KEEPS[name]
    model = Aliased(keep)
    match = path + r" keeps the convolution conv, outside the module tree"
    report = sasa.conversion_report(model)
    assert len(report.not_reached) == 1
    assert f"Not reached: {report.not_reached[0]}" in str(report)
    with pytest.warns(UserWarning, match="not reached by the conversion: " + match):
        sasa.convert(model)


def test_convolutions_that_are_not_registered_are_listed():
    model = Aliased(lambda m, c: setattr(m, "branches", [nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3))]))
    (text,) = sasa.conversion_report(model).not_reached
    assert text == "branches[0] holds Conv2d 1, outside the module tree"


def test_what_holds_no_convolution_to_convert_is_not_listed():
    def keep(m, c):
        m.parts, m.stems, m.itself, m.names = [m.inner], (m.stem,), [m], ["conv"]
        m.loop = m.names  # a list that holds itself ends as well
        m.names.append(m.names)

    assert sasa.conversion_report(Aliased(keep)).not_reached == ()


def test_a_layer_of_heads_one_channel_wide_warns():
    with pytest.warns(UserWarning, match="num_heads: 8 heads of 8 channels are one channel wide"):
        layer = sasa.RelativeSelfAttention(4, 8, 3, 8)
    assert layer.row_embedding.numel() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sasa.RelativeSelfAttention(4, 8, (1, 3), 8)
        sasa.RelativeSelfAttention(4, 8, 3, 8, position_split="across_heads")
        sasa.RelativeSelfAttention(4, 8, 3, 8, position="none")
        sasa.RelativeSelfAttention(4, 8, 3, 4)


@pytest.mark.parametrize("channels", range(1, 66))
def test_converted_layers_tell_up_from_down(channels):
    layer = sasa.convert(nn.Conv2d(2, channels, 3, padding=1))
    torch.manual_seed(0)
    if channels == 1:
        return
    weights = layer.attention_weights(torch.randn(1, 2, 9, 9)).unflatten(2, (7, 7))
    assert not torch.allclose(weights, weights.flip(3), atol=1e-3)


def test_options_with_a_kept_function():
    model = timm.create_model("resnet18")
    kept = sasa.convert(model, 5, keep_function=True, strength=3, margin=12, recompute=False)
    layer = kept.layer1[0].conv1
    assert (layer.strength, layer.margin, layer.window, layer.recompute) == (3, 12, (5, 5), False)
    for options, match in (
        ({"num_heads": 4}, "num_heads: with keep_function=True the convolution decides it, got 4"),
        ({"stride_mode": "strided"}, "stride_mode: with keep_function=True"),
    ):
        with pytest.raises(ValueError, match=match):
            sasa.convert(model, keep_function=True, **options)
    with pytest.raises(TypeError, match="border: not an option of keep_function=True, got 'mask'"):
        sasa.convert(model, keep_function=True, border="mask")
    with pytest.raises(TypeError, match="strength: not an option of keep_function=False, got 2"):
        sasa.convert(model, strength=2)
    with pytest.raises(TypeError, match="keep_function: expected True or False"):
        sasa.convert(model, keep_function="yes")
    report = sasa.conversion_report(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 7)), 5, keep_function=True, stem=True
    )
    assert [e.why for e in report.left_alone] == ["its kernel is larger than kernel_size=(5, 5)"]


def test_convolutions_that_channels_last_breaks_are_noted():
    """The backward of a strided 1x1 convolution of few channels; it would abort this process."""
    model = nn.ModuleList([nn.Conv2d(3, 48, 1, stride=2), nn.Conv2d(48, 48, 3), nn.Conv2d(48, 96, 1, stride=2)])
    (note,) = sasa.conversion_report(model).notes
    assert note.startswith("Note: don't train it in channels_last on a CPU") and "backward of 0 corrupts" in note
    assert str(sasa.conversion_report(model)).endswith(note)
    assert sasa.conversion_report(model[1:], where=lambda *_: True).notes == ()
