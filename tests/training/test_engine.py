"""Engines: which parameters are stepped together, and loss scaling for float16."""

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


def make(config: Config = CONFIG, engine_class: type[Engine] = Engine) -> tuple[Net, Engine]:
    net = Net()
    return net, engine_class(net, {"ab": [net.a, net.b], "c": [net.c]}, config)


def units(engine: Engine, net: Net) -> list[list[str]]:
    names = {p: name for name, p in net.named_parameters()}
    assert isinstance(engine, UnitEngine)
    return sorted(sorted(names[p] for p in unit.parameters) for unit in engine.optimizer.units)


def test_units_hold_parameters_that_are_always_stepped_together():
    net, engine = make(engine_class=UnitEngine)
    engine.backward((net.a + net.b + net.c).sum(), ["ab", "c"])
    engine.step()
    assert units(engine, net) == [["a", "b", "c"]]
    engine.backward((net.a + net.c).sum(), ["ab"])  # b has no gradient, c is not in the group
    engine.step()
    assert units(engine, net) == [["a"], ["b", "c"]]
    steps = {name: moments["step"] for name, moments in engine.state_dict()["moments"].items()}
    assert steps == {"a": 2, "b": 1, "c": 1}

    # After loading, parameters with the same step count form a unit.
    other_net, other = make(engine_class=UnitEngine)
    other.load_state_dict(engine.state_dict())
    assert other.state_dict()["moments"].keys() == {"a", "b", "c"}
    other.backward((other_net.a + other_net.b + other_net.c).sum(), ["ab", "c"])
    other.step()
    assert units(other, other_net) == [["a"], ["b", "c"]]
    assert {moments.step for moments in other.moments().values()} == {2, 3}
    engine.reset(0.2, 1)
    assert not engine.moments()


@pytest.mark.parametrize("case", ["local", "joint", "growing", "port", "float16"])
def test_units_are_bitwise_equal_to_one_adam(case):
    config, iterations = CASES.get(case, (GROWING, 12))
    if case == "float16":
        config = replace(config, train=replace(config.train, precision="float16"))
    step, in_units = TrainStep(config), TrainStep(config)
    in_units.engine = UnitEngine(
        in_units.networks, in_units.networks.groups(), config, scales=learning_rate_scales(in_units.networks)
    )
    in_units.grow(in_units.schedule)
    for expected, metrics in zip(advance(step, iterations), advance(in_units, iterations), strict=True):
        assert_equal(metrics, expected)
    assert_equal(dict(in_units.networks.state_dict()), dict(step.networks.state_dict()))
    assert_equal(in_units.engine.state_dict(), step.engine.state_dict())


@pytest.mark.parametrize("engine_class", [Engine, UnitEngine])
def test_losses_are_scaled_and_overflowing_steps_skipped(engine_class):
    net, engine = make(engine_class=engine_class)
    float32_net, float32_engine = make(replace(CONFIG, train=TrainConfig()), engine_class)
    scaler = engine.scaler
    assert scaler.is_enabled() and not float32_engine.scaler.is_enabled()

    def step_both(factor: float) -> None:
        for n, e in ((net, engine), (float32_net, float32_engine)):
            e.backward((factor * n.a * n.b).sum(), ["ab"])
        assert net.a.grad is not None and float32_net.a.grad is not None
        torch.testing.assert_close(net.a.grad, float32_net.a.grad * scaler.get_scale())
        for e in (engine, float32_engine):
            e.step()
        torch.testing.assert_close(net.a, float32_net.a)
        torch.testing.assert_close(net.b, float32_net.b)

    step_both(1.0)
    step_both(1e-3)
    assert scaler.get_scale() == 2**10
    step_both(2.0)
    assert scaler.get_scale() == 2**11  # a window of three steps

    before = net.a.detach().clone()
    engine.backward((net.a - before).sqrt().sum(), ["ab"])  # √0 has an infinite gradient
    engine.step()
    assert torch.equal(net.a, before) and scaler.get_scale() == 2**10
    assert {moments.step for moments in engine.moments().values()} == {3} and net.a.grad is None
    step_both(1.0)
    step_both(1.0)
    state = engine.state_dict()
    assert state["loss_scale"] == {"value": 2**10, "steps": 2}
    resumed_net, resumed = make(engine_class=engine_class)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["loss_scale"] == state["loss_scale"]
    resumed.backward((resumed_net.a * resumed_net.b).sum(), ["ab"])
    resumed.step()
    assert resumed.scaler.get_scale() == 2**11  # the third step of the window
    with pytest.raises(DivergedError, match="at any loss scale"):
        for _ in range(60):
            engine.backward((net.a - net.a.detach()).sqrt().sum(), ["ab"])
            engine.step()


def test_float16_follows_float32():
    config = replace(GROWING_FAST, optim=replace(GROWING_FAST.optim, loss_scale=64.0))
    float32, float16 = (
        TrainStep(replace(config, train=replace(config.train, precision=p))) for p in ("float32", "float16")
    )
    distances = [distance for _, _, distance in follow_weights(float16, float32, 10)]
    difference, change = (sum(values) for values in zip(*distances, strict=True))
    assert difference < 0.05 * change, distances
    assert all(p.dtype == torch.float32 for p in float16.networks.parameters())
    assert float16.engine.scaler.get_scale() == 64
    steps = [{moments.step for moments in step.engine.moments().values()} for step in (float32, float16)]
    assert steps[0] == steps[1]


def test_float16_finds_a_loss_scale_at_32x32():
    """The scale decreases from 65,536, and overflowing steps are skipped."""
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
