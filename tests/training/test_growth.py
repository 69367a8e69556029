"""Growing networks: what growth resets and keeps, resuming at any stage, and models saved at any stage."""

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
from dcvae_fast.models.build import learning_rate_scales
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
    """Train for `count` iterations, and grow when due; return the metrics."""
    metrics = []
    for _ in range(count):
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
            step.refill(batches(step.resolution, 3))
        (batch,) = batches(step.resolution, 1, step.schedule.batch)
        metrics.append({name: value.item() for name, value in step(batch).items()})
    return metrics


def test_growth_resets_moments_and_queue_and_keeps_weights():
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

    # The layers that have not been trained yet are equal in C′ and C.
    for (name, slow), live in zip(
        contrast.momentum.named_parameters(), step.networks.discriminator.parameters(), strict=True
    ):
        assert torch.equal(slow, live) == (".8." in name or ".16." in name or "heads.low" in name), name

    refill_batches = batches(8, 3)
    step.refill(refill_batches)
    assert int(contrast.queue.valid) == 10 and contrast.queue.ids.sort().values.tolist() == list(range(2, 12))
    images = refill_batches[2].images
    assert contrast.keys(images)[0].shape == (1, 4, 5)
    newest = contrast.queue.ids.argsort()[-4:]
    # At the start of a fade-in, images are upsampled from the previous resolution.
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images, 2), scale_factor=2)
    torch.testing.assert_close(contrast.queue.keys[:, newest], contrast.keys(blurred)[0])

    advance(step, 8)
    assert step.schedule.resolution == 16
    step.grow(step.schedule)
    assert contrast.layers == ("low", "final") and contrast.queue.keys.shape[0] == 2


# Growth: 4×4 for four iterations; 8×8 fading, 8×8, and 16×16 fading for four each.
STOPS = [3, 6, 7, 8, 9, 14, 15, 16, 17]  # a fade ends after 8 and after 16 iterations
PORT = replace(
    CONFIG,
    model=replace(CONFIG.model, variant="port"),
    growth=replace(CONFIG.growth, reset_adam=False, blend_real=False, lr={8: 1e-3}),
)


@pytest.fixture(scope="module", params=[CONFIG, PORT], ids=["pggan", "port"])
def stopped(request: pytest.FixtureRequest) -> tuple[dict[int, dict], list[dict[str, float]], TrainStep]:
    """States at STOPS, and the metrics and final step of 20 uninterrupted iterations."""
    step, states = TrainStep(request.param), {}
    for stop in STOPS:
        advance(step, stop - step.iterations)
        states[stop] = deepcopy(step.state_dict())
    uninterrupted = TrainStep(request.param)
    return states, advance(uninterrupted, 20), uninterrupted


@pytest.mark.parametrize("stop", STOPS)
def test_a_step_resumes_from_its_state_at_any_point_of_growth(
    stop: int, stopped: tuple[dict[int, dict], list[dict[str, float]], TrainStep]
):
    states, expected, uninterrupted = stopped
    resumed = TrainStep(uninterrupted.config)
    resumed.load_state_dict(deepcopy(states[stop]))
    assert advance(resumed, 20 - stop) == expected[stop:]
    for actual, plain in zip(
        (resumed.networks.state_dict(), *resumed.engine.state_dict()["moments"].values()),
        (uninterrupted.networks.state_dict(), *uninterrupted.engine.state_dict()["moments"].values()),
        strict=True,
    ):
        torch.testing.assert_close(dict(actual), dict(plain), rtol=0, atol=0)


def steps_by_group(step: TrainStep) -> dict[str, set[int]]:
    """Return Adam's step counts of the parameters of each group."""
    moments = step.engine.moments()
    return {name: {moments[p].step for p in group if p in moments} for name, group in step.engine.groups.items()}


