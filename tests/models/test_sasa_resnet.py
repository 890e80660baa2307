"""The paper's networks: timm's expectations of a model, stages, parameters, saving and loading."""

import json
import math
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import FeatureInfo, get_notrace_modules
from torch import nn

import sasa
from sasa import AttentionStem, RelativeSelfAttention
from sasa.models import SasaResNet
from sasa.models.presets import PAPER_DEPTHS, PAPER_MODELS
from sasa.models.tables import TABLE_1, TABLE_3, TABLE_4, as_text, paper_tables

NAMES = tuple(PAPER_MODELS)
SMALLEST = ("sasa_resnet26", "sasa_resnet26_convstem")


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RelativeSelfAttention)}


def convolutions_of(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]


# --- what timm's own tests expect of a model ---


def test_registered_by_importing_sasa_models_alone():
    code = "import timm, sasa.models; print(*timm.list_models('sasa_*'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted((*NAMES, "sasa_resnet14"))
    assert set(timm.list_models(module="sasa_resnet")) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradient_checkpointing(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert expected.shape == (1, 10)
    assert not expected.isnan().any()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALLEST)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, zero_init_last=False)
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = model(x).logsumexp(1).sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sasa_resnet26", "sasa_resnet38_convstem", "sasa_resnet50"])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42, zero_init_last=False).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name):
    model = timm.create_model(name).eval()
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (1000, 2048, 2048)
    cfg, weights = model.default_cfg, model.state_dict()
    assert (cfg["architecture"], cfg["input_size"], cfg["pool_size"]) == (name, (3, 224, 224), (7, 7))
    first = cfg["first_conv"]
    for layer in (first,) if isinstance(first, str) else first:
        assert f"{layer}.weight" in weights
    assert f"{cfg['classifier']}.weight" in weights
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.875


@pytest.mark.parametrize("name", SMALLEST)
def test_classifier_and_pooling_can_be_changed(name):
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 96, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 2048, 3, 2)
    pre = model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.fc
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert timm.create_model(name, num_classes=0, global_pool="")(x).shape == (2, 2048, 3, 2)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("arguments", [{}, {"feature_cls": "getter"}, {"out_indices": (2, 4)}, {"feature_cls": "fx"}])
@pytest.mark.parametrize("size", [(96, 96), (61, 90)])
def test_features_only(name, arguments, size):
    model = timm.create_model(name, features_only=True, **arguments).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    outputs = model(torch.randn(1, 3, *size))
    assert [o.shape[1] for o in outputs] == channels
    assert len(outputs) == (2 if "out_indices" in arguments else 5)
    for reduction, output in zip(reductions, outputs, strict=True):
        assert tuple(output.shape[2:]) == tuple(math.ceil(n / reduction) for n in size)
        assert not output.isnan().any()


@pytest.mark.parametrize("name", SMALLEST)
def test_intermediate_features(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 96, 96)
    output, intermediates = model.forward_intermediates(x)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [y.shape[1] for y in intermediates] == info.channels()
    torch.testing.assert_close(output, model.forward_features(x))


def test_layers_are_not_traced_into():
    assert {RelativeSelfAttention, AttentionStem} <= set(get_notrace_modules())


@pytest.mark.parametrize("name", SMALLEST)
def test_output_stride_dilates_the_windows(name):
    model = timm.create_model(name, output_stride=16, num_classes=0, global_pool="").eval()
    assert layers_of(model)["layer4.0.conv2"].pool == 1
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2048, 4, 4)


# --- the paper's networks ---


