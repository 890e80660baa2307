"""The operation as PyTorch's tools see it: opcheck, fake and meta tensors, vmap, FLOPs, autocast."""

from __future__ import annotations

import pytest
import torch
from oracles import BORDERS, EMBEDDINGS, NAMES, Case, assert_same_sums, layouts, pair, solve
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sasa
from sasa.ops.operators import LOCAL

LAYOUTS = layouts()
FORWARD = torch.ops.sasa.local_attention.default
BACKWARD = torch.ops.sasa.local_attention_backward.default

# (case, layout, dtype): every border, embedding, layout and dtype at least once.
PROBLEMS = [
    (Case(batch=2), "contiguous", torch.float32),
    (Case(batch=2, value_width=5, stride=2), "channels_last", torch.float32),
    (Case(batch=2, border="mask", kernel_size=(2, 3)), "slice", torch.float64),
    (Case(batch=2, border="valid", embeddings="none", value_width=2), "slice_channels_last", torch.float32),
    (Case(batch=2, embeddings="row", dilation=2, scale=0.5), "permuted", torch.bfloat16),
    (Case(batch=2, embeddings="col", stride=(1, 2)), "strided", torch.float16),
    (Case(batch=2, value_width=2, border="mask"), "one each", torch.float32),
    (Case(batch=2, border="shift", embeddings="all", stride=(1, 2)), "slice", torch.float32),
    (Case(batch=2, border="mask", embeddings="bias"), "channels_last", torch.float64),
    (Case(size=(1, 1), border="mask"), "contiguous", torch.float32),
    (Case(size=(3, 1), heads=1, width=1), "channels_last", torch.float64),
]
problems = pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    PROBLEMS,
    ids=lambda x: str(x).removeprefix("torch.") if x != Case(batch=2) else "plain",
)


def arguments(case: Case, layout: str, dtype: torch.dtype, implementation: str | None = None) -> tuple[list, list]:
    """The operator's tensors (None for a missing embedding) and its options."""
    given = case.tensors(dtype)
    tensors = [given.get(name) for name in NAMES]
    sizes = [list(pair(x)) for x in (case.kernel_size, case.stride, case.dilation)]
    names = ["channels_last", "contiguous", "slice_channels_last"] if layout == "one each" else [layout] * 3
    moved = [LAYOUTS[name](x) for name, x in zip(names, tensors, strict=False)]
    return [*moved, *tensors[3:]], [*sizes, case.border, case.scale, implementation]


def leaves(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.detach().requires_grad_() for x in tensors]


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda q: f(q).square().sum())(x[0]),
    "jvp": lambda f, x: torch.func.jvp(f, (x[0],), (x[1],)),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda q: f(q).square().sum()))(x),
    "hessian": lambda f, x: torch.func.hessian(lambda q: f(q).square().sum())(x[0]),
}

# opcheck itself looks at .grad of tensors that are no leaves.
opchecks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@opchecks
@problems
def test_opcheck(case, layout, dtype, implementation):
    """Schema, fake tensors and AOT dispatch with dynamic shapes, of both operators, gradients of the forward."""
    if not implementation.has_operator:
        pytest.skip("the equation has no operator")
    if not implementation.supports(dtype) or implementation.device != "cpu":
        pytest.skip(f"{implementation.name} does not compute {dtype} on the CPU")
    tensors, options = arguments(case, layout, dtype, implementation.name)
    opcheck(FORWARD, (*leaves(tensors), *options))
    output, lse = FORWARD(*tensors, *options)
    opcheck(BACKWARD, (LAYOUTS.get(layout, Tensor.contiguous)(torch.randn_like(output)), *tensors, lse, *options))


@opchecks
@pytest.mark.parametrize("widths", [(1, 2), (3, 1), (3, 2)], ids=str)
def test_opcheck_of_halves(widths, implementation):
    """The embeddings of the first and of the last channels: apart, one of all channels, and overlapping."""
    if not implementation.has_operator or implementation.device != "cpu":
        pytest.skip("no operator on the CPU")
    tensors, options = arguments(Case(), "contiguous", torch.float32, implementation.name)
    tensors[3:5] = tensors[3][:, : widths[0]], tensors[4][:, : widths[1]]
    opcheck(FORWARD, (*tensors, *options))
    output, lse = FORWARD(*tensors, *options)
    opcheck(BACKWARD, (output, *tensors, lse, *options))