@pytest.mark.parametrize("objective", ["vae", "dc_vae"])
def test_adam_restarts_at_each_resolution_and_at_the_end_of_each_fade(objective: str):
    step, restarts = TrainStep(replace(CONFIG, loss=replace(CONFIG.loss, objective=objective))), []
    for _ in range(20):
        advance(step, 1)
        counts, stage = steps_by_group(step), (step.resolution, step.alpha < 1)
        (iterations,) = counts["score" if objective == "dc_vae" else "encoder"]
        # An iteration of dc_vae steps three networks twice, one of vae its two networks once.
        per_iteration = {"encoder": 1, "decoder": 1}
        if objective == "dc_vae":
            per_iteration = {"encoder": 2, "decoder": 2, "trunk": 2, "score": 1, "heads": 1}
        assert counts == {name: {n * iterations} if (n := per_iteration.get(name)) else set() for name in counts}
        if iterations == 1:
            restarts.append((step.iterations, stage))
    stages = [(4, False), (8, True), (8, False), (16, True), (16, False)]
    assert restarts == list(zip((1, 5, 9, 13, 17), stages, strict=True))


def test_without_restarts_moments_are_kept_and_the_learning_rate_changes():
    step = TrainStep(PORT)
    advance(step, 4)
    before = {p: (m.step, m.exp_avg.clone(), m.exp_avg_sq.clone()) for p, m in step.engine.moments().items()}
    step.grow(step.schedule)
    assert before and {p: m.step for p, m in step.engine.moments().items()} == {p: m[0] for p, m in before.items()}
    for parameter, moments in step.engine.moments().items():
        assert torch.equal(moments.exp_avg, before[parameter][1])
        assert torch.equal(moments.exp_avg_sq, before[parameter][2])
    scales = learning_rate_scales(step.networks)
    for group in step.engine.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(1e-3 * scales.get(parameter, 1.0))
    advance(step, 16)
    assert step.resolution == 16 and step.alpha == 1
    assert steps_by_group(step)["score"] == {20}
    moments, critic = step.engine.moments(), step.networks.discriminator.critic
    assert isinstance(critic.trunk, Trunk)
    # Layers of a resolution are counted from its first iteration on.
    layers = [critic.trunk.from_images[r] for r in ("4", "8", "16")]
    assert [moments[weight].step for layer in layers for weight, _ in [layer.parameters()]] == [16, 24, 16]


def test_real_images_fade_in_unless_blend_real_is_false():
    images = batches(8, 1)[0]
    for config, blends in ((CONFIG, True), (PORT, False)):
        step = TrainStep(config)
        advance(step, 5)
        assert (step.resolution, step.alpha) == (8, 0.0)
        coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images.images, 2), scale_factor=2)
        torch.testing.assert_close(step._fade_in(images).images, coarse if blends else images.images)


@pytest.mark.parametrize("adversarial", ["wgan_gp", "logistic_r1"])
def test_the_port_trains_on_images_with_equal_pixels(adversarial: str):
    """The standard deviation of a pixel that is equal in all images is 0, where √ has an infinite derivative."""
    step = TrainStep(replace(PORT, loss=replace(PORT.loss, adversarial=adversarial, penalty_every=1)))
    (batch,) = batches(4, 1)
    batch.images[:, :, 0] = 0.5
    metrics = step(batch)
    assert metrics["loss/penalty"] > 0 and all(value.isfinite() for value in metrics.values())
    assert all(value.isfinite().all() for value in step.networks.state_dict().values())


def test_local_patches_are_contrasted_from_twice_the_resolution_of_their_feature_map_on():
    model = replace(CONFIG.model, resolution=32)  # 8 channels at 8×8, 4 at 16×16
    growth = replace(CONFIG.growth, batch={4: 4, 8: 4, 16: 4, 32: 4})
    contrast = replace(CONFIG.contrast, local_layers=("8x8",), local_start_images=8)
    config = replace(CONFIG, model=model, growth=growth, contrast=contrast)
    step, states = TrainStep(config), []
    history = []
    for count in (12, 3, 7, 6):  # 12 iterations at 4×4 and 8×8, then 8 at 16×16 and 8 at 32×32
        history += advance(step, count)
        states.append(deepcopy(step.state_dict()))
    assert ["loss/contrast_local" in metrics for metrics in history] == [False] * 12 + [True] * 16
    assert history[12]["loss/contrast_local"] == 0  # the queue starts empty
    assert all(metrics["loss/contrast_local"] > 0 for metrics in history[13:20])
    assert history[20]["loss/contrast_local"] == 0  # it is emptied at 32×32
    networks = step.networks
    assert networks.contrast is not None and networks.contrast.local_queue is not None
    assert networks.contrast.local_queue.keys.shape == (1, 10, 8) and int(networks.contrast.local_queue.valid) == 10

    resumed = TrainStep(config)
    resumed.load_state_dict(states[1])
    assert advance(resumed, 13) == history[15:]


