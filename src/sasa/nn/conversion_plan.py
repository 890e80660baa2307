"""What a conversion will do: which convolutions become attention, which are left alone, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .._compat import has_hooks
from ..ops import checks
from . import replace
from .aliases import not_reached
from .attention_conv import AttentionConv2d
from .conversion_report import ConversionReport, Entry
from .read_convolution import Convolution, read
from .stem import AttentionStem

Where = Callable[[str, nn.Module], bool]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

OPTIONS = ("position", "position_split", "border", "bias", "scale", "implementation", "recompute")
OPTIONS_KEPT = ("strength", "margin", "implementation", "recompute")  # of AttentionConv2d


class ConversionPlan:
    """The convolutions of a model and what becomes of them. The model is not modified.

    Args: see :func:`sasa.convert`.

    Attributes:
        names: the convolutions to be replaced, in the order of ``model.named_modules()``.
        resnet: name of the module whose stem becomes an :class:`AttentionStem`; None for none.
        report: everything that was found.
    """

    def __init__(
        self,
        model: nn.Module,
        kernel_size: int | Sequence[int] | None,
        num_heads: int,
        where: Where | None,
        stem: bool,
        stride_mode: str,
        grouped: bool,
        keep_function: bool,
        options: dict[str, Any],
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(f"model: expected an nn.Module written in Python, got {type(model).__name__}")
        if where is not None and not callable(where):
            raise TypeError(f"where: expected a function of name and module, or None, got {type(where).__name__}")
        known = OPTIONS_KEPT if checks.flag("keep_function", keep_function) else OPTIONS
        for name in options:
            if name not in known:
                if name in OPTIONS + OPTIONS_KEPT:
                    raise TypeError(f"{name}: not an option of keep_function={keep_function}, got {options[name]!r}")
                raise TypeError(f"{name}: not an argument of convert; layer options are {', '.join(known)}")
        checks.positive("num_heads", num_heads)
        checks.choice("stride_mode", stride_mode, replace.STRIDE_MODES)
        self.kernel_size = None if kernel_size is None else checks.pair("kernel_size", kernel_size)
        if self.kernel_size is None and not keep_function:
            self.kernel_size = 7, 7
        self.num_heads, self.where, self.stride_mode, self.grouped = num_heads, where, stride_mode, grouped
        self.keep_function, self.options = keep_function, options
        for name, value, default in (("num_heads", num_heads, 8), ("stride_mode", stride_mode, "pool")):
            if keep_function and value != default:
                raise ValueError(f"{name}: with keep_function=True the convolution decides it, got {value!r}")
        modules = dict(model.named_modules())
        owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
        self._tied = {key for key, count in owners.items() if count > 1}
        stem_names = _stem(modules)
        self.resnet = (
            next((name for name, module in modules.items() if _has_resnet_stem(module)), None)
            if stem and not keep_function
            else None
        )
        in_resnet_stem = _joined(self.resnet, "conv1") if self.resnet is not None else None
        self.names: list[str] = []
        entries = []
        for name, module in modules.items():
            if name == in_resnet_stem:
                layer = self.build_stem(modules[self.resnet or ""], device="meta")
                entries.append(Entry(name, _describe(module), f"attention stem, {_heads(layer.num_heads)}"))
            elif replace.is_spatial(module):
                assert isinstance(module, nn.Conv2d)  # noqa: S101  (for the type checker)
                entries.append(self._decide(name, module, stem_names, wanted=stem and name in stem_names))
            elif isinstance(module, CONVOLUTIONS) and max(module.kernel_size) > 1:
                why = "transposed" if module.transposed else f"{len(module.kernel_size)}-dimensional"
                entries.append(Entry(name, _describe(module), why=why, kind=why))
            elif isinstance(module, (nn.Conv2d, ParametrizationList)):
                continue
            elif replace.holds_a_kernel(module):
                why = "holds weights for a convolution of its own"
                entries.append(Entry(name, type(module).__name__, why=why, kind="with a kernel of its own"))
        replaced = {id(modules[entry.name]): entry.name for entry in entries if entry.becomes is not None}
        notes = _channels_last_note(modules)
        self.report = ConversionReport(tuple(entries), tuple(not_reached(modules, replaced)), notes)
        if not self.report.converted:
            found = f". {self.report}" if entries else ", got a model without any"
            raise ValueError(f"model: expected a convolution larger than 1x1 that can be converted{found}")

    def _decide(self, name: str, conv: nn.Conv2d, stem_names: set[str], wanted: bool) -> Entry:
        """Decides about one convolution; it is added to ``names`` if it is to be replaced."""
        was = _describe(conv)
        if not (wanted or (name not in stem_names if self.where is None else bool(self.where(name, conv)))):
            return (
                Entry(name, was, why="the stem", kind="stem")
                if self.where is None
                else Entry(name, was, why="not asked for", kind="not asked for")
            )
        found = read(conv)
        if isinstance(found, str):
            if self.where is not None and not wanted:
                raise TypeError(
                    f"model: expected convolutions that can be rebuilt where `where` accepts one, got {name}: {found}"
                )
            return Entry(name, was, why=found, kind="not understood")
        if any(id(p) in self._tied for p in conv.parameters(recurse=False)):
            return Entry(name, was, why="it shares its parameters with another module", kind="with shared parameters")
        if has_hooks(conv, globally=False):
            return Entry(name, was, why="it has hooks, which would be lost", kind="with hooks")
        if self.keep_function:
            small = self._window(conv) is not None and any(
                w < k for w, k in zip(self._window(conv) or (), found.kernel_size, strict=True)
            )
            if small:
                why = f"its kernel is larger than kernel_size={self.kernel_size}"
                return Entry(name, was, why=why, kind="with a larger kernel")
        else:
            why = replace.why_left_alone(conv, found, self.grouped, self.stride_mode)
            if why is not None:
                return Entry(name, was, why=why[1], kind=why[0])
        self.names.append(name)
        becomes = replace.describe(self.build(conv, device="meta"))
        heads = self.num_heads if self.keep_function else replace.nearest_heads(self.num_heads, conv.out_channels)
        if heads == self.num_heads:
            return Entry(name, was, becomes)
        divide = f"{self.num_heads} heads don't divide {conv.out_channels} channels"
        narrow = f"{self.num_heads} heads of {conv.out_channels} channels would be one channel wide"
        return Entry(name, was, becomes, divide if conv.out_channels % self.num_heads else narrow)

    def build(self, conv: nn.Module, **device: Any) -> nn.Module:
        """The replacement for a convolution."""
        assert isinstance(conv, nn.Conv2d)  # noqa: S101  (names holds no other)
        if self.keep_function:
            return AttentionConv2d(conv, kernel_size=self._window(conv), **self.options, **device).train(conv.training)
        found, window = read(conv), self.kernel_size
        assert isinstance(found, Convolution)  # noqa: S101  (names holds no other)
        assert window is not None  # noqa: S101  (likewise)
        return replace.replacement(conv, found, window, self.num_heads, self.stride_mode, self.options | device)

    def _window(self, conv: nn.Conv2d) -> tuple[int, int] | None:
        """The window for keeping a convolution's function: along an axis of one tap, one tap."""
        if self.kernel_size is None:
            return None
        height, width = (w if k > 1 else 1 for w, k in zip(self.kernel_size, conv.kernel_size, strict=True))
        return height, width

    def build_stem(self, resnet: nn.Module, **device: Any) -> AttentionStem:
        """The replacement for the stem of a ResNet."""
        conv = resnet.get_submodule("conv1")
        assert isinstance(conv, nn.Conv2d)  # noqa: S101  (see _has_resnet_stem)
        heads = replace.nearest_heads(self.num_heads, conv.out_channels)
        arguments = {"implementation": self.options.get("implementation"), "device": conv.weight.device}
        arguments |= {"dtype": conv.weight.dtype} | device
        return AttentionStem(conv.in_channels, conv.out_channels, heads, **arguments).train(resnet.training)