@pytest.mark.parametrize("depth", PAPER_DEPTHS)
def test_what_attends(depth):
    blocks = sum(PAPER_DEPTHS[depth])
    counts = {"": (blocks, []), "_convstem": (blocks, ["conv1"]), "_conv": (0, None)}
    for variant, (attention, convolutions) in counts.items():
        model = timm.create_model(f"sasa_resnet{depth}{variant}", device="meta")
        assert len(layers_of(model)) == attention
        assert isinstance(model.conv1, AttentionStem) == (variant == "")
        if convolutions is not None:
            assert convolutions_of(model) == convolutions
        else:
            assert len(convolutions_of(model)) == blocks + 1


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (4,), (2, 1), [], (3,)])
def test_attention_stages(stages):
    model = timm.create_model("sasa_resnet26_convstem", attention_stages=stages, device="meta")
    assert {name.split(".")[0] for name in layers_of(model)} == {f"layer{stage}" for stage in stages}
    assert {name.split(".")[0] for name in convolutions_of(model)} == {"conv1"} | {
        f"layer{stage}" for stage in range(1, 5) if stage not in stages
    }


def test_options_reach_the_layers():
    options = {"kernel_size": 5, "num_heads": 4, "position": "absolute", "position_split": "across_heads"}
    model = timm.create_model(
        "sasa_resnet26",
        **options,
        border="mask",
        implementation="reference",
        stem_mixtures=2,
        in_chans=1,
        device="meta",
    )
    for layer in layers_of(model).values():
        assert (layer.kernel_size, layer.num_heads, layer.position) == ((5, 5), 4, "absolute")
        assert (layer.position_split, layer.border, layer.implementation) == ("across_heads", "mask", "reference")
        assert layer.qkv.bias is None
    stem = model.conv1
    assert (stem.in_channels, stem.num_heads, stem.mixtures, stem.implementation) == (1, 4, 2, "reference")