def test_local_patches_start_when_configured():
    contrast = replace(CONFIG.contrast, local_layers=("8x8",), local_start_images=56)
    history = advance(TrainStep(replace(CONFIG, contrast=contrast)), 16)
    assert ["loss/contrast_local" in metrics for metrics in history] == [False] * 14 + [True] * 2


@pytest.mark.parametrize("objective", ["vae", "vae_gan", "vae_contrastive"])
def test_other_objectives_grow(objective: str):
    step = TrainStep(replace(CONFIG, loss=replace(CONFIG.loss, objective=objective)))
    history = advance(step, 15)
    assert step.resolution == 16 and all(math.isfinite(value) for metrics in history for value in metrics.values())
    instance = {"vae": "pixel", "vae_gan": "feature", "vae_contrastive": "contrast"}[objective]
    assert all(metrics[f"loss/{instance}"] > 0 for metrics in history[1:])  # in the first iteration the queue is empty


def test_layers_of_later_resolutions_do_not_change():
    step = TrainStep(CONFIG)
    before = {name: value.clone() for name, value in step.networks.named_parameters()}
    advance(step, 6)
    for name, value in step.networks.named_parameters():
        later = ".16." in name or "heads.low" in name
        assert not later or torch.equal(value, before[name]), name
    moments = step.engine.moments()
    assert not any(p in moments for name, p in step.networks.named_parameters() if ".16." in name)


@pytest.mark.parametrize("config", [CONFIG, PORT], ids=["pggan", "port"])
def test_activation_checkpointing_keeps_gradients_and_saves_memory(config: Config):
    plain, checkpointed = (
        TrainStep(replace(config, train=replace(config.train, checkpoint_activations=on))) for on in (False, True)
    )
    assert advance(checkpointed, 14) == advance(plain, 14)
    for x, y in zip(checkpointed.networks.parameters(), plain.networks.parameters(), strict=True):
        assert torch.equal(x, y)

    def saved_bytes(step: TrainStep) -> int:
        sizes: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in step.networks.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            images = step.networks.decoder(torch.randn(8, Z, requires_grad=True))
        del images
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    assert saved_bytes(checkpointed) < 0.6 * saved_bytes(plain)


@pytest.mark.parametrize("adversarial", ["wgan_gp", "logistic_r1", "hinge"])
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_micro_batches_give_the_same_gradients(adversarial: str, order: str):
    growth = GrowthConfig(fade_images=16, stable_images=16, batch={4: 8, 8: 8, 16: 12}, stddev_group=4)
    loss = replace(CONFIG.loss, adversarial=adversarial, order=order, penalty_every=2)
    config = replace(CONFIG, growth=growth, loss=loss, optim=replace(CONFIG.optim, eps=1e-3))
    torch.set_default_dtype(torch.float64)
    try:
        full = TrainStep(config)
        split = TrainStep(replace(config, train=replace(config.train, micro_batch=4)))
        for _ in range(9):
            expected, metrics = advance(full, 1)[0], advance(split, 1)[0]
            float32 = {name for name in expected if name.startswith("contrast/top")}
            rtol = {name: 1e-6 if name in float32 else 1e-10 for name in metrics}
            assert expected == {name: pytest.approx(metrics[name], rel=rtol[name]) for name in metrics}
        assert full.resolution == 16
        for x, y in zip(split.networks.parameters(), full.networks.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_bfloat16_follows_float32():
    float32, bfloat16 = (
        TrainStep(replace(GROWING_FAST, train=replace(GROWING_FAST.train, precision=precision)))
        for precision in ("float32", "bfloat16")
    )
    distances = []
    for metrics, expected, distance in follow_weights(bfloat16, float32, 10):
        distances.append(distance)
        for name in ("loss/discriminator", "loss/penalty", "loss/contrast", "pixel_mse"):
            assert metrics[name].item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03), name
    difference, change = (sum(values) for values in zip(*distances, strict=True))
    assert difference < 0.2 * change, distances


