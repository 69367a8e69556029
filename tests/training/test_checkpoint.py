"""Checkpoints survive damage and full disks, and run folders keep their configuration."""

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


def test_newest_checkpoints_are_kept_and_the_newest_is_loaded(run):
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


def replace_contents(path: Path) -> None:
    torch.save([1, 2], path)


def remove_a_part(path: Path) -> None:
    torch.save({"format": 1, "config": {}}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_a_weight, empty, replace_contents, remove_a_part])
def test_damaged_newest_checkpoint_is_named_and_the_previous_one_loaded(run, damage, caplog):
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
    """A file size limit simulates a full disk, in a child process because the limit cannot be raised again."""
    save_checkpoint(run, 1, state(1), keep=2)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            save_checkpoint(run, 2, state(2), keep=2)
        except RunError as error:
            details = ("000000000002.pt", "File too large", "000000000001.pt")
            os._exit(0 if all(detail in str(error) for detail in details) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert checkpoints(run) == ["000000000001.pt"]
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1


def test_unfinished_files_are_ignored_and_deleted(run):
    save_checkpoint(run, 1, state(1), keep=2)
    (run / "grids").mkdir()
    unfinished = [run / "checkpoints" / ".000000000002.pt.1.unfinished", run / "grids" / ".a.png.1.unfinished"]
    evaluation = run / ".evaluation.json.1.unfinished"  # another process may still be writing it
    for path in (*unfinished, evaluation):
        path.write_bytes(b"half")
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1
    with locked(run):
        assert checkpoints(run) == ["000000000001.pt"]
        assert not any(path.exists() for path in unfinished) and evaluation.exists()


def test_other_files_are_not_checkpoints(run):
    save_checkpoint(run, 1, state(1), keep=2)
    torch.save({"format": 1, **state(9)}, run / "checkpoints" / "best.pt")
    loaded = load_checkpoint(run)
    assert loaded is not None and loaded["step"]["images"] == 1


def test_damaged_checkpoints_do_not_count_as_kept(run):
    for images in (1, 2, 3):
        save_checkpoint(run, images, state(images), keep=3)
    quarantine_newer(run, 2)
    save_checkpoint(run, 3, state(3), keep=2)
    assert checkpoints(run) == ["000000000002.pt", "000000000003.damaged", "000000000003.pt"]


@pytest.mark.parametrize("names", [[], ["checkpoints"], ["checkpoints", ".config.yaml.1.unfinished"]])
def test_killed_start_can_be_repeated(names, tmp_path):
    folder = tmp_path / "run"
    for name in names:
        (folder / name).mkdir(parents=True) if name == "checkpoints" else (folder / name).write_bytes(b"da")
    prepare_run(folder, Config())
    assert is_run(folder)


def test_two_processes_cannot_train_in_one_folder(run):
    with locked(run), pytest.raises(RunError, match="is being trained by another process"), locked(run):
        pass
    with locked(run):
        pass


def test_loaded_weights_are_the_encoder_and_the_decoder_ema(run):
    networks = {"encoder.a": 1.0, "decoder.b": 2.0, "decoder_ema.b": 3.0, "discriminator.encoder.c": 4.0}
    tensors = {name: torch.tensor(value) for name, value in networks.items()}
    step = {"networks": tensors, "resolution": 8, "alpha": 0.5}
    model = {"architecture": "progressive", "resolution": 32, "alpha": 1.0}
    save_checkpoint(run, 5, {"config": {"model": model}, "step": step, "sources": [{}]}, keep=2)
    config, weights = load_weights(run)
    current = {"architecture": "progressive", "resolution": 8, "alpha": 0.5}  # at this stage of growth
    assert config == {"model": current | {"variant": "pggan"}}  # settings of earlier versions
    assert {name: value.item() for name, value in weights.items()} == {"encoder.a": 1.0, "decoder.b": 3.0}


def test_different_configuration_is_rejected_and_differences_are_listed(run):
    prepare_run(run, Config())
    longer = replace(Config(), train=replace(Config().train, images=7))
    prepare_run(run, longer)
    other = replace(Config(), optim=replace(Config().optim, lr=1e-3))
    with pytest.raises(RunError, match=r"another configuration(.|\n)*optim\.lr: 0\.0002 → 0\.001"):
        prepare_run(run, other)


def test_folder_with_other_files_is_rejected(tmp_path):
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


def test_run_without_checkpoint_is_reported(run):
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_weights(run)