def test_sizes_and_formats():
    torch.manual_seed(0)
    model = timm.create_model("sasa_resnet26", num_classes=3).eval()
    for size in ((1, 1), (33, 20)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_no_weights_are_promised():
    with pytest.raises((RuntimeError, ValueError), match=r"[Pp]retrained|weights"):
        timm.create_model("sasa_resnet26", pretrained=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attention_stages": (0, 1)},
            ValueError,
            r"attention_stages: expected distinct numbers from 1 to 4, got \(0, 1\)",
        ),
        ({"attention_stages": (5,)}, ValueError, r"attention_stages: .*got \(5,\)"),
        ({"attention_stages": (1, 1)}, ValueError, r"attention_stages: .*got \(1, 1\)"),
        ({"attention_stages": 3}, ValueError, r"attention_stages: .*got 3"),
        ({"attention_stages": ("1",)}, ValueError, r"attention_stages: .*got \('1',\)"),
        ({"num_classes": -1}, ValueError, r"num_classes: expected an int of at least 0, got -1"),
        ({"num_heads": 6}, ValueError, r"num_heads: expected a divisor of the 64 channels, got 6"),
        ({"in_chans": 0}, ValueError, r"in_chans: expected at least 1, got 0"),
        ({"kernel_size": 0}, ValueError, r"kernel_size: expected an int or a"),
        (
            {"position": "rotary"},
            ValueError,
            r"position: expected one of 'relative', .*, 'only', got 'rotary'",
        ),
        ({"border": "valid"}, ValueError, r"border: expected one of 'zero', 'mask', 'shift', got 'valid'"),
        ({"stem_mixtures": 0}, ValueError, r"mixtures: expected at least 1, got 0"),
        ({"kernel": 7}, TypeError, r"unexpected keyword argument 'kernel'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("sasa_resnet26", **arguments)


def test_the_depth_of_every_stage_is_needed():
    with pytest.raises(ValueError, match=r"layers: expected the number of blocks of 4 stages, got \(1, 2\)"):
        SasaResNet((1, 2))


# --- the paper's tables ---


def test_tables_agree_with_the_paper():
    one, three, four = paper_tables()
    assert [len(table.rows) for table in (one, three, four)] == [len(TABLE_1), len(TABLE_3), len(TABLE_4)]
    for table in (one, three, four):
        for row in table.rows:
            assert abs(row.flops_difference) <= (0.2 if "full" in row.name else 0.1), row
            assert row.parameters_difference is None or abs(row.parameters_difference) <= 0.1, row


def test_flops_add_up_by_hand():
    """ResNet-26's first attention layer and stem, from the equation."""
    model = timm.create_model("sasa_resnet26", device="meta").eval()
    pixels = 56 * 56
    layer = model.layer1[0].conv2
    assert sasa.models.count_flops(layer, (1, 64, 56, 56)) == 3 * 2 * 64**2 * pixels + 6 * 49 * 64 * pixels
    pixels = 224 * 224
    # 12 inputs, the image weighed four times; every pixel attends to the 16 of its block.
    projections, attention = 2 * 12 * 3 * 64 * pixels, 2 * 2 * 16 * 64 * pixels
    weights, weighing = 2 * 64 * 16 * 4, 2 * 3 * 12 * pixels
    assert sasa.models.count_flops(model.conv1, (1, 3, 224, 224)) == projections + attention + weights + weighing


def test_tables_as_text():
    text = as_text(paper_tables())
    assert "ResNet-50, convolution stem + attention" in text
    assert "Table 4" in text
    assert "1, 2, 3, 4" in text


# --- saving and loading ---


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("sasa_resnet26", num_classes=3, kernel_size=3, attention_stages=(1, 3), in_chans=1)
    return model.eval()


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_and_loaded(network, folder):
    loaded = SasaResNet.from_pretrained(folder)
    assert not loaded.training
    x = torch.randn(2, 1, 40, 40)
    assert torch.equal(loaded(x), network(x))
    config = json.loads((folder / "config.json").read_text())
    assert (config["layers"], config["attention_stages"], config["kernel_size"]) == ([1, 2, 4, 1], [1, 3], 3)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_changed_classifier_is_saved(folder, tmp_path):
    model = SasaResNet.from_pretrained(str(folder))
    model.reset_classifier(5)
    model.save_pretrained(tmp_path / "again")
    assert SasaResNet.from_pretrained(tmp_path / "again").num_classes == 5


def test_an_argument_that_json_cannot_hold(tmp_path):
    model = SasaResNet((1, 1, 1, 1), norm_layer=nn.BatchNorm2d, dtype=torch.float32)
    with pytest.raises(ValueError, match="built with norm_layer, which JSON can't hold"):
        model.save_pretrained(tmp_path / "saved")
    SasaResNet((1, 1, 1, 1), norm_layer="batchnorm2d", device="cpu").save_pretrained(tmp_path / "saved")
    assert "device" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_nothing_but_a_folder_of_safetensors_is_read(folder, tmp_path):
    weights = folder / "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(load_file(weights)))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"found no model.safetensors in .* \(pickled weights are not read\)"):
        SasaResNet.from_pretrained(folder)
    for nowhere in (tmp_path / "nowhere", "owner/name"):
        with pytest.raises(FileNotFoundError, match=r"found no config.json in"):
            SasaResNet.from_pretrained(nowhere)


def test_weights_that_do_not_fit_are_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({"surplus": torch.zeros(1), **{k: v for k, v in weights.items() if k != "fc.bias"}}, file)
    with pytest.raises(ValueError, match=r'weights of another network(?s:.*)"fc.bias"(?s:.*)"surplus"'):
        SasaResNet.from_pretrained(folder)
    assert SasaResNet.from_pretrained(folder, strict=False).num_classes == 3
    save_file(weights | {"fc.bias": torch.zeros(7)}, file)
    with pytest.raises(ValueError, match=r"size mismatch for fc.bias"):
        SasaResNet.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights of another network(?s:.*)size mismatch"):
        SasaResNet.from_pretrained(folder, num_classes=9)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"x" * 100])
def test_a_damaged_file_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: expected safetensors"):
        SasaResNet.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kernel_size": 7}'])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: expected"):
        SasaResNet.from_pretrained(folder)
