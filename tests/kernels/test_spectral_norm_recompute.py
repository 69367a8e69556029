"""Spectral norm with activation checkpointing and saved-tensor hooks: same results as without them."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from checks import Implementation, all_equal, randn, vectors
from dcvae_kernels import spectral_norm

Call = Callable[..., Tensor]  # checkpoint(part, *inputs), or the part alone

LAYERS = ["body.0", "body.2", "head.1"]


pytestmark = pytest.mark.usefixtures("use_implementation")


@pytest.fixture
def not_interpreted(on: Implementation) -> None:
    if on.interpreted:
        pytest.skip("the interpreter is slow; similar tests cover its kernels")


def directly(part: Call, *inputs: Tensor) -> Tensor:
    return part(*inputs)


RECOMPUTED = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not-reentrant": partial(checkpoint, use_reentrant=False),
}


class Net(nn.Module):
    """Network whose `body` is called through `call`; [B, 2, 4, 4] -> [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3, padding=1)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 2))
        self.call: Call = directly

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self.body, x)))


def recompute(net: Net, recomputed: str, whole: bool) -> Call:
    """Make `net` recompute its body, or return a call that recomputes the whole of it."""
    call = RECOMPUTED.get(recomputed, directly)
    net.call = directly if whole else call
    return call if whole else directly


def images(seed: int = 0) -> Tensor:
    return randn(3, 2, 4, 4, seed=seed).to(torch.get_default_device()).requires_grad_()


@torch.no_grad()
def make_almost_rank_one(weight: Any) -> None:
    """Make the largest singular value so dominant that 15 power iterations converge."""
    rank_one = torch.ones_like(weight)
    for dim, size in enumerate(weight.shape):
        rank_one *= torch.randn(size).sign().view([size if i == dim else 1 for i in range(weight.ndim)])
    weight.mul_(0.1).add_(rank_one)


def pair(*, converged: bool = False) -> tuple[Any, Any]:
    """Return one network normalised by torch and by spectral_norm, with the same state.

    If `converged`, u and v are singular vectors, so that further updates do not change them.
    """
    torch.manual_seed(0)
    torch_net: Any = Net().eval()  # in training mode torch iterates once more at registration
    if converged:
        for name in LAYERS:
            make_almost_rank_one(torch_net.get_submodule(name).weight)
    our_net = copy.deepcopy(torch_net)
    for name in LAYERS:
        parametrizations.spectral_norm(torch_net.get_submodule(name))
    spectral_norm(our_net)
    our_net.load_state_dict(torch_net.state_dict())
    return torch_net.train(), our_net.train()


def gradients(net: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    return [x.grad for x in (*net.parameters(), *inputs)]


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def assert_same_state(our_net: nn.Module, torch_net: nn.Module) -> None:
    assert_close(dict(our_net.state_dict()), dict(torch_net.state_dict()))


def assert_same_steps(torch_net: Any, our_net: Any, call: Call, steps: int = 2) -> None:
    """Compare outputs, gradients and states in steps of SGD; `call(our_net, x)` gives our outputs."""
    for step in range(steps):
        inputs = images(step), images(step)
        outputs = torch_net(inputs[0]), call(our_net, inputs[1])
        assert_close(outputs[1], outputs[0])
        for net, output in zip((torch_net, our_net), outputs, strict=True):
            net.zero_grad()
            output.square().mean().backward()
        assert_close(gradients(our_net, inputs[1]), gradients(torch_net, inputs[0]))
        for net in (torch_net, our_net):
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        assert_same_state(our_net, torch_net)


# Checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_checkpoint_of_a_part(recomputed: str):
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED[recomputed]
    assert_same_steps(torch_net, our_net, directly)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_checkpoint_of_the_whole_module(recomputed: str):
    torch_net, our_net = pair()
    assert_same_steps(torch_net, our_net, RECOMPUTED[recomputed])


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("outer", RECOMPUTED)
@pytest.mark.parametrize("inner", RECOMPUTED)
def test_nested_checkpoints(outer: str, inner: str):
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED[inner]
    assert_same_steps(torch_net, our_net, RECOMPUTED[outer])


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_checkpoint_of_each_layer(recomputed: str):
    def call(body: Any, x: Tensor) -> Tensor:
        for layer in body:
            x = RECOMPUTED[recomputed](layer, x)
        return x

    torch_net, our_net = pair()
    our_net.call = call
    assert_same_steps(torch_net, our_net, directly)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(use_reentrant: bool):
    torch_net, our_net = pair()
    our_net.call = lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=use_reentrant)
    assert_same_steps(torch_net, our_net, directly)


