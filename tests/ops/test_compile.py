"""``torch.compile`` and ``torch.export``: the same numbers as eager, one graph, one compilation for all image sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from oracles import BORDERS, Case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sasa

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """A gain, the split into heads and the operator, as a layer would call it: (B, 24, H, W) to (B, 8, H', W')."""

    def __init__(self, **options):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(24, 1, 1))
        entries = 5 if options.get("border") == "shift" else 3
        self.row_embedding = nn.Parameter(torch.randn(2, 4, entries))
        self.col_embedding = nn.Parameter(torch.randn(2, 4, entries))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.gain * x).unflatten(1, (3, 2, 4)).unbind(1)
        embeddings = {"row_embedding": self.row_embedding, "col_embedding": self.col_embedding}
        return sasa.local_attention(query, key, value, 3, **embeddings, **self.options).flatten(1, 2)


def results(run, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of the image and the parameters."""
    x = x.detach().requires_grad_()
    output = run(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]


def assert_same(got: list[Tensor], expected: list[Tensor], formats: int | None = None) -> None:
    """Numbers, and strides: of the first ``formats`` tensors, or of all."""
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(got[:formats], expected[:formats], strict=True):
        assert x.stride() == y.stride()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "options", [{"border": "zero"}, {"border": "mask", "stride": 2, "scale": 0.5}, {"border": "valid"}], ids=str
)
def test_compiled_equals_eager(options, implementation):
    """Forward and backward, in one graph, contiguous and channels_last. Gradients of the equation have any format."""
    if implementation.device != "cpu":
        pytest.skip("on the CPU only")
    layer = Attention(implementation=implementation.name, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 24, 7, 8).to(memory_format=memory_format)
        formats = None if implementation.has_operator else 1
        assert_same(results(compiled, layer, x), results(layer, layer, x), formats)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    """The default backend, which writes and builds code around the operator."""
    layer = Attention(border="mask")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 24, 7, 8).to(memory_format=torch.channels_last)
    assert_same(results(compiled, layer, x), results(layer, layer, x))


@pytest.mark.parametrize(
    ("options", "memory_format"),
    [
        ({"border": "zero"}, torch.contiguous_format),
        ({"border": "mask", "scale": 0.25, "stride": 2}, torch.channels_last),
        ({"border": "valid"}, torch.channels_last),
    ],
    ids=str,
)
def test_one_compilation_for_all_image_sizes(options, memory_format):
    """Other batches, heights and widths compile nothing anew."""
    layer = Attention(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch, height, width in ((2, 7, 8), (3, 6, 9), (4, 12, 5), (2, 5, 5)):
        x = torch.randn(batch, 24, height, width).to(memory_format=memory_format)
        assert_same(results(compiled, layer, x), results(layer, layer, x))
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_scale_computed_from_a_dynamic_head_width():
    """1/sqrt(D), as most attention layers have it, where D is one of the dynamic sizes."""

    def attend(query: Tensor) -> Tensor:
        return sasa.local_attention(query, query, query, 3, scale=query.shape[2] ** -0.5)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (4, 6, 9):
        query = torch.randn(2, 2, width, 5, 6)
        torch.testing.assert_close(compiled(query), attend(query))


@pytest.mark.parametrize("names", ["qqq", "qkk", "qqv", "qkq"])
def test_one_tensor_in_several_places(names):
    """As in attention of an image to itself."""

    def attend(query: Tensor, key: Tensor, value: Tensor, row: Tensor) -> Tensor:
        given = {"q": query, "k": key, "v": value}
        embeddings = {"row_embedding": row, "col_embedding": row}
        return sasa.local_attention(*(given[name] for name in names), 3, **embeddings).sin().sum()

    tensors = [*Case().tensors(torch.float32).values()][:4]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(run(*leaves), leaves, materialize_grads=True)
        for run in (compiled, attend)
        for leaves in [[x.clone().requires_grad_() for x in tensors]]
    )
    torch.testing.assert_close(found, expected)


TRANSFORMS = {
    "grad": torch.func.grad,
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "vmap": torch.func.vmap,
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
}


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own decompositions
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_of_a_compiled_function(name):
    key = Case().tensors()["key"]

    def total(query: Tensor) -> Tensor:
        return sasa.local_attention(query, key, query, 3, border="mask").sin().sum()

    transformed = TRANSFORMS[name](total)
    x = torch.randn(*([2] if "vmap" in name else []), *key.shape, dtype=key.dtype)
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transformed(x))


@pytest.mark.parametrize("kernel_size", [3, (3, 3), [3, 3]], ids=str)
def test_options_may_be_arguments_of_the_compiled_function(kernel_size):
    compiled = torch.compile(sasa.local_attention, fullgraph=True, backend="aot_eager")
    tensors = Case().tensors(torch.float32)
    options = {"stride": kernel_size, "dilation": kernel_size, "border": "mask", "scale": 0.5}
    expected = sasa.local_attention(**tensors, kernel_size=kernel_size, **options)
    torch.testing.assert_close(compiled(**tensors, kernel_size=kernel_size, **options), expected)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=lambda mode: mode.__name__)
def test_weights_compile(grad_mode):
    compiled = torch.compile(sasa.local_attention_weights, fullgraph=True, backend="aot_eager")
    tensors = {name: x for name, x in Case().tensors(torch.float32).items() if name != "value"}
    with grad_mode():
        expected = sasa.local_attention_weights(**tensors, kernel_size=3, border="mask")
        torch.testing.assert_close(compiled(**tensors, kernel_size=3, border="mask"), expected)


def test_autocast_inside_of_a_compiled_function():
    tensors = Case().tensors(torch.float32)

    def attend() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sasa.local_attention(**tensors, kernel_size=3)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert compiled().dtype == torch.bfloat16
    assert torch.equal(compiled(), attend())


def test_bad_input_in_a_compiled_function_is_named():
    compiled = torch.compile(sasa.local_attention, backend="eager")
    query = torch.randn(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match="key: expected the shape of query"):
        compiled(query, query[:, :1], query, 3)


@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("border", BORDERS)
def test_export_with_dynamic_image_size(border, strict):
    """The exported program holds one node for the operator and takes other batches, heights and widths."""
    layer = Attention(border=border, scale=0.5)
    smallest = (
        4 if border in ("valid", "shift") else 2
    )  # one more than what gives a single window: PyTorch specialises on 1
    sizes = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("h", min=smallest),
        3: torch.export.Dim("w", min=smallest),
    }
    exported = torch.export.export(layer, (torch.randn(2, 24, 8, 9),), dynamic_shapes=(sizes,), strict=strict)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.sasa.local_attention.default) == 1
    for shape in ((1, 24, smallest, 7), (3, 24, 11, 5), (2, 24, smallest, smallest)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), layer(x))