@problems
@pytest.mark.parametrize("name", [None, "eager"])
def test_derivatives_of_an_operator_called_by_itself(case, layout, dtype, name):
    """As an exported program calls it: those of the function around it, of the first order and the second."""
    tensors, options = arguments(case, layout, dtype, name)
    given = leaves(tensors)
    present = [x for x in given if x is not None]
    expected = sasa.local_attention(
        **{name: x for name, x in zip(NAMES, given, strict=True) if x is not None}, **case.options, implementation=name
    )
    output, _ = FORWARD(*given, *options)
    for y in (output, expected):
        y.tanh_()  # whoever receives it may change it in place
    found = [
        torch.autograd.grad(torch.autograd.grad(y.square().sum(), present, create_graph=True)[0].sum(), present)
        for y in (output, expected)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own rules for jvp
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_an_operator_called_by_itself(transform):
    tensors, options = arguments(Case(size=(4, 3)), "contiguous", torch.float64)
    x = torch.randn(2, *tensors[0].shape, dtype=torch.float64)
    results = [
        TRANSFORMS[transform](function, x)
        for function in (
            lambda q: FORWARD(q, *tensors[1:], *options)[0],
            lambda q: LOCAL.equation(q, *tensors[1:], *options),
        )
    ]
    torch.testing.assert_close(*results)


def kinds(results) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype, x.device.type) for x in results]


@problems
def test_fake_tensors_are_as_the_real_ones(case, layout, dtype):
    """In shape, strides and dtype, of both operators."""
    tensors, options = arguments(case, layout, dtype)
    real = FORWARD(*tensors, *options)
    real_grads = BACKWARD(real[0], *tensors, real[1], *options)
    with FakeTensorMode() as mode:
        fakes = [x if x is None else mode.from_tensor(x) for x in tensors]
        fake = FORWARD(*fakes, *options)
        fake_grads = BACKWARD(fake[0], *fakes, fake[1], *options)
    assert kinds(fake) == kinds(real)
    assert kinds(fake_grads) == kinds(real_grads)


@pytest.mark.parametrize(
    ("border", "shape"),
    [("zero", (2, 3, 5, 4, 3)), ("mask", (2, 3, 5, 4, 3)), ("valid", (2, 3, 5, 2, 3)), ("shift", (2, 3, 5, 4, 3))],
)
def test_meta_tensors(border, shape):
    """Shapes without numbers: 7x9 pixels, windows 4x3, stride (2, 3)."""
    query = torch.empty(2, 3, 4, 7, 9, device="meta", requires_grad=True)
    value = torch.empty(2, 3, 5, 7, 9, device="meta", requires_grad=True)
    row = torch.empty(3, 4, 7 if border == "shift" else 4, device="meta", requires_grad=True)
    output = sasa.local_attention(query, query, value, (4, 3), stride=(2, 3), border=border, row_embedding=row)
    assert output.device.type == "meta"
    assert output.shape == shape
    output.sum().backward()
    for x in (query, value, row):
        assert x.grad.shape == x.shape
    weights = sasa.local_attention_weights(query, query, (4, 3), stride=(2, 3), border=border, row_embedding=row)
    assert weights.shape == (2, 3, 12, *shape[3:])


VMAPPED = {
    "query": (0, None, None, None, None, None),
    "key": (None, 1, None, None, None, None),
    "value": (None, None, 4, None, None, None),
    "row_embedding": (None, None, None, 0, None, None),
    "col_embedding": (None, None, None, None, 2, None),
    "bias": (None, None, None, None, None, 1),
    "all": (0, 1, 2, 3, 0, 3),
    "images": (5, 5, 5, None, None, None),
}


