"""Which tile of the GPU kernels is fastest: candidates for the head widths of a ResNet-50's stages, and for its stem.

    python -m benchmarks.tiles            on a GPU, within two minutes; writes benchmarks/results/gpu-tiles.json

Kernels are compiled in as many processes as there are cores and measured one at a time. Tiles whose results differ from
those of the others are an error. The lists of ``sasa/ops/triton/tiles.py`` follow from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import gradient, inputs
from .machine import described, machine
from .problems import ATTENTION, STAGES, AttentionProblem
from .results import RESULTS
from .tables import Listing, markdown

FILE = RESULTS / "gpu-tiles.json"
STEM_FORWARD, STEM_BACKWARD = "stem forward", "stem backward"
WRITTEN = {
    "forward": ("output", "lse"),
    "query_gradients": ("grad_query", "delta"),
    "key_gradients": ("grad_key", "grad_value"),
    STEM_FORWARD: ("extreme", "moments"),
    STEM_BACKWARD: ("grad_values",),  # that of the form is divided among the slices
}
# Rows, columns, keys or queries of a block, warps, stages of the loads' pipeline, most registers of a thread (0: any
# number): on tensor cores.
HALO = [
    (2, 8, 32, 1, 2, 0), (2, 8, 32, 1, 2, 96), (2, 8, 32, 1, 2, 128), (2, 8, 32, 1, 1, 0), (2, 8, 32, 1, 3, 0),
    (2, 8, 64, 1, 2, 0), (2, 8, 64, 1, 2, 96), (2, 8, 64, 1, 2, 128), (2, 8, 128, 1, 2, 0),
    (4, 8, 32, 1, 2, 0), (4, 8, 32, 1, 2, 128), (4, 8, 32, 1, 2, 168), (4, 8, 32, 1, 1, 0), (4, 8, 32, 1, 1, 168),
    (4, 8, 32, 2, 1, 0), (4, 8, 32, 2, 2, 0), (4, 8, 32, 2, 3, 0), (8, 8, 32, 2, 1, 0), (8, 8, 32, 2, 2, 0),
    (8, 8, 64, 4, 1, 0), (8, 8, 64, 4, 2, 0),
]  # fmt: skip
# Rows, columns, taps, warps: tap by tap.
TAPS = [(2, 8, 8, 2), (4, 8, 8, 4), (4, 8, 4, 4), (8, 8, 8, 4), (2, 4, 8, 2), (4, 4, 8, 4), (4, 8, 2, 4), (2, 4, 8, 1)]
# Of the stem: most values of a block in a thread's registers, most registers.
BLOCKS = {
    STEM_FORWARD: [(128, 0), (128, 168), (64, 0), (64, 168), (64, 128), (32, 0), (32, 128)],
    STEM_BACKWARD: [(128, 0), (64, 0), (64, 168), (32, 0), (32, 168), (32, 128), (16, 0), (16, 128)],
}
IMAGES = 128, 3, 224, 224
TOLERANCE = 1e-2  # of a norm of the results, in either precision
LSE = 6.0  # in place of the forward's: any number for which the weights are ordinary ones

_alone: Any = None  # a lock that one process at a time holds, to use the GPU


class Key(NamedTuple):
    """One kernel for one dtype and problem."""

    kernel: str
    dtype: str
    problem: str


def problems() -> dict[tuple[str, str], AttentionProblem]:
    """By name and dtype, the most important first."""
    stages = {name: shape._replace(batch=64) for name, shape in STAGES.items()}
    shapes = {"notebook": ATTENTION["notebook"], **stages}
    found = {(name, "bfloat16"): shape for name, shape in shapes.items()}
    return found | {(name, "float32"): shapes[name] for name in ("notebook", "14x14, D 32", "7x7, D 64")}


def tensors_and_grad(shape: AttentionProblem, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values and embeddings, and a gradient of the output."""
    return inputs(shape, dtype, "channels_last", "cuda"), gradient(shape, dtype, "channels_last", "cuda")


def begin(lock: Any) -> None:
    """In each process."""
    global _alone
    _alone = lock
    torch.set_num_threads(1)


