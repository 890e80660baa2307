"""The attention stem against naive loops: any image, both modes, all gradients; and what it must not do."""

import pytest
import torch
import torch.nn.functional as F

from sasa import AttentionStem

SIZES = [(8, 8), (7, 9), (4, 5), (3, 2), (1, 1), (12, 4)]


def by_loops(stem, x):
    """The docstring's equation pixel by pixel; M value maps, and PyTorch's own max pool."""
    size, heads = stem.block_size, stem.num_heads
    query, key = stem.qk(x).chunk(2, 1)
    values = stem.value(x).unflatten(1, (stem.mixtures, -1))
    logits = torch.zeros(size, size, stem.mixtures, dtype=x.dtype)
    for a in range(size):
        for b in range(size):
            for m in range(stem.mixtures):
                place = stem.row_embedding[:, a] + stem.col_embedding[:, b]
                logits[a, b, m] = place @ stem.mixture_embedding[:, m]
    p = logits.softmax(-1)
    height, width = x.shape[2:]
    value = torch.stack(
        [
            torch.stack([torch.einsum("bmc,m->bc", values[..., i, j], p[i % size, j % size]) for j in range(width)], -1)
            for i in range(height)
        ],
        -2,
    )
    rows = []
    for i in range(height):
        pixels = []
        for j in range(width):
            block = (
                ...,
                slice(i // size * size, i // size * size + size),
                slice(j // size * size, j // size * size + size),
            )
            q = query[:, :, i, j].unflatten(1, (heads, -1))
            k, v = (t[block].flatten(2).unflatten(1, (heads, -1)) for t in (key, value))
            weights = torch.einsum("bnd,bndt->bnt", q, k).softmax(-1)
            pixels.append(torch.einsum("bnt,bndt->bnd", weights, v).flatten(1))
        rows.append(torch.stack(pixels, -1))
    return F.max_pool2d(stem.norm(torch.stack(rows, -2)), size, size, ceil_mode=True)


@pytest.mark.sampled(60)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("block_size", "mixtures", "heads"), [(4, 4, 4), (4, 1, 8), (2, 3, 2), (1, 2, 1)])
def test_equals_the_loops_with_all_gradients(size, training, block_size, mixtures, heads, implementation):
    if not implementation.supports(torch.float64):
        pytest.skip(f"{implementation} does not compute float64: which number is the largest is not certain")
    if training and size == (1, 1):
        size = (2, 1)  # batch norm wants more than one number a channel
    torch.manual_seed(0)
    options = {
        "block_size": block_size,
        "mixtures": mixtures,
        "implementation": implementation.name,
        "dtype": torch.float64,
        "device": implementation.device,
    }
    stem = AttentionStem(3, 16, heads, **options).train(training)
    torch.nn.init.normal_(stem.norm.weight)  # negative ones too: a maximum is no longer the largest output
    torch.nn.init.normal_(stem.norm.running_mean)
    x = torch.randn(2, 3, *size, dtype=torch.float64, device=implementation.device, requires_grad=True)
    inputs = [x, *stem.parameters()]
    ours, theirs = stem(x), by_loops(stem, x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_without_gradients_images_are_taken_in_parts_with_equal_results(size, monkeypatch):
    stem = AttentionStem(3, 16).eval()
    x = torch.randn(5, 3, *size)
    whole = stem(x)
    calls = []
    pooled = stem._pooled
    monkeypatch.setattr(stem, "_pooled", lambda part: calls.append(len(part)) or pooled(part))
    monkeypatch.setattr("sasa.nn.stem.PART_BYTES", 2 * 16 * 4 * size[0] * size[1])
    with torch.no_grad():
        torch.testing.assert_close(stem(x), whole)  # batch norm is in the values there
    assert calls == [2, 2, 1]


def test_running_statistics_are_those_of_all_pixels():
    torch.manual_seed(0)
    stems = [AttentionStem(3, 8, 2, dtype=torch.float64) for _ in range(2)]
    stems[1].load_state_dict(stems[0].state_dict())
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    stems[0](x)
    by_loops(stems[1], x)
    torch.testing.assert_close(stems[0].norm.running_var, stems[1].norm.running_var)
    torch.testing.assert_close(stems[0].norm.running_mean, stems[1].norm.running_mean)


def test_values_know_their_place_and_queries_do_not():
    """With one mixture, moving the pixels of a block moves nothing but the outputs; with more it changes them."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 4)
    for mixtures, equal in ((1, True), (4, False)):
        stem = AttentionStem(3, 8, 2, mixtures=mixtures).eval()
        assert torch.allclose(stem(x), stem(x.flip(2, 3)), atol=1e-5) == equal


def test_mixture_weights_sum_to_one():
    weights = AttentionStem(3, 8, mixtures=5, block_size=3).mixture_weights()
    assert weights.shape == (3, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    stem = AttentionStem(3, 16).eval()
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        expected = stem(x)
        torch.testing.assert_close(stem.to(dtype)(x.to(dtype)).float(), expected, atol=0.06, rtol=0.06)
        stem.float()
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(stem(x).float(), expected, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
def test_half_precision_with_a_norm_in_float32(size):
    stem = AttentionStem(3, 16).bfloat16().eval()
    stem.norm.float()
    x = torch.randn(2, 3, *size, dtype=torch.bfloat16)
    output = stem(x)
    with torch.no_grad():
        alone = stem(x)
    assert alone.dtype == output.dtype == torch.bfloat16
    torch.testing.assert_close(alone, output, atol=0.06, rtol=0.06)


def test_an_empty_batch():
    assert AttentionStem(3, 8).eval()(torch.randn(0, 3, 9, 8)).shape == (0, 8, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8), ValueError, "in_channels: expected at least 1, got 0"),
        ((3, 12), ValueError, "out_channels: expected a multiple of num_heads = 8, got 12"),
        ((3, 8.0), TypeError, "out_channels: expected an int of at least 1, got 8.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AttentionStem(*arguments)


@pytest.mark.parametrize("name", ["block_size", "mixtures"])
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        AttentionStem(3, 8, **{name: 0})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4, 8, 8), r"x: expected shape \(batch, in_channels=3, height, width\), got \(2, 4, 8, 8\)"),
        (torch.randn(8, 8), r"x: expected shape"),
        (torch.randn(4, 8, 8), r"x: expected shape"),
        (torch.randn(2, 3, 0, 8), r"x: expected at least one pixel, got shape \(2, 3, 0, 8\)"),
        (torch.randn(2, 3, 8, 8, dtype=torch.float64), r"x: expected dtype torch.float32 .*, got torch.float64"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"x: expected dtype torch.float32 .*, got torch.uint8"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"x: expected device cpu .*, got meta"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        AttentionStem(3, 8)(x)


def test_an_image_without_a_batch():
    stem, x = AttentionStem(3, 8).eval(), torch.randn(1, 3, 9, 8)
    torch.testing.assert_close(stem(x[0]), stem(x)[0])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation"):
        AttentionStem(3, 8, implementation="fastest")


def test_repr_has_the_arguments():
    text = "AttentionStem(\n  3, 8, num_heads=2, block_size=4, mixtures=4\n"
    assert repr(AttentionStem(3, 8, 2)).startswith(text)