@pytest.mark.parametrize("in_dims", VMAPPED.values(), ids=VMAPPED)
@pytest.mark.parametrize("border", BORDERS)
def test_vmap_equals_a_loop(in_dims, border, implementation):
    """Over each argument alone and several at once; gradients too."""
    case = Case(size=(4, 5), border=border, embeddings="all", value_width=2, stride=(2, 1))
    count = 3
    given = [x.to(implementation.device, implementation.precise) for x in case.tensors().values()]
    tensors = [
        x if dim is None else torch.stack([x + 0.1 * i for i in range(count)], dim)
        for x, dim in zip(given, in_dims, strict=True)
    ]

    def attend(*given: Tensor) -> Tensor:
        named = dict(zip(NAMES, given, strict=True))
        return sasa.local_attention(**named, **case.options, implementation=implementation.name)

    mapped, looped = leaves(tensors), leaves(tensors)
    output = torch.vmap(attend, in_dims)(*mapped)
    expected = torch.stack(
        [
            attend(*(x if d is None else x.select(d, i) for x, d in zip(looped, in_dims, strict=True)))
            for i in range(count)
        ]
    )
    torch.testing.assert_close(output, expected)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    assert_same_sums([x.grad for x in mapped], [x.grad for x in looped])


def test_nested_vmap():
    tensors = [torch.randn(2, 3, 1, 2, 3, 4, 4) for _ in range(3)]
    attend = torch.vmap(torch.vmap(lambda q, k, v: sasa.local_attention(q, k, v, 3)))
    flat = sasa.local_attention(*(x.flatten(0, 2) for x in tensors), 3)
    torch.testing.assert_close(attend(*tensors), flat.unflatten(0, (2, 3, 1)))


@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, None, None), (None, None, 0)], ids=["both", "query", "row"])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=lambda mode: mode.__name__)
def test_vmap_of_the_weights(grad_mode, in_dims):
    tensors = [torch.randn(*shape) for shape in ((3, 1, 2, 3, 4, 5), (3, 1, 2, 3, 4, 5), (3, 2, 3, 3))]
    given = [x if dim == 0 else x[0] for x, dim in zip(tensors, in_dims, strict=True)]

    def weights(query: Tensor, key: Tensor, row: Tensor) -> Tensor:
        return sasa.local_attention_weights(query, key, 3, row_embedding=row, border="mask")

    with grad_mode():
        looped = [weights(*(x[i] if dim == 0 else x for x, dim in zip(given, in_dims, strict=True))) for i in range(3)]
        torch.testing.assert_close(torch.vmap(weights, in_dims)(*given), torch.stack(looped))


# A product of two vectors of D numbers is 2·D FLOPs. 2 images, 3 heads, D = 4, 5x6 = 30 queries, 7x7 = 49 taps:
# 2·3·30·49 = 8,820 pairs of query and tap, each with q·k, q·(row + col) and the weighted sum: 6·4 FLOPs.
FLOPS = [
    (Case(size=(5, 6), batch=2, heads=3, width=4, kernel_size=7), 211_680),
    (Case(size=(5, 6), batch=2, heads=3, width=4, kernel_size=7, embeddings="row"), 211_680),
    # Without embeddings: 4·4 FLOPs a pair.
    (Case(size=(5, 6), batch=2, heads=3, width=4, kernel_size=7, embeddings="none"), 141_120),
    # 3·3 = 9 queries by stride 2, 2x3 = 6 taps, 2 heads: 108 pairs of 4·4 + 2·10.
    (Case(size=(5, 6), width=4, value_width=10, kernel_size=(2, 3), stride=2), 3_888),
    # Of these, 2 + 2 + 1 rows and 2 + 3 + 3 columns of taps are inside the image: 2·5·8 = 80 pairs.
    (Case(size=(5, 6), width=4, value_width=10, kernel_size=(2, 3), stride=2, border="mask"), 2_880),
    # 3x4 = 12 windows inside, 9 taps, 1 head: 108 pairs of 6·8.
    (Case(size=(5, 6), heads=1, width=8, border="valid"), 5_184),
    # 30 windows moved inside, 9 taps: 270 pairs of 6·8; the bias is no product.
    (Case(size=(5, 6), heads=1, width=8, border="shift", embeddings="all"), 12_960),
]


