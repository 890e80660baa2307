"""The compiled kernels: what no other implementation has, a library to be found, instruction sets, addresses."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracles import BORDERS, NAMES, Case, layouts, pair, solve_tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sasa
from sasa.ops import cpu, cpu_library
from sasa.ops.window import window

LAYOUTS = layouts()
HALVES = (torch.bfloat16, torch.float16)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
capabilities = pytest.mark.parametrize("capability", cpu.capabilities())


def grad_of(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def run(tensors: dict[str, Tensor], case: Case, name: str | None = "cpu") -> dict[str, Tensor]:
    """Output and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **case.options, implementation=name)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_of(output))
    return {"output": output.detach(), **{f"grad {x}": grad for x, grad in zip(leaves, grads, strict=True)}}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


def test_kernels_are_built():
    assert cpu.why_missing() is None
    assert cpu.capabilities()[0] == "default"


# Instruction sets.


def in_a_fresh_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)


CALL = "import torch, sasa; x = torch.ones(1, 1, 2, 3, 3); sasa.local_attention(x, x, x, 3); "


def test_the_environment_chooses_the_instruction_set():
    """The slowest, as the fastest is taken anyway."""
    done = in_a_fresh_process(CALL + "print(sasa.ops.cpu.capability())", SASA_CPU_CAPABILITY="default")
    assert done.stdout.strip() == "default", done.stderr


def test_an_unknown_instruction_set_in_the_environment_is_refused():
    known = ", ".join(map(repr, cpu.capabilities()))
    done = in_a_fresh_process(CALL, SASA_CPU_CAPABILITY="avx1024")
    assert f"ValueError: SASA_CPU_CAPABILITY: expected one of {known}, got 'avx1024'" in done.stderr


def test_an_unknown_instruction_set_is_refused_and_the_old_one_stays():
    before = cpu.capability()
    with pytest.raises(ValueError, match=r"^name: expected one of 'default'.*, got 'avx1024'$"):
        cpu.set_capability("avx1024")
    assert cpu.capability() == before


# Threads.

LARGE = [
    pytest.param(case, id=str(case))
    for case in (
        Case(size=(40, 9), kernel_size=7, width=16, scale=0.5),  # one image, cut into segments of rows
        Case(size=(9, 150), kernel_size=7, width=96, value_width=40, heads=1),  # wide: cut into strips of columns
        Case(size=(5, 6), batch=19, heads=3, width=8),  # many images, lanes left over
        Case(size=(31, 20), kernel_size=(4, 5), stride=(2, 3), dilation=(3, 2), batch=3, border="mask"),
        Case(size=(50, 11), kernel_size=5, batch=9, heads=4, border="valid", stride=2),
    )
]
large = pytest.mark.parametrize("case", LARGE)


