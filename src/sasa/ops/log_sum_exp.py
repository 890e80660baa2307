r"""Attention together with the log-sum-exp of its logits, both differentiable: an operator pair over the others.

    lse_p = log sum over t of exp(logit_t),    d lse_p / d logit_t = w_t

Output and log-sum-exp are one tensor, (B, N, Dv + 1, H', W'), so that they take the same path as every other operator.
The gradient of the log-sum-exp needs no kernel of its own. Kernels recompute weights as exp(logit - lse) and give a
logit w (dp - sum of w dp), where dp = g·v. For values of 1, c as their gradient and lse + log 2 in place of lse,
weights are halved: w/2 (c - c/2) = w c/4. The taps outside a ``"zero"`` border must have values of 1 as well: there the
images are padded, and the windows are taken inside the padded images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import equation
from .autograd import Operator, apply, needs_gradient
from .implementations import is_the_equation
from .operators import LOCAL, fold_heads
from .precision import without_autocast
from .window import window_of


def attention_and_lse(options: tuple, query: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, H', W') in the query's dtype, and log-sum-exp (B, N, H', W') in that of the sums.

    Args:
        options: kernel_size, stride, dilation, border, scale, implementation.
        query: (B, N, D, H, W).
        rest: key, value, row, col, table.
    """
    tensors = query, *rest
    # Compilers differentiate the registered operator, whose log-sum-exp has no gradient.
    if is_the_equation(options[-1]) or (torch.compiler.is_compiling() and needs_gradient(*tensors)):
        with without_autocast(query):
            joint = _equation(*tensors, *options)
    else:
        joint = apply(_WITH_LSE, options, *tensors)  # type: ignore[arg-type]
    return joint[:, :, :-1].to(query.dtype), joint[:, :, -1]


def _join(output: Tensor, lse: Tensor) -> Tensor:
    return torch.cat((output.to(lse.dtype), lse.unsqueeze(2)), 2)


def _forward(*arguments):
    output, lse = LOCAL.forward(*arguments)
    return _join(output, lse), lse


def _equation(query, key, value, row, col, table, kernel_size, stride, dilation, border, scale, implementation=None):
    window = window_of(query, kernel_size, stride, dilation, border)
    y = equation.attention(query, key, value, row, col, table, window, scale)
    return _join(y, equation.logits(query, key, row, col, table, window, scale).logsumexp(2))


def _backward(grad, query, key, value, row, col, table, lse, *options):
    kernel_size, stride, dilation, border, scale, implementation = options
    rest = scale, implementation
    of_output = LOCAL.backward(grad[:, :, :-1].to(query.dtype), query, key, value, row, col, table, lse, *options)
    window, padding = window_of(query, kernel_size, stride, dilation, border), (0, 0, 0, 0)
    if border == "zero":
        padding, border = (window.cols.before, window.cols.after, window.rows.before, window.rows.after), "valid"
        query, key = F.pad(query, padding), F.pad(key, padding)
    of_lse = LOCAL.backward(
        4 * grad[:, :, -1:].to(query.dtype),
        query,
        key,
        torch.ones_like(query[:, :, :1]),
        row,
        col,
        table,
        lse + math.log(2),
        kernel_size,
        stride,
        dilation,
        border,
        *rest,
    )
    crop = tuple(-n for n in padding)
    q, k, v, *embeddings = of_output
    more_q, more_k, _, *more = of_lse
    embeddings = [a + b for a, b in zip(embeddings, more, strict=True)]
    return q + F.pad(more_q, crop), k + F.pad(more_k, crop), v, *embeddings


_WITH_LSE = Operator(_forward, _backward, _equation, fold_heads)
