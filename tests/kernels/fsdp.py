"""One of two ranks that train a normalised network under FSDP2 on the CPU; run as `fsdp.py RANK FILE [CASE ...]`.

Each rank compares its results with those of a single process with the whole batch, which it also computes, with torch's
parametrization.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from checks import randn
from dcvae_kernels import remove_spectral_norm, spectral_norm

WORLD_SIZE, BATCH, STEPS = 2, 4, 3
LAYERS = ["body.0", "body.2", "head"]


class Net(nn.Module):
    """Network whose `body` is called through `call`; [B, 5] -> [B, 1]. Some dimensions are not multiples of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.head = nn.Linear(6, 1)
        self.call: Callable[..., Tensor] = lambda body, x: body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self.body, x)))


def normalised_by_torch() -> Net:
    torch.manual_seed(0)
    net = Net().eval()  # in training mode torch iterates once more at registration
    for name in LAYERS:
        parametrizations.spectral_norm(net.get_submodule(name))
    return net.train()


def normalised(impl: Any) -> Net:
    net = spectral_norm(Net(), impl=impl)
    net.load_state_dict(normalised_by_torch().state_dict())
    return net


def shard(net: Net, each_layer: bool, **options: Any) -> None:
    for name in LAYERS if each_layer else []:
        fully_shard(net.get_submodule(name), **options)
    fully_shard(net, **options)


def step(net: nn.Module, x: Tensor) -> Tensor:
    """Return the loss of one step of SGD."""
    loss = (net(x) - 1).square().mean()
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()  # not before the forward pass, as an evaluation without resharding leaves other parameters there
    return loss.detach()


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in net.state_dict().items()}
    return {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in state.items()}


def compare_steps(rank: int, net: nn.Module, single: nn.Module) -> None:
    """Compare losses and states of STEPS steps; each rank has its rows of the batch."""
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    for seed in range(STEPS):
        x = randn(WORLD_SIZE * BATCH, 5, seed=seed)
        expected, loss = step(single, x), step(net, x[rows].clone().requires_grad_())
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / WORLD_SIZE, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole_state(net), dict(single.state_dict()), rtol=1e-5, atol=1e-6)


def training(rank: int, impl: Any, each_layer: bool, reshard: bool) -> None:
    """Train, then evaluate, with the root alone or each layer sharded."""
    net, single = normalised(impl), normalised_by_torch()
    shard(net, each_layer, reshard_after_forward=reshard)
    assert isinstance(net.head.parametrizations.weight.original, DTensor)  # type: ignore[union-attr]
    compare_steps(rank, net, single)
    x = randn(BATCH, 5, seed=9)
    torch.testing.assert_close(net.eval()(x), single.eval()(x), rtol=1e-5, atol=1e-6)
    compare_steps(rank, net.train(), single.train())


def torch_training(rank: int, each_layer: bool, reshard: bool) -> None:
    """Control: torch's parametrization under FSDP2."""
    net, single = normalised_by_torch(), normalised_by_torch()
    shard(net, each_layer, reshard_after_forward=reshard)
    compare_steps(rank, net, single)


