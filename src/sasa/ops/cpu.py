"""The C++ kernels (``csrc/``): finds the library, loads it, and calls it with the addresses of tensors.

The library knows nothing of PyTorch: it is built once by CMake when the package is installed, and holds the same
kernels for several instruction sets. Where it could not be built the package works all the same, on the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory_format
from .cpu_structures import (
    INTERFACE_VERSION,
    UNSUPPORTED,
    CAxis,
    CEmbedding,
    CGradients,
    CLinear,
    CProblem,
    CProjection,
    CTensor,
)
from .window import BORDERS, Axis, Window

CAPABILITY_VARIABLE = "SASA_CPU_CAPABILITY"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of sasa_dtype
_FILES = ("libsasa_cpu.so", "libsasa_cpu.dylib")


class CpuLibraryWarning(UserWarning):
    """The compiled CPU kernels are missing: local attention on the CPU runs on the slow reference."""


def _places() -> Iterator[Path]:
    """Where the library may lie: beside this file, or where an editable installation puts what it builds."""
    package = sys.modules[__package__ or "sasa.ops"]
    for folder in dict.fromkeys([str(Path(__file__).parent), *package.__path__]):
        for name in _FILES:
            yield Path(folder) / name


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    found = [path for path in _places() if path.is_file()]
    if not found:
        return None, (
            "the compiled kernels are missing: sasa was installed without a C++ compiler; "
            "install one and run pip install --force-reinstall --no-deps --no-cache-dir sasa-torch"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.sasa_interface_version()
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels can't be loaded: {error}"
    if version != INTERFACE_VERSION:
        return None, (
            f"the compiled kernels are of another version of sasa (interface {version}, expected "
            f"{INTERFACE_VERSION}): install sasa anew"
        )
    library.sasa_capability_name.restype = ctypes.c_char_p
    library.sasa_set_parallel.argtypes = (ctypes.c_void_p,)
    library.sasa_set_parallel.restype = None
    library.sasa_use_huge_pages.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.sasa_use_huge_pages.restype = None
    library.sasa_can_project.argtypes = (ctypes.POINTER(CProblem),)
    library.sasa_can_pool.argtypes = (ctypes.POINTER(CProblem),)
    library.sasa_forward.argtypes = (ctypes.POINTER(CProblem), ctypes.POINTER(CTensor))
    library.sasa_backward.argtypes = (ctypes.POINTER(CProblem), ctypes.POINTER(CGradients))
    library.sasa_linear_gradients.argtypes = (ctypes.POINTER(CLinear),)
    library.sasa_set_parallel(_openmp_of_torch())
    return library, ""


def _openmp_of_torch() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch runs on, so that both share one pool of threads.

    None where PyTorch has another kind of runtime: the library then starts threads of its own for each call.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looking a name up in PyTorch's library also searches the libraries it was linked with.
        runtime = ctypes.CDLL(str(torch_library) if torch_library.is_file() else None)
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def why_missing() -> str | None:
    """Why the compiled kernels can't be used; None if they can."""
    library, reason = _load()
    return None if library is not None else reason


@functools.cache
def _names_of(library: ctypes.CDLL | None) -> tuple[str, ...]:
    if library is None:
        return ()
    return tuple(library.sasa_capability_name(index).decode() for index in range(library.sasa_capability_count()))


def _capabilities() -> tuple[str, ...]:
    return _names_of(_load()[0])


def capabilities() -> list[str]:
    """Instruction sets that the library has and this processor understands, slowest first; empty without a library."""
    return list(_capabilities())


_chosen: str | None = None


def capability() -> str | None:
    """The instruction set in use: the fastest, or what ``SASA_CPU_CAPABILITY`` names; None without a library.

    Raises:
        ValueError: the variable names something else.
    """
    global _chosen
    if _chosen is None and _capabilities():
        set_capability(os.environ.get(CAPABILITY_VARIABLE) or capabilities()[-1], CAPABILITY_VARIABLE)
    return _chosen


def set_capability(name: str, argument: str = "name") -> None:
    """Use another instruction set from now on.

    Args:
        name: one of :func:`capabilities`.
        argument: what to call it in an error.

    Raises:
        ValueError: not one of them.
    """
    global _chosen
    if name not in capabilities():
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, capabilities()))}, got {name!r}")
    _chosen = name


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}. Local attention on the CPU runs on the slow reference.", CpuLibraryWarning, stacklevel=2)


