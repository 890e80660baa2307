"""Every implementation against the naive float64 loops: outputs, log-sum-exps and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import (
    BORDERS,
    EMBEDDINGS,
    NAMES,
    Case,
    Solution,
    assert_right,
    attention,
    centres,
    layouts,
    moved,
    offsets,
    pair,
    solve,
    solve_tensors,
)
from torch import Tensor

import sasa
from sasa.ops import eager, equation
from sasa.ops.window import window_of

LAYOUTS = layouts()
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def grid(**axes) -> list:
    """The cases of all combinations, those without a single window left out, with ids."""
    cases = [Case(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [pytest.param(case, id=str(case)) for case in cases if case.fits]


def run(
    tensors: dict[str, Tensor], grad_output: Tensor, case: Case, name: str = "eager", device: str = "cpu"
) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients by the implementation of that name on that device."""
    leaves = {name: x.to(device).detach().requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **case.options, implementation=name)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(device))
    lse = log_sum_exp({name: x.detach() for name, x in leaves.items()}, case, name)
    return {"output": output, "lse": lse, **{f"grad {x}": grad for x, grad in zip(leaves, grads, strict=True)}}


def log_sum_exp(tensors: dict[str, Tensor], case: Case, name: str) -> Tensor:
    """What the forward keeps for the backward; of the equation, which keeps none, that of its logits."""
    in_order = [tensors.get(x) for x in NAMES]
    sizes = [pair(size) for size in (case.kernel_size, case.stride, case.dilation)]
    if name == "reference":
        query, key, _, *position = in_order
        window = window_of(query, *sizes, case.border)
        return equation.logits(query, key, *position, window, case.scale).logsumexp(2)
    return torch.ops.sasa.local_attention(*in_order, *sizes, case.border, case.scale, name)[1]


def check(implementation, case: Case, solution: Solution, tensors: dict[str, Tensor] | None = None) -> None:
    """Every result of the implementation against the solution, for its tensors or the same in another layout."""
    dtype = solution.grad_output.dtype
    got = run(tensors or solution.tensors, solution.grad_output, case, implementation.name, implementation.device)
    for name, result in got.items():
        single = name == "lse" and dtype != torch.float64
        assert result.dtype == (torch.float32 if single else dtype), name
        assert_right(name, result, solution, implementation.rounds)


SIZES = [(1, 1), (1, 5), (2, 3), (5, 4), (7, 7)]
WINDOWS = [1, 2, 3, 4, (3, 5), (1, 4), 7]


@pytest.mark.sampled(150)
@pytest.mark.parametrize("case", grid(size=SIZES, kernel_size=WINDOWS, border=BORDERS))
def test_any_image_and_window(case, implementation):
    check(implementation, case, solve(case, implementation.precise))


@pytest.mark.sampled(200)
@pytest.mark.parametrize(
    "case",
    grid(
        size=[(6, 7)],
        kernel_size=[1, 2, 3, (1, 4)],
        stride=[1, 2, 3, (1, 2)],
        dilation=[1, 2, (2, 1)],
        border=BORDERS,
        heads=[1],
    ),
)
def test_any_stride_and_dilation(case, implementation):
    check(implementation, case, solve(case, implementation.precise))


@pytest.mark.sampled(150)
@pytest.mark.parametrize(
    "case",
    grid(
        kernel_size=[(2, 3)],
        border=["zero", "mask"],
        embeddings=EMBEDDINGS,
        batch=[2],
        heads=[1, 3],
        width=[1, 3, 8],
        value_width=[None, 2],
        scale=[0.35],
    ),
)
def test_any_heads_widths_and_embeddings(case, implementation):
    check(implementation, case, solve(case, implementation.precise))


@pytest.mark.parametrize("scale", [-1.5, 0.0, 0.125, 3.0])
@pytest.mark.parametrize("border", BORDERS)
def test_any_scale(scale, border, implementation):
    case = Case(border=border, scale=scale)
    check(implementation, case, solve(case, implementation.precise))


# Sizes at which a kernel that works in tiles or vectors begins and ends one.
@pytest.mark.parametrize(
    "case",
    [
        *grid(
            size=[(2, 8), (3, 9), (1, 16), (2, 17), (1, 33)], kernel_size=[3, 7], border=BORDERS, heads=[1], width=[4]
        ),
        *grid(size=[(3, 5)], embeddings=["both"], width=[5, 7, 16, 17, 32, 64], value_width=[None, 9, 40]),
        *grid(size=[(9, 19)], kernel_size=[7], stride=[1, 2], border=["zero", "mask"], heads=[1], width=[16]),
    ],
)
def test_tile_edges(case, implementation):
    check(implementation, case, solve(case, implementation.precise))


