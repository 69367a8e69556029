"""Runs whose networks grow: what growing changes and what it leaves, resuming, models of every stage."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, ContrastConfig, DataConfig, GrowthConfig, LossConfig, ModelConfig, TrainConfig
from dcvae_fast.models.progressive import Trunk
from dcvae_fast.run_folder import load_checkpoint, read_metrics
from dcvae_fast.training.loop import train
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch
from image_files import write_noise
from test_graphs import GROWING_FAST, follow_weights

Z = 6
CONFIG = Config(
    data=DataConfig(name="folder"),
    model=ModelConfig("progressive", 16, latent_dim=Z, base_channels=64, max_channels=8, contrast_dim=5),
    growth=GrowthConfig(fade_images=16, stable_images=16, batch={4: 4, 8: 4, 16: 4}),
    loss=LossConfig(adversarial="wgan_gp"),
    contrast=ContrastConfig(negatives=10, layers=("low", "final"), momentum=0.9),
    train=TrainConfig(sampled_batch=None, n_critic=1, ema_decay=0.9),
)


def batches(resolution: int, count: int, n: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(resolution)
    ids = torch.arange(n * count).split(n)
    return [Batch(torch.rand(n, 3, resolution, resolution, generator=generator) * 2 - 1, i) for i in ids]


def advance(step: TrainStep, count: int) -> list[dict[str, float]]:
    """Iterations, with growth where it is due, on images of whichever resolution is."""
    metrics = []
    for _ in range(count):
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
            step.refill(batches(step.resolution, 3))
        (batch,) = batches(step.resolution, 1, step.schedule.batch)
        metrics.append({name: value.item() for name, value in step(batch).items()})
    return metrics


def test_growth_begins_anew_what_it_has_to_and_leaves_the_rest():
    step = TrainStep(CONFIG)
    advance(step, 4)
    assert (step.images, step.resolution, step.schedule.resolution, step.schedule.alpha) == (16, 4, 8, 0.0)
    contrast = step.networks.contrast
    assert contrast is not None and contrast.layers == ("final",)
    before = {name: value.clone() for name, value in step.networks.named_parameters()}
    assert step.engine.moments()
    step.grow(step.schedule)
    for name, value in step.networks.named_parameters():
        assert torch.equal(value, before[name]), name
    assert not step.engine.moments()
    assert int(contrast.queue.valid) == 0

    # C′'s layers of 8×8 are C's: nothing has moved them yet.
    live, slow = step.networks.discriminator, contrast.momentum
    for (name, mine), theirs in zip(slow.named_parameters(), live.parameters(), strict=True):
        assert torch.equal(mine, theirs) == (".8." in name or ".16." in name or "heads.low" in name), name

    fresh = batches(8, 3)
    step.refill(fresh)
    assert int(contrast.queue.valid) == 10 and contrast.queue.ids.sort().values.tolist() == list(range(2, 12))
    keys = contrast.keys(fresh[2].images)[0]  # the fade's first images are blends with nothing new in them
    order = contrast.queue.ids.argsort()[-4:]
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(fresh[2].images, 2), scale_factor=2)
    torch.testing.assert_close(contrast.queue.keys[:, order], contrast.keys(blurred)[0])
    assert keys.shape == (1, 4, 5)

    advance(step, 8)
    assert step.schedule.resolution == 16
    step.grow(step.schedule)
    assert contrast.layers == ("low", "final") and contrast.queue.keys.shape[0] == 2


STOPS = [3, 6, 8, 9, 14, 17]


@pytest.fixture(scope="module")
def stopped() -> tuple[dict[int, dict], list[dict[str, float]], TrainStep]:
    """States at STOPS, and the metrics and final step of 20 uninterrupted iterations."""
    step, states = TrainStep(CONFIG), {}
    for stop in STOPS:
        advance(step, stop - step.iterations)
        states[stop] = deepcopy(step.state_dict())
    whole = TrainStep(CONFIG)
    return states, advance(whole, 20), whole


@pytest.mark.parametrize("stop", STOPS)
def test_a_step_goes_on_from_its_state_at_any_point_of_growth(
    stop: int, stopped: tuple[dict[int, dict], list[dict[str, float]], TrainStep]
):
    states, expected, whole = stopped
    second = TrainStep(CONFIG)
    second.load_state_dict(deepcopy(states[stop]))
    assert advance(second, 20 - stop) == expected[stop:]
    for mine, theirs in zip(second.networks.state_dict().values(), whole.networks.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("objective", ["vae", "vae_gan", "vae_contrastive"])
def test_the_other_objectives_grow_too(objective: str):
    step = TrainStep(replace(CONFIG, loss=replace(CONFIG.loss, objective=objective)))
    metrics = advance(step, 15)
    assert step.resolution == 16 and all(math.isfinite(value) for each in metrics for value in each.values())
    instance = {"vae": "pixel", "vae_gan": "feature", "vae_contrastive": "contrast"}[objective]
    assert all(each[f"loss/{instance}"] > 0 for each in metrics[1:])  # at first the queue is empty


def test_layers_not_grown_to_are_never_touched():
    step = TrainStep(CONFIG)
    before = {name: value.clone() for name, value in step.networks.named_parameters()}
    advance(step, 6)
    for name, value in step.networks.named_parameters():
        later = ".16." in name or "heads.low" in name
        assert not later or torch.equal(value, before[name]), name
    moments = step.engine.moments()
    assert not any(p in moments for name, p in step.networks.named_parameters() if ".16." in name)


def test_checkpointed_activations_give_the_same_gradients_and_hold_less():
    plain, frugal = (
        TrainStep(replace(CONFIG, train=replace(CONFIG.train, checkpoint_activations=on))) for on in (False, True)
    )
    assert advance(frugal, 14) == advance(plain, 14)
    for mine, theirs in zip(frugal.networks.parameters(), plain.networks.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    def held(step: TrainStep) -> int:
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in step.networks.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            images = step.networks.decoder(torch.randn(8, Z, requires_grad=True))
        del images
        return sum(size for pointer, size in seen.items() if pointer not in parameters)

    assert held(frugal) < 0.6 * held(plain)


@pytest.mark.parametrize("adversarial", ["wgan_gp", "logistic_r1", "hinge"])
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_micro_batches_give_the_same_gradients(adversarial: str, order: str):
    growth = replace(CONFIG.growth, batch={4: 8, 8: 8, 16: 12}, fade_images=16, stable_images=16)
    loss = replace(CONFIG.loss, adversarial=adversarial, order=order, penalty_every=2)
    config = replace(CONFIG, growth=growth, loss=loss, optim=replace(CONFIG.optim, eps=1e-3))
    torch.set_default_dtype(torch.float64)
    try:
        whole = TrainStep(config)
        parts = TrainStep(replace(config, train=replace(config.train, micro_batch=4)))
        for _ in range(9):
            a, b = advance(whole, 1)[0], advance(parts, 1)[0]
            shares = {name for name in a if name.startswith("contrast/top")}  # in float32
            assert a == {name: pytest.approx(b[name], rel=1e-6 if name in shares else 1e-10) for name in b}
        assert whole.resolution == 16
        for mine, theirs in zip(parts.networks.parameters(), whole.networks.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_bfloat16_follows_float32():
    wide, narrow = (
        TrainStep(replace(GROWING_FAST, train=replace(GROWING_FAST.train, precision=precision)))
        for precision in ("float32", "bfloat16")
    )
    distances = []
    for found, expected, distance in follow_weights(narrow, wide, 10):
        distances.append(distance)
        for name in ("loss/discriminator", "loss/penalty", "loss/contrast", "pixel_mse"):
            assert found[name].item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03), name
    apart, moved = (sum(each) for each in zip(*distances, strict=True))
    assert apart < 0.2 * moved, distances


def test_losses_penalties_and_keys_are_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch):
    from dcvae_fast.training import objectives as module

    seen: dict[str, set[torch.dtype]] = {}

    def watch(name: str) -> None:
        original = getattr(module, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, set()).update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for name in ("discriminator_loss", "autoencoder_loss", "kl_divergence", "pixel_loss", "lipschitz_penalty"):
        watch(name)
    step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, precision="bfloat16")))
    trunk = step.networks.discriminator.critic.trunk
    assert isinstance(trunk, Trunk)
    dtypes = []
    trunk.conv.register_forward_hook(lambda layer, args, out: dtypes.append(out.dtype))
    caches = []  # with the cache, gradients of a weight that is used twice are added up in bfloat16
    trunk.register_forward_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    advance(step, 1)
    assert all(kinds == {torch.float32} for kinds in seen.values()) and len(seen) == 5
    assert not all(caches)
    assert dtypes.count(torch.float32) == 1 and set(dtypes) == {torch.bfloat16, torch.float32}  # the penalty's pass
    contrast = step.networks.contrast
    assert contrast is not None and contrast.queue.keys.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in step.networks.parameters())


# --- whole runs ---


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "pictures", 24, 40, 40, 3)


def settings(folder: Path, pictures: Path, images: int) -> list[str]:
    recipe = folder.parent / "growing.yaml"
    recipe.write_text(
        "data: {name: folder, mirror: true}\n"
        "model: {architecture: progressive, resolution: 16, latent_dim: 6, base_channels: 64, max_channels: 8}\n"
        "growth: {fade_images: 16, stable_images: 16, batch: {4: 4, 8: 8, 16: 4}}\n"
        "loss: {adversarial: wgan_gp}\n"
        "contrast: {layers: [low, final], negatives: 10}\n"
        "train: {sampled_batch: null, n_critic: 1}\n"
        "log: {every: 16, grids_every: 16, checkpoint_every: 8}\n"
    )
    options = ["--recipe", str(recipe), "--data.root", str(pictures), "--run", str(folder)]
    return [*options, "--train.images", str(images)]


def assert_same_state(first: Path, second: Path) -> None:
    one, two = load_checkpoint(first), load_checkpoint(second)
    assert one is not None and two is not None and one["sources"] == two["sources"]
    for name, value in one["step"]["networks"].items():
        assert torch.equal(value, two["step"]["networks"][name]), name


def test_a_run_stopped_anywhere_in_its_growth_goes_on_bitwise(
    pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    train(parse_config(settings(tmp_path / "whole", pictures, 88))[0], tmp_path / "whole")
    request.getfixturevalue("quick_ends")
    for images in (12, 16, 24, 40, 48, 60, 88):
        train(parse_config(settings(tmp_path / "parts", pictures, images))[0], tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_models_of_every_stage_can_be_used(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, picture = tmp_path / "run", pictures / "00.png"
    for images, resolution, alpha in ((8, 4, 1.0), (24, 8, 0.0), (48, 8, 1.0), (56, 16, 0.25), (80, 16, 1.0)):
        assert main(["train", *settings(run, pictures, images)]) == 0
        model = DCVAE.from_pretrained(run)
        assert (model.config.resolution, model.config.alpha) == (resolution, alpha)
        samples = model.sample(3, generator=torch.Generator().manual_seed(0))
        assert samples.shape == (3, 3, resolution, resolution)
        assert model.reconstruct(samples).shape == samples.shape
        saved = tmp_path / f"saved-{images}"
        assert main(["export", str(run), "--out", str(saved)]) == 0
        again = DCVAE.from_pretrained(saved)
        assert torch.equal(again.sample(3, generator=torch.Generator().manual_seed(0)), samples)
        for command in (["sample", str(run)], ["reconstruct", str(run), str(picture)]):
            assert main([*command, "--out", str(tmp_path / "sheet.png")]) == 0
        assert main(["interpolate", str(run), str(picture), str(picture), "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(run / "grids" / "growth.png") as sheet:
        assert sheet.size == (8 * 64, 3 * 64)  # 8 samples each of 4×4, 8×8 and 16×16, at one size
        rows = torch.from_numpy(np.array(sheet)).unflatten(0, (3, 64))[:, ::4, ::4]
    with Image.open(run / "grids" / "growth" / "0004.png") as first:
        coarse = torch.from_numpy(np.array(first))
    assert torch.equal(rows[0], coarse.repeat_interleave(4, 0).repeat_interleave(4, 1))
    latest = model.sample(64, generator=torch.Generator().manual_seed(derive_seed(0, "grids")))[:8]
    assert torch.equal(
        rows[2], torch.cat(list(latest), 2).clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0)
    )
    out = capsys.readouterr().out
    assert "Growing to 8×8, 8 images an iteration" in out and "Growing to 16×16, 4 images an iteration" in out


@pytest.mark.slow
def test_faces_small_learns_to_tell_real_faces_apart(real_data: Path, tmp_path: Path):
    """The recipe with shorter stages."""
    stages = ["--growth.fade_images", "320", "--growth.stable_images", "320", "--log.every", "320"]
    argv = ["--recipe", "faces-small", "--data.root", str(real_data / "faces1024"), *stages, "--train.images", "2240"]
    config = parse_config(argv)[0]
    train(config, tmp_path / "run")
    model = DCVAE.from_pretrained(tmp_path / "run")
    assert model.config.resolution == 32
    state = load_checkpoint(tmp_path / "run")
    assert state is not None and state["sources"][0]["images"] == 2240 and state["sources"][0]["of"] == 54
    lines = read_metrics(tmp_path / "run")
    assert {line["images"] for line in lines if "held_out/pixel_mse" in line} == {1600, 2240}
    lines = [line for line in lines if "loss/contrast" in line]
    assert lines[-1]["loss/contrast"] < lines[4]["loss/contrast"]
    assert lines[-1]["pixel_mse"] < 0.6 * lines[0]["pixel_mse"]
    assert len(list((tmp_path / "run" / "grids").glob("samples-*.png"))) == 2
