"""Attention that starts as a convolution: the same outputs, in every geometry and in whole networks, and it learns."""

import copy
import itertools
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import sasa
from sasa import AttentionConv2d

KERNELS = [(3, 3), (1, 5), (3, 1), (2, 2), (4, 3), (5, 5), (7, 7)]
PADDINGS = [0, 1, (2, 1), "kept", 3]


def output_of(module, x):
    """The output, or the kind of error of an image that is too small."""
    try:
        return module(x)
    except (RuntimeError, ValueError):
        return None


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_output_and_gradient_in_every_geometry(kernel, padding):
    torch.manual_seed(0)
    if padding == "kept":
        padding = tuple((k - 1) // 2 for k in kernel)
    others = itertools.cycle(itertools.product((1, 2, 4), (True, False), ((14, 13), (15, 16), (13, 14))))
    for stride, dilation, _ in itertools.product((1, 2, (1, 3)), (1, 2), range(3)):
        groups, bias, size = next(others)
        conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias, dtype=torch.float64)
        x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
        y, expected = AttentionConv2d(conv)(x), conv(x)
        assert y.shape == expected.shape
        assert distance(y, expected) < 1e-10
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        assert distance(*grads) < 1e-10


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0)])
def test_other_padding(mode, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (3, 4), 2, padding, padding_mode=mode)
    x = torch.randn(2, 3, 9, 8)
    for window in (None, 7):
        assert distance(AttentionConv2d(conv, kernel_size=window)(x), conv(x)) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (3, 3), (8, 8)])
def test_images_smaller_than_the_kernel(size):
    torch.manual_seed(0)
    for conv in (nn.Conv2d(2, 3, 7, padding=3), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 3, 3)):
        x = torch.randn(1, 2, *size)
        expected, y = output_of(conv, x), output_of(AttentionConv2d(conv), x)
        assert (expected is None) == (y is None)
        assert expected is None or distance(y, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cpu", "eager", "reference"])
def test_precision_of_every_dtype(dtype, name):
    torch.manual_seed(0)
    exact = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    conv = copy.deepcopy(exact).to(dtype)
    error = distance(AttentionConv2d(conv, implementation=name)(x.to(dtype)).double(), exact(x))
    assert error < {torch.float64: 1e-13, torch.float32: 1e-4}.get(dtype, 60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("strength", [0.5, 1, 2, 3, 5])
def test_every_strength_is_exact(strength):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    assert distance(AttentionConv2d(conv, strength)(x), conv(x)) < 1e-12


@pytest.mark.parametrize("margin", [5, 10, 30])
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 1, "stride": 2}, {"dilation": 2}, {"padding": 2}])
def test_a_larger_window_errs_by_what_its_outer_taps_weigh(margin, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, dtype=torch.float64, **geometry)
    layer = AttentionConv2d(conv, kernel_size=(7, 6), margin=margin)
    x = torch.randn(2, 8, 11, 12, dtype=torch.float64)
    y = layer(x)
    assert y.shape == conv(x).shape
    error = distance(y, conv(x))
    assert error < 2 * torch.tensor(-margin).exp() + 1e-12
    if margin == 5:
        assert error > 1e-4  # the outer taps are there
        y.square().sum().backward()
        outer = layer.row_embedding.grad[:, 0, [0, 1, 5, 6]]
        assert 0 < outer.abs().max() < layer.row_embedding.grad.abs().max() / 20


def test_channels_last_single_images_and_no_images():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, 2, 1)
    layer = AttentionConv2d(conv)
    x = torch.randn(2, 8, 9, 9)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, 8, 5, 5)
    with pytest.raises(ValueError, match="x: expected"):
        layer(torch.randn(2, 7, 9, 9))


def test_recomputing_changes_no_bit_of_the_gradients():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    x = torch.randn(3, 4, 8, 8)
    grads = []
    for recompute in (True, False):
        layer = AttentionConv2d(conv, recompute=recompute)
        layer(x).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    layer = AttentionConv2d(nn.Conv2d(2, 2, (2, 3), 2, 1, dtype=torch.float64))
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    names, values = zip(*layer.named_parameters(), strict=True)
    values = [v.detach().requires_grad_() for v in values]
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


