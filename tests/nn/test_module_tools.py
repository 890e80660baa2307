"""What tools do to modules leaves the layer's numbers alone: copies, files, dtypes, devices, offloading."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, skip_init, vector_to_parameters
from twins import assert_equal, differ, every_way, image, results, twins

import sasa


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


class ScaledProjection(nn.Conv2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


def halved(module, args, y):
    return y / 2


@every_way
@pytest.mark.parametrize("name", COPIES)
def test_copies(name, num_heads, recompute, grad):
    """Before and after a first call, with a hook and with a part replaced."""
    layer, _ = twins(num_heads, recompute)
    fresh = COPIES[name](layer)
    expected = results(layer, grad)
    assert_equal(results(fresh, grad), expected)
    used = COPIES[name](layer)
    assert_equal(results(used, grad), expected)
    assert repr(used) == repr(layer)
    used.qkv.weight.data.zero_()
    assert_equal(results(layer, grad), expected)  # it shares no memory with its copy

    layer.qkv.register_forward_hook(halved)
    hooked = results(layer, grad)
    assert differ(hooked, expected)
    assert_equal(results(COPIES[name](layer), grad), hooked)

    layer.qkv = ScaledProjection(4, 48, 1)
    assert_equal(results(COPIES[name](layer), grad), results(layer, grad))


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_converted_networks(name, stem):
    network = converted_network(stem)
    x = torch.randn(2, 3, 12, 11)
    assert torch.equal(COPIES[name](network)(x), network(x))


def test_parameters_as_a_vector():
    layer, hand = twins()
    vector = parameters_to_vector(layer.parameters())
    assert vector.shape == (3 * 16 * 4 + 3 * 16 + 16 * 3,)
    for module in (layer, hand):
        vector_to_parameters(1.5 * vector, module.parameters())
    assert_equal(results(layer), results(hand))


@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_dtypes_after_a_call(recompute, dtype):
    layer, _ = twins(recompute=recompute)
    exact = results(layer)["output"]
    y = layer.to(dtype)(image().to(dtype))
    assert y.dtype == dtype and layer.qkv.weight.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=max(1e-5, 16 * torch.finfo(dtype).eps))
    with pytest.raises(ValueError, match="x: expected dtype"):
        layer(image())


@every_way
def test_channels_last_parameters(num_heads, recompute, grad):
    modules = twins(num_heads, recompute)
    expected = results(modules[0], grad)
    for module in modules:
        module.to(memory_format=torch.channels_last)
        assert_equal(results(module, grad), expected)
    with torch.set_grad_enabled(grad):
        y = modules[0](image().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_equal(y.detach(), expected["output"])


@pytest.mark.parametrize("recompute", [None, True, False])
def test_meta_device_after_a_call(recompute):
    layer, _ = twins(recompute=recompute)
    layer(image())
    layer.to("meta")
    assert layer.qkv.weight.is_meta
    x = torch.empty(1000, 4, 1000, 1001, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (1000, 16, 1000, 1001)
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.qkv.weight.grad.shape == layer.qkv.weight.shape


def test_skip_init_leaves_the_parameters_to_be_loaded():
    layer = skip_init(sasa.RelativeSelfAttention, 4, 8, 3, 2)
    drawn = sasa.RelativeSelfAttention(4, 8, 3, 2)
    assert all(p.device.type == "cpu" for p in layer.parameters())
    layer.load_state_dict(drawn.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(layer(x), drawn(x))


# --- offloading with accelerate ---


def converted_network(stem=False):
    """A plain layer, one with a crop, one with a crop and a pool, one that pools itself; before them perhaps a stem."""
    network = nn.Sequential(
        sasa.AttentionStem(3, 8, 2, block_size=2) if stem else nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
    )
    return sasa.convert(network, 3, 4, where=lambda name, module: True).eval()


@pytest.mark.parametrize("position", ["relative", "absolute"])
@every_way
def test_cpu_offload_of_a_layer(position, num_heads, recompute, grad):
    """Its parameters are on the meta device, each submodule's on the CPU while its forward runs."""
    import accelerate

    layer = sasa.RelativeSelfAttention(4, 16, 3, num_heads, recompute=recompute, position=position)
    x = image().requires_grad_()
    expected = layer(x)
    expected_grad = torch.autograd.grad(expected.square().sum(), x)[0]
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in layer.parameters())
    with torch.set_grad_enabled(grad):
        y = layer(x)
        assert_equal(y, expected)
        if grad:
            assert_equal(torch.autograd.grad(y.square().sum(), x)[0], expected_grad)
    assert all(p.is_meta for p in layer.parameters())


@every_way
def test_accelerate_hooks_on_the_projection(num_heads, recompute, grad):
    """They replace ``forward`` on the instance."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Change(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (0.5 * args[0],), kwargs

        def post_forward(self, module, output):
            return output + 1

    modules = twins(num_heads, recompute)
    before = results(modules[0], grad)
    for module in modules:
        add_hook_to_module(module.qkv, Change())
    changed = [results(module, grad) for module in modules]
    assert_equal(*changed)
    assert differ(changed[0], before)
    remove_hook_from_module(modules[0].qkv)
    assert_equal(results(modules[0], grad), before)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "attach_align_device_hook"])
def test_offloaded_networks(how, stem, grad, tmp_path):
    import accelerate

    network, x = converted_network(stem), torch.randn(2, 3, 12, 11)
    expected = network(x).detach()
    cpu = torch.device("cpu")
    if how == "cpu_offload":
        accelerate.cpu_offload(network, execution_device=cpu)
    elif how == "disk_offload":
        accelerate.disk_offload(network, tmp_path, execution_device=cpu)
    elif how == "dispatch_model":
        parts = {name: "disk" if int(name) % 2 else "cpu" for name, _ in network.named_children()}
        accelerate.dispatch_model(network, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    else:
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        accelerate.hooks.attach_align_device_hook(network, execution_device=cpu, offload=True, weights_map=weights)
    assert any(p.is_meta for p in network.parameters())
    with torch.set_grad_enabled(grad):
        assert_equal(network(x).detach(), expected)
