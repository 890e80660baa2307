"""The C++ kernels (``csrc/``): finds the library, loads it, and calls it with the addresses of tensors.

The library knows nothing of PyTorch: it is built once by CMake when the package is installed, and holds the same kernels
for several instruction sets. Where it could not be built the package works all the same, on the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import memory_format
from .window import BORDERS, Axis, Window

CAPABILITY_VARIABLE = "SASA_CPU_CAPABILITY"
_INTERFACE_VERSION = 1  # SASA_INTERFACE_VERSION of csrc/local_attention.h, whose structures are repeated here
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of sasa_dtype
_FILES = ("libsasa_cpu.so", "libsasa_cpu.dylib")


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5))


class _Embedding(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3))


class _Axis(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("size", "outputs", "kernel", "stride", "dilation", "before"))


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "border", "threads", "capability")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "channels", "value_channels")),
        *((name, _Axis) for name in ("rows", "cols")),
        *((name, _Tensor) for name in ("query", "key", "value")),
        *((name, _Embedding) for name in ("row", "col")),
        ("lse", ctypes.c_void_p),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("output", "query", "key", "value")),
        *((name, _Embedding) for name in ("row", "col")),
    )


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
            "install one and run pip install --force-reinstall --no-deps sasa-torch"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.sasa_interface_version()
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels can't be loaded: {error}"
    if version != _INTERFACE_VERSION:
        return None, (
            f"the compiled kernels are of another version of sasa (interface {version}, expected "
            f"{_INTERFACE_VERSION}): install sasa anew"
        )
    library.sasa_capability_name.restype = ctypes.c_char_p
    library.sasa_set_parallel.argtypes = (ctypes.c_void_p,)
    library.sasa_set_parallel.restype = None
    library.sasa_use_huge_pages.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.sasa_use_huge_pages.restype = None
    library.sasa_forward.argtypes = (ctypes.POINTER(_Problem), ctypes.POINTER(_Tensor))
    library.sasa_backward.argtypes = (ctypes.POINTER(_Problem), ctypes.POINTER(_Gradients))
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


def capabilities() -> list[str]:
    """Instruction sets that the library has and this processor understands, slowest first; empty without a library."""
    library, _ = _load()
    if library is None:
        return []
    return [library.sasa_capability_name(index).decode() for index in range(library.sasa_capability_count())]


_chosen: str | None = None


def capability() -> str | None:
    """The instruction set in use: the fastest, or what ``SASA_CPU_CAPABILITY`` names; None without a library.

    Raises:
        ValueError: the variable names something else.
    """
    global _chosen
    if _chosen is None and capabilities():
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


def unsupported(query: Tensor) -> str | None:
    """Why the kernels can't compute this query; None when they can."""
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
    library, _ = _load()
    if library is not None and fresh.device.type == "cpu":
        library.sasa_use_huge_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())
    return fresh


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
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((*query.shape[:2], height, width), dtype=sums)
    if query.shape[0] > 0:
        problem = _problem(query, key, value, row, col, lse, window, border, scale)
        library, _ = _load()
        assert library is not None  # noqa: S101  (`unsupported` has seen to it)
        _check(library.sasa_forward(problem, _tensor(output)))
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row and col."""
    dense = [in_huge_pages(memory_format.empty(x, *x.shape[2:])) for x in (query, key, value)]
    embeddings = [None if x is None else x.new_zeros(x.shape) for x in (row, col)]
    if (window.rows.outputs, window.cols.outputs) != tuple(query.shape[3:]):
        dense[0].zero_()  # pixels that no window is centred on
    if query.shape[0] > 0:
        lse = lse.contiguous()
        problem = _problem(query, key, value, row, col, lse, window, border, scale)
        gradients = _Gradients(_tensor(grad_output), *map(_tensor, dense), *map(_embedding, embeddings))
        library, _ = _load()
        assert library is not None  # noqa: S101
        _check(library.sasa_backward(problem, gradients))
    return dense[0], dense[1], dense[2], embeddings[0], embeddings[1]


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> _Problem:
    return _Problem(
        dtype=_DTYPES.index(query.dtype),
        border=BORDERS.index(border),
        threads=torch.get_num_threads(),
        capability=capabilities().index(capability() or ""),
        scale=scale,
        batch=query.shape[0],
        heads=query.shape[1],
        channels=query.shape[2],
        value_channels=value.shape[2],
        rows=_axis(window.rows),
        cols=_axis(window.cols),
        query=_tensor(query),
        key=_tensor(key),
        value=_tensor(value),
        row=_embedding(row),
        col=_embedding(col),
        lse=lse.data_ptr(),
    )


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (ctypes.c_int64 * 5)(*x.stride()))


def _embedding(x: Tensor | None) -> _Embedding:
    return _Embedding(None) if x is None else _Embedding(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()))


def _axis(axis: Axis) -> _Axis:
    return _Axis(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation, axis.before)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("local attention on the CPU: not enough memory for the workspace of a thread")
    if status:
        raise RuntimeError(f"local attention on the CPU: the library refused its arguments (status {status})")
