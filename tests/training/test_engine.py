"""Gradients to steps: which parameters are stepped together, and losses that are scaled for float16."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dcvae_fast.config import Config, OptimConfig, TrainConfig
from dcvae_fast.errors import DivergedError
from dcvae_fast.models.build import learning_rate_scales
from dcvae_fast.training.deepspeed_engine import UnitEngine
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.step import TrainStep
from test_graphs import CASES, GROWING, GROWING_FAST, SMALL, advance, assert_equal, follow_weights

CONFIG = Config(
    optim=OptimConfig(lr=0.1, loss_scale=2.0**10, loss_scale_window=3), train=TrainConfig(precision="float16")
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(2)) for _ in range(3))


def engine(config: Config = CONFIG, kind: type[Engine] = Engine) -> tuple[Net, Engine]:
    net = Net()
    return net, kind(net, {"ab": [net.a, net.b], "c": [net.c]}, config)


def units(of: Engine, net: Net) -> list[list[str]]:
    names = {p: name for name, p in net.named_parameters()}
    assert isinstance(of, UnitEngine)
    return sorted(sorted(names[p] for p in unit.parameters) for unit in of.optimizer.units)


def test_units_are_what_is_always_stepped_together():
    net, ours = engine(kind=UnitEngine)
    ours.backward((net.a + net.b + net.c).sum(), ["ab", "c"])
    ours.step()
    assert units(ours, net) == [["a", "b", "c"]]
    ours.backward((net.a + net.c).sum(), ["ab"])  # nothing for b; c is not asked for
    ours.step()
    assert units(ours, net) == [["a"], ["b", "c"]]
    steps = {net_name: moments["step"] for net_name, moments in ours.state_dict()["moments"].items()}
    assert steps == {"a": 2, "b": 1, "c": 1}

    # Loaded, those of one step count begin as one.
    other_net, other = engine(kind=UnitEngine)
    other.load_state_dict(ours.state_dict())
    assert other.state_dict()["moments"].keys() == {"a", "b", "c"}
    other.backward((other_net.a + other_net.b + other_net.c).sum(), ["ab", "c"])
    other.step()
    assert units(other, other_net) == [["a"], ["b", "c"]]
    assert {moments.step for moments in other.moments().values()} == {2, 3}
    ours.reset(0.2, 1)
    assert not ours.moments()


@pytest.mark.parametrize("case", ["local", "joint", "growing", "float16"])
def test_units_and_one_adam_learn_the_same_bit_by_bit(case):
    config, iterations = CASES.get(case, (GROWING, 12))
    if case == "float16":
        config = replace(config, train=replace(config.train, precision="float16"))
    ours, in_units = TrainStep(config), TrainStep(config)
    in_units.engine = UnitEngine(
        in_units.networks, in_units.networks.groups(), config, scales=learning_rate_scales(in_units.networks)
    )
    in_units.grow(in_units.schedule)
    for expected, metrics in zip(advance(ours, iterations), advance(in_units, iterations), strict=True):
        assert_equal(metrics, expected)
    assert_equal(dict(in_units.networks.state_dict()), dict(ours.networks.state_dict()))
    assert_equal(in_units.engine.state_dict(), ours.engine.state_dict())


@pytest.mark.parametrize("kind", [Engine, UnitEngine])
def test_losses_are_scaled_and_steps_that_overflow_are_left_out(kind):
    net, ours = engine(kind=kind)
    plain_net, plain = engine(replace(CONFIG, train=TrainConfig()), kind)
    scaler = ours.scaler
    assert scaler.is_enabled() and not plain.scaler.is_enabled()

    def both(factor: float) -> None:
        for one, of in ((net, ours), (plain_net, plain)):
            of.backward((factor * one.a * one.b).sum(), ["ab"])
        assert net.a.grad is not None and plain_net.a.grad is not None
        torch.testing.assert_close(net.a.grad, plain_net.a.grad * scaler.get_scale())
        for of in (ours, plain):
            of.step()
        torch.testing.assert_close(net.a, plain_net.a)
        torch.testing.assert_close(net.b, plain_net.b)

    both(1.0)
    both(1e-3)
    assert scaler.get_scale() == 2**10
    both(2.0)
    assert scaler.get_scale() == 2**11  # a window of three steps

    before = net.a.detach().clone()
    ours.backward((net.a - before).sqrt().sum(), ["ab"])  # 0, whose gradient is infinite
    ours.step()
    assert torch.equal(net.a, before) and scaler.get_scale() == 2**10
    assert {moments.step for moments in ours.moments().values()} == {3} and net.a.grad is None
    both(1.0)
    both(1.0)
    state = ours.state_dict()
    assert state["loss_scale"] == {"value": 2**10, "steps": 2}
    resumed_net, resumed = engine(kind=kind)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["loss_scale"] == state["loss_scale"]
    resumed.backward((resumed_net.a * resumed_net.b).sum(), ["ab"])
    resumed.step()
    assert resumed.scaler.get_scale() == 2**11  # the third step of the window
    with pytest.raises(DivergedError, match="at any loss scale"):
        for _ in range(60):
            ours.backward((net.a - net.a.detach()).sqrt().sum(), ["ab"])
            ours.step()


def test_float16_follows_float32():
    config = replace(GROWING_FAST, optim=replace(GROWING_FAST.optim, loss_scale=64.0))
    wide, narrow = (
        TrainStep(replace(config, train=replace(config.train, precision=p))) for p in ("float32", "float16")
    )
    distances = [distance for _, _, distance in follow_weights(narrow, wide, 10)]
    apart, moved = (sum(each) for each in zip(*distances, strict=True))
    assert apart < 0.05 * moved, distances
    assert all(p.dtype == torch.float32 for p in narrow.networks.parameters())
    assert narrow.engine.scaler.get_scale() == 64
    steps = [{found.step for found in step.engine.moments().values()} for step in (wide, narrow)]
    assert steps[0] == steps[1]


def test_float16_finds_a_scale_for_networks_of_32():
    """From 65,536 down, leaving out steps meanwhile."""
    width = {"decoder_width": 8, "encoder_width": 8, "discriminator_width": 8}
    train = replace(SMALL.train, batch=2, sampled_batch=2, precision="float16")
    step = TrainStep(replace(SMALL, model=replace(SMALL.model, **width), optim=OptimConfig(), train=train))
    list(advance(step, 8))
    scale = step.engine.state_dict()["loss_scale"]
    assert 1 <= scale["value"] < 65536 and scale["steps"] > 0
    assert all(value.isfinite().all() for value in step.networks.state_dict().values())
    assert {"encoder", "decoder", "discriminator"} == {
        name.split(".")[0] for name in step.engine.state_dict()["moments"]
    }
