"""Projections and attention as one operator: the numbers of one after the other, and only the input kept."""

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same_sums

import sasa
from sasa.ops import cpu, cpu_projected
from sasa.ops.attend import attend

CASES = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "mask-dilation": {"border": "mask", "dilation": (2, 1)},
    "valid": {"border": "valid"},
    "even": {"kernel_size": (2, 4)},
    "scale": {"scale": 0.3},
    "shift": {"border": "shift", "scale": 0.3},
    "shift-dilation": {"border": "shift", "stride": (1, 2), "dilation": (2, 2)},
}
POOLED = CASES | {
    "mask": {"border": "mask"},
    "one-tap": {"kernel_size": (1, 1)},
    "stride-of-a-window": {"kernel_size": (2, 3), "stride": (2, 3)},
    "stride-past-a-window": {"kernel_size": (2, 2), "stride": (3, 1)},
    "dilation-and-stride": {"stride": (2, 4), "dilation": (2, 2)},
    "valid-even": {"border": "valid", "kernel_size": (2, 4)},
    "pool-3": {"pool": 3},
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def options(implementation=None, **changed):
    return {
        "num_heads": 8,
        "kernel_size": (3, 5),
        "stride": (1, 1),
        "dilation": (1, 1),
        "border": "zero",
        "scale": 1.0,
        "implementation": implementation,
    } | changed


def tensors(
    heads=8,
    width=5,
    inputs=7,
    kernel=(3, 5),
    dtype=torch.float64,
    device="cpu",
    size=(9, 11),
    batch=3,
    border="zero",
):
    """Input, weight, bias, embeddings and table."""
    x = torch.randn(batch, inputs, *size)
    weight = torch.randn(3 * heads * width, inputs) * inputs**-0.5
    kernel = [2 * size - 1 for size in kernel] if border == "shift" else kernel
    rest = [torch.randn(3 * heads * width), *(torch.randn(heads, width, size) for size in kernel)]
    rest.append(torch.randn(heads, *kernel))
    return [t.to(device, dtype).requires_grad_() for t in (x, weight, *rest)]


def projected_attention(x, weight, bias, row, col, table, **chosen):
    """As one operator, which keeps only its input."""
    return attend(x, weight[:, :, None, None], bias, row, col, table, **{"recompute": True} | chosen)


def one_after_the_other(x, weight, bias, row, col, table, num_heads, kernel_size, implementation, pool=1, **rest):
    """The equation in two steps, and a third to pool."""
    images = F.conv2d(x, weight[:, :, None, None], bias).unflatten(1, (3 * num_heads, -1))
    position = {"row_embedding": row, "col_embedding": col, "bias": table}
    output = sasa.local_attention(
        *images.chunk(3, 1), kernel_size, **position, implementation=implementation, **rest
    ).flatten(1, 2)
    return output if pool == 1 else torch.nn.AvgPool2d(pool, ceil_mode=True)(output)


def assert_close(ours, theirs) -> None:
    """Equal but for rounding."""
    assert_same_sums(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)))


