"""An output may be changed in place by whoever receives it, as a convolution's: the gradients are those of the same
change out of place.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracles import Case
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.retinanet import RetinaNetHead

import sasa
from sasa.ops import implementations


def add_(y):
    y += 0.5
    return y


def set_to_nan(y):
    y.data.fill_(torch.nan)  # past autograd's version counter: what is saved would give NaN instead of an error
    return y


def one_after_the_other(y, inplace):
    y = F.dropout(add_(y) if inplace else y + 0.5, 0.3, inplace=inplace)
    y = y.mul_(1.5) if inplace else y * 1.5
    return F.relu(y, inplace=inplace)


CHANGES = {
    "ReLU": (nn.ReLU(inplace=True), nn.ReLU()),
    "+=": (add_, lambda y: y + 0.5),
    "mul_": (lambda y: y.mul_(1.5), lambda y: y * 1.5),
    "Dropout": (nn.Dropout(0.3, inplace=True), nn.Dropout(0.3)),
    "set to NaN": (set_to_nan, nn.Identity()),
    "all": (lambda y: one_after_the_other(y, True), lambda y: one_after_the_other(y, False)),
}
every_change = pytest.mark.parametrize("change", CHANGES)


def gradients(function, inputs):
    """Of the inputs, for a vector at the output."""
    leaves = [x.detach().requires_grad_() if not isinstance(x, nn.Parameter) else x for x in inputs]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(1)  # of the dropout
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert all(leaf.grad is not None for leaf in leaves)
    return [leaf.grad.clone() for leaf in leaves]


def assert_harmless(run, inputs, change="all"):
    """``run`` takes the inputs and what to call with the output."""
    in_place, out_of_place = CHANGES[change]
    got, expected = (gradients(functools.partial(run, after), inputs) for after in (in_place, out_of_place))
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in expected)
    torch.testing.assert_close(got, expected)


def assert_module_is_harmless(module, x, change="all", run=lambda module, after, x: after(module(x))):
    state = copy.deepcopy(module.state_dict())  # running statistics

    def of_all(after, x, *parameters):
        module.load_state_dict(state)
        return run(module, after, x)

    assert_harmless(of_all, [x, *module.parameters()], change)


# --- the operator ---


@every_change
def test_attention_weights(change):
    case = Case(border="mask")
    query, key, *_ = case.tensors().values()
    assert_harmless(
        lambda after, *tensors: after(sasa.local_attention_weights(*tensors, **case.options)), [query, key], change
    )
    layer = sasa.RelativeSelfAttention(6, 8, 3, 2).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    assert_harmless(lambda after, x: after(layer.attention_weights(x)), [x], change)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("embeddings", ["none", "both"])
@pytest.mark.parametrize("name", [None, *implementations.names()])
@every_change
def test_operator(change, name, embeddings):
    if name == "triton" and change not in ("set to NaN", "all"):
        pytest.skip("Triton's interpreter is slow")
    case = Case(size=(1, 2), heads=1, width=2) if name == "triton" else Case(border="mask", batch=2)
    dtype = torch.float32 if name == "triton" else torch.float64
    tensors = Case(**{**case.__dict__, "embeddings": embeddings}).tensors(dtype)

    def run(after, *given):
        return after(
            sasa.local_attention(**dict(zip(tensors, given, strict=True)), **case.options, implementation=name)
        )

    assert_harmless(run, list(tensors.values()), change)


@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
@pytest.mark.parametrize("name", [None, "eager", "reference"])
def test_operator_of_a_channels_last_image_whose_output_is_joined(name, border):
    """What layers do with it: the change is one of a view."""
    x = torch.randn(2, 24, 5, 4).to(memory_format=torch.channels_last)

    def run(after, x):
        query, key, value = x.unflatten(1, (3, 2, 4)).unbind(1)
        return after(sasa.local_attention(query, key, value, 3, border=border, implementation=name).flatten(1, 2))

    assert_harmless(run, [x])


@pytest.mark.parametrize("name", [None, "eager", "reference"])
def test_second_derivatives_of_the_operator(name):
    tensors = Case().tensors()

    def run(after, *given):
        names = dict(zip(tensors, given, strict=True))
        y = after(sasa.local_attention(**names, kernel_size=3, implementation=name))
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.cat([grad.flatten() for grad in first])

    assert_harmless(run, list(tensors.values()))


# --- the layer ---

every_layer = pytest.mark.parametrize("recompute", [None, True, False])
every_number_of_heads = pytest.mark.parametrize("num_heads", [1, 2, 8])


def layers(num_heads, recompute):
    for pool, stride in itertools.product((1, 2), (1, 2)):
        yield sasa.RelativeSelfAttention(4, 16, 3, num_heads, stride, pool=pool, recompute=recompute)


def checkpointed(module, after, x, use_reentrant):
    return after(checkpoint(module, x, use_reentrant=use_reentrant))


def checkpointed_with_the_change(module, after, x, use_reentrant):
    return checkpoint(lambda x: after(module(x)), x, use_reentrant=use_reentrant)


@pytest.mark.sampled(20)
@every_change
@every_layer
@every_number_of_heads
def test_layer(num_heads, recompute, change):
    x = torch.randn(1, 4, 5, 6)
    for layer in layers(num_heads, recompute):
        assert_module_is_harmless(layer, x, change)
        assert_module_is_harmless(layer, x.to(memory_format=torch.channels_last), change)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("run", [checkpointed, checkpointed_with_the_change])
@every_layer
@every_number_of_heads
def test_checkpointed_layer(num_heads, recompute, run, use_reentrant):
    for layer in layers(num_heads, recompute):
        how = functools.partial(run, use_reentrant=use_reentrant)
        assert_module_is_harmless(layer, torch.randn(1, 4, 5, 6), run=how)


@pytest.mark.parametrize("name", [None, "reference"])
def test_layer_of_one_image_without_a_batch(name):
    layer = sasa.RelativeSelfAttention(4, 16, 3, 2, implementation=name)
    assert_module_is_harmless(layer, torch.randn(4, 5, 6))


@pytest.mark.parametrize("name", [None, "eager", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"position": "absolute"},
        {"position": "none", "bias": False},
        {"position_split": "across_heads"},
        {"border": "valid", "recompute": True},
        {"border": "mask", "recompute": True, "pool": 3},
    ],
    ids=str,
)
def test_layer_with_other_options(options, name):
    layer = sasa.RelativeSelfAttention(4, 16, 3, 2, implementation=name, **options)
    reentrant = functools.partial(checkpointed, use_reentrant=True)
    assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6))
    assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6), run=reentrant)
    if "bias" not in options:
        layer.qkv = nn.Sequential(layer.qkv)  # is called as a module
        assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6), run=reentrant)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("inside", [True, False], ids=["compiled with the change", "changed afterwards"])
@pytest.mark.parametrize(
    ("num_heads", "recompute", "pool", "stride"),
    [(1, None, 1, 1), (2, True, 1, 2), (8, False, 2, 1), (8, True, 2, 1)],
)
def test_compiled_layer(num_heads, recompute, pool, stride, inside):
    torch._dynamo.reset()
    layer = sasa.RelativeSelfAttention(4, 16, 3, num_heads, stride, pool=pool, recompute=recompute)

    def run(module, after, x):
        if not inside:
            return after(torch.compile(module, backend="aot_eager", fullgraph=True)(x))
        return torch.compile(lambda x: after(module(x)), backend="aot_eager", fullgraph=True)(x)

    assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6), run=run)
    torch._dynamo.reset()


# --- the stem, and what convert puts in ---


every_size = pytest.mark.parametrize("size", [(8, 8), (7, 6)], ids=["whole blocks", "cut blocks"])


@every_size
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_change
def test_stem(change, training, size):
    stem = sasa.AttentionStem(3, 8, 2).train(training)
    assert_module_is_harmless(stem, torch.randn(2, 3, *size), change)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("run", [checkpointed, checkpointed_with_the_change])
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_size
def test_checkpointed_stem(size, training, run, use_reentrant):
    stem = sasa.AttentionStem(3, 8, 2).train(training)
    run = functools.partial(run, use_reentrant=use_reentrant)
    assert_module_is_harmless(stem, torch.randn(2, 3, *size), run=run)


def test_stem_without_gradients_leaves_its_parameters_alone():
    stem = sasa.AttentionStem(3, 8, 2).eval()
    before = copy.deepcopy(stem.state_dict())
    with torch.no_grad():
        stem(torch.randn(2, 3, 8, 8)).fill_(torch.nan)
    torch.testing.assert_close(stem.state_dict(), before, rtol=0, atol=0)


CONVOLUTIONS = {
    "crop": nn.Conv2d(4, 8, 3),
    "pool": nn.Conv2d(4, 8, 2, stride=2),
    "pool of cut windows": nn.Conv2d(4, 8, 3, stride=(2, 1), padding=1),
    "crop and pool": nn.Conv2d(4, 8, 3, stride=2),
    "layer that pools": nn.Conv2d(4, 8, 3, stride=2, padding=1),
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@every_change
def test_converted_convolutions(change, convolution, options):
    layer = sasa.convert(CONVOLUTIONS[convolution], 3, 2, where=lambda name, module: True, **options)
    assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6), change)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_checkpointed_converted_convolutions(convolution, use_reentrant):
    layer = sasa.convert(CONVOLUTIONS[convolution], 3, 2, where=lambda name, module: True)
    run = functools.partial(checkpointed, use_reentrant=use_reentrant)
    assert_module_is_harmless(layer, torch.randn(2, 4, 7, 6), run=run)


# --- networks ---


def torchvision_network(name):
    """With a small classifier: theirs have up to 120 million parameters, all of fully connected layers."""
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(weights=None)
    if name != "squeezenet1_1":
        channels = 512 if name == "vgg11" else 256
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(nn.Dropout(inplace=True), nn.Linear(channels, 10))
    network = sasa.convert(network, 3, 2, where=lambda name, module: True).to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def out_of_place(network):
    """The same network; every module's option ``inplace`` is off."""
    network = copy.deepcopy(network)
    changed = [module for module in network.modules() if getattr(module, "inplace", False)]
    assert changed
    for module in changed:
        module.inplace = False
    return network


