"""The run folder: its layout, and checkpoints that survive a kill, a full disk and a damaged file.

RUN/config.yaml                    what is trained
RUN/checkpoints/000000640000.pt    everything that resuming needs, after so many images
RUN/metrics.jsonl, RUN/tensorboard, RUN/grids, RUN/profile
RUN/.lock                          held by the process that trains
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dcvae_fast.config import Config, changes, to_dict
from dcvae_fast.errors import RunError, reason
from dcvae_fast.renamed import rename_networks, rename_settings
from dcvae_pipelines.atomic import atomic_write, find_unfinished, replacing

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
GRIDS = "grids"
FORMAT = 3  # of a checkpoint's contents


def prepare_run(folder: Path, config: Config) -> None:
    """Make the run folder, or make sure that the one there was made with this configuration.

    Raises:
        RunError: it was made with another configuration (the message shows the differences), it holds something else,
            or it cannot be written.
    """
    import yaml

    path = folder / CONFIG_FILE
    if path.is_file():
        try:
            stored = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(
                f"{path} cannot be read ({error}); restore it, or choose another folder with --run."
            ) from error
        if found := changes(rename_settings(stored) if isinstance(stored, dict) else {}, config):
            raise RunError(
                f"{folder} was made with another configuration (there → asked for):\n  "
                + "\n  ".join(f"{setting}: {was} → {now}" for setting, was, now in found)
                + "\nChoose another folder, or ask for the settings it was made with."
            )
        return
    # Files that a killed start has left do not count.
    begun = {folder / CHECKPOINTS, *find_unfinished(folder)}
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - begun or _newest_first(folder)):
        raise RunError(
            f"{folder} exists and is not a run folder ({CONFIG_FILE} is missing); choose another with --run."
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        atomic_write(path, yaml.safe_dump(to_dict(config), sort_keys=False))
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be made ({error}).") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can train in this run folder.

    Raises:
        RunError: another one does.
    """
    try:
        lock = FileLock(folder / LOCK_FILE).acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"{folder} is being trained by another process; if it is not, delete {folder / LOCK_FILE}."
        ) from error
    with lock:
        for part in (folder / CHECKPOINTS, folder / GRIDS):  # only training writes there
            for file in find_unfinished(part):
                file.unlink()
        yield


def is_run(folder: Path) -> bool:
    """Whether this is a run folder."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def save_checkpoint(folder: Path, images: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint aside, rename it into place, then delete all but the newest `keep`.

    Raises:
        RunError: it could not be written, for lack of space say; what was there is still there.
    """
    path = folder / CHECKPOINTS / f"{images:012d}.pt"
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer may turn the former into the latter
        held = _newest_first(folder)
        still = f"the newest one is {held[0]}" if held else "there is none yet"
        raise RunError(
            f"{path}: the checkpoint could not be written ({reason(error.__context__ or error)}); {still}."
        ) from error
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run, on the CPU; None where there is none yet.

    Damaged ones are named in a warning and passed over.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in _newest_first(folder):
        try:
            # torch does not compare checksums when it reads, and a flipped bit would go unnoticed.
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            state = torch.load(path, map_location="cpu", weights_only=True)
            version, _ = state["format"], (state["config"], state["step"], state["sources"])
            state["config"] = rename_settings(state["config"])
            state["step"]["networks"] = rename_networks(state["step"]["networks"])
        except Exception as error:  # a damaged file can make zip and pickle readers raise anything
            damaged.append(path)
            logger.warning("%s is damaged and passed over (%s)", path, reason(error))
            continue
        if version != FORMAT:
            raise RunError(f"{path} was written by another version (format {version}, this one reads {FORMAT}).")
        return state
    if damaged:
        raise RunError(f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}).")
    return None


def images_shown(folder: Path) -> int:
    """By the newest checkpoint of a run, judged by its name alone; 0 where there is none."""
    return next((int(path.stem) for path in _newest_first(folder)), 0)


def quarantine_newer(folder: Path, images: int) -> None:
    """Rename checkpoints beyond `images`, which are damaged: they must not count among those that are kept."""
    for path in _newest_first(folder):
        if path.name > f"{images:012d}.pt":
            path.rename(path.with_suffix(".damaged"))


def load_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights for a `DCVAE` from a run's newest intact checkpoint: encoder and averaged decoder. The
    configuration is that of the point to which the networks have grown.

    Raises:
        RunError: the run has no checkpoint yet, or only damaged ones.
    """
    state = load_checkpoint(folder)
    if state is None:
        raise RunError(f"{folder}: this run has no checkpoint yet.")
    weights = {}
    for prefix, network in (("encoder.", "encoder."), ("decoder.", "decoder_ema.")):
        for name, value in state["step"]["networks"].items():
            if name.startswith(network):
                weights[prefix + name.removeprefix(network)] = value
    model = {**state["config"]["model"], "resolution": state["step"]["resolution"], "alpha": state["step"]["alpha"]}
    return {**state["config"], "model": model}, weights


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl, if there is one yet, without lines that a kill has cut short."""
    path, records = folder / METRICS_FILE, []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "images" in record:
            records.append(record)
    return records


def _newest_first(folder: Path) -> list[Path]:
    return sorted((folder / CHECKPOINTS).glob("[0-9]" * 12 + ".pt"), reverse=True)
