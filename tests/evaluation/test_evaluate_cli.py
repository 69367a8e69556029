"""The command `dcvae evaluate`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import fidelity
from dcvae_fast.run_folder import read_metrics
from image_files import write_noise

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    small = DCVAE(ModelConfig(image_channels=1, latent_dim=4, decoder_width=4, encoder_width=4))
    small.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.usefixtures("quick_ends")
def test_a_run_provides_its_data_and_stores_measurements(tmp_path, features, monkeypatch, capsys):
    run = tmp_path / "run"
    settings = ["--train.images", "16", "--log.held_out", "360"]
    assert main(["train", "--recipe", TINY, *settings, "--run", str(run)]) == 0
    pixel_error = read_metrics(run)[-1]["held_out/pixel_mse"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--metrics", "pixel"]) == 0
    printed = capsys.readouterr()
    assert "360 / 360 images compared by pixels" in printed.err
    assert printed.out.splitlines()[-1] == str(run / "evaluation.json")
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["images"] == 16 and stored["device"] == "cpu"
    assert stored["measurements"][0]["value"] == pytest.approx(pixel_error, rel=1e-5)

    monkeypatch.setattr(fidelity, "load_features", lambda weights: features)
    command = ["evaluate", str(run), "--metrics", "fid, is", "-n", "64", "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "1,437 / 1,437 training images" in printed.err and "64 / 64 samples" in printed.err
    assert printed.out.count("random, not Inception") == 4 and "inception" not in printed.out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    measurements = json.loads((run / "evaluation.json").read_text())["measurements"]
    assert [m["metric"] for m in measurements] == "pixel_mse pixel_squares pixel_rmse fid is fid is".split()
    assert {m["extractor"] for m in measurements} == {None, "random, not Inception"}

    assert main([*command, "--protocol", "official"]) == 0
    repeated = json.loads((run / "evaluation.json").read_text())["measurements"]
    assert repeated[: len(measurements)] == measurements and len(repeated) == len(measurements) + 4
    notes = [m["note"] for m in repeated]
    assert notes[: len(measurements)] == [None] * len(measurements)
    assert all("not Inception, and real images are the model's training split" in note for note in notes[-4:])
    assert capsys.readouterr().out.count("Not exactly comparable with the authors' code") == 1


def test_data_options_for_a_saved_model(saved, tmp_path, capsys):
    data = ["--data.name", "folder", "--data.root", str(write_noise(tmp_path / "images", 220, 40, 32, 3))]
    out = tmp_path / "results" / "pixel.json"
    assert main(["evaluate", str(saved), "--metrics", "pixel", *data, "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert stored["images"] is None and stored["measurements"][0]["count"] == 11
    assert not (saved / "evaluation.json").exists()


def test_once_reconstructs_the_published_validation_images_of_lsun(tmp_path, capsys):
    DCVAE(ModelConfig(latent_dim=4, decoder_width=4, encoder_width=4)).save_pretrained(tmp_path / "model")
    for folder, count in (("bedroom_train", 120), ("bedroom_val", 3)):
        write_noise(tmp_path / folder, count, 32, 32, 3)
    command = ["evaluate", str(tmp_path / "model"), "--metrics", "pixel", "--data.name", "lsun_bedroom"]
    command += ["--data.root", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--protocol", "once"]) == 0
    stored = json.loads((tmp_path / "model" / "evaluation.json").read_text())["measurements"]
    described = {(m["protocol"], m["count"], m["data"]) for m in stored}
    assert described == {("paper", 2, "lsun_bedroom: 2 test images"), ("once", 3, "lsun_bedroom: 3 validation images")}


def test_the_help_names_the_network_and_the_real_images_of_each_protocol(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are also broken at hyphens
    for words in ("torch-fidelity's Inception", "the training split", "pytorch-fid's Inception", "stored statistics"):
        assert words.replace(" ", "") in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "pixel"], "--data.name is missing"),
        (["--metrics", "pixel", "--data.name", "digitz"], "unknown data set 'digitz'"),
        (["--metrics", "pixel", "--data.name", "mnist"], "data.root is not set"),
        (["--metrics", "pixel", "--data.name", "folder", "--data.root", "{tmp}/nowhere"], "{tmp}/nowhere"),
        (["--metrics", "fld", "--data.name", "digits"], "metrics has fld"),
        (["--metrics", ",", "--data.name", "digits"], "metrics is empty"),
        (["--device", "tpu", "--data.name", "digits"], "the device is 'tpu'"),
        (["--weights", "{tmp}/nowhere", "--data.name", "digits"], "--weights {tmp}/nowhere is not a folder"),
        (["--weights", "{tmp}", "--data.name", "digits"], "{tmp}/weights-inception-2015-12-05-6726825d.pth"),
        (["--weights", "{tmp}", "--metrics", "pixel,perceptual", "--data.name", "digits"], "{tmp}/vgg16-397923af.pth"),
        (["--weights", "{tmp}", "--metrics", "ppl"], "{tmp}/weights-vgg16-lpips.pth"),
        (["--out", "{tmp}/model/config.json", "--data.name", "digits"], "config.json is not a measurement file"),
        (["--out", "{tmp}", "--data.name", "digits"], "{tmp} is not a measurement file"),
    ],
)
@pytest.mark.usefixtures("saved")
def test_an_error_prints_one_line_and_exits_with_1(options, message, tmp_path, capsys):
    argv = ["evaluate", str(tmp_path / "model"), *(option.format(tmp=tmp_path) for option in options)]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("dcvae: error: ") and error.count("\n") == 1
    assert message.format(tmp=tmp_path) in error
    assert not (tmp_path / "model" / "evaluation.json").exists()


def test_a_missing_package_is_named(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert main(["evaluate", str(saved), "--data.name", "digits"]) == 1
    assert "torch_fidelity is not installed: pip install 'dcvae_fast[eval]'" in capsys.readouterr().err


def test_a_data_set_with_other_channels_is_rejected(tmp_path, capsys):
    DCVAE(ModelConfig(latent_dim=4, decoder_width=4, encoder_width=4)).save_pretrained(tmp_path / "colour")
    assert main(["evaluate", str(tmp_path / "colour"), "--metrics", "pixel", "--data.name", "digits"]) == 1
    assert "digits has images of [1, 32, 32], but the model's are [3, 32, 32]" in capsys.readouterr().err
