"""Compiled iterations equal eager ones; the fast path (bfloat16, compiled, CUDA graphs) approximates them."""

import functools
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError
from dcvae_fast.models.progressive import Phase, set_phase
from dcvae_fast.training import compiled as compiled_module
from dcvae_fast.training.compiled import forget_compiled
from dcvae_fast.training.log import Log
from dcvae_fast.training.networks import Networks
from dcvae_fast.training.snapshots import write_grids
from dcvae_fast.training.step import TrainStep
from test_graphs import GROWING, GROWING_FAST, PORT, SMALL, batch_of, follow, with_graphs


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch.compile without code generation, which takes a C++ compiler and a minute. Yields torch's counters."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # By default, functions that are recompiled too often silently run eagerly.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counters
    torch._dynamo.reset()


def compiled(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, compile=True, **settings))


def assert_close(step: TrainStep, eager: TrainStep, iterations: int, tolerance: float = 1e-5) -> None:
    for metrics, expected in follow(step, eager, iterations):
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            # Rounding can change the rank of a positive if a negative is nearly as similar.
            atol = 1 / eager.schedule.batch + 1e-6 if name.startswith("contrast/top1") else tolerance
            assert metrics[name].item() == pytest.approx(value.item(), rel=tolerance, abs=atol), name


def test_compiled_iterations_equal_eager_ones(compiler: Any, tmp_path: Path):
    step = TrainStep(compiled(SMALL))
    assert_close(step, TrainStep(SMALL), 6)
    graphs = compiler["stats"]["unique_graphs"]
    assert graphs >= 9 and not compiler["graph_break"]
    log = Log(tmp_path, 0, 100)
    write_grids(step, log, torch.zeros(9, 1, 32, 32, dtype=torch.uint8))  # other sizes, in evaluation mode
    log.close()
    assert compiler["stats"]["unique_graphs"] == graphs


def test_unused_layers_are_not_stepped(compiler: Any):
    """Layers after the last contrasted one must not receive zero gradients, with which Adam would step them."""
    loss, contrast = replace(SMALL.loss, objective="vae_contrastive"), replace(SMALL.contrast, layers=("b1",))
    config = replace(SMALL, loss=loss, contrast=contrast)
    step, eager = TrainStep(compiled(config)), TrainStep(config)
    assert_close(step, eager, 2)
    moments, expected = (s.engine.state_dict()["moments"] for s in (step, eager))
    assert {name: x["step"] for name, x in moments.items()} == {name: x["step"] for name, x in expected.items()}
    assert {x["step"] for x in expected.values()} == {2}
    assert {name.split(".")[3] for name in moments if "critic.trunk" in name} == {"b1"}


