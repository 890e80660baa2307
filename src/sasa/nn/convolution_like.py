"""Attributes that other code reads from a network's convolutions, provided by their replacements."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .._compat import has_hooks, replaces_forward


class ConvolutionLike(nn.Module):
    """Attributes of ``nn.Conv2d`` whose values are the same for all attention layers.

    Subclasses have ``in_channels``, ``out_channels``, ``kernel_size``, ``stride``, ``padding`` and ``dilation``.
    """

    padding_mode: ClassVar[str] = "zeros"
    groups: ClassVar[int] = 1
    transposed: ClassVar[bool] = False
    output_padding: ClassVar[tuple[int, int]] = (0, 0)
    shows_bias: bool = True  # False when replacing a convolution without one, whatever the projections have

    def _projection(self) -> nn.Module:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The projections' weight, for its dtype and device; not the kernel of a convolution."""
        projection = self._projection()
        found = getattr(projection, "weight", None)  # a wrapper around a convolution may have none
        return found if isinstance(found, Tensor) else next(projection.parameters())

    @property
    def bias(self) -> Tensor | None:
        """The projections' bias; None if they have none, or if this replaces a convolution that had none."""
        return getattr(self._projection(), "bias", None) if self.shows_bias else None

    def __prepare_scriptable__(self) -> nn.Module:  # called by torch.jit.script
        raise NotImplementedError(
            f"{type(self).__name__}: TorchScript is not supported; use torch.export.export or torch.compile"
        )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own 1x1 convolution: its forward not replaced, its weight not computed."""
    return (
        type(module) is nn.Conv2d  # parametrized modules have their own class
        and not replaces_forward(module)
        and (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
    )


def runs_alone(module: nn.Module, globally: bool = True) -> bool:
    """Whether calling a module runs a plain 1x1 convolution and nothing else, so its weight and bias are all there is.

    ``globally``: hooks on all modules count too.
    """
    return is_plain(module) and not has_hooks(module, globally)
