"""spectral_norm against torch's parametrization, layer by layer, and against singular values."""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from checks import Implementation, all_equal, reset_vectors, vectors
from dcvae_kernels import reference, remove_spectral_norm, spectral_norm, spectral_norm_autograd

pytestmark = pytest.mark.usefixtures("use_implementation")


class Net(nn.Module):
    """Network with a layer of each type, strided and grouped; [B, 2, 6, 6] -> [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.tail = nn.Sequential(nn.Conv2d(4, 1, (1, 5), bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.relu(self.up(self.norm(F.relu(self.conv(x))))))


LAYERS = ["conv", "up", "tail.0", "tail.3"]


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(4, 2, 6, 6, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return noise.to(torch.get_default_device(), dtype)


def pair(n_power_iterations: int = 1) -> tuple[Any, Any]:
    """Return one network normalised by torch and by spectral_norm, with the same initial u and v."""
    torch.manual_seed(0)
    torch_net = Net().eval()  # in training mode torch iterates once more at registration
    our_net = copy.deepcopy(torch_net)
    torch.manual_seed(1)
    for name in LAYERS:
        parametrizations.spectral_norm(torch_net.get_submodule(name), n_power_iterations=n_power_iterations)
    torch.manual_seed(1)
    spectral_norm(our_net, n_power_iterations)
    return torch_net.train(), our_net.train()


def assert_same_state(our_net: nn.Module, torch_net: nn.Module) -> None:
    assert list(our_net.state_dict()) == list(torch_net.state_dict())
    for name, value in torch_net.state_dict().items():
        torch.testing.assert_close(
            our_net.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_gradients(our_net: nn.Module, torch_net: nn.Module) -> None:
    gradients = [{name: p.grad for name, p in net.named_parameters()} for net in (our_net, torch_net)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


# Against torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_power_iterations", "channels_last"), [(1, False), (1, True), (2, True), (5, False)])
def test_same_as_torch_step_by_step(on: Implementation, n_power_iterations: int, channels_last: bool):
    """Compare weights, u, v, outputs and gradients in every optimizer step, starting from the state of torch's network.

    Without copying the state the networks would diverge, because Adam turns rounding errors into full steps.
    """
    torch_net, our_net = pair(n_power_iterations)
    if channels_last:
        torch_net, our_net = (net.to(memory_format=torch.channels_last) for net in (torch_net, our_net))
    assert_same_state(our_net, torch_net)
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, eps=1e-3) for net in (torch_net, our_net)]
    for step in range(3 if on.interpreted else 20):
        outputs = [net(images(step)) for net in (torch_net, our_net)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
        assert_same_gradients(our_net, torch_net)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_state(our_net, torch_net)
        our_net.load_state_dict(torch_net.state_dict())
        our_parameters = dict(our_net.named_parameters())
        for name, parameter in torch_net.named_parameters():
            optimizers[1].state[our_parameters[name]] = copy.deepcopy(optimizers[0].state[parameter])
    torch_net.eval()
    our_net.eval()
    torch.testing.assert_close(our_net(images()), torch_net(images()), rtol=1e-5, atol=1e-6)
    for name in LAYERS:
        weights = our_net.get_submodule(name).weight, torch_net.get_submodule(name).weight
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_largest_singular_value_becomes_one(on: Implementation):
    torch.manual_seed(0)
    net: Any = spectral_norm(Net(), n_power_iterations=5)
    with torch.no_grad():
        for _ in range(5 if on.interpreted else 20):
            net(images())
    for name in LAYERS:
        weight = net.get_submodule(name).weight.detach()
        matrix = (weight.transpose(0, 1) if name == "up" else weight).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-3)


def test_hand_computed():
    layer: Any = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    spectral_norm(layer)
    norm = layer.parametrizations.weight[0]
    with torch.no_grad():
        norm._v.copy_(torch.tensor([0.6, 0.8]))
    out = layer(torch.eye(2))
    u = torch.tensor([1.8, 3.2]) / 13.48**0.5  # Wv/‖Wv‖
    wu = torch.tensor([5.4, 12.8]) / 13.48**0.5  # Wᵀu; σ is its norm
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, wu / wu.norm())
    torch.testing.assert_close(out, torch.diag(torch.tensor([3.0, 4.0])) / wu.norm())


# Updates --------------------------------------------------------------------------------------------------------------


def test_one_update_for_all_layers_in_a_training_forward(monkeypatch: pytest.MonkeyPatch):
    net: Any = spectral_norm(Net())
    calls: list[tuple[int, int]] = []
    update = spectral_norm_autograd.normalized_weights

    def record(layers, n_power_iterations, eps, impl):
        calls.append((len(layers.weights), n_power_iterations))
        return update(layers, n_power_iterations, eps, impl)

    # The package's attribute of this name is the function, not the module.
    monkeypatch.setattr(sys.modules["dcvae_kernels.spectral_norm"], "normalized_weights", record)
    net(images())
    assert calls == [(4, 1)]


def test_no_update_in_evaluation_or_when_a_weight_is_read():
    net: Any = spectral_norm(Net())
    before = vectors(net)
    assert torch.equal(net.conv.weight, net.conv.weight)
    net.conv(images())
    net.eval()(images())
    assert all_equal(vectors(net), before)
    net.train()(images())
    assert not all_equal(vectors(net), before)


@pytest.mark.parametrize(
    "change", [lambda net: net.get_submodule("tail").eval(), lambda net: net.requires_grad_(False)]
)
def test_evaluation_mode_and_frozen_layers_match_torch(change: Callable[[Any], Any]):
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        change(net)
        net(images())
    assert_same_state(our_net, torch_net)


def test_weight_is_one_tensor_during_a_forward_and_recomputed_after():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.weight_seen = self.linear.weight
            assert self.linear.weight is self.weight_seen
            return self.linear(self.linear(x))

    net: Any = spectral_norm(Twice())
    net(torch.ones(1, 3))
    assert net.linear.weight is not net.weight_seen
    torch.testing.assert_close(net.linear.weight, net.weight_seen)


def test_weight_is_recomputed_after_an_exception():
    net: Any = spectral_norm(Net())
    with pytest.raises(RuntimeError):
        net(images()[:, :, :2, :2])
    with torch.no_grad():
        net.conv.parametrizations.weight.original.mul_(2)
    norm = net.conv.parametrizations.weight[0]
    sigma = norm._u @ net.conv.parametrizations.weight.original.flatten(1) @ norm._v
    torch.testing.assert_close(net.conv.weight, net.conv.parametrizations.weight.original / sigma)
    copy.deepcopy(net)


def test_nothing_is_stale_after_an_interrupted_forward_pass():
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)
            self.interrupt = True

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupt:
                raise KeyboardInterrupt
            return self.linear(x)

    net: Any = spectral_norm(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        net(torch.ones(1, 3))
    net.eval().interrupt = False
    with torch.no_grad():
        net.linear.parametrizations.weight.original.copy_(torch.diag(torch.arange(1.0, 4)))
    weight, norm = net.linear.parametrizations.weight.original, net.linear.parametrizations.weight[0]
    torch.testing.assert_close(net(torch.ones(1, 3)), (weight.sum(1) / (norm._u @ weight @ norm._v))[None])


def test_deepcopy_after_an_interrupted_forward_pass():
    net: Any = spectral_norm(nn.Sequential(nn.Linear(3, 3, bias=False)))
    hook = net[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(torch.ones(1, 3))
    hook.remove()
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(torch.ones(1, 3)), net(torch.ones(1, 3)))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_deepcopy_within_a_forward_pass():
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            twin = copy.deepcopy(self)
            y = self.linear(x)
            torch.testing.assert_close(twin.linear(x), y)
            return y

    net = spectral_norm(Copied())
    net(torch.ones(1, 3)).sum().backward()


# Gradients ------------------------------------------------------------------------------------------------------------


def test_several_forward_passes_before_one_backward_pass():
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        (net(images(0)).mean() - net(images(1)).square().mean()).backward()
    assert_same_gradients(our_net, torch_net)


def test_update_gradcheck():
    """First and second derivatives of W/σ with constant u and v."""
    weights = [torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    weights = [w.requires_grad_() for w in weights]
    vectors = [torch.randn(n, dtype=torch.float64) for n in (2, 2, 6, 4)]

    def update(*weights: Tensor) -> tuple[Tensor, ...]:
        layers = reference.Layers(weights, vectors[:2], vectors[2:], [1, 0])
        return tuple(reference.spectral_norm_update(layers, 0, 1e-12))

    assert torch.autograd.gradcheck(update, weights)
    assert torch.autograd.gradgradcheck(update, weights)


def test_second_derivatives(on: Implementation):
    """Second derivatives of W/σ with constant u and v, against the reference."""
    weight = torch.randn(3, 2, 2, 2).to(on.widest).requires_grad_()
    u, v = (torch.nn.functional.normalize(torch.randn(n).to(on.widest), dim=0) for n in (2, 12))
    slope, direction = torch.randn_like(weight), torch.randn_like(weight)

    def second(update: Any, *options: Any) -> Tensor:
        (normalized,) = update(reference.Layers([weight], [u], [v], [1]), *options)
        (first,) = torch.autograd.grad((normalized**3 * slope).sum(), weight, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), weight)[0]

    result = second(spectral_norm_autograd.normalized_weights, 1, 1e-12, on.impl)
    torch.testing.assert_close(result, second(reference.spectral_norm_update, 0, 1e-12), rtol=1e-4, atol=1e-5)


def test_batched_gradients():
    net: Any = spectral_norm(nn.Linear(3, 2, bias=False))
    output, original = net(torch.ones(1, 3)), net.parametrizations.weight.original
    grad_outputs = torch.eye(2)[:, None]
    (batched,) = torch.autograd.grad(output, original, grad_outputs, is_grads_batched=True, retain_graph=True)
    for grad_output, gradient in zip(grad_outputs, batched, strict=True):
        (expected,) = torch.autograd.grad(output, original, grad_output, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_gradient_penalty():
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        x = images().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert_same_gradients(our_net, torch_net)
    assert our_net.get_submodule("conv").parametrizations.weight.original.grad.any()


# Special values -------------------------------------------------------------------------------------------------------


def test_zero_weights_stay_zero_until_they_change():
    net: Any = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(net.weight)
    spectral_norm(net)
    original = net.parametrizations.weight.original
    out = net(torch.ones(1, 3))
    assert not out.any()
    out.sum().backward()
    torch.testing.assert_close(original.grad, torch.ones(2, 3))  # σ = 0 is replaced by 1
    with torch.no_grad():
        original.copy_(torch.tensor([[2.0, 0, 0], [0, 5, 0]]))
        for _ in range(40):
            net(torch.ones(1, 3))
    torch.testing.assert_close(net.weight, original / 5)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_reach_the_output_but_not_u_and_v(value: str):
    net: Any = spectral_norm(nn.Linear(3, 2))
    with torch.no_grad():
        net.parametrizations.weight.original[0, 0] = float(value)
    assert net(torch.ones(1, 3)).isnan().any()
    assert all(x.isfinite().all() for x in vectors(net))


# Sharing, copies, dtypes ----------------------------------------------------------------------------------------------


def test_layer_with_two_names_is_normalised_once():
    shared: Any = nn.Linear(3, 3)
    net: Any = spectral_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert len(shared.parametrizations.weight) == 1
    twin = parametrizations.spectral_norm(nn.Linear(3, 3))
    twin.load_state_dict(shared.state_dict())
    assert twin.weight is not None  # torch iterates whenever the weight is read
    net(torch.ones(1, 3))
    torch.testing.assert_close(shared.state_dict(), twin.state_dict())


def test_two_layers_that_share_a_parameter():
    net: Any = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    spectral_norm(net)
    assert net[0].parametrizations.weight.original is net[1].parametrizations.weight.original
    net(torch.ones(1, 3)).sum().backward()
    assert len(list(net.parameters())) == 1


def test_deepcopy_is_independent():
    torch_net, our_net = pair()
    net = copy.deepcopy(our_net)
    before = vectors(our_net)
    net(images())
    torch_net(images())
    assert all_equal(vectors(our_net), before)
    assert_same_state(net, torch_net)
    copy.deepcopy(nn.Sequential(net))(images())
    torch_net(images())
    net(images())
    assert_same_state(net, torch_net)


def test_several_normalised_submodules_of_one_model():
    torch_net, our_net = pair()
    outer = nn.ModuleDict({"a": our_net, "b": spectral_norm(Net())})
    before = vectors(outer["b"])
    outer["a"](images())
    torch_net(images())
    assert_same_state(our_net, torch_net)
    assert all_equal(vectors(outer["b"]), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_to_another_dtype(dtype: torch.dtype):
    exact, _ = (net.double() for net in pair())
    expected = exact(images(dtype=torch.float64))
    torch_net, our_net = (net.to(dtype) for net in pair())
    error, torch_error = ((net(images(dtype=dtype)).double() - expected).abs().max() for net in (our_net, torch_net))
    assert error <= 2 * torch_error + 1e-6
    assert all(x.dtype == dtype for x in vectors(our_net))
    for name, value in torch_net.state_dict().items():
        torch.testing.assert_close(our_net.state_dict()[name], value, rtol=0.02, atol=1e-3)


def test_sigma_is_in_the_dtype_of_the_weight_under_autocast(on: Implementation):
    """bf16 autocast does not change u, v and the weights, and the output is accurate within the error of bf16."""
    full, half = pair()[1], pair()[1]
    expected = full(images())
    with torch.autocast(on.device, dtype=torch.bfloat16):
        out = half(images())
        weight = half.get_submodule("conv").weight
    assert out.dtype == torch.bfloat16 and weight.dtype == torch.float32
    assert all_equal(vectors(half), vectors(full))
    assert torch.equal(weight, full.get_submodule("conv").weight)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)


def test_meta_device(on: Implementation):
    if on.impl == "triton":
        pytest.skip("Triton does not run on the meta device")
    with torch.device("meta"):
        assert spectral_norm(Net())(torch.empty(4, 2, 6, 6)).shape == (4, 3)


def test_compiles_to_one_graph():
    eager, net = pair()[1], pair()[1]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        expected, out = eager(images(seed)), compiled(images(seed))
        torch.testing.assert_close(out, expected)
        out.square().mean().backward()
        expected.square().mean().backward()
    assert_same_state(net, eager)
    assert_same_gradients(net, eager)
    torch.testing.assert_close(compiled.eval()(images()), eager.eval()(images()))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_in_training_mode(on: Implementation, strict: bool):
    if on.impl == "triton":
        pytest.skip("the reference implementation is exported")
    net = pair()[1]
    module = torch.export.export(net, (images(),), strict=strict).module()
    twin = copy.deepcopy(net)
    torch.testing.assert_close(module(images()), twin(images()))
    module(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_parameter_that_is_replaced_by_an_attribute():
    """FullyShardedDataParallel does this unless use_orig_params is True."""
    net, twin = pair()[1], pair()[1]
    entry = net.get_submodule("conv.parametrizations.weight")
    original = entry._parameters.pop("original")
    entry.original = original * 1  # type: ignore[operator]
    net(images()).sum().backward()
    twin(images()).sum().backward()
    expected = twin.get_submodule("conv.parametrizations.weight").get_parameter("original").grad
    torch.testing.assert_close(original.grad, expected)


# state_dict, removal --------------------------------------------------------------------------------------------------


def test_state_dict_round_trip_with_torchs_parametrization():
    torch_net, our_net = pair()
    torch_net(images(5))
    our_net.load_state_dict(torch_net.state_dict())
    torch.testing.assert_close(our_net(images()), torch_net(images()), rtol=1e-5, atol=1e-6)
    torch_net.load_state_dict(our_net.state_dict())
    assert_same_state(our_net, torch_net)


@pytest.mark.parametrize("inside", [False, True])
def test_loads_the_older_keys(inside: bool):
    older, our_net = Net(), spectral_norm(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in LAYERS:
            older_spectral_norm(older.get_submodule(name))
    older(images())
    older.eval()
    our_net.eval()
    state = older.state_dict()
    assert "tail.0.weight_orig" in state and "up.weight_u" in state
    if inside:
        nn.Sequential(our_net).load_state_dict({f"0.{name}": value for name, value in state.items()})
    else:
        our_net.load_state_dict(state)
    assert "tail.0.weight_orig" in state
    torch.testing.assert_close(our_net(images()), older(images()))


def test_deepcopy_loads_the_older_keys_independently():
    net: Any = spectral_norm(nn.Linear(3, 2, bias=False))
    twin = copy.deepcopy(net)
    state = {"weight_orig": torch.ones(2, 3), "weight_u": torch.ones(2), "weight_v": torch.ones(3)}
    twin.load_state_dict(state)
    assert twin.parametrizations.weight.original.eq(1).all() and not net.parametrizations.weight.original.eq(1).any()


def test_optimizers_keep_their_parameters():
    net: Any = Net()
    before = {id(p) for p in net.parameters()}
    spectral_norm(net)
    assert {id(p) for p in net.parameters()} == before
    remove_spectral_norm(net)
    assert {id(p) for p in net.parameters()} == before


@pytest.mark.parametrize("copied", [False, True])
def test_removal_leaves_outputs_and_copies_unchanged(copied: bool):
    net: Any = spectral_norm(Net())
    net(images())
    net.eval()
    other = copy.deepcopy(net)
    if copied:
        net, other = other, net
    expected = net(images())
    assert remove_spectral_norm(net) is net
    assert torch.equal(net(images()), expected) and torch.equal(other(images()), expected)
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(images()), expected)
    assert type(net.conv) is nn.Conv2d and isinstance(net.conv.weight, nn.Parameter)
    assert not net._forward_pre_hooks and not net._forward_hooks and not net.conv._load_state_dict_pre_hooks
    spectral_norm(net).train()(images())
    remove_spectral_norm(other)
    with pytest.raises(ValueError, match="spectral_norm was not called with this Net"):
        remove_spectral_norm(other)


def test_weight_is_normalised_again_after_torch_removed_the_parametrization():
    net: Any = spectral_norm(nn.Linear(3, 3))
    parametrize.remove_parametrizations(net, "weight")
    reset_vectors(spectral_norm(net))
    before = vectors(net)
    net(torch.ones(1, 3))
    assert before and not all_equal(vectors(net), before)
    assert len(net._forward_pre_hooks) == len(net._forward_hooks) == 1


def test_one_of_two_parameters_is_normalised_again():
    net: Any = nn.Bilinear(3, 3, 2)
    net.second = nn.Parameter(torch.randn(3, 2))
    spectral_norm(net)
    spectral_norm(net, name="second")
    parametrize.remove_parametrizations(net, "second")
    reset_vectors(spectral_norm(net, name="second"))
    before = vectors(net)
    net(torch.ones(1, 3), torch.ones(1, 3))
    assert len(before) == 4
    assert not any(torch.equal(x, y) for x, y in zip(vectors(net), before, strict=True))


def test_removal_leaves_a_layer_that_another_call_normalised():
    net: Any = spectral_norm(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    parametrize.remove_parametrizations(net[0], "weight")
    spectral_norm(net[0])
    remove_spectral_norm(net)
    assert parametrize.is_parametrized(net[0]) and not parametrize.is_parametrized(net[1])


def test_setting_a_weight_sets_the_original():
    net: Any = spectral_norm(nn.Linear(2, 2, bias=False))
    net.weight = torch.eye(2) * 3
    torch.testing.assert_close(net.parametrizations.weight.original.detach(), torch.eye(2) * 3)


# Errors ---------------------------------------------------------------------------------------------------------------


def with_max_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, max_norm=1.0))


def half_normalised() -> nn.Module:
    net: Any = Net()
    parametrizations.spectral_norm(net.tail[3])
    return net


def older_normalised() -> nn.Module:
    net: Any = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        older_spectral_norm(net.up)
    return net


def integer() -> nn.Module:
    net: Any = Net()
    net.conv.weight = nn.Parameter(torch.ones(6, 2, 3, 3, dtype=torch.int8), requires_grad=False)
    return net


def without_outputs() -> nn.Module:
    net: Any = Net()
    net.tail[3].weight = nn.Parameter(torch.ones(0, 96))
    return net


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.BatchNorm2d(3), {}, ValueError, "BatchNorm2d has no layer with a parameter .weight. to normalise"),
        (lambda: spectral_norm(nn.Linear(2, 2)), {}, ValueError, "layer 'ParametrizedLinear': .* already"),
        (lambda: nn.Sequential(nn.Linear(2, 2), spectral_norm(Net())), {}, ValueError, "layer '1.conv': .* already"),
        (half_normalised, {}, ValueError, "layer 'tail.3': .* already"),
        (older_normalised, {}, ValueError, "layer 'up': .* already"),
        (integer, {}, TypeError, "layer 'conv': its weight must be floating point or complex; it is torch.int8"),
        (with_max_norm, {}, ValueError, "layer '1': max_norm would change W/σ in place; use max_norm=None"),
        (without_outputs, {}, ValueError, r"layer 'tail.3': its weight has no elements; it is \[0, 96\]"),
        (Net, {"n_power_iterations": 0}, ValueError, "n_power_iterations must be at least 1; it is 0"),
        (Net, {"eps": 0.0}, ValueError, "eps must be positive; it is 0.0"),
        (Net, {"eps": float("nan")}, ValueError, "eps must be positive; it is nan"),
    ],
)
def test_errors_name_the_layer_and_do_not_modify_the_module(make, options: dict, error: type[Exception], message: str):
    net = make()
    before = list(net.state_dict())
    with pytest.raises(error, match=message):
        spectral_norm(net, **options)
    assert list(net.state_dict()) == before
