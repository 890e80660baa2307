"""Hooks of every kind on the layer and on its projection are called as by hand, and what they return counts."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from twins import assert_equal, differ, every_way, image, results, twins


def only(target, hook):
    """A hook for all modules that acts on one."""
    return lambda module, *arguments: hook(module, *arguments) if module is target else None


def forward_hooks(seen):
    """What hooks do, by name: they note what they see and change it."""
    return {
        "forward": lambda m, args, y: seen.append((*args, y)) or 1.5 * y,
        "forward_with_kwargs": lambda m, args, kwargs, y: seen.append((*args, y)) or 1.5 * y,
        "forward_pre": lambda m, args: seen.append(args) or (0.5 * args[0],),
        "forward_pre_with_kwargs": lambda m, args, kwargs: seen.append(args) or ((0.5 * args[0],), kwargs),
        "full_backward": lambda m, inputs, outputs: seen.append(outputs) or tuple(2 * g for g in inputs),
        "full_backward_pre": lambda m, outputs: seen.append(outputs) or tuple(3 * g for g in outputs),
    }


REGISTER = {
    "forward": (nn.Module.register_forward_hook, "forward", {}),
    "forward_first": (nn.Module.register_forward_hook, "forward", {"prepend": True}),
    "forward_with_kwargs": (nn.Module.register_forward_hook, "forward_with_kwargs", {"with_kwargs": True}),
    "forward_always_called": (nn.Module.register_forward_hook, "forward", {"always_call": True}),
    "forward_pre": (nn.Module.register_forward_pre_hook, "forward_pre", {}),
    "forward_pre_with_kwargs": (nn.Module.register_forward_pre_hook, "forward_pre_with_kwargs", {"with_kwargs": True}),
    "full_backward": (nn.Module.register_full_backward_hook, "full_backward", {}),
    "full_backward_pre": (nn.Module.register_full_backward_pre_hook, "full_backward_pre", {}),
    "global_forward": (global_hooks.register_module_forward_hook, "forward", {}),
    "global_forward_with_kwargs": (
        global_hooks.register_module_forward_hook,
        "forward_with_kwargs",
        {"with_kwargs": True},
    ),
    "global_forward_always_called": (global_hooks.register_module_forward_hook, "forward", {"always_call": True}),
    "global_forward_pre": (global_hooks.register_module_forward_pre_hook, "forward_pre", {}),
    "global_full_backward": (global_hooks.register_module_full_backward_hook, "full_backward", {}),
    "global_full_backward_pre": (global_hooks.register_module_full_backward_pre_hook, "full_backward_pre", {}),
}


def register(name, target, seen):
    function, does, options = REGISTER[name]
    hook = forward_hooks(seen)[does]
    if name.startswith("global"):
        return function(only(target, hook), **options)
    return function(target, hook, **options)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", REGISTER)
def test_a_hook_on_the_layer_is_called_once_and_what_it_returns_counts(name, grad):
    check_hook(name, lambda module: module, 8, None, grad)


@every_way
@pytest.mark.parametrize("name", REGISTER)
def test_a_hook_on_the_projection_is_called_once_and_what_it_returns_counts(name, num_heads, recompute, grad):
    check_hook(name, lambda module: module.qkv, num_heads, recompute, grad)


def check_hook(name, part, num_heads, recompute, grad):
    modules = twins(num_heads, recompute)
    without = results(modules[0], grad)
    with_hook, calls = [], []
    for module in modules:
        seen = []
        handle = register(name, part(module), seen)
        with_hook.append(results(module, grad))
        handle.remove()
        calls.append(seen)
    called = grad or "backward" not in name
    assert [len(seen) for seen in calls] == [int(called)] * 2
    assert_equal(calls[0], calls[1])
    assert_equal(*with_hook)
    assert differ(with_hook[0], without) == called
    assert_equal(results(modules[0], grad), without)  # the hook is gone, and its effect with it


@pytest.mark.parametrize("num_heads", [8, 2])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_backward_hooks_of_the_old_kind_on_the_projection(num_heads, recompute):
    """They get what the last node of the module's graph gets, and PyTorch warns that this may not be all."""
    modules, calls, grads = twins(num_heads, recompute), [], []
    for module in modules:
        seen = []
        module.qkv.register_backward_hook(
            lambda m, inputs, outputs, seen=seen: (
                seen.append(outputs) or tuple(g if g is None else 2 * g for g in inputs)
            )
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            grads.append(results(module))
        calls.append(seen)
    assert [len(seen) for seen in calls] == [1, 1]
    assert_equal(calls[0], calls[1])
    assert_equal(*grads)


@every_way
def test_hooks_see_keyword_arguments(num_heads, recompute, grad):
    layer, _ = twins(num_heads, recompute)
    seen = []
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, list(kwargs))), with_kwargs=True)
    with torch.set_grad_enabled(grad):
        assert_equal(layer(x=image()), layer(image()))
    assert seen[0] == ((), ["x"]) and len(seen[1][0]) == 1


@every_way
@pytest.mark.parametrize("part", ["layer", "qkv"])
def test_hooks_that_are_always_called_are_called_after_an_error(part, num_heads, recompute, grad):
    layer, _ = twins(num_heads, recompute)

    def fail(module, args):
        raise RuntimeError("stop")

    seen = []
    target = layer if part == "layer" else layer.qkv
    target.register_forward_hook(lambda m, args, y: seen.append(y), always_call=True)
    layer.qkv.register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="stop"):
        layer(image())
    assert seen == [None]


@every_way
def test_global_forward_hooks_see_the_layer_and_its_projection(num_heads, recompute, grad):
    modules = nn.ModuleDict(dict(zip(("layer", "hand"), twins(num_heads, recompute), strict=True)))
    seen = []
    handle = global_hooks.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        for module in modules.values():
            results(module, grad)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "RelativeSelfAttention", "Conv2d", "ByHand"]


def test_state_dict_hooks_of_layer_and_projection():
    layer, _ = twins()
    calls = []
    for name, module in (("layer", layer), ("qkv", layer.qkv)):
        module.register_state_dict_pre_hook(lambda m, prefix, keep, name=name: calls.append((f"{name} before", prefix)))
        module.register_state_dict_post_hook(
            lambda m, state, prefix, local, name=name: state.__setitem__(f"{prefix}{name}_note", torch.ones(1))
        )
        module.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *rest, name=name: state.pop(f"{prefix}{name}_note")
        )
        module.register_load_state_dict_post_hook(lambda m, keys, name=name: calls.append((f"{name} after", keys)))
    state = layer.state_dict()
    names = {"qkv.weight", "qkv.bias", "row_embedding", "col_embedding"}
    assert set(state) == names | {"layer_note", "qkv.qkv_note"}
    assert calls == [("layer before", ""), ("qkv before", "qkv.")]
    layer.load_state_dict(state)
    assert [name for name, _ in calls[2:]] == ["qkv after", "layer after"]
    assert set(state) == names | {"layer_note", "qkv.qkv_note"}  # the caller's dict is the caller's
