"""ONNX files give the network's numbers in onnxruntime, whatever the size of batch and image."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sasa
import sasa.export

SIZES = ((2, 9, 14), (1, 16, 16), (3, 7, 30), (2, 13, 8))
OPTIONS = [
    {},
    {"border": "mask", "kernel_size": (3, 6)},
    {"border": "valid", "kernel_size": 4},
    {"stride": 2, "border": "mask"},
    {"stride": (1, 3), "position_split": "across_heads", "kernel_size": 7},
    {"dilation": 2},
    {"dilation": (2, 3), "stride": (3, 2), "border": "mask", "kernel_size": (3, 2), "scale": 0.5},
    {"dilation": 2, "stride": 2, "border": "valid", "kernel_size": 3},
    {"pool": 2, "bias": False},
    {"pool": 3, "stride": 2, "border": "mask"},
    {"position": "absolute", "border": "mask"},
    {"position": "none", "kernel_size": 11},
    {"num_heads": 8},
    {"position": "bias", "border": "mask", "stride": (2, 1), "dilation": (1, 2), "kernel_size": (3, 4)},
]


class Together(nn.ModuleList):
    """Modules side by side, each on the first of the channels: one export, which takes seconds, for all of them."""

    def __init__(self, modules, channels):
        super().__init__(modules)
        self.channels = channels

    def forward(self, x):
        return tuple(module(x[:, :channels]) for module, channels in zip(self, self.channels, strict=True))


def assert_same(path, module, channels, dtype=torch.float32, sizes=SIZES):
    """In onnxruntime as in PyTorch's float64."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session, right = onnxruntime.InferenceSession(path, options), module.double()
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3}[dtype]
    for batch, height, width in sizes:
        x = torch.randn(batch, channels, height, width).to(dtype)
        found = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            expected = right(x.double())
        for y, e in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert y.dtype == x.numpy().dtype and y.shape == tuple(e.shape)
            np.testing.assert_allclose(y, e.numpy(), rtol=0, atol=tolerance * max(1, e.abs().max().item()))


@pytest.mark.filterwarnings("ignore:num_heads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers(dtype, tmp_path):
    """Every option, in half precision as in PyTorch's float64 of rounded inputs and parameters."""
    options = [{"kernel_size": 5, "num_heads": 2} | given for given in OPTIONS[:: 1 if dtype == torch.float32 else 4]]
    layers = Together([sasa.RelativeSelfAttention(6, 8, **given) for given in options], [6] * len(options))
    layers = layers.to(dtype).eval()
    sasa.export.to_onnx(layers, torch.zeros(1, 6, 12, 10, dtype=dtype), tmp_path / "layers.onnx")
    assert_same(tmp_path / "layers.onnx", layers, 6, dtype)


def test_windows_that_are_moved_are_refused(tmp_path):
    layer = sasa.RelativeSelfAttention(6, 8, 3, 2, border="shift").eval()
    with pytest.raises(ValueError, match="border='shift' can't be exported to ONNX, got RelativeSelfAttention"):
        sasa.export.to_onnx(layer, torch.zeros(1, 6, 12, 10), tmp_path / "layer.onnx")
    assert not list(tmp_path.iterdir())


class Attend(nn.Module):
    """The function itself: values wider than keys, an embedding missing."""

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x):
        x = x.unflatten(1, (2, 10))
        return sasa.local_attention(x[:, :, :3], x[:, :, 3:6], x[:, :, 6:], 3, row_embedding=self.row, scale=2)