def unsupported(query: Tensor, value: Tensor | None = None) -> str | None:
    """Why the kernels can't compute this query; None when they can. Values may be as wide as they like."""
    if query.device.type != "cpu":
        return f"it computes on the CPU, the query is on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it computes {', '.join(map(str, _DTYPES))}, the query is {query.dtype}"
    reason = why_missing()
    if reason is not None:
        _warn_once(reason)
    return reason


def in_huge_pages(fresh: Tensor) -> Tensor:
    """``fresh``, a new dense tensor, backed by huge pages where the system has them: half of the time of writing a
    large tensor for the first time is page faults.
    """
    size = fresh.numel() * fresh.element_size()
    library, _ = _load()
    if size >= 2**22 and library is not None and fresh.device.type == "cpu":
        library.sasa_use_huge_pages(fresh.data_ptr(), size)
    return fresh


class Projection(NamedTuple):
    """A layer's input and its projections to queries, keys and values, one 1x1 convolution.

    Attributes:
        input: (B, C, H, W).
        weight: (3·N·D, C): queries, keys, values.
        bias: (3·N·D) or None.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) in the memory format of ``query``, and log-sum-exp of the logits (B, N, h, w)."""
    height, width = window.rows.outputs, window.cols.outputs
    output = in_huge_pages(memory_format.empty(query, value.shape[2], height, width))
    lse = _empty_lse(query, *query.shape[:2], height, width)
    if query.shape[0] > 0:
        problem = _problem(query.shape[:3], value.shape[2], row, col, lse, window, border, scale)
        _set_inputs(problem, query, key, value)
        _check(_library().sasa_forward(problem, _tensor(output)))
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    output: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row and col. The output is not needed."""
    dense = [in_huge_pages(memory_format.empty(x, *x.shape[2:])) for x in (query, key, value)]
    lse = lse.contiguous()
    problem = _problem(query.shape[:3], value.shape[2], row, col, lse, window, border, scale)
    _set_inputs(problem, query, key, value)
    return dense[0], dense[1], dense[2], *_backward_into(dense, problem, grad_output, row, col, window)


def can_project(projection: Projection, num_heads: int) -> bool:
    """Whether :func:`forward_projected` takes so many heads: they must fill vectors."""
    if unsupported(projection.input) is not None:
        return False
    channels = projection.weight.shape[0] // 3 // num_heads
    problem = CProblem(
        dtype=_DTYPES.index(projection.input.dtype),
        capability=_capabilities().index(capability() or ""),
        heads=num_heads,
        channels=channels,
        value_channels=channels,
    )
    return bool(_library().sasa_can_project(problem))


def can_pool(window: Window, pool: int) -> bool:
    """Whether :func:`forward_projected` pools the outputs of such windows."""
    problem = CProblem(rows=_axis(window.rows), cols=_axis(window.cols))
    return pool == 1 or (pool == 2 and bool(_library().sasa_can_pool(problem)))


def forward_projected(
    projection: Projection,
    num_heads: int,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
    pool: int = 1,
) -> tuple[Tensor, Tensor]:
    """As :func:`forward`, of queries, keys and values that are projected tile by tile and never exist in memory. The
    output is pooled, if :func:`can_pool`; the log-sum-exp is not.
    """
    shape = _projected_shape(projection, num_heads)
    height, width = window.rows.outputs, window.cols.outputs
    like = projection.input[:, None]  # (B, 1, C, H, W): only its memory format counts
    output = memory_format.empty(
        like.expand(-1, num_heads, -1, -1, -1), shape[2], -(-height // pool), -(-width // pool)
    )
    in_huge_pages(output)
    lse = _empty_lse(projection.input, *shape[:2], height, width)
    if shape[0] > 0:
        problem = _problem(shape, shape[2], row, col, lse, window, border, scale, pool)
        keep = _set_projection(problem, projection)
        _check(_library().sasa_forward(problem, _tensor(output)))
        del keep
    return output, lse


def backward_projected(
    grad_output: Tensor,
    projection: Projection,
    dense: Sequence[Tensor],
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
    pool: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradients of the projected query, key and value into ``dense``; returns those of row and col."""
    shape = dense[0].shape[:3]
    lse = lse.contiguous()
    problem = _problem(shape, shape[2], row, col, lse, window, border, scale, pool)
    keep = _set_projection(problem, projection)
    grads = _backward_into(dense, problem, grad_output, row, col, window)
    del keep
    return grads


