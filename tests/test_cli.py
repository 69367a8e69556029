"""The command line: output, written files and error messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.config import ModelConfig
from dcvae_fast.run_folder import read_metrics
from dcvae_pipelines import load_dataset, make_source
from image_files import write_noise

ROOT = Path(__file__).parents[1]
TINY = ["--recipe", str(ROOT / "tests" / "tiny.yaml")]


pytestmark = pytest.mark.usefixtures("quick_ends")


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    DCVAE(ModelConfig(image_channels=1, latent_dim=4, decoder_width=4, encoder_width=4)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def tiles(columns: int, rows: int) -> tuple[int, int]:
    return 2 + 66 * columns, 2 + 66 * rows


HELP = """
import contextlib, io, runpy, sys
from dcvae_fast import cli
with contextlib.redirect_stdout(io.StringIO()) as usage, contextlib.suppress(SystemExit):
    cli.main(["--help"])
names = [line.split()[0] for line in usage.getvalue().splitlines() if line.startswith("    ") and line[4] != " "]
assert len(names) == 10, names
for argv in [["dcvae", name, "--help"] for name in names] + [[sys.argv[1], "--help"]]:
    sys.argv = argv
    with contextlib.redirect_stdout(io.StringIO()) as usage:
        try:
            cli.main() if argv[0] == "dcvae" else runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            assert end.code == 0, argv
    assert usage.getvalue().startswith("usage: "), argv
    assert "torch" not in sys.modules, argv
