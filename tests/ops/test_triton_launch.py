"""Which calls the Triton kernels take, and what is chosen for them before a launch: layouts, tiles, precision."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
from oracles import layouts

import sasa
from sasa.ops import implementations, triton
from sasa.ops.window import window

pytest.importorskip("triton")
from sasa.ops.triton import launch, problem, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
LAYOUTS = layouts()


def choice(**kind) -> str:
    widest = kind.pop("value_width", 4)
    return implementations.choose(None, torch.empty(1, 1, 4, 3, 3, **kind), widest).name


def test_the_interpreter_is_never_chosen_by_default():
    assert choice() != "triton"


@ON_GPU
def test_unsupported_calls_go_to_the_fallback_by_default():
    assert choice(device="cuda") == "triton"
    assert choice(device="cuda", dtype=torch.float64) == "eager"
    assert choice(device="cuda", value_width=129) == "eager"


@pytest.mark.parametrize(
    ("query", "value", "reason"),
    [
        ((1, 1, 4, 3, 3, torch.float64), 4, "it computes torch.float16, torch.bfloat16, torch.float32, the query is"),
        ((1, 1, 129, 3, 3, torch.float32), 129, "it computes heads of up to 128 channels, these have 129"),
        ((1, 1, 4, 3, 3, torch.float32), 130, "it computes heads of up to 128 channels, these have 130"),
    ],
)
def test_unsupported_calls_raise(query, value, reason):
    *shape, dtype = query
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    v = torch.zeros(1, 1, value, 3, 3, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"^implementation: triton does not support this call: {re.escape(reason)}"):
        sasa.local_attention(x, x, v, 3, implementation="triton")


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 4, 3, 3)
    with pytest.raises(ValueError, match="it computes on cuda and xpu devices, the query is on cpu"):
        sasa.local_attention(x, x, x, 3, implementation="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted")
def test_setting_the_interpreter_too_late_raises(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = torch.zeros(1, 1, 4, 3, 3)
    with pytest.raises(ValueError, match="TRITON_INTERPRET was set after Triton had been imported"):
        sasa.local_attention(x, x, x, 3, implementation="triton")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton, "why_missing", lambda: "Triton is not installed: pip install triton")
    x = torch.zeros(1, 1, 4, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match="pip install triton"):
        sasa.local_attention(x, x, x, 3, implementation="triton")


def test_variants_are_named():
    with pytest.raises(ValueError, match="variant: expected 'halo' or 'taps', got 'fast'"), triton.using("fast"):
        pass


def test_layouts_are_recognised():
    x = torch.zeros(2, 3, 8, 5, 6)
    last = LAYOUTS["channels_last"](x)
    assert launch.layout(x) == problem.COLUMNS
    assert launch.layout(last) == problem.CHANNELS
    assert launch.layout(last.half()) == problem.CHANNELS
    assert launch.layout(last[:, :, 1:]) == problem.ANY  # not at a multiple of 16 bytes
    assert launch.layout(LAYOUTS["channels_last"](x[:, :, :3])) == problem.ANY
    assert launch.layout(LAYOUTS["strided"](x)) == problem.ANY
    assert launch.layout(x[:, :, :, :, :1]) == problem.COLUMNS


@pytest.mark.parametrize("kernel", [1, 2, 3, 7, 13, 64])
@pytest.mark.parametrize("width", [8, 32, 64, 128])
def test_tiles_are_powers_of_two_that_tensor_cores_take(kernel, width):
    x = torch.zeros(1, 2, width, 20, 20, dtype=torch.bfloat16)
    geometry = window(20, 20, (kernel, kernel), (1, 1), (1, 1), "zero")
    what = launch.problem_of(x, x, x, x, None, None, None, geometry)
    assert what.tensor_cores
    for name, small, cores in itertools.product(tiles.HALO_TILES, (False, True), (False, True)):
        found = tiles.tiles_of(name, what._replace(tensor_cores=cores), small)
        assert 1 <= len(set(found)) == len(found) <= 3
        for size in itertools.chain.from_iterable(tile[:5] for tile in found):
            assert size >= 1
            assert size & (size - 1) == 0
        assert not cores or all(min(tile.ROWS * tile.COLUMNS, tile.BLOCK_Y * tile.BLOCK_X) >= 16 for tile in found)


def test_tf32_only_where_pytorch_was_allowed_it(monkeypatch):
    monkeypatch.setattr(launch, "_allows_tf32", lambda: True)
    x = torch.zeros(1, 2, 8, 6, 6)
    geometry = window(6, 6, (3, 3), (1, 1), (1, 1), "zero")

    class OnGpu:
        """A tensor whose device is a GPU."""

        def __getattr__(self, name):
            return torch.device("cuda") if name == "device" else getattr(x, name)

    allowed = launch.problem_of(OnGpu(), x, x, x, None, None, None, geometry)
    assert (allowed.precision, allowed.tensor_cores) == ("tf32", True)
    monkeypatch.setattr(launch, "_allows_tf32", lambda: False)
    strict = launch.problem_of(OnGpu(), x, x, x, None, None, None, geometry)
    assert (strict.precision, strict.tensor_cores) == ("ieee", False)


def test_later_calls_launch_what_was_compiled(monkeypatch):
    """Without Triton's choice among its compilations, but never one for other dtypes or alignments."""
    compiled, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(launch, "start", lambda *given: compiled.append(given) or Compiled())
    geometry = window(6, 6, (3, 3), (1, 1), (1, 1), "zero")
    memory = torch.zeros(2 * 8 * 6 * 6 + 1)
    aligned, shifted = memory[:-1].view(1, 2, 8, 6, 6), memory[1:].view(1, 2, 8, 6, 6)
    for _ in range(3):
        launch.forward(aligned, aligned, aligned, None, None, None, geometry, 0.5)
    assert (len(compiled), len(launched)) == (1, 2)
    kernel, grid, arguments, options = compiled[0]
    names = list(inspect.signature(kernel.fn).parameters)
    assert launched[0][0] == (*grid, 1, 1)
    assert len(launched[0][1]) == len(names) and names[len(arguments) :] == list(launch.CONSTANTS)
    assert launched[0][1][len(arguments) :] == tuple(options[name] for name in launch.CONSTANTS)
    for other in (shifted, aligned.half(), aligned.expand(3, -1, -1, -1, -1)):
        launch.forward(other, other, other, None, None, None, geometry, 0.5)
    assert (len(compiled), len(launched)) == (3, 3)  # the batch needs no compilation
