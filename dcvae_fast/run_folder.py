"""The run folder: its layout, and checkpoints that survive a kill, a full disk or a damaged file.

RUN/config.yaml                    configuration of the run
RUN/checkpoints/000000640000.pt    all state needed to resume, after this many images shown
RUN/metrics.jsonl, RUN/tensorboard, RUN/grids, RUN/profile
RUN/.lock                          held by the training process
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
from dcvae_fast.renamed import complete_settings, rename_networks
from dcvae_pipelines.atomic import atomic_write, find_unfinished, replacing

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
GRIDS = "grids"
FORMAT = 3  # version of the checkpoint format


def prepare_run(folder: Path, config: Config) -> None:
    """Create the run folder or, if it exists, check that its run has this configuration.

    Raises:
        RunError: the run has another configuration (the message lists the differences), the folder is not a run, or
            it cannot be written.
    """
    import yaml

    if (stored := read_config(folder)) is not None:
        if differences := changes(stored, config):
            raise RunError(
                f"{folder} was created with another configuration (stored → requested):\n  "
                + "\n  ".join(f"{setting}: {old} → {new}" for setting, old, new in differences)
                + "\nChoose another folder, or use the stored settings."
            )
        return
    # A start that was killed can leave these.
    leftovers = {folder / CHECKPOINTS, *find_unfinished(folder)}
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - leftovers or _newest_first(folder)):
        raise RunError(
            f"{folder} exists and is not a run folder ({CONFIG_FILE} is missing); choose another with --run."
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        atomic_write(folder / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False))
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be created ({error}).") from error


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration stored in a run folder, with the current names and all settings; None if it has none.

    Raises:
        RunError: it cannot be read.
    """
    import yaml

    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or choose another folder with --run.") from error
    return complete_settings(stored) if isinstance(stored, dict) else {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a run folder, and removes unfinished files of training.

    Raises:
        RunError: another process holds the lock.
    """
    try:
        lock = FileLock(folder / LOCK_FILE).acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"{folder} is being trained by another process; if it is not, delete {folder / LOCK_FILE}."
        ) from error
    with lock:
        for subfolder in (folder / CHECKPOINTS, folder / GRIDS):  # only training writes to them
            for file in find_unfinished(subfolder):
                file.unlink()
        yield


def is_run(folder: Path) -> bool:
    """Return whether this is a run folder."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def save_checkpoint(folder: Path, images: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically, then delete all but the newest `keep`.

    Raises:
        RunError: it could not be written, for example because the disk is full; older checkpoints are kept.
    """
    path = folder / CHECKPOINTS / f"{images:012d}.pt"
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer can turn the former into the latter
        existing = _newest_first(folder)
        newest = f"the newest checkpoint is {existing[0]}" if existing else "the run has no checkpoint yet"
        raise RunError(
            f"{path}: the checkpoint could not be written ({reason(error.__context__ or error)}); {newest}."
        ) from error
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Load the newest intact checkpoint of a run to the CPU; None if the run has no checkpoint.

    A damaged checkpoint is skipped with a warning.

    Raises:
        RunError: all checkpoints are damaged, or the newest intact one has another format.
    """
    damaged = []
    for path in _newest_first(folder):
        try:
            # torch does not check checksums when it reads, so that a flipped bit would go unnoticed.
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            state = torch.load(path, map_location="cpu", weights_only=True)
            version, _ = state["format"], (state["config"], state["step"], state["sources"])
            if version == FORMAT:
                state["config"] = complete_settings(state["config"])
                state["step"]["networks"] = rename_networks(state["step"]["networks"])
        except Exception as error:  # a damaged file can make zip and pickle readers raise anything
            damaged.append(path)
            logger.warning("%s is damaged and skipped (%s)", path, reason(error))
            continue
        if version != FORMAT:
            raise RunError(
                f"{path} was written by another version of dcvae_fast (format {version}; this version reads {FORMAT})."
            )
        return state
    if damaged:
        raise RunError(f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}).")
    return None


def images_shown(folder: Path) -> int:
    """Return the number of images shown up to a run's newest checkpoint, from its file name; 0 without checkpoint."""
    return next((int(path.stem) for path in _newest_first(folder)), 0)


def quarantine_newer(folder: Path, images: int) -> None:
    """Rename the damaged checkpoints after `images`, so that they do not count as checkpoints to keep."""
    for path in _newest_first(folder):
        if path.name > f"{images:012d}.pt":
            path.rename(path.with_suffix(".damaged"))


def load_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and weights for a `DCVAE` from a run's newest intact checkpoint: encoder and EMA decoder.

    The configuration has the resolution and fade that the networks have reached.

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
    """Return the records of a run's metrics.jsonl, without lines cut short by a kill; [] if the file is missing."""
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
