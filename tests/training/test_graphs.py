"""Replayed iterations equal eager ones, with a CPU emulation of CUDA graphs; test_compiled.py has the GPU test."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcvae_fast.config import Config, ContrastConfig, GrowthConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from dcvae_fast.distributed import Ranks
from dcvae_fast.errors import ConfigError
from dcvae_fast.training.graphs import PATIENCE, WARM_UPS, CudaRecorder, Graphs, uses_graphs
from dcvae_fast.training.step import Metrics, TrainStep
from dcvae_pipelines import Batch
from recorder import CpuRecorder

SMALL = Config(
    model=ModelConfig(
        image_channels=1, latent_dim=5, decoder_width=8, encoder_width=4, discriminator_width=4, contrast_dim=3
    ),
    contrast=ContrastConfig(negatives=50, momentum=0.9),
    optim=OptimConfig(lr=1e-3),
    train=TrainConfig(batch=4, sampled_batch=6, n_critic=2, ema_decay=0.9),
)
# Iterations: 8 at 4×4, 8 fading in 8×8, 8 at 8×8, 8 fading in 16×16, then 16×16.
GROWING = Config(
    model=ModelConfig(
        architecture="progressive",
        resolution=16,
        image_channels=1,
        latent_dim=6,
        base_channels=64,
        max_channels=8,
        contrast_dim=5,
    ),
    growth=GrowthConfig(fade_images=64, stable_images=64, batch={4: 8, 8: 8, 16: 8}),
    loss=LossConfig(adversarial="wgan_gp"),
    contrast=ContrastConfig(negatives=20, layers=("low", "final")),
    optim=OptimConfig(lr=1e-3, betas=(0.0, 0.99)),
    train=TrainConfig(sampled_batch=None, n_critic=1, ema_decay=0.9),
)
# Micro-batches of 4 are possible with minibatch statistics over groups of 4.
MICRO = replace(GROWING, growth=replace(GROWING.growth, stddev_group=4), train=replace(GROWING.train, micro_batch=4))
PORT = replace(
    GROWING,
    model=replace(GROWING.model, variant="port"),
    growth=replace(GROWING.growth, reset_adam=False, blend_real=False, first_images=128),
)
# Two iterations in each phase.
GROWING_FAST = replace(GROWING, growth=GrowthConfig(fade_images=16, stable_images=16, batch={4: 8, 8: 8, 16: 8}))


def batch_of(step: TrainStep, seed: int, n: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n, r = n or step.schedule.batch, step.schedule.resolution
    images = torch.rand(n, step.config.model.image_channels, r, r, generator=generator) * 2 - 1
    return Batch(images.to(step.device), torch.randint(30, (n,), generator=generator).to(step.device))


def state_of(step: TrainStep) -> Sequence[Tensor]:
    """Return all tensors that an iteration writes to."""
    networks = [*step.networks.parameters(), *step.networks.buffers()]
    moments = [x for state in step.engine.optimizer.state.values() for x in state.values()]
    return networks + moments


def with_graphs(config: Config) -> tuple[TrainStep, list[CpuRecorder]]:
    """Return a step on the CPU that records graphs, and a list of the recorders it creates."""
    step, recorders = TrainStep(config), []

    def make() -> CpuRecorder:
        recorders.append(CpuRecorder(lambda: state_of(step)))
        return recorders[-1]

    step.graphs = Graphs(make)
    return step, recorders


def advance(step: TrainStep, iterations: int, sizes: Sequence[int | None] = (None,)) -> Iterator[Metrics]:
    """Train, and grow when due."""
    for i in range(iterations):
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
            step.refill([batch_of(step, 1000 + j) for j in range(3)])
        yield step(batch_of(step, i, sizes[i % len(sizes)]))


def follow(step: TrainStep, reference: TrainStep, iterations: int) -> Iterator[tuple[Metrics, Metrics]]:
    """Train both steps, starting each iteration from the state of `reference`, and yield the metrics of both.

    Without copying the state the two would diverge: Adam makes full steps from gradients that are rounding errors, and
    adversarial training amplifies the differences.
    """
    for metrics in zip(advance(step, iterations), advance(reference, iterations), strict=True):
        yield metrics
        with torch.no_grad():
            for x, y in zip(state_of(step), state_of(reference), strict=True):
                x.copy_(y)


def follow_weights(
    step: TrainStep, reference: TrainStep, iterations: int
) -> Iterator[tuple[Metrics, Metrics, tuple[float, float]]]:
    """Like `follow`; also yield two sums over all weights: |step - reference| and the change of the reference."""
    before = [p.detach().clone() for p in reference.networks.parameters()]
    for metrics, expected in follow(step, reference, iterations):
        after = [p.detach() for p in reference.networks.parameters()]
        difference = sum((x - y).abs().sum().item() for x, y in zip(step.networks.parameters(), after, strict=True))
        change = sum((x - y).abs().sum().item() for x, y in zip(before, after, strict=True))
        yield metrics, expected, (difference, change)
        before = [x.clone() for x in after]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def with_loss(**settings: Any) -> Config:
    return replace(SMALL, loss=replace(SMALL.loss, **settings))


CASES = {
    "sequential": (SMALL, 16),
    "joint": (with_loss(order="joint"), 16),
    "log": (with_loss(adversarial="log"), 12),
    "separate": (with_loss(passes="separate"), 12),
    "r1": (with_loss(adversarial="logistic_r1", penalty_every=3), 26),
    "vae": (with_loss(objective="vae"), 6),
    "vae_gan": (with_loss(objective="vae_gan"), 12),
    "vae_contrastive": (with_loss(objective="vae_contrastive"), 6),
    "no final": (replace(SMALL, contrast=replace(SMALL.contrast, layers=("b1",))), 12),
    "local": (replace(SMALL, contrast=replace(SMALL.contrast, local_start_images=40)), 26),
    "growing": (GROWING, 44),
    "port": (PORT, 44),
    "micro": (replace(MICRO, train=replace(MICRO.train, checkpoint_activations=True)), 16),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_iterations_equal_eager_ones(case: str):
    """Weights, EMAs, queue, moments and all metrics are bitwise equal."""
    config, iterations = CASES[case]
    (step, recorders), eager = with_graphs(config), TrainStep(config)
    for metrics, expected in zip(advance(step, iterations), advance(eager, iterations), strict=True):
        assert_equal(metrics, expected)
    assert_equal(dict(step.networks.state_dict()), dict(eager.networks.state_dict()))
    assert_equal(step.engine.state_dict(), eager.engine.state_dict())
    replays = sum(recorder.replays for recorder in recorders)
    assert replays >= iterations // 4, "most of the iterations ran eagerly"


def test_graphs_are_recorded_once_per_kind_and_phase():
    step, recorders = with_graphs(replace(SMALL, train=replace(SMALL.train, n_critic=4)))
    list(advance(step, 4 * (WARM_UPS + 4)))
    (recorder,) = recorders
    with_autoencoder, discriminator_alone = recorder.operations[::-1]  # the rarer kind is recorded last
    assert len(recorder.operations) == 2 and with_autoencoder > 2 * discriminator_alone

    step, recorders = with_graphs(GROWING)
    list(advance(step, 44))
    assert [len(recorder.operations) for recorder in recorders] == [1] * 5  # 4; 8 fading; 8; 16 fading; 16


def test_each_batch_size_has_its_own_graph():
    """The last batch of an epoch can be smaller."""
    (step, recorders), eager = with_graphs(with_loss(objective="vae")), TrainStep(with_loss(objective="vae"))
    sizes = (None, None, 3)
    for metrics, expected in zip(advance(step, 18, sizes), advance(eager, 18, sizes), strict=True):
        assert_equal(metrics, expected)
    assert len(recorders[0].operations) == 2


def test_recording_waits_for_the_warm_up_of_other_kinds_but_not_forever():
    graph_counts = []

    def record(work: Any) -> Any:
        result = work()
        return result, lambda: None

    graphs, x = Graphs(lambda: record), [torch.zeros(1)]

    def run(kind: str) -> None:
        graphs.run(kind, lambda inputs: {"kind": inputs[0]}, x)
        graph_counts.append(len(graphs._graphs))

    for kind in ["often"] * 2 + ["seldom"] + ["often"] * 5 + ["seldom"] * 2 + ["often", "seldom"]:
        run(kind)
    assert graph_counts == [0] * 10 + [1, 2]
    run("once")
    run("often")
    assert graph_counts[-1] == 2
    graphs.forget()
    graph_counts.clear()
    for kind in ["once"] + ["often"] * PATIENCE:
        run(kind)
    assert graph_counts == [0] * (PATIENCE - 1) + [1, 1]


def test_metrics_are_not_overwritten_by_the_next_iteration():
    step, recorders = with_graphs(with_loss(objective="vae"))
    history = list(advance(step, 8))
    assert recorders[0].replays > 2
    assert len({metrics["pixel_mse"].item() for metrics in history}) == len(history)


def test_training_continues_from_a_loaded_state():
    """Recorded graphs refer to the moments of the previous optimizers."""
    config = with_loss(objective="vae_contrastive")
    (step, recorders), eager = with_graphs(config), TrainStep(config)
    for s in (step, eager):
        list(advance(s, 6))
    saved = deepcopy(eager.state_dict())
    list(advance(step, 3))
    for s in (step, eager):
        s.load_state_dict(saved)
    for metrics, expected in zip(advance(step, 8), advance(eager, 8), strict=True):
        assert_equal(metrics, expected)
    assert_equal(dict(step.networks.state_dict()), dict(eager.networks.state_dict()))
    assert len(recorders) == 2


def test_garbage_is_collected_before_a_capture(monkeypatch: pytest.MonkeyPatch):
    """Reference cycles can keep autograd graphs of earlier iterations alive."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    cycle = nn.Module()
    cycle.__dict__["itself"], alive = cycle, weakref.ref(cycle)
    del cycle
    assert CudaRecorder(torch.device("cuda"))(alive)[0] is None


