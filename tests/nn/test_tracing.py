"""torch.fx and torch.export: traced and exported modules give the module's numbers, for other images and modes too."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

import sasa
from sasa.models import create_model

pytestmark = pytest.mark.slow

LAYERS = [
    *({"position_split": split} for split in ("per_head", "across_heads", "last_head")),
    {"position": "absolute", "border": "mask"},
    {"position": "none", "border": "valid", "bias": False},
    {"pool": 2, "border": "mask"},
    {"pool": 2, "position": "absolute", "stride": 2, "recompute": True, "bias": False},
]


def layer_of(**options):
    return sasa.RelativeSelfAttention(4, 8, 3, 2, **options)


def gradients(module, x):
    x = x.detach().requires_grad_()
    leaves = {"x": x} | dict(module.named_parameters())
    y = module(x)
    vector = torch.linspace(-1, 1, y.numel()).view_as(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), vector), strict=True))


def assert_same(traced, module, x):
    """Output and gradients, without gradients too."""
    torch.testing.assert_close(traced(x), module(x))
    torch.testing.assert_close(gradients(traced, x), gradients(module, x))
    with torch.no_grad():
        torch.testing.assert_close(traced(x), module(x))


# --- torch.fx ---


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_traced_layer(options):
    """Of other sizes, channels_last, unbatched; it follows its parameters."""
    layer = layer_of(**options)
    traced = fx.symbolic_trace(layer)
    for size in ((2, 4, 7, 6), (1, 4, 4, 9), (4, 5, 5)):
        assert_same(traced, layer, torch.randn(size))
    x = torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last)
    assert_same(traced, layer, x)
    assert traced(x).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        traced.qkv.weight.mul_(2)
    assert_same(traced, layer, x)


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_traced_modules(copied, options):
    network = nn.Sequential(layer_of(**options), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    traced = fx.symbolic_trace(network)
    other, x = copied(traced), torch.randn(2, 4, 7, 6)
    assert_same(other, copy.deepcopy(network), x)
    other.get_parameter("0.qkv.weight").data.zero_()
    assert not torch.equal(other(x), traced(x))


def test_traced_layer_checks_its_input():
    traced = fx.symbolic_trace(layer_of())
    with pytest.raises(ValueError, match="x: expected shape"):
        traced(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match="x: expected dtype"):
        traced(torch.randn(1, 4, 4, 4).double())


@pytest.mark.parametrize("traced_in", ["train", "eval"])
def test_traced_stem(traced_in):
    """In both modes, whichever it was traced in; running statistics as the stem's."""
    stem = sasa.AttentionStem(3, 8, 2).train(traced_in == "train")
    traced = fx.symbolic_trace(copy.deepcopy(stem))
    for training in (True, False):
        for size in ((2, 3, 8, 8), (2, 3, 7, 10)):
            assert_same(traced.train(training), stem.train(training), torch.randn(size))
    torch.testing.assert_close(dict(traced.named_buffers()), dict(stem.named_buffers()))


CONVOLUTIONS = {
    "crop": nn.Conv2d(4, 8, 3),
    "pool": nn.Conv2d(4, 8, 2, stride=2),
    "crop and pool": nn.Conv2d(4, 8, 4, stride=3, padding=1),
}


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_traced_converted_convolutions(convolution):
    layer = sasa.convert(CONVOLUTIONS[convolution], 3, 2, where=lambda name, module: True)
    traced = fx.symbolic_trace(layer)
    for size in ((2, 4, 7, 6), (1, 4, 12, 9)):
        assert_same(traced, layer, torch.randn(size))


@pytest.fixture(scope="module", params=[False, True], ids=["convolution stem", "attention stem"])
def resnet(request):
    """A converted network, with statistics of its own."""
    torch.manual_seed(0)
    network = sasa.convert(torchvision.models.resnet18(weights=None, num_classes=5), 3, 2, stem=request.param)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_(std=0.1)
    return network.eval()


def test_traced_network(resnet):
    network = copy.deepcopy(
        resnet
    ).double()  # a traced stem is computed in another way, and batch norms are of few pixels
    traced = fx.symbolic_trace(network)
    for training in (True, False):
        assert_same(traced.train(training), network.train(training), torch.randn(2, 3, 36, 33).double())


def test_feature_extractor(resnet):
    network = copy.deepcopy(resnet)
    extractor = create_feature_extractor(network, {"layer1": "first", "layer3.0.conv1": "inside", "fc": "logits"})
    x, seen = torch.randn(2, 3, 36, 33), {}
    network.layer1.register_forward_hook(lambda module, args, y: seen.update(first=y.clone()))
    network.layer3[0].conv1.register_forward_hook(lambda module, args, y: seen.update(inside=y.clone()))
    seen["logits"] = network(x)
    torch.testing.assert_close(extractor(x), {name: seen[name] for name in ("first", "inside", "logits")})


def test_batch_norm_fusion(resnet):
    x = torch.randn(2, 3, 36, 33)
    fused = fuse(resnet)
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (resnet, fused))
    assert after < before  # the 1x1 convolutions' at least
    with torch.no_grad():
        torch.testing.assert_close(fused(x), resnet(x), rtol=1e-4, atol=1e-4)


# --- torch.export ---


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "pool", "border", "strict"),
    [
        (None, 1, "zero", False),
        (None, 2, "mask", True),
        ("reference", 2, "zero", False),
        ("reference", 1, "mask", True),
    ],
)
def test_exported_layer(name, pool, border, strict):
    """With named sizes; it can be trained."""
    layer = layer_of(pool=pool, border=border, implementation=name)
    smallest = 2 * pool + 1
    sizes = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=smallest),
        3: torch.export.Dim("width", min=smallest),
    }
    program = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=(sizes,), strict=strict)
    assert any("sasa" in str(node.target) for node in program.graph.nodes) == (name is None)
    for size in ((1, 4, 5, 7), (3, 4, 15, 15), (5, 4, 6, 16)):
        assert_same(program.module(), layer, torch.randn(size))


@pytest.mark.nightly
def test_exported_paper_network():
    network = create_model("sasa_resnet26").eval()
    dims = {
        0: torch.export.Dim("batch"),
        **{i: 32 * torch.export.Dim(n, min=2, max=64) for i, n in ((2, "h"), (3, "w"))},
    }
    program = torch.export.export(network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(dims,))
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-4)


LOADS = """
import sys
sys.modules["sasa"] = None
import torch
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
assert program.module()(x[:1, :, :-1, :-2]).shape[0] == 1
try:
    import sasa
except ImportError:
    print("loaded without sasa")
"""


@pytest.mark.nightly
def test_a_program_of_the_equation_loads_without_sasa(tmp_path):
    network = nn.Sequential(layer_of(implementation="reference", pool=2), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 4, 8, 9)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=5), 3: torch.export.Dim("width", min=5)}
    program = torch.export.export(network, (x,), dynamic_shapes=(dims,))
    assert not any("sasa" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, network(x).detach()), tmp_path / "numbers.pt")
    command = [sys.executable, "-c", LOADS, tmp_path / "program.pt2", tmp_path / "numbers.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "loaded without sasa\n", done.stderr


# --- torch.jit.script ---


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        layer_of,
        lambda: sasa.AttentionStem(3, 8, 2),
        lambda: sasa.convert(CONVOLUTIONS["crop"], 3, 2, where=lambda name, module: True),
        lambda: sasa.convert(torchvision.models.squeezenet1_1(weights=None), 3, 2),
    ],
    ids=["layer", "stem", "crop", "network"],
)
def test_torchscript_is_not_supported(make):
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.script(make())
