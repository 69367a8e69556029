"""Runs of a table or figure: budgets, plans, training and measuring. Calling `reproduce` again resumes."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dcvae_fast.config import Config, DataConfig, changes, to_dict
from dcvae_fast.distributed import pick_device
from dcvae_fast.errors import DivergedError, EvaluationError, UserError
from dcvae_fast.evaluation import Measurement, Splits, evaluate
from dcvae_fast.evaluation.fidelity import MIN_IMAGES
from dcvae_fast.evaluation.images import published_images
from dcvae_fast.evaluation.measurement import EVALUATION_FILE, describe, read, store
from dcvae_fast.evaluation.protocol import Progress, data_of, image_count
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.recipes import RECIPES, recipe_config
from dcvae_fast.reproduce.paper import Figure, Key, Table
from dcvae_fast.reproduce.report import Curve, Result, all_remarks, markdown, write_pages
from dcvae_fast.run_folder import images_shown, read_config, read_metrics
from dcvae_fast.training.compiled import forget_compiled
from dcvae_fast.training.data import open_data
from dcvae_fast.training.held_out import held_out_images
from dcvae_fast.training.loop import Outcome, train
from dcvae_fast.training.plan import training_flops
from dcvae_fast.training.schedule import stages

logger = logging.getLogger(__name__)

# Speed assumed for the hours of a plan, which states it; measured for `cifar10` in bfloat16 on an H100.
FLOPS_PER_SECOND = 220e12

# Number of images in the paper's protocol.
IMAGES = 50_000

# Held-out images per point of the curve of a shortened run; more would take longer than training.
SHORT_HELD_OUT = 1000


@dataclass(frozen=True)
class Training:
    """Run of a table or figure with the user's settings.

    Attributes:
        name: name of the recipe
        folder: run folder
        config: recipe with the user's settings, shortened to the budget
        full: images shown in the paper's training
        changed: settings changed by the user, with their values
        needed: measurements that the table needs; empty for a figure
    """

    name: str
    folder: Path
    config: Config
    full: int
    changed: tuple[str, ...]
    needed: tuple[Key, ...]

    def remarks(self, shown: int, images: int) -> tuple[str, ...]:
        """Return the differences from the paper's run after `shown` images, if measured on `images` images."""
        remarks = []
        if shown < self.full:
            in_proportion = ", growth in proportion" if self.config.model.grows else ""
            remarks.append(f"shortened: {shown:,} of {self.full:,} images{in_proportion}")
        if self.changed:
            remarks.append(f"changed: {', '.join(self.changed)}")
        if images != IMAGES and any(key.subject != "latents" for key in self.needed):  # latents of all images are used
            remarks.append(f"measured on {images:,} images, not {IMAGES:,}")
        return tuple(remarks)


def trainings(
    table: Table | Figure,
    out: Path,
    settings: Sequence[str],
    budget: int | None,
    configure: Callable[[Sequence[str]], Config],
) -> list[Training]:
    """Return the runs that a table or figure needs.

    A run that exists keeps its data set, `data.name` and `data.root`, if the settings do not name another.

    Args:
        out: folder of all runs.
        settings: options of `dcvae train`, as on the command line.
        budget: maximum number of images shown per run; None for the paper's.
        configure: parses a command line of `dcvae train`.

    Raises:
        ConfigError: a setting is unknown, or its value is invalid.
        UserError: a setting defines the runs of the table and cannot be changed, or the budget is too small.
        RunError: the configuration of an existing run cannot be read.
    """
    names = {token.split("=")[0].removeprefix("--") for token in settings if token.startswith("--")}
    if unknown := sorted(name for name in names if "." not in name):
        raise UserError(f"--{unknown[0]} is neither an option of reproduce nor a setting of dcvae train.")
    if "train.images" in names:
        raise UserError("--train.images cannot be changed here; use --budget IMAGES to shorten every run.")
    runs = []
    for name, needed in table.needed().items():
        if fixed := sorted(name for name in names & RECIPES[name].settings.keys() if not name.startswith("log.")):
            raise UserError(f"--{fixed[0]} cannot be changed here; it defines the runs of {table.name}.")
        base, config = recipe_config(name), configure(["--recipe", name, *_stored_data(out / name), *settings])
        changed = tuple(f"{setting} {now}" for setting, _, now in changes(to_dict(base), config))
        full = base.train.images
        if budget is not None:
            config = _shortened(config, budget, full, keep_points="log.metrics_every" not in names)
        runs.append(Training(name, out / name, config, full, changed, tuple(needed)))
    return runs