def step(network, loss):
    """The network after a training step, and the gradients of its parameters."""
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    torch.manual_seed(1)  # of the dropout
    loss(network).backward()
    optimizer.step()
    return {name: (p.grad, p.detach()) for name, p in network.named_parameters()}


@pytest.mark.parametrize(("name", "size"), [("vgg11", 32), ("alexnet", 64), ("squeezenet1_1", 32)])
def test_networks_trained_a_step(name, size):
    network = torchvision_network(name)
    assert any(isinstance(module, sasa.RelativeSelfAttention) for module in network.modules())
    x, labels = torch.randn(2, 3, size, size), torch.tensor([3, 7])

    def loss(network):
        return F.cross_entropy(network(x), labels)

    other = out_of_place(network)
    torch.testing.assert_close(step(network, loss), step(other, loss))


def test_heads_of_a_retinanet_trained_a_step():
    """They are shared by maps of several sizes, and look at their outputs through views."""
    head = sasa.convert(RetinaNetHead(8, num_anchors=3, num_classes=4), 3, 2, where=lambda name, module: True)
    assert not any(isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) for module in head.modules())
    maps = [torch.randn(2, 8, *size) for size in ((6, 5), (3, 2))]

    def loss(head):
        found = head(maps)
        return found["cls_logits"].square().sum() + found["bbox_regression"].square().sum()

    other = out_of_place(head)
    torch.testing.assert_close(step(head, loss), step(other, loss))