"""


@pytest.mark.multiprocess
def test_help_of_every_command_imports_no_torch():
    subprocess.run([sys.executable, "-c", HELP, str(ROOT / "train.py")], check=True)


def test_train_prints_its_last_held_out_metrics_also_when_it_is_complete(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", *TINY, "--train.images", "16", "--log.held_out", "40", "--run", str(folder)]
    assert main(command) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    measured = read_metrics(folder)[-1]
    assert last == (
        f"On held-out images: pixel error {measured['held_out/pixel_mse']:.4f}, linear probe accuracy"
        f" {measured['held_out/probe_accuracy']:.1%}. Image grids are in {folder / 'grids'}."
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"images": 16, "held_out/pix')  # as left by a kill
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "is complete: 16 images shown, train.images is 16." in output
    assert output.strip().splitlines()[-1] == last

    assert main([*command, "--train.images", "24", "--log.held_out", "0"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"Image grids are in {folder / 'grids'}."


def test_a_failed_start_leaves_the_folder_usable(tmp_path, capsys):
    command = ["train", *TINY, "--train.images", "16", "--run", str(tmp_path / "run")]
    assert main([*command, "--data.drop_last", "true", "--train.batch", "5000"]) == 1
    assert "batch" in capsys.readouterr().err
    assert main(command) == 0


def test_error_for_a_package_that_is_not_installed(monkeypatch, saved, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["sample", str(saved)]) == 1
    assert "pip install 'dcvae_fast[train]'" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_a_closed_pipe_does_not_stop_training(tmp_path):
    settings = ["--train.images", "48", "--run", str(tmp_path / "run")]
    command = [sys.executable, "-m", "dcvae_fast.cli", "train", *TINY, *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate()
    assert process.returncode == 0 and "Traceback" not in error and "Broken" not in error
    assert (tmp_path / "run" / "checkpoints" / "000000000048.pt").exists()


def test_dry_run_prints_a_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", "--recipe", "digits", "--dry-run", "--model.decoder_width", "256", "--train.images", "14370"])
        == 0
    )
    out = capsys.readouterr().out
    assert "decoder" in out and "GFLOP" in out and "memory" in out
    assert "14,370 images = 10.0 epochs of 1,437" in out
    static = float(out.split("Adam ")[1].split(" MiB")[0])
    trained = sum(
        int(line.split()[1].replace(",", "")) for line in out.splitlines() if line.startswith(("enc", "dec", "dis"))
    )
    assert static == pytest.approx(2 * 4 * trained / 2**20, abs=0.5)  # two moments in fp32
    assert list(tmp_path.iterdir()) == []


def test_sample_reconstruct_interpolate_export(saved, picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["sample", str(saved), "-n", "10", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert size(out) == tiles(8, 2)
    first = out.read_bytes()
    assert main(["sample", str(saved), "-n", "10", "--out", str(out)]) == 0
    assert out.read_bytes() == first
    assert main(["sample", str(saved), "-n", "10", "--seed", "1", "--out", str(out)]) == 0
    assert out.read_bytes() != first
    assert main(["reconstruct", str(saved), str(picture), str(picture), "--out", str(out)]) == 0
    assert size(out) == tiles(4, 1)
    assert main(["interpolate", str(saved), str(picture), str(picture), "--steps", "5", "--out", str(out)]) == 0
    assert size(out) == tiles(7, 1)
    assert main(["export", str(saved), "--out", str(tmp_path / "copy")]) == 0
    original, exported = (DCVAE.from_pretrained(folder).parameters() for folder in (saved, tmp_path / "copy"))
    for parameter, expected in zip(exported, original, strict=True):
        assert torch.equal(parameter, expected)
    assert main(["export", str(saved), "--out", str(tmp_path / "copy")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--recipe", "cifar10"], "data.root is not set"),
        (["train", "--recipe", "mnist", "--data.root", "{tmp}/nowhere"], "nowhere"),
        (["train", *TINY, "--model.image_channels", "3"], "model.image_channels is 3, but digits has 1"),
        (["train", *TINY, "--train.device", "cuda:99"], "the device is 'cuda:99'"),
        (["train", *TINY, "--train.device", "tpu9"], "the device is 'tpu9'"),
        (["train", *TINY, "--train.device", "meta"], "the device is 'meta'"),
        (["train", *TINY, "--model.decoder_width", "100000000"], "out of memory"),
        (["sample", "{tmp}/model", "--seed", "99999999999999999999"], "--seed is 99999999999999999999"),
        (["train", *TINY, "--nothing", "1"], "--nothing"),
        (["sample", "{tmp}"], "{tmp}"),
        (["sample", "{tmp}/model", "-n", "0"], "-n is 0"),
        (["reconstruct", "{tmp}/model", "{tmp}/missing.png"], "missing.png"),
        (["reconstruct", "{tmp}/model", "{tmp}/model/config.json"], "config.json"),
        (["interpolate", "{tmp}/model", "a.png", "b.png", "--steps", "1"], "--steps is 1"),
        (["import-official", "{tmp}", "--epoch", "3", "--out", "{tmp}/o"], "3_encoder.sd"),
        (["sample", "{tmp}/model", "--out", "{tmp}/red.png/x.png"], "red.png"),
    ],
)
@pytest.mark.usefixtures("saved", "picture")
def test_a_mistake_gives_one_line_and_exit_code_1(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(tmp=tmp_path) for argument in argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dcvae: error: ")
    assert error.count("\n") == 1
    assert message.format(tmp=tmp_path) in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.multiprocess
def test_entry_points(tmp_path):
    for command in ([str(ROOT / "train.py"), "--print_config"], ["-m", "dcvae_fast.cli", "train", "--print_config"]):
        argv = [sys.executable, *command, "--recipe", "mnist"]
        result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "latent_dim: 16" in result.stdout
    result = subprocess.run([sys.executable, "-m", "dcvae_fast.cli"], capture_output=True, text=True)
    assert result.returncode == 2 and "usage: dcvae" in result.stderr


def test_data_writes_the_images_that_training_uses(tmp_path, capsys):
    write_noise(tmp_path / "images", 12, 32, 32, 3)
    out = tmp_path / "grids" / "data.png"
    settings = ["--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.mirror", "true"]
    assert main(["data", "cifar10", "--n", "10", "--out", str(out), *settings]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.size == tiles(8, 2)
        grid = np.array(image)
    source = load_dataset("folder", tmp_path / "images")
    batch = next(iter(make_source(source, resolution=32, batch=64, seed=0, mirror=True)))
    for i in range(10):
        top, left = 2 + 66 * (i // 8), 2 + 66 * (i % 8)
        tile = torch.from_numpy(grid[top : top + 64 : 2, left : left + 64 : 2]).permute(2, 0, 1)
        assert torch.equal(tile.float(), ((batch.images[i] + 1) * 127.5).round())

    assert main(["data", "cifar10", "--n", "0"]) == 1
    assert "--n is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["data", "cifar10", "--data.rot", "x"]) == 1
    assert "data.rot" in capsys.readouterr().err
    assert main(["data", "nothing"]) == 1
    assert "--recipe nothing: no such recipe" in capsys.readouterr().err


def test_prepare_reports_images_by_name_and_its_shards_can_be_used(tmp_path, capsys):
    source, target = write_noise(tmp_path / "images", 6, 40, 50, 3), tmp_path / "shards"
    Image.new("L", (64, 64)).save(source / "grey.png")
    (source / "broken.jpg").write_bytes(b"not an image")
    assert main(["prepare", str(source), str(target)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:4] == [
        "corrupt: 1 (0 converted, 1 left out)",
        "    broken.jpg",
        "greyscale: 1 (1 converted, 0 left out)",
        "    grey.png",
    ]
    assert "6 unchanged, 1 converted, 1 left out." in lines[4]
    assert lines[5] == f"Train on them with --data.name shards --data.root {target}"
    assert printed.err.splitlines()[-1].startswith("8 / 8 images, ")

    grid = tmp_path / "data.png"
    settings = ["--data.name", "shards", "--data.root", str(target)]
    assert main(["data", "cifar10", "-n", "4", "--out", str(grid), *settings]) == 0
    assert size(grid) == tiles(4, 1)

    assert main(["prepare", str(source), str(target), "--resolution", "32"]) == 1
    assert "holds shards made with resolution null, not 32; choose another folder" in capsys.readouterr().err
    assert main(["prepare", str(source), str(target), "--skip", "ugly"]) == 1
    assert "unknown kind 'ugly'; the kinds are corrupt, tiny" in capsys.readouterr().err