@pytest.mark.sampled(128)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        *grid(size=[(5, 6)], kernel_size=[2, 3], stride=[1, 2], border=BORDERS, embeddings=["both"], batch=[2]),
        *grid(kernel_size=[3], embeddings=["none", "row", "col"], scale=[0.5]),
        *grid(size=[(5, 6)], kernel_size=[7], width=[16], scale=[0.25]),
    ],
)
def test_every_dtype(case, dtype, implementation):
    if not implementation.supports(dtype):
        pytest.skip(f"{implementation.name} does not support {dtype} on {implementation.device}")
    check(implementation, case, solve(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("border", BORDERS)
def test_logits_far_beyond_the_range_of_exp(border, dtype, implementation):
    """Logits of thousands overflow exp in every dtype: the softmax must subtract the largest first."""
    if not implementation.supports(dtype):
        pytest.skip(f"{implementation.name} does not support {dtype} on {implementation.device}")
    case = Case(size=(4, 4), border=border, spread=30.0)
    solution = solve(case, dtype)
    assert solution.right["lse"].max() > 750
    check(implementation, case, solution)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, border, implementation):
    """All tensors in one layout, the gradient of the output too; what lies between their elements is NaN."""
    case = Case(size=(5, 6), kernel_size=(3, 2), stride=(1, 2), border=border, batch=2, value_width=4)
    solution = solve(case, implementation.precise)
    move = LAYOUTS[layout]
    tensors = {name: x if name.endswith("embedding") else move(x) for name, x in solution.tensors.items()}
    moved = solution._replace(grad_output=move(solution.grad_output))
    assert all(torch.equal(x, solution.tensors[name]) for name, x in tensors.items())
    check(implementation, case, moved, tensors)


@pytest.mark.parametrize("shift", range(1, len(LAYOUTS)))
def test_each_tensor_in_a_layout_of_its_own(shift, implementation):
    case = Case(size=(4, 5), kernel_size=3, batch=2, border="mask")
    solution = solve(case, implementation.precise)
    moves = itertools.islice(itertools.cycle(LAYOUTS.values()), shift, None)
    tensors = {name: next(moves)(x) if x.dim() == 5 else x.mT.contiguous().mT for name, x in solution.tensors.items()}
    check(implementation, case, solution, tensors)


@pytest.mark.parametrize("dim", range(5))
def test_expanded_tensors(dim, implementation):
    """Query, key, value and the gradient of the output repeat along one dimension without memory for it."""
    case = Case(size=(3, 4), batch=2, border="zero")

    def repeat(x: Tensor) -> Tensor:
        return x.narrow(dim, 0, 1).expand_as(x) if x.dim() == 5 else x

    given = case.tensors(implementation.precise)
    tensors = {name: repeat(x) for name, x in given.items()}
    solution = solve_tensors(tensors, repeat(torch.randn_like(given["value"])), **case.options)
    check(implementation, case, solution)


@pytest.mark.parametrize("border", BORDERS)
def test_empty_batch_gives_an_empty_output_and_zero_gradients(border, implementation):
    query = torch.empty(0, 2, 3, 5, 6, device=implementation.device, requires_grad=True)
    row = torch.ones(2, 3, 5 if border == "shift" else 3, device=implementation.device, requires_grad=True)
    options = {"row_embedding": row, "border": border, "implementation": implementation.name, "stride": 2}
    output = sasa.local_attention(query, query, query[:, :, :1], 3, **options)
    assert output.shape == ((0, 2, 1, 2, 2) if border == "valid" else (0, 2, 1, 3, 3))
    output.sum().backward()
    assert query.grad.shape == query.shape
    assert torch.equal(row.grad, torch.zeros_like(row))


@pytest.mark.parametrize("border", BORDERS)
def test_output_and_gradients_keep_the_memory_format(border, implementation):
    """Channels_last in, channels_last out, also from a slice of a wider tensor; contiguous otherwise.

    The gradients of the equation are PyTorch's, in the format of its choice.
    """
    for layout, format_ in [
        ("contiguous", torch.contiguous_format),
        ("slice", torch.contiguous_format),
        ("strided", torch.contiguous_format),
        ("channels_last", torch.channels_last),
        ("slice_channels_last", torch.channels_last),
    ]:
        case = Case(size=(6, 7), border=border, batch=2, value_width=5)
        tensors = {n: LAYOUTS[layout](x) if x.dim() == 5 else x for n, x in case.tensors(torch.float32).items()}
        leaves = {name: x.to(implementation.device).requires_grad_() for name, x in tensors.items()}
        output = sasa.local_attention(**leaves, **case.options, implementation=implementation.name)
        grads = torch.autograd.grad(output.square().sum(), [leaves[name] for name in ("query", "key", "value")])
        for x in (output, *grads) if implementation.has_operator else (output,):
            assert x.flatten(1, 2).is_contiguous(memory_format=format_), layout
            assert x.flatten(1, 2).data_ptr() == x.data_ptr(), layout


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("border", BORDERS)
def test_eager_in_chunks_of_the_batch(border, images, monkeypatch):
    """It works on some images at a time: chunks of one and of two of five give what is right."""
    case = Case(batch=5, border=border, heads=1, size=(3, 4))
    solution = solve(case)
    monkeypatch.setattr(eager, "CHUNK", images * solution.tensors["query"][0].numel())
    assert len(list(eager._chunks(solution.tensors["query"]))) == -(-5 // images)
    for name, result in run(solution.tensors, solution.grad_output, case).items():
        assert_right(name, result, solution)


WEIGHT_CASES = [
    *grid(size=[(4, 5)], kernel_size=[1, 2, 3, (3, 5)], stride=[1, 2], border=BORDERS, scale=[0.5]),
    *grid(size=[(4, 5)], dilation=[2], border=["zero", "mask"], embeddings=EMBEDDINGS),
]


def without_value(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name != "value"}


grad_modes = pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=lambda mode: mode.__name__)


@grad_modes
@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_weights_equal_the_loops(case, grad_mode):
    solution = solve(case)
    with grad_mode():
        weights = sasa.local_attention_weights(**without_value(solution.tensors), **case.options)
    assert_right("weights", weights, solution)
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[:, :, 0]))