class Small(nn.Module):
    """Convolutions to convert, with what crops and pools."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        return self.layers(x)


def test_other_modules(tmp_path):
    """The function, the stem, converted networks, those that keep their function too."""
    stem = sasa.AttentionStem(3, 8, 2)
    with torch.no_grad():
        stem.norm.running_mean.normal_()
        stem.norm.running_var.uniform_(0.5, 2)
        stem.norm.weight.normal_()
    converted = [
        sasa.convert(Small(), 3, where=lambda name, module: True, **given)
        for given in ({"num_heads": 2}, {"keep_function": True})
    ]
    modules = Together([Attend(), stem, *converted], [20, 3, 3, 3]).eval()
    sasa.export.to_onnx(modules, torch.zeros(1, 20, 18, 13), tmp_path / "modules.onnx")
    assert_same(tmp_path / "modules.onnx", modules, 20)


@pytest.mark.slow
def test_networks(tmp_path):
    from sasa.models import create_model

    for name, channels, sizes in (
        ("sasa_resnet14", 1, SIZES),
        ("sasa_resnet26", 3, ((2, 48, 64), (1, 64, 64), (1, 70, 33), (3, 40, 40))),
    ):
        network = create_model(name, 4, channels, **({"width": 0.5} if name.endswith("14") else {})).eval()
        sasa.export.to_onnx(network, torch.zeros(1, channels, 40, 36), tmp_path / "network.onnx")
        assert_same(tmp_path / "network.onnx", network, channels, sizes=sizes)


def test_a_layer_is_a_scan_without_copies_for_each_tap(tmp_path):
    """The number of nodes does not depend on the window."""
    counts = []
    for kernel in (3, 7):
        layer = sasa.RelativeSelfAttention(4, 8, kernel, 2).eval()
        sasa.export.to_onnx(layer, torch.zeros(2, 4, 9, 9), tmp_path / "layer.onnx")
        graph = onnx.load(tmp_path / "layer.onnx").graph
        counts.append(len(graph.node))
        shape = graph.input[0].type.tensor_type.shape
        assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 4, "height", "width"]
        assert [node.op_type for node in graph.node].count("Scan") == 1
        assert {node.domain for node in graph.node} == {""}
    assert counts[0] == counts[1] < 100


def test_fixed_sizes_and_metadata(tmp_path):
    layer = sasa.RelativeSelfAttention(4, 8, 3, 2).eval()
    path = str(tmp_path / "layer.onnx")
    sasa.export.to_onnx(
        layer, torch.zeros(1, 4, 9, 8), path, dynamic=False, metadata={"classes": ["a", "b"], "by": "x"}, opset=23
    )
    model = onnx.load(path)
    assert [(used.domain, used.version) for used in model.opset_import] == [("", 23)]
    onnx.checker.check_model(model, full_check=True)
    assert {p.key: p.value for p in model.metadata_props}.items() >= {"classes": '["a", "b"]', "by": "x"}.items()
    assert_same(path, layer, 4, sizes=((1, 9, 8),))


@pytest.mark.nightly
@pytest.mark.parametrize("opset", range(18, 24))
def test_opsets(opset, tmp_path):
    """Every one that can be asked for, with all that a network has."""
    network = [
        sasa.AttentionStem(3, 8, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        sasa.RelativeSelfAttention(8, 8, 3, 2, pool=2),
    ]
    network = nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    sasa.export.to_onnx(network, torch.zeros(2, 3, 18, 13), tmp_path / "network.onnx", opset=opset)
    assert {(used.domain, used.version) for used in onnx.load(tmp_path / "network.onnx").opset_import} == {("", opset)}
    assert_same(tmp_path / "network.onnx", network, 3)


@pytest.mark.nightly
def test_an_opset_that_the_exporter_does_not_reach(tmp_path, monkeypatch):
    """It logs a line and writes another one."""
    monkeypatch.setattr("sasa.export.onnx.OPSETS", (17, 23))
    layer = sasa.RelativeSelfAttention(4, 8, 3, 2).eval()
    with pytest.raises(ValueError, match="opset: this network can't be converted to version 17, only written in 18"):
        sasa.export.to_onnx(layer, torch.zeros(2, 4, 9, 9), tmp_path / "layer.onnx", opset=17)
    assert not list(tmp_path.iterdir())


class InBlocks(nn.Module):
    """A stem, and all that its operator returns; some extremes are the largest, some the smallest, one the first."""

    def __init__(self):
        super().__init__()
        self.stem = sasa.AttentionStem(3, 6, 2)
        nn.init.normal_(self.stem.norm.weight)
        nn.init.normal_(self.stem.norm.running_mean)
        self.form = nn.Parameter(torch.randn(2, 3, 3))
        self.values = nn.Parameter(torch.randn(16, 6, 3))
        self.register_buffer("chosen", torch.tensor([1.0, 1, -1, 0, 1, -1]))

    def forward(self, x):
        return self.stem(x), *torch.ops.sasa.block_attention(x, self.form, self.values, self.chosen, 4)


def test_program_of_attention_in_blocks(tmp_path):
    """``torch.export.export`` on the CPU keeps the operator, which ONNX then has to have."""
    network, dims = InBlocks().eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(network, (torch.zeros(2, 3, 18, 13),), dynamic_shapes=(dims,), strict=False)
    assert sum(node.target is torch.ops.sasa.block_attention.default for node in program.graph.nodes) == 2
    torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False).save(tmp_path / "network.onnx")
    assert_same(tmp_path / "network.onnx", network, 3)


class HalfInBlocks(nn.Module):
    """The operator with an image in half precision, as in a stem on a GPU."""

    def __init__(self):
        super().__init__()
        self.form, self.values = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(16, 6, 3))
        self.register_buffer("chosen", torch.tensor([1.0, 1, -1, 0, 1, -1]))

    def forward(self, x):
        extreme, *moments = torch.ops.sasa.block_attention(x.half(), self.form, self.values, self.chosen, 4)
        return extreme.float(), *moments


def test_program_of_attention_in_blocks_of_an_image_in_half_precision(tmp_path):
    network, dims = HalfInBlocks().eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(network, (torch.zeros(2, 3, 18, 13),), dynamic_shapes=(dims,), strict=False)
    torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False).save(tmp_path / "network.onnx")
    assert_same(tmp_path / "network.onnx", network, 3)


DIRECTLY = """
import sys, torch, sasa
assert "onnxscript" not in sys.modules
layer = sasa.RelativeSelfAttention(4, 8, 3, 2, pool=2).eval()
shapes = ({0: "batch", 2: "height", 3: "width"},)
for parameter in layer.parameters():
    parameter.requires_grad_(len(sys.argv) > 2)  # then the projections are a convolution of their own