@large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_equal_bits(case, dtype):
    tensors, before = case.tensors(dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(tensors, case))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_python_threads_at_once_on_different_shapes_give_equal_bits():
    """Each gets what it gets alone, however often."""
    cases = [Case(), Case(size=(9, 3), batch=5, width=7), Case(size=(6, 6), kernel_size=5, border="mask", heads=8)]
    problems = [(case.tensors(torch.float32), case) for case in cases]
    alone = [run(*problem) for problem in problems]

    def worker(index: int) -> None:
        for _ in range(100):
            assert_same_bits(run(*problems[index]), alone[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(worker, range(3)))


@linux_only
def test_threads_are_those_of_pytorch():
    """No second OpenMP runtime is loaded, and no thread started beside PyTorch's."""
    done = in_a_fresh_process("""
import os, re, torch
torch.set_num_threads(2)
x = torch.ones(2, 8, 16, 32, 32, requires_grad=True)
x.sin().sum().backward()

def runtimes():
    with open("/proc/self/maps") as maps:
        return set(re.findall(r"/\\S*lib(?:gomp|iomp|omp)\\S*", maps.read()))

def threads():
    return len(os.listdir("/proc/self/task"))

before = runtimes(), threads()
import sasa
for _ in range(3):
    sasa.local_attention(x, x, x, 3, implementation="cpu").sum().backward()
    assert (runtimes(), threads()) == before, (runtimes(), threads(), before)
assert before[0]
""")
    assert done.returncode == 0, done.stderr


# Accuracy.


@large
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@capabilities
def test_errors_are_at_most_twice_those_of_the_fallback(case, dtype, capability, monkeypatch):
    """Largest errors against float64, of the output and of every gradient; and an epsilon of the largest number."""
    monkeypatch.setattr(cpu_library, "_chosen", cpu.capabilities().index(capability))
    tensors = case.tensors(dtype)
    right = run({name: x.double() for name, x in tensors.items()}, case, "eager")
    fallback = run(tensors, case, "eager")
    for name, got in run(tensors, case).items():
        error, allowed = ((x.double() - right[name]).abs().max() for x in (got, fallback[name]))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * right[name].abs().max(), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@capabilities
def test_halves_are_rounded_to_the_nearest_and_ties_to_even(dtype, capability, monkeypatch):
    """Windows of two pixels with equal weights: the mean of two numbers, any two of both signs, a step apart or far."""
    monkeypatch.setattr(cpu_library, "_chosen", cpu.capabilities().index(capability))
    bits = torch.cat([torch.arange(0, 2**15, 97), torch.arange(0x3C00, 0x3C40), torch.arange(40)]).to(torch.int16)
    finite = bits.view(dtype)[bits.view(dtype).isfinite()]
    value = torch.cat([finite, -finite])
    value = torch.cat([value, value[torch.randperm(len(value))]]).view(1, 1, 1, 1, -1)
    output = sasa.local_attention(torch.zeros_like(value), value.sign(), value, (1, 2), border="valid")
    wide = value.float()
    assert torch.equal(output, ((wide[..., 1:] + wide[..., :-1]) / 2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("spoilt", ["query", "key", "value", "row_embedding"])
@pytest.mark.parametrize("by", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("border", BORDERS)
def test_numbers_that_are_not_finite_spread_as_in_the_fallback(border, by, spoilt, dtype):
    case = Case(size=(4, 5), border=border)
    tensors = case.tensors(dtype)
    tensors[spoilt].view(-1)[tensors[spoilt].numel() // 2] = by
    expected = run(tensors, case, "eager")
    solution = solve_tensors(tensors, grad_of(expected["output"]), **case.options)
    assert torch.equal(expected["grad value"].isnan(), solution.right["grad value"].isnan())  # and as in the loops
    for name, got in run(tensors, case).items():
        torch.testing.assert_close(got.isnan(), expected[name].isnan(), msg=name)
        infinite = expected[name].isinf()
        assert torch.equal(got[infinite], expected[name][infinite]), name


# Addresses.


class Memory:
    """Fresh memory that ends at pages which no one may read or write; tensors lie flush against its end or start."""

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.maps: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor full of NaN."""
        numel = torch.Size(shape).numel()
        used, page = numel * dtype.itemsize, mmap.PAGESIZE
        inside = -(-used // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        self.maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (start, start + page + inside):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        offset = page + (inside - used if self.at_end else 0)
        return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset).fill_(torch.nan).view(shape)

    def like(self, x: Tensor) -> Tensor:
        """The same numbers with the same strides, which must leave no gaps."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        moved = self.empty(tuple(x.shape[i] for i in order), x.dtype)
        return moved.permute([order.index(i) for i in range(x.dim())]).copy_(x)


class InMemory(TorchFunctionMode):
    """What is allocated by a method of a tensor lies there."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in (Tensor.new_empty, Tensor.new_zeros) or result.numel() == 0:
            return result
        placed = self.memory.empty(tuple(result.shape), result.dtype)
        return placed.zero_() if func is Tensor.new_zeros else placed


def forward_and_backward(tensors: dict[str, Tensor], case: Case, grad_output: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients by the functions that call the library."""
    inputs = [tensors.get(name) for name in NAMES]
    geometry = window(*case.size, pair(case.kernel_size), pair(case.stride), pair(case.dilation), case.border)
    output, lse = cpu.forward(*inputs, geometry, case.scale)
    grads = cpu.backward(grad_output, *inputs, lse, geometry, case.scale)
    return [output, lse, *(grad for grad in grads if grad is not None)]


def run_between_guards(capability: str) -> None:
    """All results with every tensor between guarded pages; a process that steps out of one is killed."""
    cpu.set_capability(capability)
    torch.set_num_threads(2)
    cases = [
        Case(size=(5, 3), width=5, value_width=7, batch=3),
        Case(size=(4, 21), width=17, value_width=1, kernel_size=(2, 5), border="mask", heads=3),
        Case(size=(13, 16), width=8, kernel_size=3, stride=(2, 3), border="valid", heads=4, batch=4),
        Case(size=(1, 1), heads=1, width=1, kernel_size=7, dilation=(2, 3)),
        Case(size=(9, 10), width=5, kernel_size=(3, 4), dilation=(2, 1), border="shift", embeddings="all"),
    ]
    for dtype in (torch.float32, torch.float64, *HALVES):
        for case in cases:
            for layout in ("contiguous", "channels_last", "permuted"):
                given = {n: LAYOUTS[layout](x) if x.dim() == 5 else x for n, x in case.tensors(dtype).items()}
                output = sasa.local_attention(**given, **case.options)
                grad_output = LAYOUTS[layout](torch.randn_like(output))
                expected = forward_and_backward(given, case, grad_output)
                for at_end in (True, False):
                    memory = Memory(at_end)
                    guarded = {name: memory.like(x) for name, x in given.items()}
                    with InMemory(memory):
                        results = forward_and_backward(guarded, case, memory.like(grad_output))
                    for got, right in zip(results, expected, strict=True):
                        assert torch.equal(got, right), (dtype, case, layout)


@linux_only
@capabilities
def test_nothing_is_read_or_written_beside_the_tensors(capability):
    process = multiprocessing.get_context("spawn").Process(target=run_between_guards, args=(capability,))
    process.start()
    process.join()
    assert process.exitcode == 0


@linux_only
@pytest.mark.parametrize("dim", range(5))
def test_elements_more_than_2_to_the_31_apart(dim):
    """Inputs and results spread along one dimension; of the memory only the pages that are touched exist."""
    case, dtype, far = Case(size=(3, 3), batch=3, heads=3), torch.float16, 2**30 + 8
    private_unreserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * far + 2**20), flags=private_unreserved), dtype=dtype)
    placed = 0

    def spread(shape: torch.Size) -> Tensor:
        nonlocal placed
        stride = list(torch.empty(shape, device="meta").stride())
        stride[dim] = far
        placed += 1024
        return memory[placed:].as_strided(shape, stride).fill_(torch.nan)

    class Spread(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = func is Tensor.new_empty and result.dim() == 5
            return spread(result.shape) if results else result

    tensors = case.tensors(dtype)
    grad_output = torch.randn_like(tensors["value"])
    expected = forward_and_backward(tensors, case, grad_output)
    apart = {name: spread(x.shape).copy_(x) if x.dim() == 5 else x for name, x in tensors.items()}
    with Spread():
        results = forward_and_backward(apart, case, spread(grad_output.shape).copy_(grad_output))
    assert placed == 8 * 1024
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right)


def test_shapes_of_more_than_2_to_the_31_elements():
    query = torch.empty(2, 4, 64, 4096, 4096, device="meta", dtype=torch.bfloat16, requires_grad=True)
    output = sasa.local_attention(query, query, query, 7)
    assert output.shape == query.shape
    assert output.numel() > 2**31
    output.sum().backward()
    assert query.grad.shape == query.shape


# The library is not there.


@pytest.fixture(name="library_at")
def _library_at(monkeypatch):
    """Puts the library elsewhere, or nowhere, and forgets the one that was loaded."""

    def forget() -> None:
        cpu_library.load.cache_clear()
        cpu._warn_once.cache_clear()

    def library_at(*paths: Path) -> None:
        monkeypatch.setattr(cpu_library, "_places", lambda: iter(paths))
        monkeypatch.setattr(cpu_library, "_chosen", None)
        forget()

    yield library_at
    monkeypatch.undo()
    forget()


def assert_fallback_is_used(reason: str) -> None:
    """With one warning however many calls, and an error where the kernels are asked for; both give the reason."""
    tensors, case = Case().tensors(torch.float32), Case()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(tensors, case, None) for _ in range(2)]
    assert [warning.category for warning in caught] == [cpu.CpuLibraryWarning]
    assert re.search(reason, str(caught[0].message))
    for result in results:
        assert_same_bits(result, run(tensors, case, "eager"))
    for module in (sasa.RelativeSelfAttention(3, 8, 3, 8, pool=2), sasa.AttentionStem(3, 8, 2)):
        x = torch.randn(1, 3, 8, 8)
        output = module(x)
        output.sum().backward()
        module.implementation = "eager"
        assert torch.equal(output, module(x))
        module.implementation = None
        with torch.no_grad():
            assert module.eval()(x).shape == output.shape
    with pytest.raises(ValueError, match=f"implementation: cpu does not support this call: .*{reason}"):
        run(tensors, case, "cpu")
    assert cpu.capabilities() == []
    assert cpu.capability() is None


def test_without_a_library_the_fallback_is_used(library_at, tmp_path):
    library_at(tmp_path / "libsasa_cpu.so")
    assert_fallback_is_used("the compiled kernels are missing")


def test_with_a_file_that_is_no_library_the_fallback_is_used(library_at, tmp_path):
    (tmp_path / "libsasa_cpu.so").write_text("no library")
    library_at(tmp_path / "libsasa_cpu.so")
    assert_fallback_is_used("the compiled kernels can't be loaded")


@linux_only
def test_with_a_library_of_something_else_the_fallback_is_used(library_at):
    library_at(Path(torch.__file__).parent / "lib" / "libc10.so")
    assert_fallback_is_used("the compiled kernels can't be loaded: .*sasa_interface_version")


def test_with_a_library_of_another_version_the_fallback_is_used(library_at, monkeypatch):
    places = list(cpu_library._places())
    monkeypatch.setattr(cpu_library, "INTERFACE_VERSION", 0)
    library_at(*places)
    assert_fallback_is_used("the compiled kernels are of another version of sasa")


def test_with_a_library_of_other_structures_the_fallback_is_used(library_at, monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (("problem", cpu_library.CProblem), ("more", ctypes.c_int64))

    places = list(cpu_library._places())
    structures = tuple(Longer if x is cpu_library.CProblem else x for x in cpu_library.STRUCTURES)
    monkeypatch.setattr(cpu_library, "STRUCTURES", structures)
    library_at(*places)
    size = ctypes.sizeof(cpu_library.CProblem)
    assert_fallback_is_used(f"expect {size} bytes of Longer, which has {size + 8} here")


def test_an_editable_installation_finds_what_it_built(monkeypatch, tmp_path):
    """The library is looked for in every folder of the package."""
    monkeypatch.setattr(sasa.ops, "__path__", [str(tmp_path)])
    (tmp_path / "libsasa_cpu.so").touch()
    assert tmp_path / "libsasa_cpu.so" in list(cpu_library._places())
