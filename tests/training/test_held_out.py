"""Metrics of held-out images during training: their values, when they come, and that they change nothing."""

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
def test_they_are_logged_at_their_times_and_training_stays_bitwise_the_same(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    measured = ["--log.held_out", "40", "--log.metrics_every", "64", "--log.fid_images", "30"]
    caplog.set_level(logging.INFO, "dcvae_fast")
    train(config_of("--train.images", "160"), tmp_path / "plain")
    assert "held out" not in caplog.text
    train(config_of("--train.images", "160", *measured), tmp_path / "measured")
    assert caplog.text.count("held out: pixel mse 0.") == 3
    states = [load_checkpoint(tmp_path / name) for name in ("plain", "measured")]
    plain, with_metrics = (state["step"]["networks"] for state in states if state is not None)
    assert all(torch.equal(value, with_metrics[name]) for name, value in plain.items())

    lines = read_metrics(tmp_path / "measured")
    own = [line for line in lines if "held_out/pixel_mse" in line]
    names = ["images", "held_out/pixel_mse", "held_out/probe_accuracy", "held_out/fid"]
    assert [line["images"] for line in own] == [64, 128, 160] and all(list(line) == names for line in own)
    for line, before in zip([line for line in lines if line not in own], read_metrics(tmp_path / "plain"), strict=True):
        timed = {"images_per_second", "waiting_for_data"}
        assert {k: v for k, v in line.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}

    # The last ones are those of the model that was saved.
    model, test = DCVAE.from_pretrained(tmp_path / "measured"), load_dataset("digits", split="test")
    images = test.images[:40].float() / 127.5 - 1
    error = (model.reconstruct(images) - images).square().mean().item()
    assert own[-1]["held_out/pixel_mse"] == pytest.approx(error, rel=1e-5)
    assert own[-1]["held_out/probe_accuracy"] * 40 == pytest.approx(round(own[-1]["held_out/probe_accuracy"] * 40))
    board = EventAccumulator(str(tmp_path / "measured" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("held_out/fid")] == [64, 128, 160]


@pytest.mark.usefixtures("rows")
def test_fid_is_that_of_as_many_training_images_at_the_models_resolution():
    config = config_of("--log.held_out", "20", "--log.fid_images", "50")
    train_set = load_dataset("digits")
    measuring = HeldOut(config, train_set, load_dataset("digits", split="test"), CPU)
    torch.manual_seed(0)
    model = DCVAE(config.model).eval()
    fid = measuring.measure(model)["fid"]
    assert fid == measuring.measure(model)["fid"]

    class Remembered(DCVAE):
        """Draws training images: those that it is compared with."""

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            chosen = self.shown + torch.arange(len(latents))
            self.shown += len(latents)
            return train_set.images[chosen * len(train_set) // 50].float() / 127.5 - 1

    same = Remembered(config.model).eval()
    same.shown = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "pixel_error", lambda pairs: (0.5, 20))
        measured = measuring.measure(same)
    assert measured["fid"] == pytest.approx(0, abs=1e-4) and fid > 100


def test_how_many_images_there_are_and_what_they_do_without():
    config = config_of()
    unset = replace(config, log=replace(config.log, held_out=None))
    assert held_out_images(config) == 0 and held_out_images(unset) == 1000
    assert held_out_images(parse_config(["--recipe", "celebahq512"]).config) == 64
    test = load_dataset("digits", split="test")
    unlabelled = ImageSet("digits", test.images, None)
    few = replace(config, log=replace(config.log, held_out=5))
    assert list(HeldOut(few, unlabelled, unlabelled, CPU).measure(DCVAE(config.model).eval())) == ["pixel_mse"]
    assert list(HeldOut(few, unlabelled, test, CPU).measure(DCVAE(config.model).eval())) == ["pixel_mse"]


def test_a_model_that_has_diverged_is_named():
    config = config_of("--log.held_out", "5")
    model = DCVAE(config.model).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    test = load_dataset("digits", split="test")
    with pytest.raises(DivergedError, match="held-out images are no longer finite"):
        HeldOut(config, test, test, CPU).measure(model)


def test_weights_that_are_missing_stop_a_run_before_it_begins(tmp_path, capsys):
    asked = ["--log.held_out", "5", "--log.fid_images", "10", "--log.weights", str(tmp_path)]
    assert main(["train", *TINY, *asked, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log.fid_images is 10, but " in error and "the option is --log.weights" in error
    assert str(tmp_path / "weights-inception-2015-12-05-6726825d.pth") in error
    assert not (tmp_path / "run").exists()


def test_time_in_a_pause_does_not_count(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    log = Log(tmp_path, 0, 1000)
    log.add({"loss": torch.tensor(1.0)}, waited=1.0)
    now = 4.0
    with log.paused():
        now = 100.0
    now += 1.0
    log.write(100)
    with log.paused():  # as grids, between two means
        now += 50.0
    log.add({"loss": torch.tensor(1.0)})
    now += 2.0
    log.write(200)
    log.close()
    first, second = read_metrics(tmp_path)
    assert (first["images_per_second"], first["waiting_for_data"]) == (20.0, 0.2)
    assert second["images_per_second"] == 50.0
