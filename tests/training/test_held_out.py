"""Held-out metrics during training: their values, when they are logged, and that they do not affect training."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config
from dcvae_fast.errors import DivergedError
from dcvae_fast.run_folder import load_checkpoint, read_metrics
from dcvae_fast.training import held_out
from dcvae_fast.training.held_out import HeldOut, held_out_images
from dcvae_fast.training.log import Log
from dcvae_fast.training.loop import train
from dcvae_pipelines import ImageSet, load_dataset

TINY = ["--recipe", str(Path(__file__).parent.parent / "tiny.yaml")]
CPU = torch.device("cpu")


def config_of(*settings: str) -> Config:
    return parse_config([*TINY, *settings]).config


@pytest.mark.usefixtures("rows", "quick_ends")
def test_metrics_are_logged_when_due_and_training_is_bitwise_unaffected(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--log.held_out", "40", "--log.metrics_every", "64", "--log.fid_images", "30"]
    caplog.set_level(logging.INFO, "dcvae_fast")
    train(config_of("--train.images", "160"), tmp_path / "plain")
    assert "held out" not in caplog.text
    train(config_of("--train.images", "160", *options), tmp_path / "measured")
    assert caplog.text.count("held out: pixel error 0.") == 3
    states = [load_checkpoint(tmp_path / name) for name in ("plain", "measured")]
    plain, with_metrics = (state["step"]["networks"] for state in states if state is not None)
    assert all(torch.equal(value, with_metrics[name]) for name, value in plain.items())

    lines = read_metrics(tmp_path / "measured")
    held_out_lines = [line for line in lines if "held_out/pixel_mse" in line]
    names = ["images", "held_out/pixel_mse", "held_out/probe_accuracy", "held_out/fid"]
    assert [line["images"] for line in held_out_lines] == [64, 128, 160]
    assert all(list(line) == names for line in held_out_lines)
    train_lines = [line for line in lines if line not in held_out_lines]
    timing = {"images_per_second", "waiting_for_data"}
    for line, expected in zip(train_lines, read_metrics(tmp_path / "plain"), strict=True):
        assert line.keys() == expected.keys()
        assert all(line[name] == expected[name] for name in line.keys() - timing)

    # The last record has the metrics of the saved model.
    model, test = DCVAE.from_pretrained(tmp_path / "measured"), load_dataset("digits", split="test")
    images = test.images[:40].float() / 127.5 - 1
    error = (model.reconstruct(images) - images).square().mean().item()
    assert held_out_lines[-1]["held_out/pixel_mse"] == pytest.approx(error, rel=1e-5)
    correct = held_out_lines[-1]["held_out/probe_accuracy"] * 40
    assert correct == pytest.approx(round(correct))
    board = EventAccumulator(str(tmp_path / "measured" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("held_out/fid")] == [64, 128, 160]


@pytest.mark.usefixtures("rows")
def test_fid_compares_with_evenly_spaced_training_images():
    config = config_of("--log.held_out", "20", "--log.fid_images", "50")
    train_set = load_dataset("digits")
    evaluator = HeldOut(config, train_set, load_dataset("digits", split="test"), CPU)
    torch.manual_seed(0)
    model = DCVAE(config.model).eval()
    fid = evaluator.measure(model)["fid"]
    assert fid == evaluator.measure(model)["fid"]

    class Memorised(DCVAE):
        """Generates the training images that FID compares with."""

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            indices = self.generated + torch.arange(len(latents))
            self.generated += len(latents)
            return train_set.images[indices * len(train_set) // 50].float() / 127.5 - 1

    memorised = Memorised(config.model).eval()
    memorised.generated = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "pixel_error", lambda pairs: (0.5, 20))
        metrics = evaluator.measure(memorised)
    assert metrics["fid"] == pytest.approx(0, abs=1e-4) and fid > 100


def test_number_of_images_and_metrics_without_labels():
    config = config_of()
    unset = replace(config, log=replace(config.log, held_out=None))
    assert held_out_images(config) == 0 and held_out_images(unset) == 1000
    assert held_out_images(parse_config(["--recipe", "celebahq512"]).config) == 64
    test = load_dataset("digits", split="test")
    unlabelled = ImageSet("digits", test.images, None)
    config = replace(config, log=replace(config.log, held_out=5))
    assert list(HeldOut(config, unlabelled, unlabelled, CPU).measure(DCVAE(config.model).eval())) == ["pixel_mse"]
    assert list(HeldOut(config, unlabelled, test, CPU).measure(DCVAE(config.model).eval())) == ["pixel_mse"]


def test_divergence_is_reported():
    config = config_of("--log.held_out", "5")
    model = DCVAE(config.model).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    test = load_dataset("digits", split="test")
    with pytest.raises(DivergedError, match="held-out images are not finite"):
        HeldOut(config, test, test, CPU).measure(model)


def test_missing_inception_weights_stop_a_run_before_it_begins(tmp_path, capsys):
    options = ["--log.held_out", "5", "--log.fid_images", "10", "--log.weights", str(tmp_path)]
    assert main(["train", *TINY, *options, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log.fid_images is 10, but " in error and "set --log.weights" in error
    assert str(tmp_path / "weights-inception-2015-12-05-6726825d.pth") in error
    assert not (tmp_path / "run").exists()


def test_paused_time_is_excluded(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    log = Log(tmp_path, 0, 1000)
    log.add({"loss": torch.tensor(1.0)}, waited=1.0)
    now = 4.0
    with log.paused():
        now = 100.0
    now += 1.0
    log.write(100)
    with log.paused():  # like grids, right after means were written
        now += 50.0
    log.add({"loss": torch.tensor(1.0)})
    now += 2.0
    log.write(200)
    log.close()
    first, second = read_metrics(tmp_path)
    assert (first["images_per_second"], first["waiting_for_data"]) == (20.0, 0.2)
    assert second["images_per_second"] == 50.0
