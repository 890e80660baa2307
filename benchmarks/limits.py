"""What the GPU kernels must move and compute, compared with an H100's limits, counted without a GPU.

    python -m benchmarks.limits

The kernels are compiled for the H100 and their machine code is analysed: registers, shared memory, and the instructions
that a warp of one program executes, in straight-line code and in loops. Times are lower bounds for the chip if it did
nothing else: they show what to tune first, and are not measurements.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .problems import STAGES
from .results import RESULTS
from .tables import Listing, markdown

FILE = RESULTS / "gpu-limits.json"
# NVIDIA H100 SXM5, from its architecture white paper: 132 multiprocessors at 1.83 GHz, four schedulers each.
CHIP = {
    "name": "H100 SXM5",
    "bytes_per_second": 3.35e12,
    "tensor_flops": 989e12,
    "exponentials_per_second": 132 * 16 * 1.83e9,
    "warp_instructions_per_second": 132 * 4 * 1.83e9,
}
TOOLS = Path("backends/nvidia/bin")
KERNEL = 7


class Absent:
    """Enough of a driver to compile for a GPU that is not present."""

    def get_current_target(self) -> Any:
        """An H100."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The device of the tensors."""
        return torch.device("cpu")


def instructions(cubin: bytes) -> tuple[list[str], list[tuple[int, int]], int]:
    """Machine code, its loops as (first, last) instruction, and registers per thread."""
    import triton

    tools = Path(triton.__file__).parent / TOOLS
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        code = subprocess.run([tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
        use = subprocess.run([tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            found.append(instruction[1].strip())
    loops = []
    for index, text in enumerate(found):
        target = re.search(r"BRA.*?(\.L_x_\d+)", text)
        if target and labels.get(target[1], index + 1) <= index:
            loops.append((labels[target[1]], index))
    return found, sorted(loops), int(re.findall(r"REG:(\d+)", use.stdout + use.stderr)[-1])


def main_loops(found: list[str], loops: list[tuple[int, int]], passes: int) -> list[tuple[int, int]]:
    """The innermost of each of the first loop nests that compute exponentials, one for each pass over the keys; later
    nests handle non-finite numbers.
    """
    taking = [loop for loop in loops if any("MUFU.EX2" in text for text in found[slice(*loop)])]
    innermost = []
    for _ in range(passes):
        outer = taking[0]
        nest = [loop for loop in taking if loop[1] <= outer[1]]
        innermost.append(min(nest, key=lambda loop: loop[1] - loop[0]))
        taking = [loop for loop in taking if loop[0] > outer[1]]
    return innermost


def compiled() -> Iterator[dict[str, Any]]:
    """Every kernel for the head widths of a ResNet-50's stages, in bfloat16 on tensor cores and float32 tap by tap."""
    import triton

    from sasa.ops.triton import launch
    from sasa.ops.window import window

    triton.runtime.driver.set_active(Absent())
    torch.use_deterministic_algorithms(True)  # the default tile of each
    torch.utils.deterministic.fill_uninitialized_memory = False
    done: list[dict[str, Any]] = []

    def note(kernel: Any, grid: tuple[int], arguments: list, options: dict[str, Any]) -> None:
        made = kernel.warmup(*arguments, grid=grid, **options)
        found, loops, registers = instructions(made.asm["cubin"])
        passes = PASSES[kernel.fn.__name__]
        inner = main_loops(found, loops, passes)
        problem, sizes = options["P"], {name: options[name] for name in ("ROWS", "COLUMNS", "BLOCK_Y", "BLOCK_X")}
        if problem.tensor_cores:
            trips = -(-(sizes["ROWS"] + KERNEL - 1) // sizes["BLOCK_Y"])
            trips *= -(-(sizes["COLUMNS"] + KERNEL - 1) // sizes["BLOCK_X"])
        else:
            trips = KERNEL * -(-KERNEL // sizes["BLOCK_X"])
        between = [after[0] - before[1] - 1 for before, after in itertools.pairwise(inner)]
        straight = inner[0][0] + sum(between) + len(found) - loops[-1][1]
        warp = straight + trips * sum(end - begin + 1 for begin, end in inner)
        done.append(
            {
                "kernel": kernel.fn.__name__,
                **sizes,
                "warps": options["num_warps"],
                "registers": registers,
                "shared_bytes": made.metadata.shared,
                "loop_instructions": [end - begin + 1 for begin, end in inner],
                "warp_instructions_per_pixel": warp * options["num_warps"] / (sizes["ROWS"] * sizes["COLUMNS"]),
                "exponentials_per_pixel": passes * trips * sizes["BLOCK_Y"] * sizes["BLOCK_X"],
            }
        )

    launch.start = note
    for dtype in (torch.bfloat16, torch.float32):
        for width in (8, 16, 32, 64):
            qkv = torch.zeros(1, 3 * 8 * width, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
            query, key, value = qkv.unflatten(1, (24, width)).chunk(3, dim=1)
            row = torch.zeros(8, width, KERNEL, dtype=dtype)
            geometry = window(56, 56, (KERNEL, KERNEL), (1, 1), (1, 1), "zero")
            done.clear()
            output, lse = launch.forward(query, key, value, row, row, None, geometry, 1.0)
            launch.backward(output, query, key, value, row, row, None, lse, geometry, 1.0)
            yield from ({"dtype": str(dtype).removeprefix("torch."), "width": width, **one} for one in done)


STEM = {"batch": 128, "size": 224, "channels": 64, "heads": 8, "block": 4}


def stem() -> Iterator[dict[str, Any]]:
    """The attention stem's kernels, for images in bfloat16: a loop over groups of blocks, and in it one or two over the
    pixels of a block, each with an exponential for every pixel.
    """
    from sasa.ops.triton import blocks, launch

    done: list[dict[str, Any]] = []
    pixels, channels, keys = STEM["batch"] * STEM["size"] ** 2, STEM["channels"], STEM["block"] ** 2

    def note(kernel: Any, grid: tuple[int, ...], arguments: list, options: dict[str, Any]) -> None:
        made = kernel.warmup(*arguments, grid=grid, **options)
        found, loops, registers = instructions(made.asm["cubin"])
        (first, last), *inner = [loop for loop in loops if any("MUFU.EX2" in text for text in found[slice(*loop)])]
        of_group = last - first + 1 + (keys - 1) * sum(end - begin + 1 for begin, end in inner)
        slices = channels // options["D"]
        # Images are read, and an extreme of each block and channel is written, or its gradient read.
        seconds = {
            "memory": 2 * (3 * pixels + channels * pixels // keys) / CHIP["bytes_per_second"],
            "tensor_cores": 0.0,
            "exponentials": len(inner) * slices * keys * pixels / CHIP["exponentials_per_second"],
            "issue": of_group * slices * pixels / keys / options["BLOCKS"] / CHIP["warp_instructions_per_second"],
        }
        done.append(
            {
                "kernel": f"stem {kernel.fn.__name__}",
                "dtype": "bfloat16",
                "D": options["D"],
                "warps": options["num_warps"],
                "registers": registers,
                "shared_bytes": made.metadata.shared,
                "loop_instructions": [end - begin + 1 for begin, end in inner],
                "batch": STEM["batch"],
                "size": STEM["size"],
                "microseconds": {name: 1e6 * one for name, one in seconds.items()},
            }
        )

    launch.start = note
    x, form = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16), torch.zeros(STEM["heads"], 3, 3)
    values, sign = torch.zeros(keys, channels, 3), torch.zeros(channels)
    extreme, *moments = blocks.forward(x, form, values, sign, STEM["block"])
    blocks.backward(extreme, *moments, x, form, values, sign, moments[0], STEM["block"], needs_input=False)
    yield from done


# Tensors of a query's size that are read or written; passes over the halo, each with one exponential per key; matrix
# products in all passes, each of 2·D FLOPs per key.
TENSORS = {"forward": 4, "query_gradients": 5, "key_gradients": 6}
PASSES = {"forward": 1, "query_gradients": 2, "key_gradients": 1}
PRODUCTS = {"forward": 2, "query_gradients": 5, "key_gradients": 4}


def limits(kernel: dict[str, Any], pixels: int) -> dict[str, float]:
    """Minimum microseconds, by limit, of a kernel that computes that many pixels, all heads and images counted."""
    size = {"bfloat16": 2, "float32": 4}[kernel["dtype"]]
    keys = kernel["exponentials_per_pixel"] / PASSES[kernel["kernel"]]
    flops = PRODUCTS[kernel["kernel"]] * 2 * max(16, kernel["width"]) * keys
    seconds = {
        "memory": TENSORS[kernel["kernel"]] * kernel["width"] * size / CHIP["bytes_per_second"],
        "tensor_cores": flops / CHIP["tensor_flops"] if kernel["dtype"] == "bfloat16" else 0.0,
        "exponentials": kernel["exponentials_per_pixel"] / CHIP["exponentials_per_second"],
        "issue": kernel["warp_instructions_per_pixel"] / CHIP["warp_instructions_per_second"],
    }
    return {name: 1e6 * pixels * one for name, one in seconds.items()}


def run() -> dict[str, Any]:
    """Compile and count; the notebook's problem is the stage of width 16 at 56x56 for 32 images."""
    import triton

    kernels = []
    for kernel in compiled():
        stage = next(problem for problem in STAGES.values() if problem.head_width == kernel["width"])
        batch, size = (32, 56) if kernel["width"] == 16 else (64, stage.size)
        pixels = batch * stage.num_heads * size**2
        kernels.append({**kernel, "batch": batch, "size": size, "microseconds": limits(kernel, pixels)})
    kernels += stem()
    return {"chip": CHIP, "triton": triton.__version__, "kernels": kernels}


NAMES = {"forward": "forward", "query_gradients": "gradient of queries", "key_gradients": "gradient of keys, values"}


def words_of(kernel: dict[str, Any]) -> tuple[str, str, str]:
    """What it computes, its name, and its tile."""
    images, warps = f"{kernel['batch']} images of {kernel['size']}²", f"{kernel['warps']} warps"
    if kernel["kernel"] not in NAMES:
        return f"{kernel['dtype']}, {images}", kernel["kernel"], f"{kernel['D']} channels, {warps}"
    tile = f"{kernel['ROWS']}x{kernel['COLUMNS']}, {warps}"
    return f"{kernel['dtype']}, D {kernel['width']}, {images}", NAMES[kernel["kernel"]], tile


def listing(found: dict[str, Any]) -> Listing:
    """The table of docs/kernels.md."""
    rows = [
        [
            *words_of(kernel),
            f"{kernel['registers']}",
            f"{kernel['shared_bytes'] / 1024:.0f}",
            *(f"{kernel['microseconds'][name]:.0f}" for name in ("memory", "tensor_cores", "exponentials", "issue")),
        ]
        for kernel in found["kernels"]
    ]
    header = ["", "kernel", "tile", "registers", "shared KB", "memory", "tensor cores", "exponentials", "issue"]
    return Listing(header, rows, f"Microseconds, {found['chip']['name']}; Triton {found['triton']}.", 3)


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None) not in (None, "", "0"):
        sys.exit("benchmarks.limits: unset TRITON_INTERPRET: the kernels are to be compiled")
    result = run()
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(listing(result)))
