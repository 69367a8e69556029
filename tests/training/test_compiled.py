"""Compiled iterations compute what eager ones do, and the fast path (bfloat16, compiled, from graphs) nearly so."""

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

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError
from dcvae_fast.training import compiled as compiled_module
from dcvae_fast.training.log import Log
from dcvae_fast.training.snapshots import write_grids
from dcvae_fast.training.step import TrainStep
from test_graphs import GROWING, GROWING_FAST, SMALL, batch_of, follow, with_graphs


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All of torch.compile but the last step, which needs a C++ compiler and a minute; counts what it compiles."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # Otherwise what is compiled too often runs eagerly from then on.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counters
    torch._dynamo.reset()


def compiled(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, compile=True, **settings))


def assert_close(ours: TrainStep, eager: TrainStep, iterations: int, tolerance: float = 1e-5) -> None:
    for found, expected in follow(ours, eager, iterations):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Rounding may change the rank of a positive that is nearly as similar as a negative.
            most = 1 / eager.schedule.batch + 1e-6 if name.startswith("contrast/top1") else tolerance
            assert found[name].item() == pytest.approx(value.item(), rel=tolerance, abs=most), name


def test_compiled_iterations_are_the_eager_ones(compiler: Any, tmp_path: Path):
    ours = TrainStep(compiled(SMALL))
    assert_close(ours, TrainStep(SMALL), 6)
    known = compiler["stats"]["unique_graphs"]
    assert known >= 9 and not compiler["graph_break"]
    log = Log(tmp_path, 0, 100)
    write_grids(ours, log, torch.zeros(9, 1, 32, 32, dtype=torch.uint8))  # other sizes, in evaluation mode
    log.close()
    assert compiler["stats"]["unique_graphs"] == known


def test_what_no_loss_uses_is_left_alone(compiler: Any):
    """The compiler would give zeros to layers beyond the last that is contrasted, and Adam would step them."""
    loss, contrast = replace(SMALL.loss, objective="vae_contrastive"), replace(SMALL.contrast, layers=("b1",))
    config = replace(SMALL, loss=loss, contrast=contrast)
    ours, eager = TrainStep(compiled(config)), TrainStep(config)
    assert_close(ours, eager, 2)
    found, expected = (step.engine.state_dict()["moments"] for step in (ours, eager))
    assert {name: x["step"] for name, x in found.items()} == {name: x["step"] for name, x in expected.items()}
    assert {x["step"] for x in expected.values()} == {2}
    assert {name.split(".")[3] for name in found if "critic.trunk" in name} == {"b1"}


def test_networks_that_grow_are_compiled_once_for_each_phase(compiler: Any):
    """The second derivatives of the gradient penalty are not."""
    ours, eager = TrainStep(compiled(GROWING_FAST)), TrainStep(GROWING_FAST)
    compilations = []
    for iterations in (2, 1, 1, 1, 1):  # 4×4; 8×8 fading; 8×8
        assert_close(ours, eager, iterations)
        compilations.append(compiler["stats"]["unique_graphs"])
    at_4, begun, fading, whole, still = compilations
    assert at_4 < begun == fading < whole == still and not compiler["graph_break"]


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def backend(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    step = TrainStep(compiled(SMALL))
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(.*C\+\+.*\); --train.compile false does without"):
        step(batch_of(step, 0))


# Relative and absolute bounds for the difference of the mean over all iterations from float32.
BOUNDS = {
    "loss/contrast": (0.02, 0.0),
    "pixel_mse": (0.02, 0.0),
    "loss/discriminator": (0.02, 0.02),
    "loss/adversarial": (0.02, 0.02),
    "contrast/top1_final": (0.0, 0.1),
}


def assert_near(fast: TrainStep, eager: TrainStep, iterations: int) -> None:
    found, expected = defaultdict(list), defaultdict(list)
    for ours, theirs in follow(fast, eager, iterations):
        assert ours.keys() == theirs.keys()
        for name in BOUNDS.keys() & theirs.keys():
            found[name].append(ours[name])
            expected[name].append(theirs[name])
    for name in found:
        share, most = BOUNDS[name]
        mine, plain = torch.stack(found[name]).mean().item(), torch.stack(expected[name]).mean().item()
        assert mine == pytest.approx(plain, rel=share, abs=most), name


def test_the_fast_path_stays_near_float32(compiler: Any):
    fast, recorders = with_graphs(compiled(SMALL, precision="bfloat16"))
    assert_near(fast, TrainStep(SMALL), 24)
    assert recorders[0].replays > 12


@pytest.mark.parametrize(
    ("wanted", "device", "obstacle", "compiles"),
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
def test_when_networks_are_compiled(
    wanted: bool | None, device: str, obstacle: str | None, compiles: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiled_module, "obstacle_to_building", lambda: obstacle)
    config = replace(SMALL, train=replace(SMALL.train, compile=wanted))
    assert compiled_module.uses_compile(config, torch.device(device)) is compiles


def test_kernels_stay_loaded_when_another_resolution_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph of another TrainStep may use kernels of compiled modules, without a reference to them.

    Triton unloads a kernel when its last reference is gone, so torch must keep the modules.
    """
    from torch._inductor.codecache import PyCodeCache

    made = ModuleType("made by the compiler")
    monkeypatch.setattr(PyCodeCache, "modules", [made])
    monkeypatch.setattr(PyCodeCache, "modules_no_attr", {"path": made})
    compiled_module.forget_compiled()
    assert PyCodeCache.modules == [made] and PyCodeCache.modules_no_attr == {"path": made}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("config", [SMALL, GROWING], ids=["32", "growing"])
def test_compiled_to_machine_code(config: Config):
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
    ours, theirs = TrainStep(with_graphs, "cuda"), TrainStep(eager, "cuda")
    assert ours.graphs is not None and theirs.graphs is None
    assert_close(ours, theirs, iterations, 1e-3)