def check_against_two_steps(args, chosen, memory_format=torch.contiguous_format, precise="reference"):
    """Results and all gradients; for the gradient of a sum too, one number with strides of zero."""
    ours, theirs = (
        projected_attention(*args, **chosen),
        one_after_the_other(*args, **chosen | {"implementation": precise}),
    )
    assert ours.is_contiguous(memory_format=memory_format)
    assert_close(ours, theirs)
    for vector in (torch.randn_like(ours), torch.ones_like(ours[:1, :1, :1, :1]).expand_as(ours)):
        grads = (torch.autograd.grad(y, args, vector, retain_graph=True) for y in (ours, theirs))
        assert_close(*grads)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [8, 3])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_two_steps(implementation, case, heads, memory_format):
    chosen = options(implementation.name, num_heads=heads, **CASES[case])
    like = {"dtype": implementation.precise, "device": implementation.device, "border": chosen["border"]}
    args = tensors(heads, kernel=chosen["kernel_size"], **like)
    args[0] = args[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    ours, theirs = projected_attention(*args, **chosen), one_after_the_other(*args, **chosen)
    assert ours.is_contiguous(memory_format=memory_format)
    assert_close(ours, theirs)
    vector = torch.randn_like(ours)
    assert_close(torch.autograd.grad(ours, args, vector), torch.autograd.grad(theirs, args, vector))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("widths", [(2, 3), (1, 2), (4, 3), (1, 5)], ids=str)
@pytest.mark.parametrize("heads", [3, 8])
def test_embeddings_of_some_channels(implementation, heads, widths, recompute):
    """A row half of the first channels and a column half of the last, side by side, with a gap or overlapping, are
    embeddings with zeros elsewhere.
    """
    args = tensors(heads, size=(5, 6), batch=2, dtype=implementation.precise, device=implementation.device)
    first, last = widths
    args[3:5] = (x.detach().requires_grad_() for x in (args[3][:, :first], args[4][:, 5 - last :]))
    ours = projected_attention(*args, **options(implementation.name, num_heads=heads, recompute=recompute))
    padded = F.pad(args[3], (0, 0, 0, 5 - first)), F.pad(args[4], (0, 0, 5 - last, 0))
    theirs = one_after_the_other(*args[:3], *padded, args[5], **options("eager", num_heads=heads))
    assert_close(ours, theirs)
    vector = torch.randn_like(ours)
    assert_close(torch.autograd.grad(ours, args, vector), torch.autograd.grad(theirs, args, vector))


@pytest.mark.parametrize("pool", [1, 2])
def test_many_gradients_at_once(implementation, pool):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` takes them."""
    args = tensors(dtype=implementation.precise, device=implementation.device, size=(3, 4), batch=2)
    output = projected_attention(*args, **options(implementation.name, pool=pool))
    vectors = torch.randn(3, *output.shape, dtype=output.dtype, device=output.device)
    grads = torch.autograd.grad(output, args, vectors, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(output, args, vector, retain_graph=True) for vector in vectors]
    assert_close(grads, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.sampled(100)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(8, 12), (9, 11), (8, 39)], ids=str)
@pytest.mark.parametrize("case", POOLED)
def test_pooling_is_that_of_the_output(implementation, case, size, memory_format):
    chosen = options(implementation.name) | {"pool": 2} | POOLED[case]
    kernel = chosen["kernel_size"]
    like = {"dtype": implementation.precise, "device": implementation.device, "border": chosen["border"]}
    args = tensors(kernel=kernel, size=size, batch=2, **like)
    args[0] = args[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    check_against_two_steps(args, chosen, memory_format)


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("heads", [8, 3, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (30, 2), (3, 1), (5, 40)], ids=str)
def test_any_image_size_is_pooled(size, heads, border):
    check_against_two_steps(
        tensors(heads, width=3, size=size, batch=2), options(num_heads=heads, border=border, pool=2)
    )


@pytest.mark.parametrize("name", cpu.capabilities())
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 3e-5), (torch.float64, 1e-13), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
def test_every_instruction_set_pools(name, dtype, tolerance):
    before = cpu.capability()
    args = [t.detach().to(dtype).requires_grad_() for t in tensors(width=9, inputs=12, size=(7, 18))]
    exact = [t.detach().double().requires_grad_() for t in args]
    chosen = options("cpu", pool=2)
    theirs = one_after_the_other(*exact, **chosen | {"implementation": "reference"})
    vector = torch.randn_like(theirs).to(dtype)
    try:
        cpu.set_capability(name)
        ours = projected_attention(*args, **chosen)
        grads = torch.autograd.grad(ours, args, vector)
    finally:
        cpu.set_capability(before)
    wanted = torch.autograd.grad(theirs, exact, vector.double())
    for got, want in zip((ours, *grads), (theirs, *wanted), strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_what_is_not_finite_stays_so_when_pooled():
    args = [t.detach() for t in tensors(size=(9, 10))]
    args[0][0, 1, 4, 5] = torch.inf
    args[0][1, 2, 0, 0] = torch.nan
    ours, theirs = (f(*args, **options(pool=2)) for f in (projected_attention, one_after_the_other))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("missing", [(2,), (3, 4), (3,), (5,), (4, 5), (2, 3, 4, 5)], ids=str)
def test_bias_and_embeddings_may_be_missing(missing):
    args = [None if i in missing else t for i, t in enumerate(tensors())]
    given = [t for t in args if t is not None]
    ours, theirs = projected_attention(*args, **options()), one_after_the_other(*args, **options())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), given), torch.autograd.grad(theirs.sum(), given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_the_two_steps(dtype):
    """In units of the precise result's size; half precision rounds queries, keys and values if they are stored."""
    args = [t.detach().to(dtype) for t in tensors(width=16, inputs=32)]
    precise = one_after_the_other(*(t.double() for t in args), **options())
    ours = (projected_attention(*args, **options()) - precise).abs().max()
    theirs = (one_after_the_other(*args, **options("reference")) - precise).abs().max()
    assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps * precise.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 2), (5, 40)], ids=str)
def test_any_image_size(size):
    args = tensors(width=3, size=size, batch=2)
    ours, theirs = projected_attention(*args, **options()), one_after_the_other(*args, **options())
    torch.testing.assert_close(ours, theirs)
    vector = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, args, vector), torch.autograd.grad(theirs, args, vector))


@pytest.mark.parametrize("pool", [1, 2])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(pool):
    args = tensors(batch=0)
    output = projected_attention(*args, **options(pool=pool))
    assert output.shape == ((0, 40, 9, 11) if pool == 1 else (0, 40, 5, 6))
    grads = torch.autograd.grad(output.sum(), args)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, args, strict=True))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("heads", [3, 8])
@pytest.mark.parametrize("name", ["eager", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the library multiplies the matrices of the first
def test_large_batches_are_computed_in_parts(monkeypatch, dtype, name, heads, pool):
    monkeypatch.setattr("sasa.ops.projected.PART_BYTES", 1)  # an image a part
    args = tensors(heads=heads, dtype=dtype)
    chosen = options(name, num_heads=heads, pool=pool)
    exact = [t.detach().double().requires_grad_() for t in args]
    grads = torch.autograd.grad(projected_attention(*args, **chosen).sum(), args)
    expected = torch.autograd.grad(one_after_the_other(*exact, **chosen).sum(), exact)
    for ours, theirs in zip(grads, expected, strict=True):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=100 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("pool", [1, 2])
def test_derivatives_of_both_orders(pool):
    args = tensors(heads=4, width=2, inputs=3, size=(3, 4), batch=1)
    chosen = options(num_heads=4, pool=pool)
    assert torch.autograd.gradcheck(lambda *a: projected_attention(*a, **chosen), args, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: projected_attention(*a, **chosen), args, fast_mode=True)


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("pool", [{}, {"pool": 2}, {"pool": 3}], ids=str)
def test_opcheck(pool, projected):
    args = [t.detach() for t in tensors(heads=4, width=2, inputs=3, size=(4, 5), batch=2, dtype=torch.float32)]
    args[1] = args[1][:, :, None, None] if projected else None
    args[0] = args[0] if projected else torch.randn(2, 24, 4, 5)
    args[2] = args[2] if projected else None
    chosen = (options(num_heads=4) | {"pool": 1} | pool).values()
    output, lse = torch.ops.sasa.projected_attention(*args, *chosen)
    torch.library.opcheck(torch.ops.sasa.projected_attention.default, (*args, *chosen))
    backward = torch.ops.sasa.projected_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(output), *args, lse, *chosen))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("mapped", [(0,), (0, 1, 2, 3, 4, 5), (3,), (5,)], ids=str)
def test_vmap(mapped, pool):
    chosen = options(pool=pool)
    args = [t.detach() for t in tensors()]
    dims = tuple(0 if i in mapped else None for i in range(6))
    many = [torch.stack([t, t.flip(0) + 1]) if i in mapped else t for i, t in enumerate(args)]
    got = torch.vmap(lambda *a: projected_attention(*a, **chosen), dims)(*many)
    want = [projected_attention(*(t[j] if i in mapped else t for i, t in enumerate(many)), **chosen) for j in range(2)]
    torch.testing.assert_close(got, torch.stack(want))


def test_compiled_equals_eager():
    layer = sasa.RelativeSelfAttention(6, 16, 3, 8, recompute=True)
    x = torch.randn(2, 6, 7, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(layer(x).sum(), x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_flops_count_the_projections_and_their_recomputation():
    from torch.utils.flop_counter import FlopCounterMode

    def count(recompute):
        x, weight, *rest = tensors(width=2, inputs=6, size=(7, 8), kernel=(3, 3), batch=2)
        chosen = options(kernel_size=(3, 3), recompute=recompute)
        with FlopCounterMode(display=False) as forward:
            y = attend(x, weight[:, :, None, None], *rest, **chosen)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    (forward, backward), (kept_forward, kept_backward) = count(True), count(False)
    projections = 2 * 2 * 7 * 8 * 6 * 48
    assert forward == kept_forward
    assert backward == kept_backward + projections


def test_flops_of_the_attention_are_counted_without_the_pool():
    from torch.utils.flop_counter import FlopCounterMode

    def count(pool):
        with FlopCounterMode(display=False) as counter:
            projected_attention(*tensors(), **options(pool=pool)).sum().backward()
        return counter.get_total_flops()

    assert count(2) == count(1) > 0


@pytest.mark.parametrize(
    "shape", [(1000, 384, 64), (77, 50, 32), (5, 7, 16), (300, 97, 48), (1, 1, 16), (4, 6, 5)], ids=str
)
@pytest.mark.parametrize("name", cpu.capabilities())
def test_gradients_of_the_projections(name, shape):
    """By the library for inputs that fill vectors, else by PyTorch."""
    pixels, outputs, inputs = shape
    before = cpu.capability()
    grad, x, weight = torch.randn(pixels, outputs), torch.randn(pixels, inputs), torch.randn(outputs, inputs)
    grad_x = torch.empty_like(x)
    try:
        cpu.set_capability(name)
        grad_weight, grad_bias = cpu_projected.linear_gradients(grad, x, weight, True, grad_x)
    finally:
        cpu.set_capability(before)
    torch.testing.assert_close(grad_x, grad @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad_weight, grad.mT @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad_bias, grad.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(("batch", "size"), [(3, (20, 13)), (1, (20, 13)), (1, (7, 7))], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(batch, size, pool):
    """In a small image threads share the heads, whose vectors are half as wide then."""
    kernel = (7, 7) if size == (7, 7) else (3, 5)
    args = tensors(width=16, inputs=32, size=size, kernel=kernel, dtype=torch.float32, batch=batch)
    chosen = options(pool=pool, kernel_size=kernel)
    vector = torch.randn_like(projected_attention(*args, **chosen))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = projected_attention(*args, **chosen)
            results.append([output, *torch.autograd.grad(output, args, vector)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
