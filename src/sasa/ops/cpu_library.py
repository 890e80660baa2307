"""The library of the C++ kernels (``csrc/``): finding and loading it, and the choice of an instruction set.

The library knows nothing of PyTorch: it is built once by CMake when the package is installed, and holds the same
kernels for several instruction sets. Without it the package falls back to plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .cpu_structures import INTERFACE_VERSION, STRUCTURES, CBlockGradients, CBlockResults, CBlocks, CLinear, CProblem

CAPABILITY_VARIABLE = "SASA_CPU_CAPABILITY"
_FILES = ("libsasa_cpu.so", "libsasa_cpu.dylib")


def _places() -> Iterator[Path]:
    """Where the library may be: next to this file, or where an editable installation puts its build output."""
    package = sys.modules[__package__ or "sasa.ops"]
    for folder in dict.fromkeys([str(Path(__file__).parent), *package.__path__]):
        for name in _FILES:
            yield Path(folder) / name


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason it is missing."""
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
            f"{INTERFACE_VERSION}): install sasa again"
        )
    library.sasa_structure_size.restype = ctypes.c_int64
    for index, structure in enumerate(STRUCTURES):
        size = library.sasa_structure_size(index)
        if size != ctypes.sizeof(structure):
            return None, (
                f"the compiled kernels expect {size} bytes of {structure.__name__}, which has "
                f"{ctypes.sizeof(structure)} here: install sasa again"
            )
    _declare(library)
    library.sasa_set_parallel(_openmp_of_torch())
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    library.sasa_capability_name.restype = ctypes.c_char_p
    library.sasa_set_parallel.argtypes = (ctypes.c_void_p,)
    library.sasa_set_parallel.restype = None
    library.sasa_use_huge_pages.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.sasa_use_huge_pages.restype = None
    for name in ("sasa_can_project", "sasa_prefers_projected", "sasa_can_pool"):
        getattr(library, name).argtypes = (ctypes.POINTER(CProblem),)
    library.sasa_forward.argtypes = library.sasa_backward.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.sasa_linear_gradients.argtypes = (ctypes.POINTER(CLinear),)
    library.sasa_blocks_forward.argtypes = ctypes.POINTER(CBlocks), ctypes.POINTER(CBlockResults)
    library.sasa_blocks_backward.argtypes = ctypes.POINTER(CBlocks), ctypes.POINTER(CBlockGradients)


def _openmp_of_torch() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch runs on, so that both share one pool of threads.

    None if PyTorch uses another runtime: the library then starts its own threads for each call.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looking up a symbol in PyTorch's library also searches the libraries it is linked against.
        runtime = ctypes.CDLL(str(torch_library) if torch_library.is_file() else None)
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def library() -> ctypes.CDLL:
    """The library; raises RuntimeError with the reason if there is none."""
    found, reason = load()
    if found is None:
        raise RuntimeError(reason)
    return found


def why_missing() -> str | None:
    """Why the compiled kernels can't be used; None if they can."""
    found, reason = load()
    return None if found is not None else reason


@functools.cache
def _names_of(found: ctypes.CDLL | None) -> tuple[str, ...]:
    if found is None:
        return ()
    return tuple(found.sasa_capability_name(index).decode() for index in range(found.sasa_capability_count()))


def capabilities() -> list[str]:
    """Instruction sets that the library has and this processor understands, slowest first; empty without a library."""
    return list(_names_of(load()[0]))


_chosen: int | None = None


def capability_index() -> int:
    """The instruction set in use as the library counts them, see :func:`capability`; -1 without a library."""
    if _chosen is not None:
        return _chosen
    name = capability()
    return -1 if name is None else capabilities().index(name)


def capability() -> str | None:
    """The instruction set in use: the fastest, or what ``SASA_CPU_CAPABILITY`` names; None without a library.

    Raises:
        ValueError: the variable names no available instruction set.
    """
    names = capabilities()
    if not names:
        return None
    if _chosen is None:
        set_capability(os.environ.get(CAPABILITY_VARIABLE) or names[-1], CAPABILITY_VARIABLE)
    return names[_chosen or 0]


def set_capability(name: str, argument: str = "name") -> None:
    """Use another instruction set from now on.

    Args:
        name: one of :func:`capabilities`.
        argument: its name in error messages.

    Raises:
        ValueError: not one of them.
    """
    global _chosen
    if name not in capabilities():
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, capabilities()))}, got {name!r}")
    _chosen = capabilities().index(name)
