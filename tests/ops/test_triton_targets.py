"""The Triton kernels compiled for GPUs that need not be there: NVIDIA's by PTX and its assembler, AMD's by LLVM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

# Runs in a process of its own: whether Triton interprets, as other tests need it, is settled when it is imported.
PROGRAM = """
import json, os, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

backend, arch, warp_size, problems = json.loads(sys.argv[1])

class Absent:
    "Enough of a driver to compile for a GPU that is not there."
    def get_current_target(self): return GPUTarget(backend, arch, warp_size)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Absent())
from sasa.ops.triton import blocks, launch
from sasa.ops.window import window

compiled, count = [], 0

def note(**_):
    global count
    count += 1

def launch_nothing(kernel, grid, arguments, options):
    done = kernel.warmup(*arguments, grid=grid, **options)
    compiled.append({"kernel": kernel.fn.__name__, "shared": done.metadata.shared, "forms": list(done.asm)})

triton.knobs.runtime.jit_post_compile_hook = note
launch.start = launch_nothing
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False
every, original = launch.tiles_of, launch.problem_of
for one in problems:
    if size := one.get("block"):
        x = torch.zeros(2, 3, *one["size"], dtype=getattr(torch, one.get("dtype", "bfloat16")))
        form, values, sign = torch.zeros(2, 3, 3), torch.zeros(size * size, 2 * one["width"], 3), torch.zeros(16)
        extreme, *moments = blocks.forward(x, form, values, sign, size)
        blocks.backward(extreme, *moments, x, form, values, sign, moments[0], size, one.get("needs_input", False))
        continue
    last = torch.channels_last if one.get("channels_last") else torch.contiguous_format
    dtype = getattr(torch, one.get("dtype", "bfloat16"))
    heads, width, kernel = 2, one.get("width", 16), one.get("kernel", 7)
    x = torch.zeros(2, 3 * heads * width, *one["size"], dtype=dtype).to(memory_format=last)
    query, key, value = x.unflatten(1, (3 * heads, width)).chunk(3, dim=1)
    offsets = 2 * kernel - 1 if one.get("border") == "shift" else kernel
    row, col = torch.zeros(2, heads, one.get("half", width), offsets, dtype=dtype)
    table = torch.zeros(heads, offsets, offsets, dtype=dtype) if one.get("table") else None
    geometry = window(*one["size"], (kernel, kernel), (one.get("stride", 1),) * 2, (1, 1), one.get("border", "zero"))
    changed = {"tensor_cores": True, "precision": "tf32"} if one.get("tf32") else {}
    if dtype != torch.float32 and backend == "cuda":
        changed["sum_precision"] = "tf32"
    launch.problem_of = lambda *given: original(*given)._replace(**changed)
    for tile in range(3 if one.get("every_tile") else 1):
        launch.tiles_of = lambda *given: every(*given)[tile:tile + 1] or every(*given)[:1]
        output, lse = launch.forward(query, key, value, row, col, table, geometry, 1.0)
        launch.backward(output, query, key, value, row, col, table, lse, geometry, 1.0)
print(json.dumps({"compiled": compiled, "count": count}))
"""


def compiled(target: tuple[str, int | str, int], problems: list[dict]) -> dict:
    """The kernels compiled for the target, and how many times Triton compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps([*target, problems])],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PROBLEMS = [
    {"size": [9, 9], "channels_last": True},
    {"size": [4, 4], "width": 8, "border": "mask"},
    {"size": [9, 9], "dtype": "float32", "channels_last": True},
    {"size": [9, 9], "half": 8, "channels_last": True},
    {"size": [9, 9], "half": 5, "dtype": "float32"},
    {"size": [19, 19], "border": "shift", "channels_last": True},
    {"size": [19, 19], "border": "shift", "table": True},
    {"size": [8, 8], "width": 8, "block": 4},
    {"size": [7, 9], "width": 2, "block": 3, "dtype": "float32", "needs_input": True},
]
LARGE = [
    {"size": [9, 9], "width": 128, "border": "mask"},
    {"size": [9, 9], "width": 64, "kernel": 25, "channels_last": True},
    {"size": [9, 9], "width": 64, "dtype": "float32", "channels_last": True, "tf32": True},
]
TARGETS = {
    "A100": ("cuda", 80, 32),
    "H100": ("cuda", 90, 32),
    "MI300": ("hip", "gfx942", 64),
}
# Shared memory that one program can have, on the smallest of NVIDIA's GPUs (compute capability 8.6) and on AMD's.
LEAST_SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}
LAST_FORM = {"cuda": "cubin", "hip": "hsaco"}


SOME = {
    "A100": [PROBLEMS[0], LARGE[2]],
    "H100": [PROBLEMS[2], PROBLEMS[5], PROBLEMS[7]],
    "MI300": [PROBLEMS[3], PROBLEMS[6], PROBLEMS[8]],
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("problems", [SOME, pytest.param(None, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_compiles_within_shared_memory(problems, name):
    target = TARGETS[name]
    every = PROBLEMS + (LARGE if name == "A100" else [])
    for kernel in compiled(target, problems[name] if problems else every)["compiled"]:
        assert LAST_FORM[target[0]] in kernel["forms"], kernel
        assert kernel["shared"] <= LEAST_SHARED[target[0]], kernel


@pytest.mark.nightly
def test_every_tile_compiles():
    problems = [{"size": [9, 9], "width": width, "channels_last": True, "every_tile": True} for width in (16, 64)]
    made = compiled(TARGETS["H100"], problems)["compiled"]
    assert len(made) == 18
    assert max(kernel["shared"] for kernel in made) <= LEAST_SHARED["cuda"]


def test_no_recompilation_for_another_size_of_image():
    """Twenty sizes, with all remainders that compilers specialise on, in two layouts; three kernels each."""
    sizes = [[5 + 3 * i, 40 - 2 * i + i % 2] for i in range(15)] + [[16, 16], [64, 32], [1, 17], [128, 5], [33, 48]]
    layouts = [{"channels_last": last, "kernel": 3} for last in (False, True)]
    assert compiled(TARGETS["H100"], [{"size": size} | one for one in layouts for size in sizes])["count"] == 6


def test_no_recompilation_for_another_number_of_blocks():
    """Only for images whose edge cuts blocks off: two kernels for each kind."""
    sizes = [[8 * i, 16] for i in range(1, 6)] + [[7 + i, 9] for i in range(5)] + [[128, 4], [2, 2]]
    problems = [{"size": size, "block": 2, "width": 2} for size in sizes]
    assert compiled(TARGETS["H100"], problems)["count"] == 4