def _stored_data(folder: Path) -> list[str]:
    """Return the data set of an existing run as settings; [] for a new run."""
    data = (read_config(folder) or {}).get("data")
    if not isinstance(data, dict):
        return []
    return [f"--data.{name}={data[name]}" for name in ("name", "root") if data.get(name)]


def _shortened(config: Config, budget: int, full: int, keep_points: bool) -> Config:
    """Shorten a configuration to at most `budget` images shown, and its growth in proportion.

    Args:
        full: images shown in the paper's training.
        keep_points: whether to keep the number of points of a curve, by measuring more often and on fewer images.
    """
    images = min(budget, full)
    growth, log, steps = config.growth, config.log, stages(config)
    if keep_points and log.metrics_every is not None:
        held_out = None if log.held_out is None else min(log.held_out, SHORT_HELD_OUT)
        log = replace(log, metrics_every=max(1, log.metrics_every * images // full), held_out=held_out)
    if config.model.grows:
        # Each stage keeps at least one iteration.
        least = max(-(-growth.batch[stage.resolution] * full // stage.images) for stage in steps)
        if images < least:
            raise UserError(
                f"--budget is {budget:,}; to grow to {config.model.resolution}, it must be at least {least:,}."
            )
        names = ("fade_images", "stable_images", "first_images")
        lengths = {name: length for name in names if (length := getattr(growth, name)) is not None}
        growth = replace(growth, **{name: length * images // full for name, length in lengths.items()})
    return replace(config, growth=growth, log=log, train=replace(config.train, images=images))


def plan(table: Table | Figure, runs: Sequence[Training], images: int) -> str:
    """Describe progress and remaining cost in images, PFLOP and GPU-hours, one line per run with its remarks."""
    lines = [("run", "recipe", "images", "shown so far", "numbers so far", "PFLOP left", "GPU-hours left", "remarks")]
    total, all_run_remarks = 0.0, {}
    for run in runs:
        target, shown = run.config.train.images, images_shown(run.folder)
        flops = training_flops(run.config, shown) if shown < target else 0.0
        total += flops
        done = shown >= target and read(run.folder / EVALUATION_FILE).get("images") == shown
        measured = len(set(run.needed) & set(_stored(run.folder))) if done else 0
        remarks = "; ".join(run.remarks(max(shown, target), images))
        all_run_remarks[remarks] = None
        progress = (f"{target:,}", f"{shown:,}", f"{measured} of {len(run.needed)}", *_cost(flops), remarks)
        lines.append((run.name, RECIPES[run.name].base or run.name, *progress))
    lines.append(("total", "", "", "", "", *_cost(total), "; ".join(filter(None, all_run_remarks))))
    if not any(run.needed for run in runs):
        lines = [(*line[:4], *line[5:]) for line in lines]  # a figure has no numbers
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    rate = f"{FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s"
    return "\n".join([table.title, "", *rows, "", f"GPU-hours: training at an assumed {rate}, without measuring."])


def _cost(flops: float) -> tuple[str, str]:
    return f"{flops / 1e15:,.2f}", f"{flops / FLOPS_PER_SECOND / 3600:,.2f}"


def reproduce(
    table: Table,
    runs: Sequence[Training],
    out: Path,
    *,
    images: int = IMAGES,
    weights: Path | None = None,
    cache: Path | None = None,
    progress: Progress = lambda description, done, total: None,
) -> int:
    """Complete the training and measurements of a table, and write its pages after each run.

    The pages are OUT/TABLE.md, OUT/TABLE.json and, for Figure 7, OUT/TABLE.png.

    Args:
        runs: runs of the table, from `trainings`.
        out: folder for the pages.
        images, weights, cache, progress: as in `evaluate`.

    Returns:
        0, or 128 + the signal that stopped training.

    Raises:
        EvaluationError: some numbers are missing; all others were measured and written.
        UserError, DataError: as in `train`; a run that diverges is skipped.
    """
    _check(table, runs, images)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    splits = open_splits(runs)
    measure = partial(evaluate, images=images, weights=weights, cache=cache, progress=progress)
    results: dict[str, Result] = {}
    for run in runs:
        data = splits[run.config.data]
        try:
            outcome = train_run(run, images)
        except DivergedError as error:
            result = Result(run.remarks(run.config.train.images, images), missing=dict.fromkeys(run.needed, str(error)))
        else:
            if outcome.signal:
                return 128 + outcome.signal
            result = _measure(run, data, outcome.images, images, measure)
        if table.name == "figure7":
            result = replace(result, curve=_curve(run, data))
        results[run.name] = result
        write_pages(table, results, out)
        logger.info(_line(f"{run.name}: {len(result.measured)} of {len(run.needed)} numbers", result.remarks))
    logger.info("\n%s", markdown(table, results))
    logger.info(_line(str(out / f"{table.name}.md"), all_remarks(results.values())))
    if reasons := list(dict.fromkeys(reason for result in results.values() for reason in result.missing.values())):
        count = sum(len(result.missing) for result in results.values())
        raise EvaluationError(
            f"{count} numbers of {table.name} are missing, all others were saved: {' '.join(reasons)}"
        )
    return 0


def _check(table: Table, runs: Sequence[Training], images: int) -> None:
    """Check the number of images, packages and measurement files, to fail early, not after hours of training."""
    if images < MIN_IMAGES:
        raise UserError(f"--images is {images}; it must be at least {MIN_IMAGES}.")
    for package in _packages(table):
        import_module(package)
    for run in runs:
        read(run.folder / EVALUATION_FILE)


def _packages(table: Table) -> list[str]:
    """Return the packages that only measuring needs."""
    metrics = {key.metric for keys in table.needed().values() for key in keys}
    packages = ["scipy"] if metrics & {"fid", "probe_error"} else []
    packages += ["torch_fidelity"] if metrics & {"fid", "is", "ppl"} else []
    return [*packages, "matplotlib"] if table.name == "figure7" else packages


def open_splits(runs: Sequence[Training]) -> dict[DataConfig, Splits]:
    """Open each data set of the runs once."""
    configs = {run.config.data: run.config for run in runs}
    once = {run.config.data for run in runs if any(key.protocol == "once" for key in run.needed)}
    return {
        data: Splits(
            open_data(config, "train"),
            open_data(config, "test"),
            data.on_corrupt,
            published_images(data) if data in once else None,
        )
        for data, config in configs.items()
    }


def train_run(run: Training, images: int = IMAGES) -> Outcome:
    """Complete the training of a run, and log its start and, if a signal stopped it, its stop.

    Args:
        images: number of images that will be measured, for the remarks in the log.

    Raises:
        UserError, DataError: as in `train`.
    """
    target = run.config.train.images
    remarks = run.remarks(target, images)
    logger.info(_line(f"{run.name}: {target:,} images", remarks))
    try:
        outcome = train(run.config, run.folder)
    finally:  # free the memory of the networks and their compiled code, which form reference cycles
        forget_compiled()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if outcome.signal:
        stopped = f"stopped after {outcome.images:,} of {target:,} images, run the same command to resume"
        logger.info(_line(f"{run.name}: {stopped}", remarks))
    return outcome


def _line(text: str, remarks: Sequence[str]) -> str:
    return "; ".join([text, *remarks])


def _measure(run: Training, data: Splits, shown: int, images: int, measure: Callable[..., list[Measurement]]) -> Result:
    """Reuse the stored measurements of the current weights and images; measure and store the missing ones."""
    model = DCVAE.from_pretrained(run.folder, device=pick_device(run.config.train.device))
    path, head = run.folder / EVALUATION_FILE, describe(model, shown)
    content, measured = read(path), {}
    if all(content.get(name) == head[name] for name in ("images", "weights")):
        stored = _stored(run.folder)
        measured = {key: stored[key] for key in run.needed if key in stored and _is_current(stored[key], data, images)}
    missing: dict[Key, str] = {}

    def report(measurement: Measurement) -> None:
        store(path, head, measurement)
        key = Key(measurement.metric, measurement.subject, measurement.protocol)
        if key in run.needed:
            measured[key] = measurement

    for metrics, protocol in _group([key for key in run.needed if key not in measured]):
        try:
            measure(model, data, metrics, protocol=protocol, report=report)
        except EvaluationError as error:
            failed = [key for key in run.needed if _metric(key) in metrics and key.protocol == protocol]
            missing |= {key: str(error) for key in failed if key not in measured}
    return Result(run.remarks(shown, images) + _too_few(measured, images), measured, missing, head)


def _too_few(measured: dict[Key, Measurement], images: int) -> tuple[str, ...]:
    """Return a remark for each FID and IS of fewer than `images` images, because some could not be decoded.

    Protocol `once` always uses fewer, and has no number of the paper to be compared with.
    """
    remarks = {
        f"FID and IS of {measurement.subject} on {measurement.count:,} images, not {IMAGES:,}"
        for key, measurement in measured.items()
        if key.metric in ("fid", "is") and key.protocol != "once" and measurement.count < min(images, IMAGES)
    }
    return tuple(sorted(remarks))


def _metric(key: Key) -> str:
    """Return the metric's name in `evaluate`, such as pixel for pixel_mse."""
    return key.metric.split("_")[0]


def _group(keys: Sequence[Key]) -> list[tuple[tuple[str, ...], str]]:
    """Group metrics by protocol and required network, so that missing weights fail only one group."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for key in keys:
        network = "inception" if _metric(key) in ("fid", "is") else _metric(key)
        groups.setdefault((network, key.protocol), {})[_metric(key)] = None
    return [(tuple(metrics), protocol) for (_, protocol), metrics in groups.items()]


def _stored(folder: Path) -> dict[Key, Measurement]:
    """Return a run's stored measurements, except outdated ones and those that lack a field other than `note`."""
    names = Measurement.__dataclass_fields__.keys()
    measurements = [
        Measurement(**{name: stored[name] for name in names & stored.keys()})
        for stored in read(folder / EVALUATION_FILE).get("measurements", [])
        if names - {"note"} <= stored.keys() and not _is_outdated(stored)
    ]
    return {Key(m.metric, m.subject, m.protocol): m for m in measurements}


def _is_outdated(stored: dict[str, Any]) -> bool:
    """Return whether a stored measurement follows the earlier definition of protocol `paper`: each test image once."""
    key = (stored["subject"], stored["protocol"])
    return "note" not in stored and key == ("reconstructions", "paper") and stored["metric"] in ("fid", "is")


def _is_current(measurement: Measurement, data: Splits, images: int) -> bool:
    """Return whether a measurement has this data set, this number of images and the default seed."""
    key = (measurement.metric, measurement.subject, measurement.protocol)
    if measurement.data != data_of(*key, data) or measurement.seed != 0:
        return False
    count = image_count(*key, data, images)
    return count is None or measurement.count == count


def _curve(run: Training, data: Splits) -> Curve:
    """Return the held-out error during training, from the run's metrics."""
    records = read_metrics(run.folder)
    points = {record["images"]: record["held_out/pixel_mse"] for record in records if "held_out/pixel_mse" in record}
    epochs = [images / len(data.train) for images in points]
    held_out = min(held_out_images(run.config), len(data.test))
    return Curve(f"K = {run.config.contrast.negatives:,}", epochs, list(points.values()), held_out)