@pytest.mark.usefixtures("not_interpreted")
def test_checkpoint_without_early_stop():
    """The recomputation runs to the end of the part."""
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED["not-reentrant"]
    with set_checkpoint_early_stop(False):
        assert_same_steps(torch_net, our_net, directly)


def test_selective_checkpoint():
    """Convolutions are stored, and all other operations are recomputed."""
    operations = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, operations)
    torch_net, our_net = pair()
    our_net.call = partial(checkpoint, use_reentrant=False, context_fn=context)
    assert_same_steps(torch_net, our_net, partial(checkpoint, use_reentrant=False, context_fn=context))


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("first", [True, False])
def test_checkpoint_wrapper(first: bool):
    """The wrapper may be applied before or after spectral_norm."""
    torch_net, our_net = pair()
    state = copy.deepcopy(our_net.state_dict())
    if first:
        our_net = Net()
        our_net.body = checkpoint_wrapper(our_net.body)
        spectral_norm(our_net)
        our_net.load_state_dict(state)
    else:
        our_net.body = checkpoint_wrapper(our_net.body)
    assert_same_steps(torch_net, our_net, directly)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("whole", [True, False])
def test_no_update_in_a_backward_pass(recomputed: str, whole: bool):
    """A backward pass leaves u and v unchanged, and the next forward pass updates them."""
    _, our_net = pair()
    call = recompute(our_net, recomputed, whole)
    for seed in range(2):
        before = vectors(our_net)
        output = call(our_net, images(seed))
        after = vectors(our_net)
        assert not all_equal(before, after)
        output.sum().backward()
        assert all_equal(vectors(our_net), after)


def test_forward_pass_in_a_backward_hook():
    """A forward pass in a hook of the backward pass uses W/σ for the current u and v."""
    _, our_net = pair()
    outputs = []
    x = images()
    x.register_hook(lambda _: outputs.append(our_net(images(1)).detach()))
    our_net(x).sum().backward()
    before = vectors(our_net)
    assert_close(outputs[0], our_net.eval()(images(1)).detach())
    our_net.train()(images())
    assert not all_equal(vectors(our_net), before)