def _channels_last_note(modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """A warning about convolutions whose backward, PyTorch 2.15's own, corrupts memory in channels_last on a CPU."""
    names = [
        name
        for name, m in modules.items()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1 and 1 < m.in_channels < 16
    ]
    if not names:
        return ()
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (f"Note: don't train it in channels_last on a CPU, where PyTorch's backward of {listed} corrupts memory.",)


def _stem(modules: dict[str, nn.Module]) -> set[str]:
    """Names of the convolutions before a network's first stage: the first one, and any in the same stem."""
    convs = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and name]
    if not convs or not replace.is_spatial(modules[convs[0]]):
        return set()
    *parents, _ = parts = convs[0].split(".")
    for i, part in enumerate(parents):
        if "stem" in part or part in ("conv1", "patch_embed"):
            prefix = ".".join(parts[: i + 1]) + "."
            return {name for name in convs if name.startswith(prefix)}
    return {convs[0]}


def _has_resnet_stem(module: nn.Module) -> bool:
    """Whether a module starts like timm's and torchvision's ResNets, with a stem that shrinks the image four times."""
    conv, norm, pool = (getattr(module, name, None) for name in ("conv1", "bn1", "maxpool"))
    return (
        isinstance(conv, nn.Conv2d)
        and isinstance(norm, nn.BatchNorm2d)
        and isinstance(pool, nn.MaxPool2d)
        and (conv.stride, conv.groups) == ((2, 2), 1)
        and isinstance(found := read(conv), Convolution)
        and [axis.lost for axis in replace.axes(found)] == [0, 0]
        and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    )


def put_stem(resnet: nn.Module, stem: AttentionStem) -> None:
    """Replace a ResNet's convolution, batch norm, activation and max pool by an attention stem."""
    resnet.add_module("conv1", stem)
    for name in ("bn1", "act1", "relu", "maxpool"):
        if isinstance(getattr(resnet, name, None), nn.Module):
            resnet.add_module(name, nn.Identity())
    info = getattr(resnet, "feature_info", None)  # timm's: module names and their reduction factors
    if isinstance(info, list) and info and info[0].get("module") == "act1":
        info[0] = info[0] | {"reduction": stem.block_size}


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _heads(count: int) -> str:
    return f"{count} head{'' if count == 1 else 's'}"


def _describe(module: nn.Module) -> str:
    """A convolution in a few words."""
    assert isinstance(module, CONVOLUTIONS)  # noqa: S101  (for the type checker)
    kernel = "x".join(map(str, module.kernel_size))
    text = f"{type(module).__name__} {kernel}, {module.in_channels} to {module.out_channels}"
    if set(module.stride) != {1}:
        text += f", stride {module.stride[0]}" if len(set(module.stride)) == 1 else f", stride {module.stride}"
    return text