def test_losses_penalties_and_keys_are_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch):
    from dcvae_fast.training import objectives as module

    input_dtypes: dict[str, set[torch.dtype]] = {}

    def record_dtypes(name: str) -> None:
        original = getattr(module, name)

        def recording(*args, **kwargs):
            input_dtypes.setdefault(name, set()).update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recording)

    for name in ("discriminator_loss", "autoencoder_loss", "kl_divergence", "pixel_loss", "lipschitz_penalty"):
        record_dtypes(name)
    step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, precision="bfloat16")))
    trunk = step.networks.discriminator.critic.trunk
    assert isinstance(trunk, Trunk)
    output_dtypes = []
    trunk.conv.register_forward_hook(lambda layer, args, out: output_dtypes.append(out.dtype))
    cache_enabled = []  # with the cache, gradients of a weight that is used twice are accumulated in bfloat16
    trunk.register_forward_hook(lambda *_: cache_enabled.append(torch.is_autocast_cache_enabled()))
    advance(step, 1)
    assert all(dtypes == {torch.float32} for dtypes in input_dtypes.values()) and len(input_dtypes) == 5
    assert not all(cache_enabled)
    assert set(output_dtypes) == {torch.bfloat16, torch.float32}
    assert output_dtypes.count(torch.float32) == 1  # the forward pass of the penalty
    contrast = step.networks.contrast
    assert contrast is not None and contrast.queue.keys.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in step.networks.parameters())


# --- complete runs ---


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


def assert_same_state(run: Path, expected_run: Path) -> None:
    state, expected = load_checkpoint(run), load_checkpoint(expected_run)
    assert state is not None and expected is not None and state["sources"] == expected["sources"]
    for name, value in expected["step"]["networks"].items():
        assert torch.equal(state["step"]["networks"][name], value), name


def test_a_run_resumes_bitwise_at_any_point_of_growth(pictures: Path, tmp_path: Path, request: pytest.FixtureRequest):
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train(parse_config(settings(uninterrupted, pictures, 88))[0], uninterrupted)
    request.getfixturevalue("quick_ends")
    for images in (12, 16, 24, 32, 48, 60, 88):
        train(parse_config(settings(resumed, pictures, images))[0], resumed)
    assert_same_state(resumed, uninterrupted)


def test_models_of_all_stages_can_be_used(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
        loaded = DCVAE.from_pretrained(saved)
        assert torch.equal(loaded.sample(3, generator=torch.Generator().manual_seed(0)), samples)
        for command in (["sample", str(run)], ["reconstruct", str(run), str(picture)]):
            assert main([*command, "--out", str(tmp_path / "sheet.png")]) == 0
        assert main(["interpolate", str(run), str(picture), str(picture), "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(run / "grids" / "growth.png") as sheet:
        assert sheet.size == (8 * 64, 3 * 64)  # 8 samples each at 4×4, 8×8 and 16×16, at the same size
        rows = torch.from_numpy(np.array(sheet)).unflatten(0, (3, 64))[:, ::4, ::4]
    with Image.open(run / "grids" / "growth" / "0004.png") as first:
        coarse = torch.from_numpy(np.array(first))
    assert torch.equal(rows[0], coarse.repeat_interleave(4, 0).repeat_interleave(4, 1))
    latest = model.sample(64, generator=torch.Generator().manual_seed(derive_seed(0, "grids")))[:8]
    assert torch.equal(
        rows[2], torch.cat(list(latest), 2).clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0)
    )
    out = capsys.readouterr().out
    assert "Growing to 8×8, 8 images per iteration" in out and "Growing to 16×16, 4 images per iteration" in out


@pytest.mark.slow
def test_faces_small_learns_to_distinguish_faces(real_data: Path, tmp_path: Path):
    """Uses the recipe with shorter stages."""
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