x = torch.zeros(2, 4, 9, 8)
program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, input_names=["images"])
program.save(sys.argv[1])
torch.save(layer, sys.argv[1] + ".pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracked", [False, True])
def test_called_directly(tracked, tmp_path):
    """``torch.onnx.export`` by someone who knows nothing of ``sasa.export``."""
    path = str(tmp_path / "layer.onnx")
    line = [sys.executable, "-c", DIRECTLY, path, *(["tracked"] if tracked else [])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [node.op_type for node in onnx.load(path).graph.node].count("Scan") == 1
    assert_same(path, torch.load(path + ".pt", weights_only=False), 4)


def test_table():
    assert torch.ops.sasa.projected_attention.default in sasa.export.onnx_translations()


class Fixed(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[2] == 8 else x * torch.ones(x.shape[2], x.shape[2])


def test_errors_name_the_argument(tmp_path):
    layer, x, path = sasa.RelativeSelfAttention(4, 8, 3, 2).eval(), torch.zeros(2, 4, 8, 8), tmp_path / "a.onnx"
    to_onnx = sasa.export.to_onnx
    for error, match, call in (
        (ValueError, "model: expected evaluation mode.*RelativeSelfAttention", lambda: to_onnx(layer.train(), x, path)),
        (TypeError, "model: expected an nn.Module, got function", lambda: to_onnx(lambda x: x, x, path)),
        (TypeError, "example: expected a Tensor, got list", lambda: to_onnx(layer.eval(), [1], path)),
        (ValueError, "example: expected images", lambda: to_onnx(layer, x[0], path)),
        (ValueError, "x: expected shape", lambda: to_onnx(layer, x[:, :3], path)),
        (ValueError, "opset: expected an int from 18 to 23, got 9", lambda: to_onnx(layer, x, path, opset=9)),
        (ValueError, "opset: expected an int from 18 to 23, got 24", lambda: to_onnx(layer, x, path, opset=24)),
        (TypeError, "metadata: expected what JSON", lambda: to_onnx(layer, x, path, metadata={"a": object()})),
        (TypeError, "dynamic: expected True or False", lambda: to_onnx(layer, x, path, dynamic=1)),
        (IsADirectoryError, "path: expected a file", lambda: to_onnx(layer, x, tmp_path)),
        (FileNotFoundError, "path: expected a file in a folder", lambda: to_onnx(layer, x, tmp_path / "no" / "a.onnx")),
        (ValueError, "dynamic: expected False for this network", lambda: to_onnx(Fixed().eval(), x, path)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path, monkeypatch):
    """A disk that fills up leaves the earlier file, and nothing beside it."""
    layer, path = sasa.RelativeSelfAttention(4, 8, 3, 2).eval(), tmp_path / "a.onnx"
    path.write_bytes(b"earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sasa.export.to_onnx(layer, torch.zeros(2, 4, 8, 8), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"] and path.read_bytes() == b"earlier"
