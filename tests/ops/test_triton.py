"""The Triton kernels: on a GPU if there is one, else on CPU tensors in Triton's interpreter, which is slow: a reduced
grid. On a GPU all other tests of the operator run too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import BORDERS, EMBEDDINGS, NAMES, Case, Solution, assert_right, layouts, pair, solve, solve_tensors
from torch import Tensor

import sasa
from sasa.ops import implementations, triton
from sasa.ops.window import Window, window

pytest.importorskip("triton")
from sasa.ops.triton import launch

# NumPy warns of numbers that tiles compute beyond the edge of an image and discard.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
LAYOUTS = layouts()
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["taps", "halo"])
def variant(request):
    """One variant of the kernels, forced."""
    with triton.using(request.param):
        yield request.param


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def geometry_of(case: Case) -> Window:
    return window(*case.size, pair(case.kernel_size), pair(case.stride), pair(case.dilation), case.border)


def run(tensors: dict[str, Tensor], grad_output: Tensor, case: Case) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients; ``tensors`` may hold embeddings of fewer channels than the head's."""
    given = [tensors[name].to(DEVICE) if name in tensors else None for name in NAMES]
    kernels = implementations.choose("triton", given[0], max(given[0].shape[2], given[2].shape[2]))
    geometry = geometry_of(case)
    output, lse = kernels.forward(*given, geometry, case.scale)
    grads = kernels.backward(grad_output.to(DEVICE), *given, lse, geometry, case.scale)
    assert [grad is None for grad in grads] == [x is None for x in given]
    got = {f"grad {name}": grad for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
    assert all(got[f"grad {name}"].shape == x.shape for name, x in tensors.items())
    return {"output": output, "lse": lse, **got}


def by_reference(tensors: dict[str, Tensor], grad_output: Tensor, case: Case) -> dict[str, Tensor]:
    """Output and gradients of the reference, in the dtype given."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **case.options, implementation="reference")
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output.dtype))
    return {"output": output.detach(), **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def halves(x: dict[str, Tensor], channels: tuple[int, int], prefix: str = "") -> dict[str, Tensor]:
    """``x`` with the first channels of the row embedding and the last of the column embedding."""
    parts = {f"{prefix}row_embedding": slice(channels[0]), f"{prefix}col_embedding": slice(-channels[1], None)}
    return x | {name: x[name][:, part] for name, part in parts.items() if name in x}


def solve_halves(case: Case, channels: tuple[int, int], dtype: torch.dtype) -> Solution:
    """The solution of a case with embeddings of so many channels: that with zeros in the other channels."""
    solution = solve(case, dtype)
    parts = halves(solution.tensors, channels)
    padded = solution.tensors | {name: torch.zeros_like(solution.tensors[name]) for name in NAMES[3:5] if name in parts}
    for name, x in halves(padded, channels).items():
        x.copy_(parts[name])
    whole = solve_tensors(padded, solution.grad_output, **case.options)
    return whole._replace(tensors=parts, right=halves(whole.right, channels, "grad "))


def check(
    case: Case,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
    channels: tuple[int, int] | None = None,
) -> None:
    """Compare with the solution: of other ``tensors`` of the same values, or with embeddings of so many channels."""
    solution = solve(case, dtype) if channels is None else solve_halves(case, channels, dtype)
    for name, result in run(tensors or solution.tensors, solution.grad_output, case).items():
        assert result.dtype == (torch.float32 if name == "lse" else dtype), name
        assert_right(name, result, solution, rounded=True)


# Every size, window, border, width and embedding once or twice: a case takes seconds in the interpreter.
SEVERAL_TILES = Case(size=(9, 19), kernel_size=7, width=16, heads=1, border="mask")
ROUNDED = [Case(size=(4, 5), border="mask"), Case(size=(3, 4), stride=2, width=17, value_width=9, kernel_size=2)]
GRID = [
    SEVERAL_TILES,
    *ROUNDED,
    *(Case(size=size, border=border) for size, border in (((1, 1), "zero"), ((1, 5), "mask"), ((5, 4), "zero"))),
    *(Case(size=(2, 3), kernel_size=7, border=border) for border in ("zero", "mask")),
    *(Case(size=(5, 6), kernel_size=(2, 3), stride=(2, 1), border=border, heads=1) for border in BORDERS),
    Case(size=(7, 6), kernel_size=3, dilation=2, border="valid", heads=1),
    Case(size=(9, 8), kernel_size=(3, 2), dilation=(2, 3), stride=(2, 2), border="mask", heads=1),
    Case(size=(9, 8), kernel_size=2, dilation=4, stride=2, heads=1),
    *(Case(size=(3, 4), embeddings=name, scale=0.35, batch=2) for name in EMBEDDINGS),
    *(Case(size=(3, 4), width=width, value_width=9, kernel_size=2) for width in (1, 5, 32)),
    *(Case(size=(4, 3), width=128, value_width=width, heads=1) for width in (1, 128)),
    Case(size=(4, 3), width=128, heads=1, scale=0.1),  # weights that are not close to 0 and 1
    *(Case(size=(4, 3), scale=scale) for scale in (-1.5, 0.0)),
    Case(size=(10, 9), kernel_size=5, stride=3, width=8, border="valid", heads=1),
    Case(size=(3, 3), kernel_size=(1, 9)),
    Case(size=(2, 12), kernel_size=(1, 11), border="mask", stride=(1, 5)),
    Case(size=(9, 11), kernel_size=(3, 5), border="shift", heads=1),
    Case(size=(7, 9), kernel_size=(2, 3), dilation=(2, 3), stride=(1, 2), border="shift", heads=1),
    Case(size=(4, 7), border="shift", embeddings="all", stride=(2, 1), scale=0.5),
]


@pytest.mark.sampled(20)
@pytest.mark.parametrize("case", [case for case in GRID if case.fits], ids=str)
def test_results_and_gradients(case, variant):
    if DEVICE == "cuda" and variant == "halo" and case.width > 64:
        pytest.skip("full float32 products on tensor cores, which nothing asks for, take a minute to compile")
    check(case)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("case", "channels"),
    [
        (Case(size=(5, 4), width=8, kernel_size=(2, 5), border="mask"), (2, 3)),
        (Case(size=(3, 4), width=8, kernel_size=2), (4, 4)),
        (Case(size=(6, 5), width=7, kernel_size=(3, 2), stride=(1, 2), dilation=(2, 1), value_width=3), (7, 5)),
        (Case(size=(3, 4), width=8, embeddings="row", scale=-0.5), (1, 1)),
        (Case(size=(3, 4), width=8, embeddings="col"), (1, 5)),
    ],
    ids=str,
)
def test_embeddings_of_some_channels(case, channels, variant):
    """The row embedding has a head's first channels, the column embedding its last; between them a gap, or both."""
    check(case, channels=channels)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_embeddings_of_some_channels_in_half_precision(dtype, variant):
    check(Case(size=(4, 5), width=16, kernel_size=3, scale=0.25), dtype, channels=(8, 8))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"dilation": 2**24}, {"dilation": 4}),
        ({"dilation": (2**62, 1), "border": "mask"}, {"dilation": (3, 1), "border": "mask"}),
        ({"stride": 2**62, "dilation": 2}, {"stride": 4, "dilation": 2}),
        ({"stride": 2**40, "dilation": 2**50}, {"stride": 4, "dilation": 5}),
    ],
    ids=str,
)
def test_strides_and_dilations_beyond_the_image(options, same, variant):
    """At the cost of those as large as the image."""
    solution = solve(Case(size=(2, 3), heads=1, **same), torch.float32)
    got = run(solution.tensors, solution.grad_output, Case(size=(2, 3), heads=1, **options))
    for name, result in got.items():
        assert_right(name, result, solution)


