"""Batch norm over the batch of all processes on any device; PyTorch's own synchronises on GPUs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class _Mean(torch.autograd.Function):
    """The mean of a tensor over all processes; so is its gradient's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        mean = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(mean)
        return mean / distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Mean.apply(grads[0])  # type: ignore[return-value]


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose training statistics are those of all processes' batches, equally large.

    Parameters, buffers and their names are the same.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in PyTorch
        """(B, C, H, W), normalised."""
        x = input
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(x)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean: Tensor = _Mean.apply(values.mean((0, 2, 3)))  # type: ignore[assignment]
        centred = values - mean[:, None, None]
        variance: Tensor = _Mean.apply(centred.square().mean((0, 2, 3)))  # type: ignore[assignment]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._remember(mean.detach(), variance.detach(), x.numel() // x.shape[1] * distributed.get_world_size())
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        out = centred * scale[:, None, None]
        return (out + self.bias[:, None, None] if self.affine else out).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """The running statistics; of the variance, the unbiased one."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)  # type: ignore[union-attr, arg-type]
            unbiased = variance * (count / max(1, count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), momentum)  # type: ignore[union-attr, arg-type]


def synchronised(network: nn.Module, gpu: bool) -> nn.Module:
    """The network with its batch norms synchronised: PyTorch's on GPUs, the one above elsewhere."""
    if gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, module in network.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm2d):
            raise TypeError(f"network: expected torch.nn.BatchNorm2d alone, got {type(module).__name__} at {name}")
    return network


def unsynchronised(network: nn.Module) -> nn.Module:
    """The network with ordinary batch norms again, sharing their parameters, for a process by itself."""
    for module in network.modules():
        if type(module) in (SyncBatchNorm2d, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d
    return network