def sharded_body(rank: int, impl: Any) -> None:
    """A sharded part within a module that is not sharded, as in training only the large part with FSDP2."""
    net, single = normalised(impl), normalised_by_torch()
    fully_shard(net.body)
    x = randn(BATCH, 5, seed=0)  # the same on both ranks, because the gradients of the head are not averaged
    for _ in range(STEPS):
        torch.testing.assert_close(step(net, x), step(single, x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole_state(net), dict(single.state_dict()), rtol=1e-5, atol=1e-6)


def recomputed(rank: int, impl: Any, each_layer: bool, how: str) -> None:
    """Activation checkpointing of a part under FSDP2."""
    net, single = normalised(impl), normalised_by_torch()
    if how == "wrapper":
        net.body = checkpoint_wrapper(net.body)
        for name in ["body._checkpoint_wrapped_module.0", "body._checkpoint_wrapped_module.2"] if each_layer else []:
            fully_shard(net.get_submodule(name))
        fully_shard(net)
    else:
        net.call = partial(checkpoint, use_reentrant=how == "reentrant")
        shard(net, each_layer)
    compare_steps(rank, net, single)


def two_passes(rank: int, impl: Any, each_layer: bool) -> None:
    """A discriminator's two forward passes before one backward pass."""
    net, single = normalised(impl), normalised_by_torch()
    shard(net, each_layer)
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    real, fake = (randn(WORLD_SIZE * BATCH, 5, seed=seed) for seed in range(2))
    for module, used in ((net, rows), (single, slice(None))):
        (module(real[used]).mean() - module(fake[used]).square().mean()).backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    torch.testing.assert_close(whole_state(net), dict(single.state_dict()), rtol=1e-5, atol=1e-6)


def frozen(rank: int, impl: Any, each_layer: bool) -> None:
    """Power iterations run for frozen layers too, and training does not change these layers."""
    net, single = normalised(impl), normalised_by_torch()
    for module in (net, single):
        module.get_submodule("body.0").requires_grad_(False)
    shard(net, each_layer)
    compare_steps(rank, net, single)


def removal(rank: int, impl: Any) -> None:
    """A state gathered from the shards loads into a single process, whose normalisation is then removed."""
    net = normalised(impl)
    shard(net, True)
    step(net, randn(BATCH, 5, seed=rank))
    single = normalised(impl)
    single.load_state_dict(whole_state(net))
    x = randn(BATCH, 5, seed=9)
    expected = net.eval()(x)
    torch.testing.assert_close(remove_spectral_norm(single.eval())(x), expected, rtol=1e-5, atol=1e-6)


def sharded_before(rank: int, impl: Any, each_layer: bool) -> None:
    """spectral_norm after fully_shard is rejected."""
    net = Net()
    shard(net, each_layer)
    with pytest.raises(ValueError, match="before fully_shard"):
        spectral_norm(net, impl=impl)


def built_on_meta(rank: int, impl: Any, each_layer: bool) -> None:
    """A network built on the meta device is sharded, allocated, and loaded from a whole state_dict."""
    single = normalised_by_torch()
    with torch.device("meta"):
        net = Net()
        spectral_norm(net, impl="auto" if impl == "triton" else impl)  # Triton does not run on the meta device
    shard(net, each_layer)
    net.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(net, dict(single.state_dict()), options=options)
    compare_steps(rank, net, single)
    state = get_model_state_dict(net, options=options)
    torch.testing.assert_close(state, dict(single.state_dict()), rtol=1e-5, atol=1e-6)


BOTH = (False, True)
CASES: dict[str, Callable[[int, Any], None]] = {}
for layers, reshard in itertools.product(BOTH, BOTH):
    CASES[f"training-{layers}-{reshard}"] = partial(training, each_layer=layers, reshard=reshard)
for layers in BOTH:
    for how in ("reentrant", "not-reentrant", "wrapper"):
        CASES[f"recomputed-{layers}-{how}"] = partial(recomputed, each_layer=layers, how=how)
    CASES[f"two-passes-{layers}"] = partial(two_passes, each_layer=layers)
    CASES[f"frozen-{layers}"] = partial(frozen, each_layer=layers)
    CASES[f"built-on-meta-{layers}"] = partial(built_on_meta, each_layer=layers)
    CASES[f"sharded-before-{layers}"] = partial(sharded_before, each_layer=layers)
CASES["sharded-body"] = sharded_body
CASES["removal"] = removal


if __name__ == "__main__":
    rank, file, *names = sys.argv[1:]
    rank = int(rank)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD_SIZE)
    for each_layer, reshard in itertools.product(BOTH, BOTH):
        torch_training(rank, each_layer, reshard)
    failures = []
    # Triton's interpreter is slow, and the update of sharded layers does not use the kernels.
    for impl, default in (("torch", CASES), ("triton", ["training-False-True", "recomputed-False-not-reentrant"])):
        for name in names or default:
            try:
                CASES[name](rank, impl)
            except Exception as error:
                failures.append(f"{name}, {impl}: {type(error).__name__}: " + " ".join(str(error).split("\n")[:5]))
    assert not failures, "\n".join(failures)
    dist.destroy_process_group()
