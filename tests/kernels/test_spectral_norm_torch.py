"""Properties that torch's parametrization has: layer types, names, dims, dtypes, gradients, state_dict and removal."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from checks import randn, reset_vectors, vectors
from dcvae_kernels import remove_spectral_norm, spectral_norm

pytestmark = pytest.mark.usefixtures("use_implementation")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the same numbers on every device; complex numbers have independent parts."""
    if dtype.is_complex:
        values = torch.complex(*(randn(*shape, seed=2 * seed + part, dtype=torch.float64) for part in range(2)))
    else:
        values = randn(*shape, seed=seed, dtype=torch.float64)
    return values.to(torch.get_default_device(), dtype)


def pair(
    make: Callable[[], nn.Module],
    n_power_iterations: int = 1,
    *,
    layers: Sequence[str] = ("",),
    **options: Any,
) -> tuple[Any, Any]:
    """Return one network normalised by torch, layer by layer, and by spectral_norm, with the same state.

    `options` are `name` and `dim`.
    """
    torch.manual_seed(0)
    torch_net = make().eval()  # in training mode torch iterates once more at registration
    our_net = copy.deepcopy(torch_net)
    for layer in layers:
        parametrizations.spectral_norm(torch_net.get_submodule(layer), n_power_iterations=n_power_iterations, **options)
    spectral_norm(our_net, n_power_iterations, **options)
    assert list(our_net.state_dict()) == list(torch_net.state_dict())
    our_net.load_state_dict(torch_net.state_dict())
    return torch_net.train(), our_net.train()


def assert_equal_step(nets: tuple[Any, Any], *inputs: Tensor, lr: float = 0.1, rtol: float = 1e-5) -> None:
    """Compare outputs, gradients and states of both networks in one step of SGD in training mode."""
    outputs = [net(*inputs) for net in nets]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=rtol, atol=0.1 * rtol)
    for net, output in zip(nets, outputs, strict=True):
        net.zero_grad()
        output.abs().square().mean().backward()
    gradients = [{name: p.grad for name, p in net.named_parameters()} for net in nets]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=rtol, atol=0.1 * rtol)
    for net in nets:
        torch.optim.SGD(net.parameters(), lr).step()
    assert_equal_states(nets, rtol)


def assert_equal_states(nets: tuple[nn.Module, nn.Module], rtol: float = 1e-5) -> None:
    torch_state, our_state = (net.state_dict() for net in nets)
    assert list(our_state) == list(torch_state)
    torch.testing.assert_close(dict(our_state), dict(torch_state), rtol=rtol, atol=0.1 * rtol)


