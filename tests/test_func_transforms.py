"""torch.func and forward mode, in float64: reverse mode against loops over plain autograd, forward mode against finite
differences; and the operator and the layer against their twins of ``implementation="reference"``.
"""

import functools

import pytest
import torch
from oracles import BORDERS, EMBEDDINGS, Case
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import sasa

# Forward mode imports a part of PyTorch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

double = {"dtype": torch.float64}
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
about = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)  # finite differences


# What is differentiated: functions of a tuple of tensors, each with its twin and those tensors.

CASES = [
    *(Case(size=(2, 3), heads=2, width=1, kernel_size=2, border=border) for border in BORDERS),
    *(Case(size=(3, 2), heads=1, width=2, kernel_size=(3, 1), embeddings=name) for name in EMBEDDINGS),
    Case(size=(3, 3), heads=1, width=1, value_width=2, kernel_size=2, stride=2, border="mask", scale=0.5),
    Case(size=(2, 3), heads=8, width=1, kernel_size=(1, 2), dilation=2),
]
LAYERS = [
    *({"num_heads": 2, "border": border} for border in BORDERS),
    {"num_heads": 2, "pool": 2, "recompute": True},
    {"num_heads": 8, "out_channels": 8},
    {"num_heads": 8, "out_channels": 8, "pool": 2, "border": "mask", "position": "none", "recompute": False},
    {"num_heads": 2, "stride": 2, "position": "absolute", "bias": False},
]


def operator(case, name):
    tensors = case.tensors()

    def function(*given):
        named = dict(zip(tensors, given, strict=True))
        return sasa.local_attention(**named, **case.options, implementation=name)

    return function, tuple(tensors.values())


def layer_of(implementation=None, out_channels=4, **options):
    return sasa.RelativeSelfAttention(2, out_channels, 2, implementation=implementation, **double, **options)


def function_of(module, names):
    """The module as a function of its input and parameters; it changes copies of its buffers."""

    def function(x, *parameters):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return functional_call(module, buffers | dict(zip(names, parameters, strict=True)), (x,))

    return function


def layer(options, name):
    torch.manual_seed(0)
    module = layer_of(name, **options)
    names, parameters = zip(*((n, p.detach()) for n, p in module.named_parameters()), strict=True)
    return function_of(module, names), (torch.randn(1, 2, 3, 3, **double), *parameters)


PROBLEMS = [
    *(pytest.param(functools.partial(operator, case), None, id=f"operator-{case}") for case in CASES),
    pytest.param(functools.partial(operator, CASES[1]), "eager", id="operator-eager"),
    *(pytest.param(functools.partial(layer, options), None, id=f"layer-{options}") for options in LAYERS),
    pytest.param(functools.partial(layer, LAYERS[3]), "eager", id="layer-eager"),
]
every_problem = pytest.mark.parametrize(("make", "name"), PROBLEMS)
some_problems = pytest.mark.parametrize(("make", "name"), [PROBLEMS[i] for i in (0, 1, 2, 9, 13, 15)])
few_problems = pytest.mark.parametrize(("make", "name"), [PROBLEMS[i] for i in (1, 7, 13)])


def scalar(function):
    return lambda *given: function(*given).sin().sum()


def directions(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, **double) for x in tensors)


def difference(function, tensors, tangents, step=1e-6):
    """The derivative along the tangents, by a central difference of results that may be tuples."""
    ahead, behind = (
        function(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True))) for sign in (1, -1)
    )
    if isinstance(ahead, tuple):
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
    return (ahead - behind) / (2 * step)