def test_a_state_dict_a_copy_and_a_pickle_give_the_same_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    layer, other = AttentionConv2d(conv), AttentionConv2d(nn.Conv2d(4, 4, 3, padding=1))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 5, 5)
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    on_meta = AttentionConv2d(nn.Conv2d(4, 4, 3, padding=1, device="meta"))
    assert {k: v.shape for k, v in on_meta.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_traced_compiled_and_exported():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    layer = sasa.convert(net, keep_function=True, where=lambda *_: True)
    x = torch.randn(2, 4, 12, 13)
    expected = layer(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    with pytest.raises(NotImplementedError, match="AttentionConv2d: TorchScript"):
        torch.jit.script(layer[0])


def test_autocast():
    layer = AttentionConv2d(nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_it_answers_as_the_convolution():
    conv = nn.Conv2d(4, 8, (3, 5), 2, (1, 0), 2, 2, padding_mode="reflect")
    layer = AttentionConv2d(conv, kernel_size=7)
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"
    assert all(getattr(layer, n) == getattr(conv, n) for n in (*names, "transposed", "output_padding"))
    assert (layer.window, layer.num_heads, layer.weight.shape) == ((7, 7), 15, (15, 8, 2, 1, 1))
    assert repr(layer) == (
        "AttentionConv2d(4, 8, kernel_size=(3, 5), stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=2, "
        "padding_mode='reflect', window=(7, 7))"
    )


@pytest.mark.parametrize(
    ("conv", "options", "error", "match"),
    [
        (nn.Linear(2, 2), {}, TypeError, r"conv: expected an nn\.Conv2d, got Linear"),
        (nn.Conv2d(2, 2, 1), {}, ValueError, "conv: expected a kernel larger than 1x1"),
        (nn.Conv2d(2, 2, 3), {"strength": 0}, ValueError, "strength: expected more than 0 and at most 10, got 0"),
        (nn.Conv2d(2, 2, 3), {"strength": float("nan")}, ValueError, "strength"),
        (nn.Conv2d(2, 2, 3), {"strength": "2"}, TypeError, "strength"),
        (nn.Conv2d(2, 2, 3), {"margin": -1}, ValueError, "margin: expected more than 0 and at most 100, got -1"),
        (nn.Conv2d(2, 2, 3), {"kernel_size": (3, 2)}, ValueError, r"kernel_size: expected at least .*\(3, 3\), got"),
        (nn.Conv2d(2, 2, 3), {"recompute": None}, TypeError, "recompute: expected True or False"),
        (nn.Conv2d(2, 2, 3), {"implementation": "fast"}, ValueError, "implementation: expected None or one of"),
        (nn.LazyConv2d(2, 3), {}, ValueError, "conv: .* no shape yet"),
    ],
)
def test_errors(conv, options, error, match):
    with pytest.raises(error, match=match):
        AttentionConv2d(conv, **options)


# --- whole networks ---


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.merge(torch.cat((x, self.up(self.middle(self.down(x)))), 1))


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "mobilenetv3_small_100": lambda: timm.create_model("mobilenetv3_small_100", num_classes=10),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "tf_efficientnet_b0": lambda: timm.create_model("tf_efficientnet_b0", num_classes=10),
    "nf_regnet_b0": lambda: timm.create_model("nf_regnet_b0", num_classes=10),
    "unet": UNet,
}


def trained_statistics(model):
    """Batch norms as after training: statistics of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_did(name):
    torch.manual_seed(0)
    model = trained_statistics(NETWORKS[name]())
    network = sasa.convert(model, keep_function=True, stem=True)
    left = [m for m in network.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    assert left == []
    for size in ((64, 64), (52, 70)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert distance(network(x), model(x)) < 1e-4
            if size == (64, 64):
                assert (
                    distance(copy.deepcopy(network).double()(x.double()), copy.deepcopy(model).double()(x.double()))
                    < 1e-6
                )


def test_a_detector_finds_what_it_did():
    torch.manual_seed(0)
    build = torchvision.models.detection.retinanet_resnet50_fpn
    model = build(weights=None, weights_backbone=None, num_classes=3).eval()
    network = sasa.convert(model, keep_function=True, where=lambda name, module: "fpn" in name or "head" in name)
    x = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        features, expected = (m.backbone(torch.stack(x)) for m in (network, model))
        heads = [m.head(list(f.values())) for m, f in ((network, features), (model, expected))]
    assert all(distance(features[k], expected[k]) < 1e-4 for k in expected)
    assert all(distance(heads[0][k], heads[1][k]) < 1e-4 for k in ("cls_logits", "bbox_regression"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("resnet18", "mobilenetv3_small_100")), "unet"]
)
def test_every_parameter_gets_a_gradient_and_training_reduces_the_loss(name):
    torch.manual_seed(0)
    network = sasa.convert(NETWORKS[name](), keep_function=True, stem=True).train()
    x = torch.randn(4, 3, 48, 48)
    target = (x.mean(1) > 0).long() if name == "unet" else torch.randint(2, (4,))
    optimizer = torch.optim.SGD(network.parameters(), 0.5 if name == "unet" else 0.01)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), target)
        loss.backward()
        if step == 0:
            for key, p in network.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), key
                assert p.grad.any(), key
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_memory_of_a_training_step_is_at_most_three_times_the_convolutions():
    """What lives between forward and backward: counted by the tensors that autograd keeps."""
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x = torch.randn(2, 32, 24, 24, requires_grad=True)
    kept = {}
    for name, layer in (("conv", conv), ("attention", AttentionConv2d(conv))):
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        kept[name] = sum(storages.values())
    assert kept["attention"] < 3 * kept["conv"]
