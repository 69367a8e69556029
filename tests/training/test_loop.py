"""Complete runs on scikit-learn's digits with tiny networks: resume, kill, stop, diverge."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.commands.train import parse_config
from dcvae_fast.run_folder import load_checkpoint, read_metrics, save_checkpoint
from dcvae_fast.training import loop, signals
from dcvae_fast.training.data import open_data, open_source
from dcvae_fast.training.loop import train
from dcvae_pipelines import Batch, DataError, EncodedSet, ImageSet
from image_files import write_noise

CPU = torch.device("cpu")
TINY = ["--recipe", str(Path(__file__).parent.parent / "tiny.yaml")]


def settings(folder: Path, images: int, *more: str) -> list[str]:
    return [*TINY, "--train.images", str(images), "--run", str(folder), *more]


def run(folder: Path, images: int, *more: str):
    return train(parse_config(settings(folder, images, *more))[0], folder)


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested dicts and lists into one dict."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        return {prefix: value}
    return {name: leaf for key, item in pairs for name, leaf in flat(item, f"{prefix}/{key}").items()}


def assert_same_state(run: Path, expected_run: Path) -> None:
    """Check that networks, EMAs, optimizers, queue and data position are bitwise equal."""
    state, expected = (
        flat({k: v for k, v in (load_checkpoint(folder) or {}).items() if k != "config"})
        for folder in (run, expected_run)
    )
    assert state.keys() == expected.keys() and len(state) > 100
    for name, value in state.items():
        other = expected[name]
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(folder, 160)
    return folder


def test_contents_of_a_run_folder(uninterrupted):
    lines = read_metrics(uninterrupted)
    assert [line["images"] for line in lines] == [32, 64, 96, 128, 160]
    assert {
        "loss/discriminator",
        "loss/adversarial",
        "loss/contrast",
        "loss/kl",
        "pixel_mse",
        "images_per_second",
    } < set(lines[0])
    assert {"contrast/top1_b2", "contrast/top5_final", "score/real", "score/fake", "score/rec"} < set(lines[0])
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == [
        "000000000128.pt",
        "000000000160.pt",
    ]
    assert any((uninterrupted / "tensorboard").iterdir())
    for name, size in (("reconstructions", (8, 8)), ("samples", (8, 8)), ("interpolations", (10, 8))):
        with Image.open(uninterrupted / "grids" / f"{name}-000000000160.png") as image:
            assert image.size == tuple(2 + 66 * n for n in size)
    state = load_checkpoint(uninterrupted)
    assert state is not None
    model = DCVAE.from_pretrained(uninterrupted)
    ema = state["step"]["networks"]["decoder_ema.linear.weight"]
    assert torch.equal(model.decoder.linear.weight, ema)
    assert not torch.equal(ema, state["step"]["networks"]["decoder.linear.weight"])


@pytest.mark.usefixtures("quick_ends")
def test_resumed_runs_are_bitwise_equal(uninterrupted, tmp_path):
    for images in (24, 64, 72, 160):  # no checkpoint is due at 24 and 72 images
        assert run(tmp_path / "run", images).images == images
    assert_same_state(tmp_path / "run", uninterrupted)
    assert [line["images"] for line in read_metrics(tmp_path / "run")] == [24, 32, 64, 72, 96, 128, 160]
    assert not run(tmp_path / "run", 160).trained


def test_grids_do_not_affect_training(uninterrupted, tmp_path):
    run(tmp_path / "run", 160, "--log.grids_every", "32")
    assert len(list((tmp_path / "run" / "grids").glob("samples-*.png"))) == 5
    assert_same_state(tmp_path / "run", uninterrupted)


def test_source_follows_the_configuration():
    images = ImageSet(
        "x", torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 32, 32), torch.arange(10)
    )
    ramp = ImageSet("x", torch.arange(32, dtype=torch.uint8).expand(10, 1, 32, 32), torch.arange(10))

    def batches(data: ImageSet, *more: str) -> list[Batch]:
        config = parse_config([*TINY, "--train.batch", "4", *more])[0]
        return list(islice(open_source(config, data, torch.device("cpu")), 5))

    ids = torch.cat([batch.ids for batch in batches(images)]).tolist()
    assert sorted(ids[:10]) == sorted(ids[10:20]) == list(range(10))
    dropped = torch.cat([batch.ids for batch in batches(images, "--data.drop_last", "true")]).tolist()
    assert len(set(dropped[:8])) == len(set(dropped[8:16])) == 8
    assert dropped[:8] == ids[:8] and dropped[8:16] == ids[10:18]  # drops the last two of each epoch
    mirrored = torch.cat([batch.images[:, 0, 0, 0] for batch in batches(ramp)])
    assert sorted(set(mirrored.tolist())) == pytest.approx([-1.0, 31 / 127.5 - 1])
    plain = torch.cat([batch.images[:, 0, 0, 0] for batch in batches(ramp, "--data.mirror", "false")])
    assert set(plain.tolist()) == {-1.0}
    other_seed = batches(images, "--train.seed", "1")
    assert torch.cat([batch.ids for batch in other_seed]).tolist() != ids


@pytest.mark.usefixtures("quick_ends")
def test_images_shown_are_rounded_up_to_full_batches(tmp_path):
    assert run(tmp_path / "run", 33).images == 40


@pytest.mark.usefixtures("quick_ends")
def test_progress_counts_images_up_to_the_total(tmp_path, monkeypatch):
    bars = []

    @contextmanager
    def record(description: str, total: int, initial: int = 0, lines: bool = True) -> Iterator[Callable[[int], None]]:
        bars.append([initial])
        yield bars[-1].append

    monkeypatch.setattr(loop, "progress_bar", record)
    run(tmp_path / "run", 16)
    run(tmp_path / "run", 33)
    assert bars == [[0, 8, 8], [16, 8, 8, 1]]


def start(folder: Path, images: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dcvae_fast.cli", "train", *settings(folder, images, *more)]
    # The same number of threads as in this process, because it affects the order of sums.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.multiprocess
@pytest.mark.usefixtures("quick_ends")
def test_killed_and_resumed_run_is_bitwise_equal(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, 160)
    wait_for(folder / "checkpoints" / "000000000064.pt", process)
    process.kill()
    process.wait()
    state = load_checkpoint(folder)
    assert state is not None and 64 <= state["step"]["images"] < 160
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"images": 12}x\n{"images": 12')  # a damaged record and an incomplete one
    run(folder, 160)
    assert_same_state(folder, uninterrupted)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [32, 64, 96, 128, 160]


def test_immediately_repeated_signals_count_once(monkeypatch: pytest.MonkeyPatch):
    unhandled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: unhandled.append(number))
    try:
        with signals.stop_signals() as received:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM] and not unhandled
            monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", -1)
            signal.raise_signal(signal.SIGTERM)  # goes to the previous handler
            assert received == [signal.SIGTERM] and unhandled == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_stops(number, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, 1_000_000, "--log.checkpoint_every", "1000000")
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    state = load_checkpoint(folder)
    assert state is not None
    assert f"Stopped after {state['step']['images']:,} of 1,000,000 images" in output


@pytest.mark.usefixtures("quick_ends")
def test_divergence_is_reported_and_the_last_good_checkpoint_kept(tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder, 16, "--log.checkpoint_every", "8")
    good = load_checkpoint(folder)
    assert good is not None
    for value in good["step"]["networks"].values():
        if value.is_floating_point():
            value.mul_(1e25)
    save_checkpoint(folder, 24, {**good, "step": {**good["step"], "images": 24}}, keep=2)
    assert main(["train", *settings(folder, 1000, "--log.checkpoint_every", "8")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dcvae: error: {folder}: ") and error.count("\n") == 1
    assert "became nan" in error or "became inf" in error or "a weight is not finite" in error
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000000000016.pt", "000000000024.pt"]


# --- images that are decoded during training ---


@pytest.fixture
def folder_of_images(tmp_path) -> Path:
    return write_noise(tmp_path / "images", 40, 36, 40)


def test_training_on_a_folder_resumes_bitwise(folder_of_images, tmp_path, request):
    data = ["--data.name", "folder", "--data.root", str(folder_of_images)]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    run(complete, 48, *data)
    request.getfixturevalue("quick_ends")
    for images, setting in ((16, "--data.prefetch=1"), (24, "--data.threads=1"), (40, "--data.resident=true")):
        run(resumed, images, *data, setting)
    run(resumed, 48, *data)
    assert_same_state(resumed, complete)
    state = load_checkpoint(complete)
    assert state is not None and state["sources"] == [{"images": 48, "of": 38, "skipped": 0, "ranks": 1}]
    assert len(list((complete / "grids").iterdir())) == 3  # repeat the two held-out images

    (folder_of_images / "40.png").write_bytes((folder_of_images / "00.png").read_bytes())
    with pytest.raises(DataError, match="has 39 images now and had 38"):
        run(complete, 56, *data)


@pytest.mark.usefixtures("quick_ends")
def test_a_damaged_image_stops_a_run_after_a_checkpoint_or_is_skipped(folder_of_images, tmp_path, capsys):
    data = ["--data.name", "folder", "--data.root", str(folder_of_images), "--log.checkpoint_every", "1000"]
    config = parse_config([*TINY, *data])[0]
    order = torch.cat([batch.ids for batch in islice(open_source(config, open_data(config, "train"), CPU), 3)])
    images = open_data(config, "train")
    assert isinstance(images, EncodedSet)
    damaged = Path(images.image_name(int(order[-1])))
    damaged.write_bytes(b"")
    command = ["train", *settings(tmp_path / "run", 32, *data)]
    assert main(command) == 1
    assert f"{damaged}: cannot be read as an image" in capsys.readouterr().err
    state = load_checkpoint(tmp_path / "run")
    assert state is not None and state["step"]["images"] == len(order) - 8

    assert main([*command, "--data.on_corrupt", "skip", "--log.held_out", "2"]) == 0
    state = load_checkpoint(tmp_path / "run")
    assert state is not None and state["sources"] == [{"images": 32, "of": 38, "skipped": 1, "ranks": 1}]
    out = capsys.readouterr().out
    assert "On held-out images: pixel error" in out and "probe" not in out  # the data set has no labels