def test_a_window_too_large_for_32_bits_raises():
    x = torch.zeros(1, 1, 1, 3, 3)
    case = Case(size=(3, 3), kernel_size=(2**31, 1))
    with pytest.raises(ValueError, match=r"^kernel_size: expected .* fewer than 2\*\*31 pixels, got 2147483648 taps"):
        run({"query": x, "key": x, "value": x}, x, case)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", [*ROUNDED, Case(size=(4, 4), scale=0.0, dilation=2, heads=1)], ids=str)
def test_half_precision(case, dtype, variant):
    check(case, dtype)


def test_half_precision_over_several_tiles():
    with triton.using("halo"):  # on tensor cores, as half precision is by default
        check(SEVERAL_TILES, torch.bfloat16)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_error_of_half_precision_is_that_of_rounding(dtype, variant):
    """At most twice that of the reference, which computes in float32 and rounds once, and some last places."""
    case = Case(size=(7, 6), kernel_size=5, width=16, value_width=16, heads=1, border="mask", scale=0.25)
    tensors, grad = case.tensors(dtype), torch.randn(1, 1, 16, 7, 6).to(dtype)
    right = by_reference({name: x.double() for name, x in tensors.items()}, grad, case)
    rounded, got = by_reference(tensors, grad, case), run(tensors, grad, case)
    for name, exact in right.items():
        largest = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * (rounded[name].double() - exact).abs().max() + 2 * largest
        assert (got[name].cpu().double() - exact).abs().max() <= allowed, name