def plain_gradients(function, tensors):
    """By autograd, differentiable no further."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


# --- reverse mode ---


@every_problem
def test_grad_and_vjp(make, name):
    function, tensors = make(name)
    everything = tuple(range(len(tensors)))
    expected = plain_gradients(scalar(function), tensors)
    close(grad(scalar(function), everything)(*tensors), expected)
    output, pull = vjp(function, *tensors)
    close(output, function(*tensors))
    close(pull(output.cos()), expected)
    close(expected, plain_gradients(scalar(make("reference")[0]), tensors))


@every_problem
def test_jacrev_and_jacfwd(make, name):
    function, tensors = make(name)
    everything = tuple(range(len(tensors)))
    expected = torch.autograd.functional.jacobian(make("reference")[0], tensors)  # row by row
    close(jacrev(function, everything)(*tensors), expected)
    close(jacfwd(function, everything)(*tensors), expected)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd, grad])
@some_problems
def test_second_derivatives(make, name, inner, outer):
    """Of the first and the last tensor, by each other; hessian is jacfwd of jacrev."""
    function, tensors = make(name)
    chosen = (0, len(tensors) - 1)

    def of_two(function):
        return lambda first, last: scalar(function)(first, *tensors[1:-1], last)

    given = tensors[0], tensors[-1]
    expected = torch.autograd.functional.hessian(of_two(make("reference")[0]), given)
    close(outer(inner(scalar(function), chosen), chosen)(*tensors), expected)
    if inner is grad:
        close(hessian(scalar(function), chosen)(*tensors), expected)


@some_problems
def test_third_derivatives(make, name):
    """Forward over forward over reverse, and reverse three times: of a direction each."""
    function, tensors = make(name)

    def first(x):
        return scalar(function)(x, *tensors[1:])

    def second(x):
        return jvp(grad(first), (x,), directions([x], 1))[1]

    direction = directions(tensors[:1], 2)
    expected = difference(second, tensors[:1], direction)
    about(jvp(second, tensors[:1], direction)[1], expected)

    def along(x):
        return (grad(first)(x) * directions([x], 1)[0]).sum()

    about(grad(lambda x: (grad(along)(x) * direction[0]).sum())(tensors[0]), expected)
    about(jvp(grad(along), tensors[:1], direction)[1], expected)


# --- many samples ---


@pytest.mark.parametrize("mapped", ["images", "embeddings", "all", "query"])
@pytest.mark.parametrize("name", [None, "eager", "reference"])
@pytest.mark.parametrize("case", [Case(size=(2, 3), kernel_size=2, border=border) for border in BORDERS], ids=str)
def test_per_sample_gradients_of_the_operator(case, name, mapped):
    """Also with the samples in another dimension than the first."""
    function, tensors = operator(case, name)
    chosen = {"images": (0, 1, 2), "embeddings": (3, 4), "all": (0, 1, 2, 3, 4), "query": (0,)}[mapped]
    samples = tuple(torch.stack(directions([x] * 3, seed)) if seed in chosen else x for seed, x in enumerate(tensors))
    gradients = grad(scalar(function), (0, 1, 2, 3, 4))
    loop = [
        plain_gradients(scalar(function), [x[i] if j in chosen else x for j, x in enumerate(samples)]) for i in range(3)
    ]
    expected = tuple(torch.stack(one) for one in zip(*loop, strict=True))
    in_dims = tuple(0 if i in chosen else None for i in range(5))
    close(vmap(gradients, in_dims)(*samples), expected)
    close(vmap(gradients, in_dims, chunk_size=2)(*samples), expected)
    moved = tuple(x.movedim(0, -1) if i in chosen else x for i, x in enumerate(samples))
    close(vmap(gradients, tuple(-1 if i in chosen else None for i in range(5)))(*moved), expected)


def test_vmap_in_vmap():
    case = Case(size=(2, 3), kernel_size=2)
    function, tensors = operator(case, None)
    samples = tuple(x.expand(2, 3, *x.shape) * torch.rand(2, 3, *[1] * x.dim(), **double) for x in tensors)
    gradients = grad(scalar(function), (0, 1, 2, 3, 4))
    loop = [plain_gradients(scalar(function), [x[i, j] for x in samples]) for i in range(2) for j in range(3)]
    expected = tuple(torch.stack(one).unflatten(0, (2, 3)) for one in zip(*loop, strict=True))
    close(vmap(vmap(gradients))(*samples), expected)


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_per_sample_gradients_of_a_layer(options):
    """Each image by the shared parameters: what differential privacy asks for; and jvp of each."""
    function, (_, *parameters) = layer(options, None)
    images = torch.randn(3, 1, 2, 3, 4, **double)
    every_parameter = tuple(range(1, len(parameters) + 1))
    loop = [plain_gradients(scalar(function), (x, *parameters))[1:] for x in images]
    expected = tuple(torch.stack(one) for one in zip(*loop, strict=True))
    in_dims = (0, *[None] * len(parameters))
    close(vmap(grad(scalar(function), every_parameter), in_dims)(images, *parameters), expected)

    tangents = directions(images)
    got = vmap(lambda x, t: jvp(lambda x: function(x, *parameters), (x,), (t,))[1])(images, torch.stack(tangents))
    singles = [
        difference(lambda x: function(x, *parameters), (x,), (t,)) for x, t in zip(images, tangents, strict=True)
    ]
    about(got, torch.stack(singles))


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_ensemble_of_layers(options):
    """Many parameters and one image, by ``stack_module_state``; with gradients of them, and an image each."""
    layers = [layer_of(**options) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x, images = torch.randn(2, 2, 3, 4, **double), torch.randn(3, 2, 2, 3, 4, **double)

    def loss(parameters, x):
        return functional_call(layers[0], (parameters, buffers), (x,)).sin().sum()

    close(vmap(loss, (0, None))(parameters, x), torch.stack([one(x).sin().sum() for one in layers]))
    for given, in_dim in ((x, None), (images, 0)):
        got = vmap(grad(loss), (0, in_dim))({name: p.detach() for name, p in parameters.items()}, given)
        for i, one in enumerate(layers):
            own = dict(one.named_parameters())
            value = one(given if in_dim is None else given[i]).sin().sum()
            expected = torch.autograd.grad(value, list(own.values()))
            close({name: g[i] for name, g in got.items()}, dict(zip(own, expected, strict=True)))


@every_problem
def test_batched_gradients(make, name):
    """``is_grads_batched``: one backward for many vectors."""
    function, tensors = make(name)
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    vectors = torch.stack(directions([output] * 3))
    got = torch.autograd.grad(output, leaves, vectors, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(output, leaves, vector, retain_graph=True) for vector in vectors]
    close(got, tuple(torch.stack(one) for one in zip(*loop, strict=True)))


# --- forward mode ---


@every_problem
def test_jvp_and_dual_numbers(make, name):
    """Of all tensors together, and of each alone."""
    function, tensors = make(name)
    tangents = directions(tensors)
    output, tangent = jvp(function, tensors, tangents)
    close(output, function(*tensors))
    about(tangent, difference(function, tensors, tangents))
    total = torch.zeros_like(tangent)
    for i, (x, t) in enumerate(zip(tensors, tangents, strict=True)):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, t)
            y = forward_ad.unpack_dual(function(*tensors[:i], dual, *tensors[i + 1 :]))
            close(y.primal, output)
            total += 0 if y.tangent is None else y.tangent
    close(total, tangent)


@every_problem
def test_dual_number_through_a_backward(make, name):
    """A product with the Hessian, forward over reverse: of leaves that require gradients and have tangents."""
    function, tensors = make(name)
    tangents = directions(tensors)
    expected = difference(lambda *given: plain_gradients(scalar(function), given), tensors, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), t) for x, t in zip(tensors, tangents, strict=True)]
        grads = torch.autograd.grad(scalar(function)(*duals), duals)
        got = tuple(forward_ad.unpack_dual(x).tangent for x in grads)
    about(got, expected)
    about(jvp(grad(scalar(function), tuple(range(len(tensors)))), tensors, tangents)[1], expected)


@every_problem
def test_dual_gradient_of_an_output_without_tangent(make, name):
    """The forward ran without dual numbers; the vector at the output of its backward has a tangent."""
    function, tensors = make(name)
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = function(*leaves)
    vector, tangent = directions([output, output])
    with forward_ad.dual_level():
        grads = torch.autograd.grad(output, leaves, forward_ad.make_dual(vector, tangent), retain_graph=True)
        got = tuple(forward_ad.unpack_dual(x).tangent for x in grads)
    close(got, torch.autograd.grad(output, leaves, tangent))  # a backward is linear


def test_nested_jvps_keep_their_tangents_apart():
    function, (x, *rest) = operator(CASES[0], None)
    direction, other = directions([x, x])

    def derivative(x):
        return jvp(lambda x: function(x, *rest), (x,), (direction,))[1]

    about(jvp(derivative, (x,), (other,))[1], difference(derivative, (x,), (other,)))
    assert jvp(derivative, (x,), (other,))[1].abs().max() > 1e-3


@pytest.mark.parametrize("tangents", ["all", "image", "parameters"])
def test_jvp_of_a_network(tangents):
    """Layers with other modules between them; the tangents begin at the image or at the parameters alone."""
    network = nn.Sequential(
        layer_of(num_heads=2, pool=2), nn.GELU(), nn.Conv2d(4, 2, 1, **double), layer_of(num_heads=4)
    )
    names, parameters = zip(*((n, p.detach()) for n, p in network.named_parameters()), strict=True)
    given = (torch.randn(2, 2, 5, 5, **double), *parameters)
    along = directions(given)
    if tangents != "all":
        along = tuple(t * ((i == 0) == (tangents == "image")) for i, t in enumerate(along))
    function = function_of(network, names)
    got = jvp(function, given, along)[1]
    assert got.abs().max() > 1e-3
    about(got, difference(function, given, along))


# --- the stem ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=["whole blocks", "cut blocks"])
def test_stem(size, training):
    stem = sasa.AttentionStem(3, 8, 2, block_size=2, **double).train(training)
    names, parameters = zip(*((n, p.detach()) for n, p in stem.named_parameters()), strict=True)
    given = (torch.randn(2, 3, *size, **double), *parameters)
    function, tangents = function_of(stem, names), directions(given)
    close(grad(scalar(function), tuple(range(len(given))))(*given), plain_gradients(scalar(function), given))
    got = jvp(function, given, tangents)[1]
    assert got.abs().max() > 1e-3
    about(got, difference(function, given, tangents))


# --- PyTorch's own checks ---


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's own operations in vmap
@few_problems
def test_gradcheck(make, name):
    function, tensors = make(name)
    leaves = tuple(x.clone().requires_grad_() for x in tensors)
    assert gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
    )