def iterate(matrix: Tensor, v: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, v and σ = uᵀWv after `count` power iterations, as in the definition."""
    u = v
    for _ in range(count):
        u = matrix @ v
        u = u / u.norm()
        v = matrix.mH @ u
        v = v / v.norm()
    return u, v, torch.vdot(u, matrix @ v)


# Layer types, names and dims ------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), [(2, 4, 7)]),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), bias=False), [(2, 3, 4, 4)]),
    "Conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3)), [(2, 2, 2, 3, 4)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), [(2, 4, 5)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, (2, 3), groups=1), [(2, 4, 3, 3)]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, (2, 1, 3), groups=2), [(1, 4, 2, 2, 2)]),
    "Linear": (lambda: nn.Linear(5, 3), [(2, 5)]),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 2), [(2, 3), (2, 4)]),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_layer_types(layer: str, n_power_iterations: int):
    make, shapes = LAYERS[layer]
    nets = pair(make, n_power_iterations)
    for step in range(3):
        inputs = [noise(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]
        assert_equal_step(nets, *inputs)
    torch_net, our_net = (net.eval() for net in nets)
    torch.testing.assert_close(our_net(*inputs), torch_net(*inputs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_net.weight, torch_net.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"sparse": True}], ids=str)
def test_embedding(options: dict[str, Any]):
    """Unused rows have a gradient too, because σ depends on all rows."""
    nets = pair(lambda: nn.Embedding(5, 3, **options))
    for _ in range(3):
        assert_equal_step(nets, torch.tensor([[0, 4], [1, 1]]))
    gradient = nets[1].parametrizations.weight.original.grad
    assert not gradient.is_sparse and gradient[2:4].any(1).all()


def test_network_of_all_layer_types():
    """Layers of all supported types in a network are normalised, and layers of other types are unchanged."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({layer: make() for layer, (make, _) in LAYERS.items()})
            self.layers["Embedding"] = nn.Embedding(4, 3)
            self.norm = nn.LayerNorm([2, 3])
            self.gru = nn.GRUCell(2, 3)

        def forward(self, *inputs: list[Tensor]) -> Tensor:
            outputs = [layer(*x) for layer, x in zip(self.layers.values(), inputs, strict=True)]
            return torch.cat([self.norm.weight.flatten(), *(output.flatten() for output in outputs)])

    nets = pair(Net, layers=[f"layers.{layer}" for layer in [*LAYERS, "Embedding"]])
    inputs = [[noise(*shape, seed=i) for i, shape in enumerate(shapes)] for _, shapes in LAYERS.values()]
    for _ in range(2):
        outputs = [net(*inputs, [torch.tensor([0, 3])]) for net in nets]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert_equal_states(nets)


def test_subclass_of_a_layer():
    class Upsampling(nn.ConvTranspose1d):
        pass

    nets = pair(lambda: nn.Sequential(Upsampling(4, 3, 2)), layers=["0"])
    assert_equal_step(nets, noise(2, 4, 3))
    assert nets[1][0].parametrizations.weight[0]._u.shape == (3,)  # rows are output channels, dimension 1


class Product(nn.Module):
    """Custom module with two matrices and a 3-D tensor."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(3, 4, dtype=dtype))
        self.right = nn.Parameter(torch.randn(4, 2, dtype=dtype))
        self.cube = nn.Parameter(torch.randn(2, 3, 5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bj,jkl->bkl", x @ self.left @ self.right, self.cube)


@pytest.mark.parametrize("name", ["left", "right", "cube"])
def test_custom_module_with_a_name(name: str):
    nets = pair(Product, name=name)
    for step in range(3):
        assert_equal_step(nets, noise(2, 3, seed=step), lr=0.01)


def test_two_names_on_one_module():
    torch_net, our_net = pair(Product, name="left")
    for net in (torch_net, our_net):
        net.eval()
    parametrizations.spectral_norm(torch_net, "cube", n_power_iterations=2, dim=2)
    spectral_norm(our_net, 2, name="cube", dim=2)
    our_net.load_state_dict(torch_net.state_dict())
    nets = torch_net.train(), our_net.train()
    for step in range(3):
        assert_equal_step(nets, noise(2, 3, seed=step), lr=0.01)
    our_net.eval()
    expected = our_net(noise(2, 3))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(our_net, name="cube")
    remove_spectral_norm(our_net)
    assert {"left", "right", "cube"} == set(dict(our_net.named_parameters())) and type(our_net) is Product
    torch.testing.assert_close(our_net(noise(2, 3)), expected)
    assert not our_net._forward_pre_hooks and not our_net._forward_hooks and not our_net._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("name", "options"), [("in_proj_weight", {}), ("k_proj_weight", {"kdim": 3, "vdim": 5}), ("in_proj_weight", None)]
)
def test_multihead_attention(name: str, options: dict[str, int] | None):
    """Compare one pass with the definition: torch iterates at each read, and the module reads its weight repeatedly."""
    attention = partial(nn.MultiheadAttention, 4, 2, **options or {})
    torch_net, our_net = pair(attention, name=name)
    inputs = noise(3, 2, 4), noise(3, 2, our_net.kdim, seed=1), noise(3, 2, our_net.vdim, seed=2)
    if options is None:  # self-attention, for which evaluation mode has a fast path
        inputs = (inputs[0],) * 3
    weight = our_net.parametrizations[name]
    u, v, sigma = iterate(weight.original.detach(), weight[0]._v.clone())
    output, _ = our_net(*inputs)
    output.square().sum().backward()
    torch.testing.assert_close([weight[0]._u, weight[0]._v], [u, v], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(getattr(our_net, name), weight.original / sigma, rtol=1e-5, atol=1e-6)
    torch_net.load_state_dict(our_net.state_dict())
    nets = torch_net.eval(), our_net.eval()
    for net in nets:
        net.zero_grad()
        net(*inputs)[0].square().sum().backward()
    gradients = [net.parametrizations[name].original.grad for net in nets]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(our_net(*inputs), torch_net(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [partial(nn.LSTM, 3, 4), partial(nn.GRU, 3, 4), partial(nn.RNN, 3, 4, 2)])
def test_recurrent_layer(make: Callable[[], nn.Module]):
    """A recurrent layer keeps references to its weights, which must be those of the current pass."""
    _, our_net = pair(make, name="weight_hh_l0")
    weight = our_net.parametrizations.weight_hh_l0
    plain = make()
    state = {
        name.removeprefix("parametrizations.").removesuffix(".original"): p for name, p in our_net.named_parameters()
    }
    for step in range(2):
        u, v, sigma = iterate(weight.original.detach(), weight[0]._v.clone())
        expected = torch.func.functional_call(
            plain, state | {"weight_hh_l0": weight.original / sigma}, noise(5, 2, 3, seed=step)
        )[0]
        output = our_net(noise(5, 2, 3, seed=step))[0]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([weight[0]._u, weight[0]._v], [u, v], rtol=1e-5, atol=1e-6)
        our_net.zero_grad()
        output.square().sum().backward()
        gradient = weight.original.grad
        assert gradient is not None and gradient.any()
        with torch.no_grad():
            weight.original.add_(gradient, alpha=-0.1)


@pytest.mark.parametrize("dim", range(-4, 4))
def test_dim(dim: int):
    """Rows are dimension `dim`, columns the other dimensions in their order, which determines v."""
    nets = pair(lambda: nn.Conv2d(3, 4, (2, 5)), dim=dim)
    norm = nets[1].parametrizations.weight[0]
    assert norm._u.shape == ([4, 3, 2, 5][dim],) and norm._v.numel() == 120 // norm._u.numel()
    for step in range(2):
        assert_equal_step(nets, noise(2, 3, 3, 6, seed=step))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dim_of_a_transposed_convolution(dim: int):
    nets = pair(lambda: nn.ConvTranspose1d(4, 3, 2), dim=dim)
    for step in range(2):
        assert_equal_step(nets, noise(2, 4, 3, seed=step))


def test_dim_applies_to_all_layers():
    nets = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), dim=-1, layers=["0", "2"])
    assert [x.numel() for x in vectors(nets[1])] == [4, 3, 3, 2]
    assert_equal_step(nets, noise(2, 4))


@pytest.mark.parametrize("trained", [False, True])
def test_channels_last_3d(trained: bool):
    nets = pair(lambda: nn.Conv3d(2, 3, (2, 1, 3)))
    if trained:
        assert_equal_step(nets, noise(1, 2, 2, 2, 3))
    torch_net, our_net = (net.to(memory_format=torch.channels_last_3d) for net in nets)
    original = our_net.parametrizations.weight.original
    assert original.is_contiguous(memory_format=torch.channels_last_3d) and not original.is_contiguous()
    x = noise(2, 2, 2, 2, 3).to(memory_format=torch.channels_last_3d)
    for _ in range(2):
        assert_equal_step((torch_net, our_net), x)
    assert our_net.weight.stride() == torch_net.weight.stride() == original.stride()


def test_non_contiguous_weight():
    def make() -> nn.Module:
        layer = nn.Conv2d(3, 4, 2)
        layer.weight = nn.Parameter(torch.randn(2, 3, 2, 4).transpose(0, 3))
        return layer

    nets = pair(make)
    for step in range(2):
        assert_equal_step(nets, noise(2, 3, 3, 3, seed=step))


# Complex weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(partial(nn.Linear, 3, 2), (4, 3)), (partial(nn.ConvTranspose1d, 3, 2, 2), (2, 3, 4)), (Product, (2, 3))],
    ids=["Linear", "ConvTranspose1d", "Product"],
)
def test_complex_weights(make: Any, shape: tuple[int, ...], dtype: torch.dtype):
    nets = pair(partial(make, dtype=dtype), name="cube" if make is Product else "weight")
    assert all(x.dtype == dtype for x in vectors(nets[1]))
    rtol = 1e-5 if dtype == torch.complex64 else 1e-12
    for step in range(3):
        assert_equal_step(nets, noise(*shape, seed=step, dtype=dtype), rtol=rtol)
    torch_net, our_net = (net.eval() for net in nets)
    x = noise(*shape, dtype=dtype)
    torch.testing.assert_close(our_net(x), torch_net(x))


def test_complex_and_real_layers_in_one_network():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).abs())

    nets = pair(Net, layers=["first", "last"])
    for step in range(2):
        assert_equal_step(nets, noise(2, 3, seed=step, dtype=torch.complex64))


def test_complex_value():
    """A diagonal matrix is divided by the largest modulus, and u, v are the corresponding axes up to a phase."""
    layer: Any = nn.Linear(3, 3, bias=False, dtype=torch.complex64)
    diagonal = torch.tensor([1 + 1j, -3 + 4j, 2j])
    layer.weight = nn.Parameter(torch.diag(diagonal))
    spectral_norm(layer, 5)
    for _ in range(5):
        layer(noise(1, 3, dtype=torch.complex64))
    torch.testing.assert_close(layer.weight.detach(), torch.diag(diagonal / 5))
    for x in vectors(layer):
        torch.testing.assert_close(x.abs(), torch.tensor([0.0, 1, 0]), rtol=1e-5, atol=1e-5)


def test_complex_gradcheck():
    layer: Any = spectral_norm(nn.Linear(3, 2, dtype=torch.complex128)).eval()
    x = noise(2, 3, dtype=torch.complex128)
    assert torch.autograd.gradcheck(lambda _: layer(x), [layer.parametrizations.weight.original])


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_one_pass_is_one_power_iteration(dim: int | None):
    """Compare u, v, σ and the output with the definition, for each choice of rows of a Linear."""
    layer: Any = spectral_norm(nn.Linear(5, 7), dim=dim)
    weight = layer.parametrizations.weight.original.detach().clone()
    matrix = weight.mT if dim == 1 else weight
    norm = layer.parametrizations.weight[0]
    with torch.no_grad():
        norm._v.copy_(F.normalize(noise(*norm._v.shape), dim=0))
    u, v, sigma = iterate(matrix, norm._v)
    output = layer(noise(3, 5))
    torch.testing.assert_close([norm._u, norm._v], [u, v], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output, F.linear(noise(3, 5), weight / sigma, layer.bias), rtol=1e-5, atol=1e-6)


def test_hand_computed_convolution():
    """Weight [2, 1, 2] with rows (3, 0) and (0, 4), v = (0.6, 0.8), for a Conv1d and for its dim 2."""
    for dim in (0, 2):
        layer: Any = nn.Conv1d(1, 2, 2, bias=False)
        layer.weight = nn.Parameter(torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]]))
        spectral_norm(layer, dim=dim)
        norm = layer.parametrizations.weight[0]
        with torch.no_grad():
            norm._v.copy_(torch.tensor([0.6, 0.8]))
        output = layer(torch.tensor([[[1.0, 10.0]]]))
        sigma = (5.4**2 + 12.8**2) ** 0.5 / 13.48**0.5
        torch.testing.assert_close(norm._u, torch.tensor([1.8, 3.2]) / 13.48**0.5)
        torch.testing.assert_close(norm._v, torch.tensor([5.4, 12.8]) / (5.4**2 + 12.8**2) ** 0.5)
        torch.testing.assert_close(output, torch.tensor([[[3.0], [40.0]]]) / sigma)


def test_initial_vectors_are_almost_converged():
    """A diagonal matrix is divided by its largest entry in modulus immediately after registration, in both modes."""
    layer: Any = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.diag(torch.tensor([0.5, -3.0])))
    spectral_norm(layer)
    for training in (True, False):
        expected = torch.diag(torch.tensor([0.5, -3.0])) / 3
        torch.testing.assert_close(layer.train(training).weight.detach(), expected)


# Structure, modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "right"])
def test_parameters_and_buffers(name: str):
    net: Any = nn.Linear(5, 7) if name == "weight" else Product()
    before = getattr(net, name)
    assert spectral_norm(net, name=name) is net
    weight = net.parametrizations[name]
    assert weight.original is before and weight.original.requires_grad
    assert set(dict(weight.named_buffers())) == {"0._u", "0._v"} and set(dict(weight.named_parameters())) == {
        "original"
    }
    assert name not in net._parameters and name not in net._buffers
    value = getattr(net, name)
    assert value.shape == before.shape and value.stride() == before.stride() and value.requires_grad
    assert weight[0]._u.shape == before.shape[:1] and weight[0]._v.shape == before.shape[1:]
    assert parametrize.is_parametrized(net, name)
    assert parametrize.type_before_parametrizations(net) in (nn.Linear, Product)


def test_buffers_are_updated_in_place():
    """u and v remain the same tensors, which a process group or a captured graph may refer to."""
    net: Any = spectral_norm(nn.Linear(3, 2))
    buffers = list(net.buffers())
    net(noise(1, 3))
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    net(noise(1, 3))
    assert all(x is y for x, y in zip(net.buffers(), buffers, strict=True))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_requires_grad_and_modes(requires_grad: bool, training: bool):
    def make() -> nn.Module:
        layer = nn.Linear(3, 4)
        layer.weight.requires_grad_(requires_grad)
        return layer

    nets = pair(make)
    for net in nets:
        net.train(training)
    before = vectors(nets[1])
    for step in range(2):
        assert_equal_step(nets, noise(2, 3, seed=step))
    gradient = nets[1].parametrizations.weight.original.grad
    assert (gradient is not None) == requires_grad
    assert nets[1].weight.requires_grad == requires_grad
    assert all(torch.equal(x, y) for x, y in zip(before, vectors(nets[1]), strict=True)) == (not training)


def test_no_grad_in_training_mode_updates():
    nets = pair(lambda: nn.Linear(3, 4))
    with torch.no_grad():
        outputs = [net(noise(2, 3)) for net in nets]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert_equal_states(nets)


def test_inference_mode():
    """A pass in inference mode updates u and v, and the next training pass works."""
    nets = pair(lambda: nn.Linear(3, 4))
    with torch.inference_mode():
        outputs = [net(noise(2, 3)) for net in nets]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert_equal_step(nets, noise(2, 3))


def test_evaluation_repeats_the_last_training_pass():
    net: Any = spectral_norm(nn.Linear(3, 4))
    net(noise(2, 3))
    expected = net(noise(2, 3))
    before = vectors(net)
    net.eval()
    for _ in range(2):
        torch.testing.assert_close(net(noise(2, 3)), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, vectors(net), strict=True))


def test_mixed_modes_within_a_network():
    """Layers in evaluation mode keep u and v in a training pass, and the reverse."""
    nets = pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), layers=["0", "2"])
    for modes in [(True, False), (False, True), (False, False), (True, True)]:
        for net in nets:
            net[0].train(modes[0])
            net[2].train(modes[1])
        assert_equal_step(nets, noise(2, 3))


def test_cached_weights():
    """`parametrize.cached` gives the same output and gradients for a pass inside it."""
    nets = pair(lambda: nn.Linear(3, 4))
    for step in range(2):
        with parametrize.cached():
            assert_equal_step(nets, noise(2, 3, seed=step))


# Gradients ------------------------------------------------------------------------------------------------------------


def gradcheck_layer(dtype: torch.dtype = torch.float64) -> Any:
    """Return a layer in training mode whose u and v have converged."""
    torch.manual_seed(0)
    layer: Any = nn.Conv1d(2, 3, 2, dtype=dtype)
    with torch.no_grad():
        layer.weight[0] *= 3  # a gap between the singular values
    spectral_norm(layer, 50)
    layer(noise(1, 2, 3, dtype=dtype))
    return layer


def with_constant_vectors(layer: Any, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that resets u and v to their current values and then calls `call`."""
    saved = [b.clone() for b in layer.buffers()]

    def repeatable(*args: Tensor) -> Tensor:
        for buffer, value in zip(layer.buffers(), saved, strict=True):
            buffer.data.copy_(value)
        return call(*args)

    return repeatable


def test_gradcheck_of_the_weight_in_evaluation():
    layer = gradcheck_layer().eval()
    weight, x = layer.parametrizations.weight.original, noise(2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda _: layer(x), [weight])
    assert torch.autograd.gradgradcheck(lambda _: layer(x).square(), [weight])


def test_gradcheck_of_the_weight_in_training():
    """With converged u and v, σ is stationary in them, so the derivative with constant u and v is the whole one."""
    layer = gradcheck_layer()
    weight, x = layer.parametrizations.weight.original, noise(2, 2, 4, dtype=torch.float64)
    call = with_constant_vectors(layer, lambda _: layer(x))
    assert torch.autograd.gradcheck(call, [weight], check_batched_grad=False)


def test_gradcheck_of_the_input():
    """Two training passes, and training and evaluation passes in turn, from the same u and v."""
    layer: Any = spectral_norm(nn.Linear(3, 4, dtype=torch.float64))
    x = noise(2, 3, dtype=torch.float64).requires_grad_()
    twice = with_constant_vectors(layer, lambda x: layer(x) + layer(x))
    twice(x).sum().backward()
    assert torch.autograd.gradcheck(twice, [x])
    turns = with_constant_vectors(
        layer, lambda x: torch.stack([layer.train(mode)(x) for mode in (True, False, True, False)])
    )
    assert torch.autograd.gradcheck(turns, [x])


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms(training: bool):
    """Compare torch.func.grad and, in evaluation mode, jvp and vmap over an ensemble of parameters."""
    nets = pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), layers=["0", "2"])
    x = noise(2, 3)
    results = []
    for net in nets:
        net.train(training)
        parameters = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters: dict[str, Tensor], net: Any = net) -> Tensor:
            return torch.func.functional_call(net, parameters, x).square().sum()

        gradients = torch.func.grad(loss)(parameters)
        results.append([gradients])
        if not training:  # torch's own update in training mode has neither forward derivatives nor batches
            tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
            ensemble = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
            results[-1] += [torch.func.jvp(loss, (parameters,), (tangents,)), torch.func.vmap(loss)(ensemble)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert_equal_states(nets)


# state_dict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [0, 3])
def test_state_dict_keys_and_strictness(passes: int):
    net: Any = spectral_norm(nn.Linear(3, 5))
    for step in range(passes):
        net(noise(2, 3, seed=step))
    state = copy.deepcopy(net.state_dict())
    keys = {"bias", "parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"}
    assert set(state) == keys
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        net.load_state_dict(state | {"surplus": torch.zeros(1)})
    net.load_state_dict(state | {"surplus": torch.zeros(1)}, strict=False)
    for key in keys:
        partial_state = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            net.load_state_dict(partial_state)
        assert net.load_state_dict(partial_state, strict=False).missing_keys == [key]


@pytest.mark.parametrize("name", ["weight", "cube"])
def test_state_dict_interchange(name: str):
    """Load states of each implementation into the other, and into a module that is wrapped again."""
    make: Any = Product if name == "cube" else partial(nn.ConvTranspose1d, 3, 2, 2)
    x = [noise(2, 3, *([] if name == "cube" else [4]), seed=seed) for seed in range(3)]
    torch_net, our_net = pair(make, 2, name=name)
    torch_net(x[0])
    our_net.load_state_dict(torch_net.state_dict())
    torch.testing.assert_close(our_net(x[1]), torch_net(x[1]), rtol=1e-5, atol=1e-6)
    our_net(x[2])
    torch_net.load_state_dict(our_net.state_dict())
    torch.testing.assert_close(our_net(x[0]), torch_net(x[0]), rtol=1e-5, atol=1e-6)
    state = copy.deepcopy(torch_net.state_dict())
    with torch.no_grad():
        expected = [torch_net.train(mode)(x[0]) for mode in (False, True, True, False)]
    spectral_norm(remove_spectral_norm(our_net), 2, name=name)
    our_net.load_state_dict(state)
    with torch.no_grad():
        outputs = [our_net.train(mode)(x[0]) for mode in (False, True, True, False)]
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("swap", [False, True])
def test_assigned_and_swapped_tensors(swap: bool):
    """`load_state_dict(assign=True)` and `torch.__future__.set_swap_module_params_on_conversion` replace tensors."""
    torch_net, our_net = pair(lambda: nn.Linear(3, 2))
    torch_net(noise(1, 3))
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        our_net.load_state_dict(copy.deepcopy(torch_net.state_dict()), assign=True)
        assert_equal_step((torch_net, our_net), noise(2, 3))
        torch_net, our_net = torch_net.double(), our_net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_equal_step((torch_net, our_net), noise(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["weight", "cube"])
def test_loads_the_older_keys(name: str):
    """torch.nn.utils.spectral_norm names its tensors `<name>_orig`, `<name>_u` and `<name>_v`."""
    make: Any = Product if name == "cube" else partial(nn.Conv3d, 2, 3, 2)
    older = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        older_spectral_norm(older, name)
    x = noise(2, 3) if name == "cube" else noise(1, 2, 2, 2, 3)
    older(x)
    state = older.state_dict()
    assert {f"{name}_orig", f"{name}_u", f"{name}_v"} <= set(state)
    net: Any = nn.Sequential(spectral_norm(make(), name=name))
    net.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(net.eval()(x), older.eval()(x))


def test_older_keys_of_two_names():
    older = Product()
    net: Any = Product()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("left", "right"):
            older_spectral_norm(older, name)
            spectral_norm(net, name=name)
    older(noise(2, 3))
    net.load_state_dict(older.state_dict())
    torch.testing.assert_close(net.eval()(noise(2, 3)), older.eval()(noise(2, 3)))


# Sharing and further parametrizations ---------------------------------------------------------------------------------


def test_shared_layer_is_updated_once():
    """torch updates a layer that is used twice in a pass twice; here both uses have the same weight."""
    shared = nn.Conv1d(2, 2, 1)
    net: Any = spectral_norm(nn.Sequential(shared, nn.Tanh(), shared))
    norm: Any = shared.parametrizations.weight[0]  # type: ignore[union-attr]
    weight = shared.parametrizations.weight.original.detach().flatten(1)  # type: ignore[union-attr]
    u, v, _ = iterate(weight, norm._v.clone())
    net(noise(1, 2, 3))
    torch.testing.assert_close([norm._u, norm._v], [u, v], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="already"):
        spectral_norm(nn.Sequential(shared, nn.Linear(2, 2)))


class Scaled(nn.Module):
    """Parametrization that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / self.scale


def test_further_parametrization_applies_on_top():
    nets = pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), layers=["0", "2"])
    for net in nets:
        parametrize.register_parametrization(net.eval()[0], "weight", Scaled())
        net.train()
    nets[1].load_state_dict(nets[0].state_dict())
    for step in range(3):
        assert_equal_step(nets, noise(2, 3, seed=step))
    torch_net, our_net = (net.eval() for net in nets)
    expected = our_net(noise(2, 3))
    for net in nets:
        parametrize.remove_parametrizations(net[0], "weight")
    torch.testing.assert_close(our_net(noise(2, 3)), expected)
    assert isinstance(our_net[0].weight, nn.Parameter)
    assert_equal_step((torch_net.train(), our_net.train()), noise(2, 3))


# Removal --------------------------------------------------------------------------------------------------------------


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def hooks(net: nn.Module) -> list[Any]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
    return [hook for module in net.modules() for kind in kinds for hook in getattr(module, kind).values()]


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_layers_removed_individually(leave_parametrized: bool, training: bool):
    """The other layers remain normalised. After the removal from the last one, no hooks remain."""
    nets = pair(three_layers, layers=["0", "2", "4"])
    for index in (2, 0, 4):
        for net in nets:
            net.eval()  # in training mode torch iterates once more at removal
            expected = net[index].weight if leave_parametrized else net[index].parametrizations.weight.original
            expected = expected.detach().clone()
            parametrize.remove_parametrizations(net[index], "weight", leave_parametrized)
            assert torch.equal(net[index].weight, expected) and isinstance(net[index].weight, nn.Parameter)
            net.train(training)
        for step in range(2):
            assert_equal_step(nets, noise(2, 3, seed=step))
    assert not hooks(nets[1])
    assert type(nets[1][0]) is nn.Linear
    assert set(nets[1].state_dict()) == set(three_layers().state_dict())


@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_removal_of_the_rest(leave_parametrized: bool):
    _, our_net = pair(three_layers, layers=["0", "2", "4"])
    parametrize.remove_parametrizations(our_net[2], "weight", leave_parametrized)
    our_net(noise(2, 3))
    our_net.eval()
    expected = our_net(noise(2, 3))
    remove_spectral_norm(our_net)
    torch.testing.assert_close(our_net(noise(2, 3)), expected)
    assert not hooks(our_net) and not parametrize.is_parametrized(our_net[0])
    our_net.train()(noise(2, 3)).sum().backward()
    with pytest.raises(ValueError, match="spectral_norm was not called"):
        remove_spectral_norm(our_net)


def test_removed_layer_can_be_normalised_again():
    _, our_net = pair(three_layers, layers=["0", "2", "4"])
    parametrize.remove_parametrizations(our_net[2], "weight")
    reset_vectors(spectral_norm(our_net[2]))
    expected = our_net[2].parametrizations.weight[0]._u.clone()
    our_net(noise(2, 3))
    assert not torch.equal(our_net[2].parametrizations.weight[0]._u, expected)
    copy.deepcopy(our_net)(noise(2, 3)).sum().backward()


def test_individual_removal_leaves_a_copy_unchanged():
    _, our_net = pair(three_layers, layers=["0", "2", "4"])
    twin = copy.deepcopy(our_net)
    parametrize.remove_parametrizations(our_net[0], "weight")
    expected = copy.deepcopy(our_net)(noise(2, 3))
    torch.testing.assert_close(our_net(noise(2, 3)), expected)
    remove_spectral_norm(our_net)
    assert our_net(noise(2, 3)).shape == (2, 2)
    # torch's removal deletes the property of layer 0's class, which the copy shares, but not those of other layers.
    assert parametrize.is_parametrized(twin[2])
    assert twin[2].weight.shape == (4, 4)


# Errors ---------------------------------------------------------------------------------------------------------------


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (nn.ReLU, {}, ValueError, "ReLU"),
        (lambda: nn.Sequential(nn.LayerNorm([2, 2])), {}, ValueError, "Sequential"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"name": "kernel"}, ValueError, "kernel"),
        (lambda: nn.Linear(2, 2, bias=False), {"name": "bias"}, ValueError, "bias"),
        (lambda: nn.Linear(2, 2), {"name": "bias"}, ValueError, "dimension"),
        (lambda: nn.BatchNorm2d(3), {}, ValueError, "BatchNorm2d|dimension"),
        (lambda: with_weight(torch.ones(2)), {}, ValueError, "dimension"),
        (lambda: with_weight(torch.tensor(1.0)), {}, ValueError, "dimension"),
        (lambda: with_weight(torch.ones(0, 2)), {}, ValueError, "no elements"),
        (lambda: with_weight(torch.ones(2, 2, dtype=torch.int32)), {}, TypeError, "int32"),
        (lambda: with_weight(torch.ones(2, 2, dtype=torch.bool)), {}, TypeError, "bool"),
        (lambda: nn.Linear(2, 2), {"dim": 2}, ValueError, "dim"),
        (lambda: nn.Linear(2, 2), {"dim": -3}, ValueError, "dim"),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), {"dim": 2}, ValueError, "dim"),
        (lambda: spectral_norm(Product(), name="left"), {"name": "left"}, ValueError, "already"),
        (lambda: parametrizations.spectral_norm(Product(), "left"), {"name": "left"}, ValueError, "already"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), {}, ValueError, "already"),
    ],
)
def test_errors(make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str):
    """An error names the argument or layer, and the module is unchanged."""
    net = make()
    before, types, count = list(net.state_dict()), [type(m) for m in net.modules()], len(hooks(net))
    with pytest.raises(error, match=message):
        spectral_norm(net, **options)
    assert list(net.state_dict()) == before
    assert [type(m) for m in net.modules()] == types and len(hooks(net)) == count
