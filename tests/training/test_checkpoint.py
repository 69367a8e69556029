"""Checkpoints that survive damage and full disks; run folders that keep their configuration."""

import logging
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcvae_fast.config import Config
from dcvae_fast.errors import RunError
from dcvae_fast.run_folder import (
    is_run,
    load_checkpoint,
    load_weights,
    locked,
    prepare_run,
    quarantine_newer,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    prepare_run(folder, Config())
    return folder


def state(value: float) -> dict:
    return {
        "config": {"model": {}},
        "sources": [{}],
        "step": {"images": int(value), "networks": {"encoder.w": torch.full((1000,), float(value))}},
    }


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_the_newest_is_read(run):
    assert load_checkpoint(run) is None
    for images in (10, 9_000_000, 20):
        save_checkpoint(run, images, state(images), keep=2)
    assert checkpoints(run) == ["000000000020.pt", "000009000000.pt"]
    loaded = load_checkpoint(run)
    assert loaded is not None
    assert torch.equal(loaded["step"]["networks"]["encoder.w"], torch.full((1000,), 9e6))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weight = torch.full((8,), 2.0).numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_contents(path: Path) -> None:
    torch.save([1, 2], path)


def a_part_missing(path: Path) -> None:
    torch.save({"format": 1, "config": {}}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_a_weight, empty, other_contents, a_part_missing])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(run, damage, caplog):
    save_checkpoint(run, 1, state(1), keep=3)
    newest = save_checkpoint(run, 2, state(2), keep=3)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1
    assert str(newest) in caplog.text and "damaged" in caplog.text
    truncate(run / "checkpoints" / "000000000001.pt")
    with pytest.raises(RunError, match=r"every checkpoint is damaged \(000000000002\.pt, 000000000001\.pt\)"):
        load_checkpoint(run)


def test_a_checkpoint_is_never_unpickled_unsafely(run):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(run / "sprung"),)

    torch.save({"format": 1, "trap": Trap()}, run / "checkpoints" / "000000000001.pt")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        load_checkpoint(run)
    assert not (run / "sprung").exists()


@pytest.mark.multiprocess
def test_a_full_disk_loses_nothing(run):
    """A limit on the size of files stands for the full disk; in a child, for it cannot be raised again."""
    save_checkpoint(run, 1, state(1), keep=2)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            save_checkpoint(run, 2, state(2), keep=2)
        except RunError as error:
            told = (
                "000000000002.pt" in str(error) and "File too large" in str(error) and "000000000001.pt" in str(error)
            )
            os._exit(0 if told else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert checkpoints(run) == ["000000000001.pt"]
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1


def test_what_a_kill_left_half_written_is_ignored_and_cleared(run):
    save_checkpoint(run, 1, state(1), keep=2)
    (run / "grids").mkdir()
    half_written = [run / "checkpoints" / ".000000000002.pt.1.unfinished", run / "grids" / ".a.png.1.unfinished"]
    evaluating = run / ".evaluation.json.1.unfinished"  # by another process, which may still be writing
    for path in (*half_written, evaluating):
        path.write_bytes(b"half")
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1
    with locked(run):
        assert checkpoints(run) == ["000000000001.pt"]
        assert not any(path.exists() for path in half_written) and evaluating.exists()


def test_other_files_are_no_checkpoints(run):
    save_checkpoint(run, 1, state(1), keep=2)
    torch.save({"format": 1, **state(9)}, run / "checkpoints" / "best.pt")
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1


def test_damaged_checkpoints_take_no_place_among_those_kept(run):
    for images in (1, 2, 3):
        save_checkpoint(run, images, state(images), keep=3)
    quarantine_newer(run, 2)
    save_checkpoint(run, 3, state(3), keep=2)
    assert checkpoints(run) == ["000000000002.pt", "000000000003.damaged", "000000000003.pt"]


@pytest.mark.parametrize("left", [[], ["checkpoints"], ["checkpoints", ".config.yaml.1.unfinished"]])
def test_a_start_that_was_killed_can_be_made_again(left, tmp_path):
    folder = tmp_path / "run"
    for name in left:
        (folder / name).mkdir(parents=True) if name == "checkpoints" else (folder / name).write_bytes(b"da")
    prepare_run(folder, Config())
    assert is_run(folder)


def test_two_cannot_train_in_one_folder(run):
    with locked(run), pytest.raises(RunError, match="is being trained by another process"), locked(run):
        pass
    with locked(run):
        pass


def test_weights_are_the_encoder_and_the_averaged_decoder(run):
    networks = {"encoder.a": 1.0, "decoder.b": 2.0, "decoder_ema.b": 3.0, "discriminator.encoder.c": 4.0}
    tensors = {name: torch.tensor(value) for name, value in networks.items()}
    step = {"networks": tensors, "resolution": 8, "alpha": 0.5}
    model = {"latent_dim": 3, "resolution": 32, "alpha": 1.0}
    save_checkpoint(run, 5, {"config": {"model": model}, "step": step, "sources": [{}]}, keep=2)
    config, weights = load_weights(run)
    assert config == {"model": {"latent_dim": 3, "resolution": 8, "alpha": 0.5}}  # as far as it has grown
    assert {name: value.item() for name, value in weights.items()} == {"encoder.a": 1.0, "decoder.b": 3.0}


def test_another_configuration_is_refused_with_its_differences(run):
    prepare_run(run, Config())
    longer = replace(Config(), train=replace(Config().train, images=7))
    prepare_run(run, longer)
    other = replace(Config(), optim=replace(Config().optim, lr=1e-3))
    with pytest.raises(RunError, match=r"another configuration(.|\n)*optim\.lr: 0\.0002 → 0\.001"):
        prepare_run(run, other)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"exists and is not a run folder \(config\.yaml is missing\)"):
        prepare_run(tmp_path, Config())
    assert not is_run(tmp_path)
    with pytest.raises(RunError, match="exists and is not a run folder"):
        prepare_run(tmp_path / "photo.jpg", Config())
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(RunError, match="cannot be read"):
        prepare_run(tmp_path, Config())
    (tmp_path / "config.yaml").write_text("data:\n  name: cifar10\nmodel:\n")  # cut short
    with pytest.raises(RunError, match=r"model\.latent_dim: not set → 128"):
        prepare_run(tmp_path, Config())


def test_a_run_without_a_checkpoint_says_so(run):
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_weights(run)