@pytest.mark.sampled(3)
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
    leaves = [solution.tensors[name].to(DEVICE).requires_grad_() for name in NAMES[:5]]
    output = sasa.local_attention(
        *leaves[:3], **case.options, row_embedding=leaves[3], col_embedding=leaves[4], implementation="triton"
    )
    grads = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(output, leaves, torch.ones_like(output)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wide", [False, True])
def test_offsets_of_64_bits(wide, variant, monkeypatch):
    before = launch._layout_of
    monkeypatch.setattr(launch, "_layout_of", lambda x: before(x)._replace(reach=2**31 if wide else 1))
    check(Case(size=(5, 4), stride=2))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("spoil", "border", "by"),
    [
        *((name, "zero", torch.nan) for name in ("query", "key", "value")),
        ("query", "mask", torch.inf),
        ("key", "zero", torch.inf),
        ("value", "mask", -torch.inf),
    ],
)
def test_what_is_not_finite_stays_in_the_windows_that_see_it(border, spoil, by, variant):
    """Forward and backward, though a tile computes with all pixels of its halo."""
    case = Case(size=(6, 7), kernel_size=(3, 2), border=border, width=4, heads=1)
    tensors = case.tensors(torch.float32)
    tensors[spoil][0, 0, 2, 3, 5] = by
    grad_output = torch.randn(1, 1, 4, 6, 7)
    got = run(tensors, grad_output, case)
    for name, x in by_reference(tensors, grad_output, case).items():
        y = got[name].cpu()
        assert torch.equal(x.isfinite(), y.isfinite()), name
        torch.testing.assert_close(y[x.isfinite()], x[x.isfinite()], rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(1)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_geometry(data, variant):
    def draw(most: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(1, most), st.integers(1, most)))

    case = Case(
        size=draw(9), kernel_size=draw(4), stride=draw(3), dilation=draw(3), heads=1,
        border=data.draw(st.sampled_from(BORDERS)), embeddings=data.draw(st.sampled_from(list(EMBEDDINGS))),
    )  # fmt: skip
    if case.fits:
        check(case, channels=draw(case.width))


def test_equal_inputs_give_equal_bits(variant):
    case = Case(size=(9, 8) if DEVICE == "cuda" else (4, 5), kernel_size=3, width=8, batch=2)
    solution = solve(case, torch.float32)
    first = run(solution.tensors, solution.grad_output, case)
    for _ in range(19 if DEVICE == "cuda" else 1):
        again = run(solution.tensors, solution.grad_output, case)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("images", "channels"), [(1, (3, 3)), (2, (1, 2)), (3, (3, 3))])
def test_embeddings_gradients_a_few_images_at_a_time(images, channels, variant, monkeypatch):
    """However many shares exist at once."""
    monkeypatch.setattr(launch, "SHARE_BYTES", images * 3 * sum(channels) * 4)
    check(Case(size=(3, 4), batch=3, heads=1), channels=channels)


def test_log_sum_exp_of_an_infinite_logit(variant):
    """Infinite in the windows that see it."""
    query, key = torch.ones(2, 1, 1, 2, 3, 4)
    key[0, 0, 0, 1, 1] = torch.inf
    lse = run({"query": query, "key": key, "value": key}, query, Case(size=(3, 4)))["lse"].cpu()
    seen = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    seen[..., :3] = True
    assert torch.equal(lse == torch.inf, seen)


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
    """Captured after one ordinary call, in which the tiles are tuned."""
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
