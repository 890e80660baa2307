"""Batch norm folded into the convolution before it: fewer operations, the same function in evaluation mode."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .._compat import has_hooks
from ..ops import checks

Model = TypeVar("Model", bound=nn.Module)


class _Tracer(fx.Tracer):
    """Doesn't trace into sasa's modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("sasa.nn")
        return own or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(model: Model, *, inplace: bool = False) -> Model:
    r"""The network with its batch norms folded into the convolutions whose only consumer they are.

    .. math::
        W' = W \, \gamma / \sqrt{\sigma^2 + \varepsilon}, \qquad
        b' = (b - \mu) \, \gamma / \sqrt{\sigma^2 + \varepsilon} + \beta

    Batch norms after attention are kept: beyond a zero border values are 0, whatever their bias is. Folded ones are
    replaced by ``nn.Identity``.

    Args:
        model: a network in evaluation mode that ``torch.fx`` can trace, such as those of timm and torchvision.
        inplace: change ``model`` itself instead of a copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is in training mode, or its forward can't be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    checks.flag("inplace", inplace)
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model: expected evaluation mode, model.eval(), got {training[0]} in training mode")
    model = model if inplace else copy.deepcopy(model)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the network's code may raise anything on a symbol
        raise ValueError(
            f"model: expected a network that torch.fx can trace, got {type(model).__name__}: {error}"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = [id(modules[str(node.target)]) for node in calls]
    for node in calls:
        norm, source = modules[str(node.target)], node.args[0] if node.args else None
        if type(norm) is not nn.BatchNorm2d or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv = modules[str(source.target)]
        once = times.count(id(conv)) == times.count(id(norm)) == 1 and len(source.users) == 1
        if type(conv) is not nn.Conv2d or norm.running_mean is None:
            continue
        plain = not has_hooks(conv) and not has_hooks(norm)
        if once and plain:
            _replace(model, str(source.target), fuse_conv_bn_eval(conv, norm))
            _replace(model, str(node.target), nn.Identity().eval())
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
