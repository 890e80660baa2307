"""Conversion of any convolutional network to attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from .conversion_plan import ConversionPlan, Where, put_stem
from .conversion_report import ConversionReport

Model = TypeVar("Model", bound=nn.Module)

CONVERSIONS = "sasa_conversions"  # attribute of converted networks: the arguments they were converted with


def convert(
    model: Model,
    kernel_size: int | Sequence[int] | None = None,
    num_heads: int = 8,
    *,
    where: Where | None = None,
    stem: bool = False,
    stride_mode: str = "pool",
    grouped: bool = False,
    keep_function: bool = False,
    inplace: bool = False,
    verbose: bool = False,
    **options: Any,
) -> Model:
    """Replace the spatial convolutions of a network by local self-attention, and return it.

    Every feature map keeps its size, whatever the image size. The attention's parameters are freshly initialised, on
    the device and in the dtype of the convolution's; train (or fine-tune) the network before use. Source: arXiv
    1906.05909, section 3.2. With ``keep_function=True`` the network computes what it did before, up to rounding, and
    can be fine-tuned from there.

    What becomes of a convolution larger than 1x1, unless its function is kept:

    - stride 1, padding that keeps the size: :class:`RelativeSelfAttention`, with biases whether or not the convolution
      has one, since the queries' bias lets each head start on its own tap (``bias=False``: without);
    - a stride: attention at every pixel, then average pooling with that stride (``stride_mode="pool"``, as in the
      paper), or attention at every stride-th pixel (``"strided"``);
    - dilation is kept; a 1xk or kx1 kernel gets a window of 1 x ``kernel_size`` or ``kernel_size`` x 1; even kernels
      are treated as odd ones;
    - less padding than needed to keep the size: the pixels that the convolution loses are cropped after attention;
    - more padding than needed to keep the size, a ``padding_mode`` other than zeros, groups (unless ``grouped``), hooks
      on the module: left alone;
    - subclasses of ``nn.Conv2d`` with their own forward: converted if, run on a few small images, they compute a single
      convolution of the padded image (standardized weights, TensorFlow's "same" padding), else left alone;
    - transposed, one- and three-dimensional convolutions, convolutions that share parameters with others: left alone.
      Calls to ``torch.nn.functional.conv2d`` can't be detected; modules that hold weights for one are listed.

    Args:
        model: the network, from timm, torchvision or your own.
        kernel_size: window of the attention, int or (height, width). None: 7, or the convolution's if its function is
            kept.
        num_heads: number of heads; if it doesn't divide a layer's channels, the nearest number that does.
        where: which convolutions to replace: ``where(name, module)`` is called for each that is larger than 1x1, with
            its name in ``model.named_modules()``. None: all but the stem, i.e. the first convolution of the network and
            any in the same ``stem`` or ``conv1``.
        stem: replace the stem too. The stem of timm's and torchvision's ResNets (7x7 convolution, batch norm,
            activation, max pool) becomes an :class:`AttentionStem`; others are treated like all other convolutions.
        stride_mode: ``"pool"`` or ``"strided"``.
        grouped: also convert depthwise and grouped convolutions, although attention projects all channels.
        keep_function: replace convolutions by :class:`AttentionConv2d`, which computes the same until it is trained: of
            any stride, padding, ``padding_mode`` and dilation, including grouped and depthwise ones. It has one head
            per tap of the convolution, and its window unless ``kernel_size`` gives another.
        inplace: change ``model`` itself. By default a copy is changed.
        verbose: print a table of what was converted, what was left alone, and why: see :func:`conversion_report`.
        **options: ``position``, ``position_split``, ``border``, ``bias``, ``scale``, ``implementation``,
            ``recompute`` of :class:`RelativeSelfAttention`; ``strength``, ``margin``, ``implementation``,
            ``recompute`` of :class:`AttentionConv2d`.

    Returns:
        The converted network: ``model`` itself if ``inplace``.

    Warns:
        UserWarning: fewer than a third of the requested ``nn.Conv2d`` could be converted, or an attribute outside the
            module tree (a list, a bound method) still holds a convolution.

    Raises:
        ValueError: there is nothing to convert, or an argument is out of range. The model is unchanged.
        TypeError: an argument has the wrong type, or ``where`` accepts a class of convolution that can't be rebuilt.
            The model is unchanged.

    Example:
        >>> network = sasa.convert(timm.create_model("resnet50"))
    """
    plan = ConversionPlan(model, kernel_size, num_heads, where, stem, stride_mode, grouped, keep_function, options)
    arguments = {"kernel_size": kernel_size, "num_heads": num_heads, "stem": stem, "stride_mode": stride_mode}
    arguments |= {"grouped": grouped, "keep_function": keep_function} | options
    names = [entry.name for entry in plan.report.converted]
    done = [*vars(model).get(CONVERSIONS, ()), {"arguments": arguments, "names": names}]
    if plan.names == [""]:
        if inplace:
            raise ValueError("inplace: expected False for a model that is itself a convolution, got True")
        layer = plan.build(model)
        setattr(layer, CONVERSIONS, done)
        return layer  # type: ignore[return-value]
    if not inplace:
        model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    # All are built before any is inserted, so that an error leaves the model unchanged.
    built = {id(modules[name]): plan.build(modules[name]) for name in plan.names}
    attention_stem = None if plan.resnet is None else plan.build_stem(modules[plan.resnet])
    for parent in modules.values():
        for name, child in parent._modules.items():  # a module may have several names
            if id(child) in built:
                parent._modules[name] = built[id(child)]
    if attention_stem is not None:
        put_stem(modules[plan.resnet or ""], attention_stem)
    setattr(model, CONVERSIONS, done)
    if verbose:
        print(plan.report)  # noqa: T201
    _warn(plan.report)
    return model


def _warn(report: ConversionReport) -> None:
    """Warn of what a user may not expect: that little was converted, or that code may still call a convolution."""
    if report.few:
        warnings.warn(f"model: {report.summary}", UserWarning, stacklevel=3)
    if report.not_reached:
        warnings.warn(f"model: not reached by the conversion: {'; '.join(report.not_reached)}", stacklevel=3)


def conversion_report(
    model: nn.Module,
    kernel_size: int | Sequence[int] | None = None,
    num_heads: int = 8,
    *,
    where: Where | None = None,
    stem: bool = False,
    stride_mode: str = "pool",
    grouped: bool = False,
    keep_function: bool = False,
    **options: Any,
) -> ConversionReport:
    """What :func:`convert` would do with these arguments, without doing it.

    Args:
        model: this and all others as in :func:`convert`.
        kernel_size: window of the attention.
        num_heads: heads.
        where: which convolutions to replace.
        stem: replace the stem too.
        stride_mode: ``"pool"`` or ``"strided"``.
        grouped: also convert depthwise and grouped convolutions.
        keep_function: attention that computes what the convolutions do.
        **options: further options of the layers.

    Raises:
        ValueError: as :func:`convert`.
        TypeError: as :func:`convert`.
    """
    return ConversionPlan(
        model, kernel_size, num_heads, where, stem, stride_mode, grouped, keep_function, options
    ).report
