"""The attention stem against naive loops: any image, both modes, all gradients; and what it must not do."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sasa import AttentionStem
from sasa.nn import stem as stem_module
from sasa.ops.triton import blocks as triton_blocks

SIZES = [(8, 8), (7, 9), (4, 5), (3, 2), (1, 1), (12, 4)]


def by_loops(stem, x):
    """The docstring's equation pixel by pixel; M value maps, and PyTorch's own max pool."""
    size, heads = stem.block_size, stem.num_heads
    query, key = stem.qk(x).chunk(2, 1)
    values = stem.value(x).unflatten(1, (stem.mixtures, -1))
    logits = torch.zeros(size, size, stem.mixtures, dtype=x.dtype, device=x.device)
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
    stem = AttentionStem(3, 16, implementation="eager").eval()
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


@pytest.mark.parametrize("name", ["default", "triton"])
def test_an_empty_batch(name, monkeypatch):
    if name == "triton":
        monkeypatch.setattr(triton_blocks, "DEVICES", ("cpu",))
    stem, x = AttentionStem(3, 8).eval(), torch.randn(0, 3, 9, 8)
    if name == "triton":
        stem, x = stem.bfloat16(), x.bfloat16()
    assert stem(x).shape == (0, 8, 3, 2)


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


# --- in one pass: float32 on the CPU, and on GPUs ---


def twins(channels=3, outputs=16, heads=4, **options):
    """A stem in float32 that takes one pass, and the same in float64."""
    torch.manual_seed(0)
    stem = AttentionStem(channels, outputs, heads, **options)
    torch.nn.init.normal_(stem.norm.running_mean)
    if stem.norm.affine:
        torch.nn.init.normal_(stem.norm.weight)  # negative ones too
        torch.nn.init.normal_(stem.norm.bias)
    return stem, copy.deepcopy(stem).double()


@pytest.fixture
def only_one_pass(monkeypatch):
    """No attention but the kernel's."""
    monkeypatch.setattr(stem_module, "attend", None)


@pytest.mark.usefixtures("only_one_pass")
@pytest.mark.parametrize("size", [*SIZES[:4], (30, 45)])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm", "norm in training"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_pass_equals_the_loops(size, mode, memory_format):
    ours, right = twins()
    for stem in (ours, right):
        stem.train(mode in ("train", "frozen norm")).norm.train(mode in ("train", "norm in training"))
    x = torch.randn(2, 3, *size).to(memory_format=memory_format)
    results = []
    for stem, function in ((ours, ours), (right, lambda x: by_loops(right, x))):
        image = x.to(stem.weight.dtype).requires_grad_()
        y = function(image)
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, [image, *stem.parameters()], torch.randn(y.shape).to(y))
        results.append([y, *grads, *stem.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=2e-5 * expected.abs().max().item(), rtol=1e-4)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    assert results[0][1].stride() == x.stride()


@pytest.mark.usefixtures("only_one_pass")
@pytest.mark.parametrize("weights", [None, 0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_one_pass_with_any_batch_norm(weights, training):
    """Without parameters, or statistics; with weights of 0, which make every pixel of a block the largest."""
    stem, right = twins()
    for one in (stem, right):
        one.norm = torch.nn.BatchNorm2d(16, affine=weights is not None, track_running_stats=weights != 1).to(one.weight)
        one.train(training)
        if weights is not None:
            torch.nn.init.constant_(one.norm.weight, weights)
    x = torch.randn(2, 3, 9, 8)
    results = []
    for one in (stem, right):
        y = one(x.to(one.weight)) if one is stem else by_loops(one, x.double())
        torch.manual_seed(1)
        results.append([y, *torch.autograd.grad(y, list(one.parameters()), torch.randn(y.shape).to(y))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("only_one_pass")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "bfloat16, norm in float32"])
def test_one_pass_in_half_precision(how, training, monkeypatch):
    """On a GPU, or in Triton's interpreter: only images and outputs are rounded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(triton_blocks, "DEVICES", ("cpu",))
        monkeypatch.setattr(triton_blocks, "THREADS", 512)
    stem, _ = twins(outputs=4, heads=2)
    stem.train(training)
    if how != "autocast":
        stem.bfloat16()
    right = copy.deepcopy(stem).double()
    if "norm" in how:
        stem.norm.float()
    stem.to(device)
    x = torch.randn(2, 3, 9, 6).bfloat16()
    image = (x.float() if how == "autocast" else x).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        y = stem(image)
    assert y.dtype == torch.bfloat16
    exact = x.double().requires_grad_()
    wanted = by_loops(right, exact)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = [y, *torch.autograd.grad(y, [image, *stem.parameters()], grad.to(device)), *stem.norm.buffers()]
    leaves = [exact, *right.parameters()]
    expected = [wanted, *torch.autograd.grad(wanted, leaves, grad.double()), *right.norm.buffers()]
    for ours, theirs in zip(got, expected, strict=True):
        error = (ours.detach().cpu().double() - theirs.detach()).abs().max()
        assert error <= 0.02 * theirs.detach().abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_pass_compiled_on_a_gpu(dynamic):
    stem = twins()[0].cuda()
    x = torch.randn(2, 3, 9, 8, device="cuda", requires_grad=True)
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True, dynamic=dynamic)
    results = [[y, *torch.autograd.grad(y.square().sum(), x)] for y in (stem(x), compiled(x))]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_what_one_pass_cannot_do_is_done_as_ever(monkeypatch):
    x = torch.randn(2, 3, 9, 8)
    stem, _ = twins()
    expected = copy.deepcopy(stem)(x)

    def refuse(*arguments):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(stem_module, "block_attention", refuse)
    with pytest.raises(AssertionError, match="called"):
        stem(x)
    hooked = copy.deepcopy(stem)
    hooked.norm.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(hooked(x), expected)
    eager = copy.deepcopy(stem)
    eager.implementation = "eager"
    torch.testing.assert_close(eager(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(stem)(x).dtype == torch.bfloat16
    for channels, size in ((5, 4), (3, 9)):
        other = AttentionStem(channels, 8, 2, block_size=size)
        assert other(torch.randn(2, channels, 9, 8)).isfinite().all()
    monkeypatch.setattr("sasa.ops.cpu_blocks.is_available", lambda x: False)
    stem.implementation = "eager"
    torch.testing.assert_close(stem(x), expected)


def test_one_number_a_channel_is_refused_as_by_the_batch_norm():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        AttentionStem(3, 8)(torch.randn(1, 3, 1, 1))