def test_backward_pass_within_a_forward_pass():
    """A module can differentiate its own output in its forward pass, for example for the gradient of an energy.

    It must retain the graph, because the weights W/σ are the same tensors throughout the pass.
    """

    class Slope(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                output = self.net(x)
                output.square().sum().backward(retain_graph=True)
            assert x.grad is not None
            return self.net(x.grad)

    # Two calls of the network in one pass are two updates in torch, so u and v have converged.
    torch_net = Slope(pair(converged=True)[0])
    state = copy.deepcopy(torch_net.state_dict())
    net: Any = Slope(Net())
    spectral_norm(net)
    net.load_state_dict(state)
    net.net.call = RECOMPUTED["not-reentrant"]
    for module in (torch_net, net):
        module(images()).square().sum().backward()
    assert_close(gradients(net), gradients(torch_net))
    assert_same_state(net, torch_net)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_two_forward_passes_before_one_backward_pass(recomputed: str):
    """A recomputation uses the latest u and v, which are those of both passes once they have converged."""
    torch_net, our_net = pair(converged=True)
    our_net.call = RECOMPUTED[recomputed]
    for _ in range(2):
        inputs = []
        for net in (torch_net, our_net):
            net.zero_grad()
            real, fake = images(1), images(2)
            (F.relu(1 - net(real)).mean() + F.relu(1 + net(fake)).mean()).backward()
            inputs.append((real, fake))
        assert_close(gradients(our_net, *inputs[1]), gradients(torch_net, *inputs[0]))
        assert_same_state(our_net, torch_net)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", ["directly", *RECOMPUTED])
def test_two_forward_passes_and_two_backward_passes(recomputed: str):
    """Backward passes in the reverse order, with converged u and v."""
    torch_net, our_net = pair(converged=True)
    our_net.call = RECOMPUTED.get(recomputed, directly)
    for net in (torch_net, our_net):
        outputs = [net(images(seed)) for seed in range(2)]
        for output in reversed(outputs):
            output.square().sum().backward()
    assert_close(gradients(our_net), gradients(torch_net))


# Modes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("whole", [True, False])
def test_evaluation_mode(recomputed: str, whole: bool):
    torch_net, our_net = (net.eval() for net in pair())
    call = recompute(our_net, recomputed, whole)
    before = vectors(our_net)
    assert_same_steps(torch_net, our_net, call)
    assert all_equal(vectors(our_net), before)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("frozen", ["body", "head", "body.0", ""])
def test_frozen_layers(recomputed: str, frozen: str):
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        net.get_submodule(frozen).requires_grad_(False)
    our_net.call = RECOMPUTED[recomputed]
    for step in range(2):
        inputs = images(step), images(step)
        for net, x in zip((torch_net, our_net), inputs, strict=True):
            net(x).square().sum().backward()
        assert_close(gradients(our_net, inputs[1]), gradients(torch_net, inputs[0]))
        assert_same_state(our_net, torch_net)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("evaluated", ["body", "head", "body.0"])
def test_part_in_evaluation_mode(recomputed: str, evaluated: str):
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        net.get_submodule(evaluated).eval()
    our_net.call = RECOMPUTED[recomputed]
    assert_same_steps(torch_net, our_net, directly)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("whole", [True, False])
def test_autocast(on: Implementation, recomputed: str, whole: bool):
    """The recomputation sees the autocast state of the forward pass. Compare with the network without it."""
    nets = pair()[1], pair()[1]
    calls = directly, recompute(nets[1], recomputed, whole)
    for step in range(2):
        inputs = images(step), images(step)
        for net, call, x in zip(nets, calls, inputs, strict=True):
            with torch.autocast(on.device, dtype=torch.bfloat16):
                output = call(net, x)
            assert output.dtype == torch.bfloat16
            output.float().square().sum().backward()
        assert_close(gradients(nets[1], inputs[1]), gradients(nets[0], inputs[0]))
        assert_same_state(nets[1], nets[0])


# Higher derivatives, repeated backward passes -------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_gradient_penalty(whole: bool):
    torch_net, our_net = pair()
    calls = directly, recompute(our_net, "not-reentrant", whole)
    for step in range(2):
        for net, call in zip((torch_net, our_net), calls, strict=True):
            net.zero_grad()
            x = images(step)
            (slope,) = torch.autograd.grad(call(net, x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        assert_close(gradients(our_net), gradients(torch_net))
        assert_same_state(our_net, torch_net)


@pytest.mark.parametrize("recomputed", ["directly", "not-reentrant"])
def test_second_derivatives_of_the_weights(recomputed: str):
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED.get(recomputed, directly)
    for net in (torch_net, our_net):
        weights = list(net.parameters())
        first = torch.autograd.grad(net(images()).square().sum(), weights, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(gradients(our_net), gradients(torch_net), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recomputed", ["directly", *RECOMPUTED])
def test_retained_graph(recomputed: str):
    """Two backward passes through one graph add twice the gradient."""
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED.get(recomputed, directly)
    inputs = images(), images()
    for net, x in zip((torch_net, our_net), inputs, strict=True):
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close(gradients(our_net, inputs[1]), gradients(torch_net, inputs[0]))
    assert_same_state(our_net, torch_net)


def test_optimizer_step_before_the_backward_pass():
    """torch raises an error; ours is the gradient for the weights of the forward pass."""
    torch_net, our_net = pair()
    reference = copy.deepcopy(our_net)
    reference(images()).square().sum().backward()
    outputs = [net(images()).square().sum() for net in (torch_net, our_net)]
    for net in (torch_net, our_net):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].backward()
    outputs[1].backward()
    assert_close(gradients(our_net), gradients(reference))


def test_forward_pass_before_the_backward_pass_of_an_earlier_one():
    """A later pass changes u and v in place, but not the gradient of the earlier pass, without recomputation."""
    torch_net, our_net = pair()
    for net in (torch_net, our_net):
        loss = net(images()).square().sum()
        with torch.no_grad():
            net(images(1))
        loss.backward()
    assert_close(gradients(our_net), gradients(torch_net))


# Saved-tensor hooks ---------------------------------------------------------------------------------------------------


def on_disk(folder: Any) -> AbstractContextManager[Any]:
    """Return hooks that save tensors in files, as in torch's tutorial."""

    def pack(x: Tensor) -> Any:
        file = folder / str(len(list(folder.iterdir())))
        torch.save(x, file)
        return file

    return saved_tensors_hooks(pack, lambda file: torch.load(file, weights_only=True))


@pytest.mark.parametrize("hooks", ["save_on_cpu", "clone", "half", "disk"])
def test_saved_tensor_hooks(hooks: str, tmp_path: Any):
    contexts = {
        "save_on_cpu": save_on_cpu,
        "clone": lambda: saved_tensors_hooks(torch.clone, torch.clone),
        "half": lambda: saved_tensors_hooks(lambda x: (x.dtype, x.double()), lambda saved: saved[1].to(saved[0])),
        "disk": lambda: on_disk(tmp_path),
    }

    def call(net: nn.Module, x: Tensor) -> Tensor:
        with contexts[hooks]():
            return net(x)

    assert_same_steps(*pair(), call)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_saved_tensor_hooks_and_checkpoint(recomputed: str):
    torch_net, our_net = pair()
    our_net.call = RECOMPUTED[recomputed]

    def call(net: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu():
            return net(x)

    assert_same_steps(torch_net, our_net, call)


# Functional calls and compilation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
def test_functional_call(recomputed: bool, buffers: bool):
    """The given weights are used, and the given u and v are updated."""
    torch_net, our_net = pair()
    results = []
    for net in (torch_net, our_net):
        given = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
        given |= {name: b.flip(0) for name, b in net.named_buffers() if buffers}

        forward = partial(torch.func.functional_call, net, given)
        if recomputed and net is our_net:
            forward = partial(checkpoint, forward, use_reentrant=False)
        output: Any = forward(images())
        output.square().sum().backward()
        results.append([output, [x.grad for x in given.values()], {k: x.detach() for k, x in given.items()}])
    assert_close(results[1], results[0])
    assert_same_state(our_net, torch_net)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole: bool):
    torch_net, our_net = pair()
    call = recompute(our_net, "not-reentrant", whole)
    compiled = torch.compile(our_net, backend="aot_eager")
    assert_same_steps(torch_net, our_net, lambda _, x: call(compiled, x))


# Memory ---------------------------------------------------------------------------------------------------------------


class Weights(TorchFunctionMode):
    """Record weak references to the storage of every weight that a layer uses."""

    def __init__(self, on: Implementation) -> None:
        super().__init__()
        self.on = on
        self.storages: list[StorageWeakRef] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv2d, F.conv_transpose2d):
            self.storages.append(StorageWeakRef(args[1].untyped_storage()))
        return func(*args, **kwargs or {})

    def alive(self) -> int:
        if self.on.interpreted:
            gc.collect()  # Triton's interpreter keeps its arguments in reference cycles
        return sum(not storage.expired() for storage in self.storages)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("recomputed", ["directly", *RECOMPUTED])
@pytest.mark.parametrize("whole", [True, False])
def test_normalized_weights_are_freed_with_the_output(on: Implementation, recomputed: str, whole: bool):
    """The weights are freed with the graph, without the garbage collector, because no reference cycle holds them."""
    _, our_net = pair()
    call = recompute(our_net, recomputed, whole)
    with without_garbage_collection():
        with Weights(on) as weights:
            output = call(our_net, images())
        if recomputed == "directly":
            assert weights.alive() == len(weights.storages) == len(LAYERS)
        del output
        assert weights.alive() == 0


@pytest.mark.parametrize("recomputed", ["directly", *RECOMPUTED])
@pytest.mark.parametrize("whole", [True, False])
def test_normalized_weights_are_freed_by_the_backward_pass(on: Implementation, recomputed: str, whole: bool):
    """A loss that is kept, for example for logging, does not keep the weights."""
    _, our_net = pair()
    call = recompute(our_net, recomputed, whole)
    with without_garbage_collection(), Weights(on) as weights:
        loss = call(our_net, images()).square().sum()
        loss.backward()
        assert loss.grad_fn is not None and weights.alive() == 0


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_normalized_weights_are_freed_after_a_pass_without_graph(on: Implementation, context: Any):
    _, our_net = pair()
    our_net.requires_grad_(False)
    with without_garbage_collection(), context(), Weights(on) as weights:
        output = our_net(images().detach())
        assert output.shape == (3, 2) and len(weights.storages) == len(LAYERS) and weights.alive() == 0


def test_normalized_weights_are_freed_after_an_error(on: Implementation):
    _, our_net = pair()
    with without_garbage_collection(), Weights(on) as weights:
        with suppress(RuntimeError):
            our_net(images()[:, :, :2])
        assert weights.storages and weights.alive() == 0