def test_graphs_are_disabled_on_the_meta_device():
    assert TrainStep(replace(SMALL, train=replace(SMALL.train, graphs=True)), "meta").graphs is None


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({}, None),
        ({"train.precision": "float16"}, "float16"),
        ({"train.zero": 1}, "DeepSpeed"),
        ({"optim.implementation": "apex"}, "optim.implementation is apex"),
        ({"device": "cpu"}, "the device is cpu"),
    ],
)
def test_uses_graphs(settings: dict[str, Any], obstacle: str | None):
    def configured(graphs: bool | None) -> Config:
        config = replace(Config(), train=replace(Config().train, graphs=graphs))
        for name, value in settings.items():
            section, _, setting = name.partition(".")
            if setting:
                config = replace(config, **{section: replace(getattr(config, section), **{setting: value})})
        return config

    device = torch.device(settings.get("device", "cuda"))
    assert uses_graphs(configured(None), device) is (obstacle is None)
    assert not uses_graphs(configured(False), device)
    assert not uses_graphs(configured(None), device, Ranks(world_size=2))
    if obstacle is None:
        assert uses_graphs(configured(True), device) and uses_graphs(configured(True), device, Ranks(world_size=2))
        return
    with pytest.raises(ConfigError, match=f"train.graphs is true, but CUDA graphs cannot be used: .*{obstacle}"):
        uses_graphs(configured(True), device)