def measure(key: Key, shape: AttentionProblem | None, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Compile one kernel for one tile, and time it; in a process of its own."""
    from sasa.ops.triton import launch, tiles
    from sasa.ops.window import window

    if shape is None:
        return measure_stem(key, *sizes)
    found: dict[str, Any] = {}

    def run(kernel: Any, programs: Any, problem: Any, small: bool, arguments: Any) -> tiles.Tile:
        if problem.tensor_cores:
            tile = tiles.halo_tile(problem, *sizes)
        else:
            rows, columns, taps, warps = sizes
            tile = tiles.Tile(rows, columns, 1, taps, warps, 1)
        if kernel.fn.__name__ == key.kernel and tile is not None:
            found.update(tile._asdict(), most_registers=tile.registers)
            pads = [max(16, tiles.power_of_two(axis.kernel)) for axis in (problem.y, problem.x)]
            options = {"P": problem, "PAD_Y": pads[0], "PAD_X": pads[1], **launch.OPTIONS}
            options |= launch._config(tile).all_kwargs()
            found.update(measured(key, kernel, (programs(tile.ROWS, tile.COLUMNS),), arguments, options))
        return tiles_before(key.kernel, problem, small)[0]

    tiles_before, bytes_before, run_before = launch.tiles_of, launch.SHARE_BYTES, launch._run
    launch._run, launch.SHARE_BYTES = run, 2**33
    launch.tiles_of = lambda *_: [tiles.Tile(1, 1, 1, 1, 1, 1)]  # enough shares for any
    taps = shape.kernel_size, shape.kernel_size
    geometry = window(shape.size, shape.size, taps, (1, 1), (1, 1), "zero")
    try:
        dtype = getattr(torch, key.dtype)
        with _alone:
            (query, key_, value, row, col), grad = tensors_and_grad(shape, dtype)
            images = query, key_, value
            torch.cuda.synchronize()
        if key.kernel == "forward":
            launch.forward(*images, row, col, None, geometry, 1.0)
        else:
            lse = torch.full((shape.batch, shape.num_heads, shape.size, shape.size), LSE, device="cuda")
            launch.backward(grad, *images, row, col, None, lse, geometry, 1.0)
    except Exception as error:
        found["cannot"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    finally:
        launch._run, launch.SHARE_BYTES, launch.tiles_of = run_before, bytes_before, tiles_before
        torch.cuda.empty_cache()
    return found


def measure_stem(key: Key, most: int, registers: int) -> dict[str, Any]:
    """The same for a kernel of the attention stem."""
    from sasa.ops.triton import blocks, launch

    found: dict[str, Any] = {}

    def start(kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any]) -> None:
        options = options | ({"maxnreg": registers} if registers else {})
        found.update(D=options["D"], warps=options["num_warps"], most_registers=registers)
        found.update(measured(key, kernel, grid, arguments, options))

    before = launch.start, blocks.VALUES, blocks.GRADIENTS
    launch.start, blocks.VALUES, blocks.GRADIENTS = start, most, most
    try:
        with _alone:
            torch.manual_seed(0)
            x = torch.randn(IMAGES, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
            form, values, sign = (torch.randn(size, device="cuda") for size in ((8, 3, 3), (16, 64, 3), (64,)))
            grad = torch.randn(IMAGES[0], 64, 56, 56, device="cuda").bfloat16()
            torch.cuda.synchronize()
        if key.kernel == STEM_FORWARD:
            blocks.forward(x, form, values, sign.sign(), 4)
        else:
            blocks.backward(grad, sign, sign, x, form, values, sign.sign(), sign, 4, needs_input=False)
    except Exception as error:
        found["cannot"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    finally:
        launch.start, blocks.VALUES, blocks.GRADIENTS = before
        torch.cuda.empty_cache()
    return found


def measured(key: Key, kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Microseconds, registers, and a norm of what the kernel wrote."""
    from triton.testing import do_bench

    names = {name: kernel.arg_names.index(name) for name in ("delta", *WRITTEN[key.kernel]) if
             name in kernel.arg_names}  # fmt: skip
    began = time.perf_counter()
    made = kernel.warmup(*arguments, grid=grid, **options)
    found = {"compile_seconds": time.perf_counter() - began}
    with _alone:
        for name, index in names.items():
            arguments[index].fill_(0.0 if name == "delta" else float("nan"))
        began = time.perf_counter()
        kernel[grid](*arguments, **options)
        torch.cuda.synchronize()
        found["first_seconds"] = time.perf_counter() - began
        written = [arguments[names[name]] for name in WRITTEN[key.kernel]]
        norm = sum(x.double().square().sum() for x in written)
        time_: Any = do_bench(lambda: kernel[grid](*arguments, **options), warmup=4, rep=16, return_mode="median")
    found |= {"microseconds": 1e3 * time_, "norm": float(norm) ** 0.5}
    return found | {"registers": made.n_regs, "spills": made.n_spills, "shared": made.metadata.shared}


def sweep(seconds: float, workers: int) -> dict[Key, list[dict[str, Any]]]:
    """Measure until time is over; figures by kernel and problem."""
    context, found, began = get_context("spawn"), defaultdict(list), time.time()
    pool = ProcessPoolExecutor(workers, context, begin, (context.Lock(),))
    jobs = {}
    for kernel, candidates in BLOCKS.items():
        key = Key(kernel, "bfloat16", f"{IMAGES[0]} images")
        jobs |= {pool.submit(measure, key, None, sizes): key for sizes in candidates}
    for (name, dtype), shape in problems().items():
        for kernel in ("forward", "query_gradients", "key_gradients"):
            key = Key(kernel, dtype, name)
            for sizes in HALO if dtype == "bfloat16" else TAPS:
                jobs[pool.submit(measure, key, shape, sizes)] = key
    count = 0
    try:
        for job in as_completed(jobs, timeout=seconds):
            found[jobs[job]].append(job.result())
            count += 1
            if count % 25 == 0:
                print(f"{count} of {len(jobs)} after {time.time() - began:.0f} s", flush=True)
    except TimeoutError:
        print(f"{len(jobs) - count} of {len(jobs)} did not fit into {seconds:.0f} s")
    pool.shutdown(wait=False, cancel_futures=True)
    for process in active_children():
        process.kill()
    for known in found.values():
        compare([one for one in known if "norm" in one])
    return {key: found[key] for key in jobs.values() if key in found}


def compare(known: list[dict[str, Any]]) -> None:
    """Mark those whose results differ from those of the others."""
    middle = statistics.median(one["norm"] for one in known) if known else 0
    for one in known:
        if not abs(one["norm"] - middle) <= TOLERANCE * middle:
            one["cannot"] = f"its results have the norm {one['norm']:.6g}, those of the others {middle:.6g}"


def listing(found: dict[str, Any], most: int = 1) -> Listing:
    """The fastest of each kernel and problem."""
    rows = []
    for one in found["kernels"]:
        known = [tile for tile in one["tiles"] if "cannot" not in tile and "microseconds" in tile]
        for tile in sorted(known, key=lambda tile: tile["microseconds"])[:most]:
            if one["kernel"] in BLOCKS:
                sizes = f"{tile['D']} channels"
            else:
                sizes = f"{tile['ROWS']}x{tile['COLUMNS']}, {tile['BLOCK_Y']}x{tile['BLOCK_X']}"
            setup = f"{tile['warps']}, {tile.get('stages', 1)}, {tile.get('most_registers') or 'any'}"
            figures = [f"{tile['microseconds']:.0f}", *(f"{tile[name]}" for name in ("registers", "spills", "shared"))]
            rows.append([one["problem"], one["dtype"], one["kernel"], sizes, setup, *figures])
    head = [
        "problem",
        "dtype",
        "kernel",
        "tile, block",
        "warps, stages, most registers",
        "µs",
        "registers",
        "spills",
        "shared bytes",
    ]
    return Listing(head, rows, described(found["machine"]) + ".", words=5)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser("benchmarks.tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=100, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tiles: no GPU here")
    found = sweep(options.seconds, max(1, (os.cpu_count() or 2) - 1))
    listed = [{**key._asdict(), "tiles": tiles} for key, tiles in found.items()]
    written = {"machine": machine("cuda"), "kernels": listed}
    options.out.write_text(json.dumps(written, indent=1) + "\n")
    print(markdown(listing(written, most=4)))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