@pytest.mark.parametrize(("case", "flops"), FLOPS, ids=lambda x: str(x))
def test_flops_of_the_forward(case, flops, implementation):
    """6·k²·D a query and head with embeddings and D = Dv; the border's zeros count as all others."""
    if not implementation.has_operator:
        pytest.skip("PyTorch counts the operations of the equation")
    tensors = {name: x.to(implementation.device) for name, x in case.tensors(torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        sasa.local_attention(**tensors, **case.options, implementation=implementation.name)
    assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        sasa.local_attention(**{n: x.to("meta") for n, x in tensors.items()}, **case.options)
    assert counter.get_total_flops() == flops


@pytest.mark.parametrize(
    ("embeddings", "flops"),
    # 8,820 pairs as above: q·k, q·(row + col) once more, and two products for the gradients of each of these and of
    # the weighted sum (dq and dk, dq and drow + dcol, dp and dv): 8 products of 2·4 with embeddings, 5 without.
    [("both", 564_480), ("none", 352_800)],
)
def test_flops_of_the_backward(embeddings, flops):
    case = Case(size=(5, 6), batch=2, heads=3, width=4, kernel_size=7, embeddings=embeddings)
    output = sasa.local_attention(
        **dict(zip(NAMES, leaves(arguments(case, "contiguous", torch.float32)[0]), strict=True)), **case.options
    )
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == flops


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_autocast_computes_in_bfloat16(embeddings, backward_inside):
    """Bit for bit as with tensors rounded by hand, sums in float32; gradients come back in float32."""
    case = Case(embeddings=embeddings)
    tensors = {name: x.requires_grad_() for name, x in case.tensors(torch.float32).items()}
    rounded = {name: x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = sasa.local_attention(**tensors, **case.options)
    assert output.dtype == torch.bfloat16
    expected = sasa.local_attention(**rounded, **case.options)
    assert torch.equal(output, expected)
    expected.sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        output.sum().backward()
    for name, x in tensors.items():
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, rounded[name].grad.float())


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_autocast_of_the_weights(embeddings):
    """As above."""
    case = Case(embeddings=embeddings)
    tensors = {name: x for name, x in case.tensors(torch.float32).items() if name != "value"}
    with torch.autocast("cpu", torch.bfloat16):
        weights = sasa.local_attention_weights(**tensors, **case.options)
    rounded = {name: x.bfloat16() for name, x in tensors.items()}
    assert torch.equal(weights, sasa.local_attention_weights(**rounded, **case.options))


def test_autocast_of_second_derivatives():
    """As above, all of it inside of autocast."""
    case = Case()
    tensors = {name: x.requires_grad_() for name, x in case.tensors(torch.float32).items()}
    rounded = {name: x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}

    def second(tensors: dict[str, Tensor]) -> list[Tensor]:
        given = list(tensors.values())
        first = torch.autograd.grad(sasa.local_attention(**tensors, **case.options).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(x.sum() for x in first), given)

    with torch.autocast("cpu", torch.bfloat16):
        found = second(tensors)
    for x, y in zip(found, second(rounded), strict=True):
        assert torch.equal(x, y.float())


def test_autocast_joins_mixed_dtypes():
    """What a bfloat16 projection and float32 embeddings give under autocast; without it, they don't go together."""
    query = torch.randn(1, 2, 3, 4, 4, dtype=torch.bfloat16)
    row = torch.randn(2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert sasa.local_attention(query, query, query, 3, row_embedding=row).dtype == torch.bfloat16
        assert sasa.local_attention_weights(query, query, 3, row_embedding=row).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"row_embedding: expected dtype torch\.bfloat16"):
        sasa.local_attention(query, query, query, 3, row_embedding=row)


def test_autocast_leaves_float64():
    case = Case()
    solution = solve(case)
    with torch.autocast("cpu", torch.bfloat16):
        output = sasa.local_attention(**solution.tensors, **case.options)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, solution.right["output"])