def test_growing_networks_are_compiled_once_per_phase(compiler: Any):
    """The second derivatives of the gradient penalty are not compiled."""
    step, eager = TrainStep(compiled(GROWING_FAST)), TrainStep(GROWING_FAST)
    graphs = []
    for iterations in (2, 1, 1, 1, 1):  # 4×4; 8×8 fading twice; 8×8 twice
        assert_close(step, eager, iterations)
        graphs.append(compiler["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] < graphs[3] == graphs[4] and not compiler["graph_break"]


def test_networks_of_the_port_are_compiled_as_whole_graphs():
    networks = Networks(PORT)
    set_phase(networks, Phase(8, torch.tensor(0.25)))
    generator = torch.Generator().manual_seed(0)
    images, latents = (torch.randn(6, *shape, generator=generator) for shape in ((1, 8, 8), (PORT.model.latent_dim,)))
    cases: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (networks.decoder, (latents,)),
        (networks.encoder.trunk, (images,)),
        (networks.discriminator.critic, (images, 2, ("final",), True)),
    ]
    for module, arguments in cases:
        actual = torch.compile(module.forward, backend="eager", fullgraph=True, dynamic=False)(*arguments)
        torch.testing.assert_close(actual, module(*arguments))
    forget_compiled()


def test_missing_compiler_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch):
    def backend(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    step = TrainStep(compiled(SMALL))
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(.*C\+\+.*\); use --train.compile false"):
        step(batch_of(step, 0))


# Relative and absolute tolerance of each metric's mean over all iterations, compared with float32.
BOUNDS = {
    "loss/contrast": (0.02, 0.0),
    "pixel_mse": (0.02, 0.0),
    "loss/discriminator": (0.02, 0.02),
    "loss/adversarial": (0.02, 0.02),
    "contrast/top1_final": (0.0, 0.1),
}


def assert_near(fast: TrainStep, eager: TrainStep, iterations: int) -> None:
    values, expected_values = defaultdict(list), defaultdict(list)
    for metrics, expected in follow(fast, eager, iterations):
        assert metrics.keys() == expected.keys()
        for name in BOUNDS.keys() & expected.keys():
            values[name].append(metrics[name])
            expected_values[name].append(expected[name])
    for name, (rtol, atol) in BOUNDS.items():
        if name in values:
            mean, expected_mean = (torch.stack(v[name]).mean().item() for v in (values, expected_values))
            assert mean == pytest.approx(expected_mean, rel=rtol, abs=atol), name


def test_fast_path_stays_close_to_float32(compiler: Any):
    fast, recorders = with_graphs(compiled(SMALL, precision="bfloat16"))
    assert_near(fast, TrainStep(SMALL), 24)
    assert recorders[0].replays > 12


@pytest.mark.parametrize(
    ("setting", "device", "obstacle", "compiles"),
    [
        (None, "cuda", None, True),
        (None, "cuda", "no C compiler", False),
        (None, "cpu", None, False),
        (True, "cuda", "no C compiler", True),  # raises an error with the reason
        (True, "cpu", None, True),
        (False, "cuda", None, False),
        (True, "meta", None, False),
    ],
)
def test_uses_compile(
    setting: bool | None, device: str, obstacle: str | None, compiles: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiled_module, "obstacle_to_building", lambda: obstacle)
    config = replace(SMALL, train=replace(SMALL.train, compile=setting))
    assert compiled_module.uses_compile(config, torch.device(device)) is compiles


def test_kernels_stay_loaded_after_forget_compiled(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph of another TrainStep can use kernels of compiled modules without a reference to them.

    Triton unloads a kernel with its last reference, so torch must keep the modules.
    """
    from torch._inductor.codecache import PyCodeCache

    module = ModuleType("compiled")
    monkeypatch.setattr(PyCodeCache, "modules", [module])
    monkeypatch.setattr(PyCodeCache, "modules_no_attr", {"path": module})
    compiled_module.forget_compiled()
    assert PyCodeCache.modules == [module] and PyCodeCache.modules_no_attr == {"path": module}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("config", [SMALL, GROWING], ids=["32", "growing"])
def test_generated_code_matches_eager(config: Config):
    assert_close(TrainStep(compiled(config)), TrainStep(config), 26 if config.model.grows else 8)


# Growing networks stop at 8×8 on a GPU, because compiling a phase takes a minute.
@pytest.mark.gpu
@pytest.mark.parametrize(("config", "iterations"), [(SMALL, 100), (GROWING, 16)], ids=["32", "growing"])
def test_the_fast_path_on_a_gpu(config: Config, iterations: int):
    plain = replace(config, train=replace(config.train, compile=False, graphs=False))
    fast = TrainStep(compiled(config, precision="bfloat16", graphs=True), "cuda")
    assert_near(fast, TrainStep(plain, "cuda"), iterations)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "iterations"), [(SMALL, 20), (GROWING, 24)], ids=["32", "growing"])
def test_graphs_on_a_gpu(config: Config, iterations: int):
    """Compare replayed with eager iterations, in float32 without torch.compile."""
    eager = replace(config, train=replace(config.train, compile=False, graphs=False))
    with_graphs = replace(eager, train=replace(eager.train, graphs=True))
    step, eager_step = TrainStep(with_graphs, "cuda"), TrainStep(eager, "cuda")
    assert step.graphs is not None and eager_step.graphs is None
    assert_close(step, eager_step, iterations, 1e-3)