@grad_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weights_in_every_dtype(dtype, grad_mode):
    case = Case(size=(4, 5), border="mask")
    solution = solve(case, dtype)
    with grad_mode():
        weights = sasa.local_attention_weights(**without_value(solution.tensors), **case.options)
    assert weights.dtype == dtype
    assert_right("weights", weights, solution)


@pytest.mark.parametrize("case", WEIGHT_CASES[:8])
def test_weights_are_differentiable(case):
    """The gradients of a random function of the weights, against those of the loops."""
    right = {name: x.requires_grad_() for name, x in case.tensors().items()}
    got = {name: x.requires_grad_() for name, x in without_value(case.tensors()).items()}
    weights = sasa.local_attention_weights(**got, **case.options)
    direction = torch.randn_like(weights)
    (attention(**right, **case.options).weights * direction).sum().backward()
    (weights * direction).sum().backward()
    for name, x in got.items():
        torch.testing.assert_close(x.grad, right[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def seen_by_tap(value: Tensor, case: Case) -> Tensor:
    """The values under each tap of each window, zero outside of the image: (B, N, Dv, kh·kw, h, w)."""
    at_taps = []
    for axis in (0, 1):
        size, kernel, stride, dilation = (
            pair(x)[axis] for x in (case.size, case.kernel_size, case.stride, case.dilation)
        )
        middles = torch.tensor(centres(size, kernel, stride, dilation, case.border))
        at = torch.tensor(offsets(kernel, dilation))[:, None] + middles
        if case.border == "shift":
            at = torch.tensor([moved(int(pixel), size, kernel, dilation) for pixel in middles]).mT + middles
        at_taps.append((at.clamp(0, size - 1), (at >= 0) & (at < size)))
    (rows, in_rows), (cols, in_cols) = at_taps
    values = value[..., rows[:, None, :, None], cols[None, :, None, :]]
    return (values * (in_rows[:, None, :, None] & in_cols[None, :, None, :])).flatten(3, 4)


@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_weights_times_values_is_the_output(case):
    tensors = case.tensors()
    weights = sasa.local_attention_weights(**without_value(tensors), **case.options)
    output = (weights[:, :, None] * seen_by_tap(tensors["value"], case)).sum(3)
    torch.testing.assert_close(sasa.local_attention(**tensors, **case.options), output)
