"""The Triton kernels: on a GPU if there is one, else on CPU tensors in Triton's interpreter, which is slow: a grid in
reduced form. On a GPU all other tests of the operator run too.
"""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import BORDERS, EMBEDDINGS, Case, assert_right, layouts, pair, solve
from torch import Tensor
from torch.library import opcheck

import sasa
from sasa.ops import implementations, reference, triton
from sasa.ops.window import window

pytest.importorskip("triton")
from sasa.ops.triton import launch, problem, tiles

# What NumPy says of numbers that tiles compute beyond the edge of an image, and throw away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
NAMES = ("query", "key", "value", "row_embedding", "col_embedding")
LAYOUTS = layouts()
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["taps", "halo"])
def variant(request):
    """One variant of the kernels, forced."""
    with triton.using(request.param):
        yield request.param


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(tensors: dict[str, Tensor], grad_output: Tensor, case: Case) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients."""
    leaves = {name: x.to(DEVICE).detach().requires_grad_() for name, x in tensors.items()}
    in_order = [leaves.get(name) for name in NAMES]
    sizes = [pair(size) for size in (case.kernel_size, case.stride, case.dilation)]
    output, lse = torch.ops.sasa.local_attention(*in_order, *sizes, case.border, case.scale, "triton")
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(DEVICE))
    return {"output": output, "lse": lse, **{f"grad {x}": grad for x, grad in zip(leaves, grads, strict=True)}}


def check(case: Case, dtype: torch.dtype = torch.float32, tensors: dict[str, Tensor] | None = None) -> None:
    solution = solve(case, dtype)
    for name, result in run(tensors or solution.tensors, solution.grad_output, case).items():
        assert result.dtype == (torch.float32 if name == "lse" else dtype), name
        assert_right(name, result, solution, rounded=True)


GRID = [
    *(Case(size=size, border=border) for size in ((1, 1), (1, 5), (5, 4)) for border in ("zero", "mask")),
    *(Case(size=(2, 3), kernel_size=7, border=border) for border in ("zero", "mask")),
    *(Case(size=(5, 6), kernel_size=(2, 3), stride=(2, 1), border=border, batch=2) for border in BORDERS),
    *(Case(size=(7, 6), kernel_size=3, dilation=2, border=border) for border in BORDERS),
    *(Case(size=(9, 8), kernel_size=(3, 2), dilation=(2, 3), stride=(2, 2), border=border) for border in BORDERS),
    *(Case(size=(9, 8), kernel_size=2, dilation=4, stride=2, border=border, heads=1) for border in ("zero", "mask")),
    *(Case(embeddings=name, scale=0.35) for name in EMBEDDINGS),
    *(Case(size=(3, 4), width=width, value_width=9, kernel_size=2) for width in (1, 5, 17, 32)),
    *(Case(size=(4, 3), width=128, value_width=width, heads=1) for width in (1, 128)),
    *(Case(scale=scale) for scale in (-1.5, 0.0)),
    Case(size=(9, 19), kernel_size=7, width=16, heads=1, border="mask", embeddings="both"),
    Case(size=(10, 9), kernel_size=5, stride=3, width=8, border="valid"),
    Case(size=(3, 3), kernel_size=(1, 9)),
    Case(size=(2, 12), kernel_size=(1, 11), border="mask", stride=(1, 5)),
]


@pytest.mark.parametrize("case", [case for case in GRID if case.fits], ids=str)
def test_results_and_gradients(case, variant):
    if DEVICE == "cuda" and variant == "halo" and case.width > 64:
        pytest.skip("full float32 products on tensor cores, which nothing asks for, take a minute to compile")
    check(case)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", [GRID[4], GRID[8], *GRID[10:12], *GRID[-6:-3]], ids=str)
def test_half_precision(case, dtype, variant):
    check(case, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_error_of_half_precision_is_that_of_rounding(dtype, variant):
    """At most twice that of the reference, which computes in float32 and rounds once, and some last places."""
    case = Case(size=(10, 9), kernel_size=7, width=16, value_width=16, heads=2, border="mask", scale=0.25)
    tensors, grad = case.tensors(dtype), torch.randn(1, 2, 16, 10, 9).to(dtype)
    geometry = window(10, 9, (7, 7), (1, 1), (1, 1), "mask")

    def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
        given = [tensors[name].to(dtype) for name in NAMES]
        output, lse = reference.forward(*given, geometry, "mask", 0.25)
        grads = reference.backward(grad.to(dtype), *given, output, lse, geometry, "mask", 0.25)
        return {"output": output, **{f"grad {name}": x for name, x in zip(NAMES, grads, strict=True)}}

    right, rounded, got = by_reference(torch.float64), by_reference(dtype), run(tensors, grad, case)
    for name, exact in right.items():
        largest = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * (rounded[name].double() - exact).abs().max() + 2 * largest
        assert (got[name].cpu().double() - exact).abs().max() <= allowed, name


@pytest.mark.parametrize(
    "names", [("channels_last",) * 3, ("contiguous", "strided", "permuted"), ("slice_channels_last",) * 3]
)
def test_any_memory_layout(names, variant):
    case = Case(size=(5, 6), width=8, value_width=8, kernel_size=(3, 2))
    tensors = dict(case.tensors(torch.float32))
    for name, layout in zip(NAMES, names, strict=False):
        tensors[name] = LAYOUTS[layout](tensors[name])
    check(case, tensors=tensors)
    moved = [tensors[name].to(DEVICE) for name in NAMES[:3]]
    output = sasa.local_attention(*moved, 3, implementation="triton")
    last = output.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
    assert last if "channels_last" in names[0] else output.is_contiguous()


def test_gradients_with_strides_of_zero(variant):
    case = Case(size=(4, 5))
    solution = solve(case, torch.float32)
    leaves = [solution.tensors[name].to(DEVICE).requires_grad_() for name in NAMES]
    output = sasa.local_attention(
        *leaves[:3], **case.options, row_embedding=leaves[3], col_embedding=leaves[4], implementation="triton"
    )
    grads = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(output, leaves, torch.ones_like(output)))


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_of_64_bits(wide, variant, monkeypatch):
    monkeypatch.setattr(launch, "_reach", lambda x: 2**31 if wide else 1)
    check(Case(size=(5, 4), stride=2))


@pytest.mark.parametrize("spoil", ["query", "key", "value"])
@pytest.mark.parametrize(
    ("border", "by"), [("zero", torch.nan), ("mask", torch.nan), ("zero", torch.inf), ("mask", -torch.inf)]
)
def test_what_is_not_finite_stays_in_the_windows_that_see_it(border, spoil, by, variant):
    """Forward and backward, though a tile computes with all pixels of its halo."""
    case = Case(size=(7, 8), kernel_size=(3, 2), border=border, width=4)
    tensors = case.tensors(torch.float32)
    tensors[spoil][0, 1, 2, 3, 5] = by
    grad_output = torch.randn(1, 2, 4, 7, 8)
    got = run(tensors, grad_output, case)
    geometry = window(7, 8, (3, 2), (1, 1), (1, 1), border)
    given = [tensors[name] for name in NAMES]
    output, lse = reference.forward(*given, geometry, border, 1.0)
    grads = reference.backward(grad_output, *given, output, lse, geometry, border, 1.0)
    right = {"output": output, **{f"grad {name}": x for name, x in zip(NAMES, grads, strict=True)}}
    for name, x in right.items():
        y = got[name].cpu()
        assert torch.equal(x.isfinite(), y.isfinite()), name
        torch.testing.assert_close(y[x.isfinite()], x[x.isfinite()], rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_geometry(data, variant):
    def draw(most: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(1, most), st.integers(1, most)))

    case = Case(
        size=draw(9), kernel_size=draw(4), stride=draw(3), dilation=draw(3), heads=1,
        border=data.draw(st.sampled_from(BORDERS)), embeddings=data.draw(st.sampled_from(list(EMBEDDINGS))),
    )  # fmt: skip
    if case.fits:
        check(case)


def test_equal_inputs_give_equal_bits(variant):
    case = Case(size=(9, 8), kernel_size=3, width=8, batch=2)
    solution = solve(case, torch.float32)
    first = run(solution.tensors, solution.grad_output, case)
    for _ in range(19 if DEVICE == "cuda" else 1):
        again = run(solution.tensors, solution.grad_output, case)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("images", [1, 2, 5])
def test_embeddings_gradients_a_few_images_at_a_time(images, variant, monkeypatch):
    """However many shares exist at once."""
    case = Case(batch=5, heads=1)
    monkeypatch.setattr(launch, "SHARE_BYTES", images * 6 * 3 * 4)
    check(case)


def test_log_sum_exp_of_an_infinite_logit(variant):
    """As the reference has it."""
    query, key = torch.ones(2, 1, 1, 2, 3, 4, device=DEVICE)
    key[0, 0, 0, 1, 1] = torch.inf
    options = [*([*pair(x)] for x in (3, 1, 1)), "zero", 1.0]
    right = torch.ops.sasa.local_attention(query, key, key, None, None, *options, "reference")[1]
    assert torch.equal(
        torch.ops.sasa.local_attention(query, key, key, None, None, *options, "triton")[1].isinf(), right.isinf()
    )


def test_empty_batch():
    tensors = [torch.zeros(0, 2, 3, 4, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    row = torch.zeros(2, 3, 3, device=DEVICE, requires_grad=True)
    output = sasa.local_attention(*tensors, 3, row_embedding=row, stride=2, implementation="triton")
    assert output.shape == (0, 2, 3, 2, 3)
    output.sum().backward()
    assert torch.equal(row.grad, torch.zeros_like(row))
    assert tensors[0].grad.shape == (0, 2, 3, 4, 5)


def test_a_window_beyond_what_registers_hold_goes_tap_by_tap():
    case = Case(size=(1, 3), kernel_size=(1, launch.MOST_TAPS + 3), heads=1, width=2)
    with triton.using("halo"):
        check(case)


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(variant):
    case = Case(size=(3, 4), batch=2)
    given = [case.tensors(torch.float32)[name].to(DEVICE).requires_grad_() for name in NAMES]
    options = [*([*pair(x)] for x in (3, 1, 1)), "zero", 1.0, "triton"]
    opcheck(torch.ops.sasa.local_attention.default, (*given, *options))


def test_compiled_in_one_graph():
    case = Case(size=(4, 5))
    solution = solve(case, torch.float32)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in solution.tensors.items()}
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    @torch.compile(fullgraph=True, backend=backend)
    def attend(tensors):
        return sasa.local_attention(**tensors, **case.options, implementation="triton")

    output = attend(leaves)
    assert_right("output", output, solution)
    for name, grad in zip(
        leaves, torch.autograd.grad(output, list(leaves.values()), solution.grad_output.to(DEVICE)), strict=True
    ):
        assert_right(f"grad {name}", grad, solution)


def test_second_derivatives_go_through_the_reference():
    case = Case(size=(3, 3), kernel_size=2)
    given = {name: x.to(DEVICE).requires_grad_() for name, x in case.tensors(torch.float32).items()}

    def second(name: str) -> list[Tensor]:
        output = sasa.local_attention(**given, **case.options, implementation=name)
        first = torch.autograd.grad(output.sin().sum(), list(given.values()), create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), list(given.values())))

    torch.testing.assert_close(second("triton"), second("reference"), rtol=1e-3, atol=1e-3)


def test_autocast():
    case = Case(size=(4, 4), width=4)
    tensors = {name: x.to(DEVICE).requires_grad_() for name, x in case.tensors(torch.float32).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        output = sasa.local_attention(**tensors, **case.options, implementation="triton")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in tensors.values())


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"pool": 2}, {"stride": 2}], ids=str)
def test_layer(options):
    layer = sasa.RelativeSelfAttention(6, 8, 3, 2, implementation="triton", **options).to(DEVICE)
    image = torch.randn(2, 6, 7, 6, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for name in ("triton", "reference"):
        layer.implementation = name
        output = layer(image)
        inputs = [image, *layer.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_stem():
    stem = sasa.AttentionStem(3, 16, 2, implementation="triton").to(DEVICE)
    image = torch.randn(1, 3, 9, 8, device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        stem.implementation = name
        output = stem(image)
        results.append((output, *torch.autograd.grad(output.square().sum(), [stem.qk.weight, stem.value.weight])))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def choice(**kind) -> str:
    value = torch.empty(1, 1, kind.pop("value_width", 4), 3, 3, **kind)
    return implementations.choose(None, torch.empty(1, 1, 4, 3, 3, **kind), value).name


def test_the_interpreter_is_never_chosen_unasked():
    assert choice() != "triton"


@ON_GPU
def test_what_is_not_supported_goes_to_the_reference():
    assert choice(device="cuda") == "triton"
    assert choice(device="cuda", dtype=torch.float64) == "reference"
    assert choice(device="cuda", value_width=129) == "reference"


@pytest.mark.parametrize(
    ("query", "value", "reason"),
    [
        ((1, 1, 4, 3, 3, torch.float64), 4, "it computes torch.float16, torch.bfloat16, torch.float32, the query is"),
        ((1, 1, 129, 3, 3, torch.float32), 129, "it computes heads of up to 128 channels, these have 129"),
        ((1, 1, 4, 3, 3, torch.float32), 130, "it computes heads of up to 128 channels, these have 130"),
    ],
)
def test_asked_for_what_it_cannot_it_says_why(query, value, reason):
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
def test_an_interpreter_asked_for_too_late_is_told(monkeypatch):
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
    what = launch.problem_of(x, x, x, x, None, None, None, geometry, "zero")
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
        """A tensor that says it is on a GPU."""

        def __getattr__(self, name):
            return torch.device("cuda") if name == "device" else getattr(x, name)

    allowed = launch.problem_of(OnGpu(), x, x, x, None, None, None, geometry, "zero")
    assert (allowed.precision, allowed.tensor_cores) == ("tf32", True)
    monkeypatch.setattr(launch, "_allows_tf32", lambda: False)
    strict = launch.problem_of(OnGpu(), x, x, x, None, None, None, geometry, "zero")
    assert (strict.precision, strict.tensor_cores) == ("ieee", False)


@ON_GPU
def test_tuned_tiles_give_the_right_numbers(monkeypatch):
    """Outside of deterministic mode tiles are measured and chosen."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(launch, "LEAST_PROGRAMS", 1)
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(size=(9, 19), kernel_size=7, width=16, heads=2, batch=2), dtype)


@ON_GPU
def test_tuned_by_several_threads(monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(launch, "LEAST_PROGRAMS", 1)
    x = torch.randn(2, 2, 24, 20, 20, device=DEVICE)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: sasa.local_attention(x, x, x, 5, implementation="triton"), range(8)))
    assert all(torch.equal(result, results[0]) for result in results)


@ON_GPU
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph(deterministic):
    """Captured after one ordinary call, which has tuned what there is to tune."""
    torch.use_deterministic_algorithms(deterministic)
    case = Case(size=(40, 40), kernel_size=3, width=16, batch=4, heads=2)
    given = {name: x.to(DEVICE).requires_grad_() for name, x in case.tensors(torch.bfloat16).items()}
    grad = torch.randn(4, 2, 16, 40, 40, dtype=torch.bfloat16, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        output = sasa.local_attention(**given, **case.options)
        return output, *torch.autograd.grad(output, list(given.values()), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        right = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().zero_()
    graph.replay()
    torch.testing.assert_close(list(captured), right)