def linear_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor | None
) -> bool:
    """Gradients of ``pixels @ weight.T + bias``: writes ``grad_input`` and adds to the other two. False, with nothing
    done, if these matrices are not for this kernel.
    """
    tensors = [grad, pixels, weight, grad_input, grad_weight] + ([] if grad_bias is None else [grad_bias])
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() for x in tensors):
        return False
    problem = CLinear(
        threads=torch.get_num_threads(),
        capability=_capabilities().index(capability() or ""),
        pixels=pixels.shape[0],
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        grad=grad.data_ptr(),
        input=pixels.data_ptr(),
        weight=weight.data_ptr(),
        grad_input=grad_input.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=None if grad_bias is None else grad_bias.data_ptr(),
    )
    status = _library().sasa_linear_gradients(problem)
    if status == UNSUPPORTED:
        return False
    _check(status)
    return True


def _projected_shape(projection: Projection, num_heads: int) -> tuple[int, int, int]:
    return projection.input.shape[0], num_heads, projection.weight.shape[0] // 3 // num_heads


def _empty_lse(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _backward_into(
    dense: Sequence[Tensor],
    problem: CProblem,
    grad_output: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
) -> tuple[Tensor | None, Tensor | None]:
    embeddings = [None if x is None else x.new_zeros(x.shape) for x in (row, col)]
    if (window.rows.outputs, window.cols.outputs) != (window.rows.size, window.cols.size):
        dense[0].zero_()  # pixels that no window is centred on
    if problem.batch > 0:
        gradients = CGradients(_tensor(grad_output), *map(_tensor, dense), *map(_embedding, embeddings))
        _check(_library().sasa_backward(problem, gradients))
    return embeddings[0], embeddings[1]


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _problem(
    shape: Sequence[int],
    value_channels: int,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
    pool: int = 1,
) -> CProblem:
    """A problem of shape (B, N, D) without its inputs."""
    return CProblem(
        border=BORDERS.index(border),
        threads=torch.get_num_threads(),
        capability=_capabilities().index(capability() or ""),
        scale=scale,
        batch=shape[0],
        heads=shape[1],
        channels=shape[2],
        value_channels=value_channels,
        rows=_axis(window.rows),
        cols=_axis(window.cols),
        row=_embedding(row),
        col=_embedding(col),
        lse=lse.data_ptr(),
        pool=pool,
    )


def _set_inputs(problem: CProblem, query: Tensor, key: Tensor, value: Tensor) -> None:
    problem.dtype = _DTYPES.index(query.dtype)
    problem.query, problem.key, problem.value = _tensor(query), _tensor(key), _tensor(value)


def _set_projection(problem: CProblem, projection: Projection) -> tuple[CProjection, Tensor | None]:
    """Points the problem at the projection; what is returned must live as long as the call."""
    x, weight, bias = projection
    bias = None if bias is None else bias.contiguous()
    structure = CProjection(
        input=_tensor(x[:, None]),
        in_channels=x.shape[1],
        weight=weight.data_ptr(),
        weight_stride=weight.stride(),
        bias=None if bias is None else bias.data_ptr(),
    )
    problem.dtype = _DTYPES.index(x.dtype)
    problem.projection = ctypes.pointer(structure)
    return structure, bias


def _tensor(x: Tensor) -> CTensor:
    return CTensor(x.data_ptr(), x.stride())


def _embedding(x: Tensor | None) -> CEmbedding:
    return CEmbedding(None) if x is None else CEmbedding(x.data_ptr(), x.stride())


def _axis(axis: Axis) -> CAxis:
    return CAxis(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation, axis.before)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("local attention on the CPU: not enough memory for the workspace of a thread")
    if status:
        raise RuntimeError(f"local attention on the CPU: the library refused its arguments (status {status})")
