"""The private parts of other libraries that the package needs, in one place, each with the reason.

When moving to another version of PyTorch, look here first: see ``docs/dev/new-pytorch.md``.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as transforms_active  # noqa: F401
from torch._C import _AutoDispatchBelowAutograd as below_autograd  # noqa: F401
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch._ops import OpOverload  # noqa: F401
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# below_autograd: an operator with its own kernel for the Autograd key calls its next kernel inside this guard; Python
# has no public redispatch. OpOverload, TorchDispatchMode: documented, but only under private modules.
# transforms_active: whether torch.func.grad, vmap or jvp is active; the public way is to try and catch an error.


def is_recorded(x: Tensor) -> bool:
    """Whether a mode, a tracer or the profiler observes operators, or ``x`` is a batch of ``is_grads_batched``.

    An unobserved call may bypass PyTorch's dispatcher, which costs more than a small layer.
    """
    return (
        _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
        or is_legacy_batchedtensor(x)
    )


def has_hooks(module: nn.Module, globally: bool = True) -> bool:
    """Whether calling the module runs more than its forward; ``globally``: hooks on all modules count too.

    There is no public API for this. Layers that read a submodule's parameters instead of calling it need to know.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (globally and nn.modules.module._has_any_global_hook())
    )


def hub_config(network: Any) -> dict[str, Any]:
    """The arguments that a network with Hugging Face's mixin was built with; the mixin has no public attribute."""
    return dict(network._hub_mixin_config or {})


def replaces_forward(conv: nn.Conv2d) -> bool:
    """Whether this instance's forward differs from its class's, as patched by accelerate and others."""
    return "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__


def computes_as_conv2d(conv: nn.Conv2d) -> bool:
    """Whether the module's class overrides none of the methods by which ``torch.nn.Conv2d`` computes."""
    names = ("__call__", "forward", "_conv_forward")
    return all(getattr(type(conv), name) is getattr(nn.Conv2d, name) for name in names)


def compile_package(program: ExportedProgram, path: str, metadata: dict[str, str]) -> None:
    """AOTInductor's package of a program; documented, but only under private modules."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=path, inductor_configs={"aot_inductor.metadata": metadata})


def size_is_bound() -> type[Exception]:
    """What ``torch.export.export`` raises for a network whose code depends on a size that should be dynamic."""
    from torch._dynamo.exc import UserError

    return UserError


def take_whole(layers: ModuleType, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have fastai (its module ``fastai.layers``) list modules of these kinds as one layer each.

    ``learn.summary()`` and the callbacks that hook layers descend to modules without children. For a module with both
    children and its own parameters they list only the children, and lose the parameters. fastai has no public way to
    stop the descent.
    """
    has_children = getattr(layers, "has_children", None)
    if has_children is None:  # another version of fastai
        return

    @functools.wraps(has_children)
    def to_take_apart(m: nn.Module) -> bool:
        return not isinstance(m, kinds) and has_children(m)

    layers.has_children = to_take_apart  # type: ignore[attr-defined]
