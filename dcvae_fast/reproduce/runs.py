"""The runs of a table: budgets, plans, training and measuring. To resume, call `reproduce` again."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from dcvae_fast.config import Config, DataConfig, changes, to_dict
from dcvae_fast.distributed import pick_device
from dcvae_fast.errors import DivergedError, EvaluationError, UserError
from dcvae_fast.evaluation import Measurement, Splits, evaluate
from dcvae_fast.evaluation.fidelity import FEWEST
from dcvae_fast.evaluation.measurement import EVALUATION_FILE, describe, read, store
from dcvae_fast.evaluation.protocol import Progress, data_of
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.recipes import RECIPES, recipe_config
from dcvae_fast.reproduce.paper import Key, Table
from dcvae_fast.reproduce.report import Curve, Result, all_remarks, markdown, write_pages
from dcvae_fast.run_folder import images_shown, read_metrics
from dcvae_fast.training.compiled import forget_compiled
from dcvae_fast.training.data import open_data
from dcvae_fast.training.held_out import held_out_images
from dcvae_fast.training.loop import Outcome, train
from dcvae_fast.training.plan import training_flops
from dcvae_fast.training.schedule import stages

logger = logging.getLogger(__name__)

# Speed that a plan's hours assume; the plan says so.
FLOPS_PER_SECOND = 320e12

# Images that the paper's protocol measures.
IMAGES = 50_000

# Held-out images for each point of the curve of a shortened run; more would take longer than training.
SHORT_HELD_OUT = 1000


@dataclass(frozen=True)
class Training:
    """A run of a table, as the user asks for it.

    Attributes:
        name: of the recipe
        folder: of the run
        config: the recipe with the user's changes, shortened to the budget
        full: images that the paper's training shows
        changed: settings that the user has changed, with their values
        needed: measurements that the table needs
    """

    name: str
    folder: Path
    config: Config
    full: int
    changed: tuple[str, ...]
    needed: tuple[Key, ...]

    def remarks(self, shown: int, images: int) -> tuple[str, ...]:
        """Return how the run differs from the paper's after `shown` images, measured on `images` images."""
        remarks = []
        if shown < self.full:
            in_proportion = ", its growth in proportion" if self.config.model.grows else ""
            remarks.append(f"shortened: {shown:,} of {self.full:,} images{in_proportion}")
        if self.changed:
            remarks.append(f"changed: {', '.join(self.changed)}")
        if images != IMAGES and any(key.of != "latents" for key in self.needed):  # of latents, all are measured
            remarks.append(f"measured on {images:,} images, not {IMAGES:,}")
        return tuple(remarks)


def trainings(
    table: Table,
    out: Path,
    settings: Sequence[str],
    budget: int | None,
    configure: Callable[[Sequence[str]], Config],
) -> list[Training]:
    """Return the runs that a table needs.

    Args:
        out: folder of all runs.
        settings: options of `dcvae train`, as given on the command line.
        budget: images to which each run is shortened; None for the paper's.
        configure: parses a command line of `dcvae train`.

    Raises:
        ConfigError: a setting is unknown, or its value has no meaning.
        UserError: a setting is what the table's rows differ in, or the budget is too small.
    """
    names = {token.split("=")[0].removeprefix("--") for token in settings if token.startswith("--")}
    if strange := sorted(name for name in names if "." not in name):
        raise UserError(f"--{strange[0]} is neither an option of reproduce nor a setting of dcvae train.")
    if "train.images" in names:
        raise UserError("--train.images is the paper's; --budget IMAGES shortens every training.")
    runs = []
    for name, needed in table.needed().items():
        if fixed := sorted(name for name in names & RECIPES[name].settings.keys() if not name.startswith("log.")):
            raise UserError(f"--{fixed[0]} is what defines the runs of {table.name}; it cannot be changed.")
        base, config = recipe_config(name), configure(["--recipe", name, *settings])
        changed = tuple(f"{setting} {now}" for setting, _, now in changes(to_dict(base), config))
        full = base.train.images
        if budget is not None:
            config = _shortened(config, budget, full, keep_points="log.metrics_every" not in names)
        runs.append(Training(name, out / name, config, full, changed, tuple(needed)))
    return runs


def _shortened(config: Config, budget: int, full: int, keep_points: bool) -> Config:
    """Return the configuration with at most `budget` images, and with growth shortened in proportion.

    Args:
        full: images that the paper's training shows.
        keep_points: whether a curve keeps its number of points: they are measured more often, on fewer images.
    """
    images = min(budget, full)
    growth, log, steps = config.growth, config.log, stages(config)
    if keep_points and log.metrics_every is not None:
        held_out = None if log.held_out is None else min(log.held_out, SHORT_HELD_OUT)
        log = replace(log, metrics_every=max(1, log.metrics_every * images // full), held_out=held_out)
    if config.model.grows:
        least = len(steps) * max(growth.batch[stage.resolution] for stage in steps)
        if images < least:
            raise UserError(f"--budget is {budget:,}; to grow to {config.model.resolution} takes {least:,} or more.")
        fade, stable = growth.fade_images * images // full, growth.stable_images * images // full
        growth = replace(growth, fade_images=fade, stable_images=stable)
    return replace(config, growth=growth, log=log, train=replace(config.train, images=images))


def plan(table: Table, runs: Sequence[Training], images: int) -> str:
    """Return what is done and what is left, in images, PFLOP and GPU-hours; each line with its run's remarks."""
    lines = [("run", "recipe", "images", "shown so far", "numbers so far", "PFLOP left", "GPU-hours left", "remarks")]
    total, seen = 0.0, {}
    for run in runs:
        asked, shown = run.config.train.images, images_shown(run.folder)
        flops = training_flops(run.config, shown) if shown < asked else 0.0
        total += flops
        done = shown >= asked and read(run.folder / EVALUATION_FILE).get("images") == shown
        there = len(set(run.needed) & set(_stored(run.folder))) if done else 0
        remarks = "; ".join(run.remarks(max(shown, asked), images))
        seen[remarks] = None
        of_run = (f"{asked:,}", f"{shown:,}", f"{there} of {len(run.needed)}", *_cost(flops), remarks)
        lines.append((run.name, RECIPES[run.name].base or run.name, *of_run))
    lines.append(("in all", "", "", "", "", *_cost(total), "; ".join(filter(None, seen))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    rate = f"{FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s, which is an assumption"
    return "\n".join([table.title, "", *rows, "", f"GPU-hours of training, at {rate}; measuring comes on top."])


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
    progress: Progress = lambda what, done, total: None,
) -> int:
    """Train what is missing, measure what is missing, and write OUT/TABLE.md and .json, and for Figure 7 .png, after
    each run.

    Args:
        runs: the table's, from `trainings`.
        out: folder for the pages.
        images, weights, cache, progress: as in `evaluate`.

    Returns:
        0, or 128 + the signal that stopped a training.

    Raises:
        EvaluationError: some numbers are missing; all others were measured and written.
        UserError, DataError: as in `train`; but a run that diverges is left out.
    """
    _check(table, runs, images)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    splits = _open_data(runs)
    measure = partial(evaluate, images=images, weights=weights, cache=cache, progress=progress)
    results: dict[str, Result] = {}
    for run in runs:
        data, asked = splits[run.config.data], run.config.train.images
        logger.info(_line(f"{run.name}: {asked:,} images", run.remarks(asked, images)))
        try:
            outcome = _train(run)
        except DivergedError as error:
            result = Result(run.remarks(asked, images), missing=dict.fromkeys(run.needed, str(error)))
        else:
            if outcome.signal:
                stopped = f"stopped after {outcome.images:,} of {asked:,} images, run the same command to resume"
                logger.info(_line(f"{run.name}: {stopped}", run.remarks(asked, images)))
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
        raise EvaluationError(f"{count} numbers of {table.name} are missing, all others are kept: {' '.join(reasons)}")
    return 0


def _check(table: Table, runs: Sequence[Training], images: int) -> None:
    """Fail early, not after hours of training: check the number of images, packages and files of measurements."""
    if images < FEWEST:
        raise UserError(f"--images is {images}; it must be at least {FEWEST}.")
    for package in _packages(table):
        import_module(package)
    for run in runs:
        read(run.folder / EVALUATION_FILE)


def _packages(table: Table) -> list[str]:
    """Return the packages that measuring needs and training does not."""
    metrics = {key.metric for keys in table.needed().values() for key in keys}
    packages = ["scipy"] if metrics & {"fid", "probe_error"} else []
    packages += ["torch_fidelity"] if metrics & {"fid", "is", "ppl"} else []
    return [*packages, "matplotlib"] if table.name == "figure7" else packages


def _open_data(runs: Sequence[Training]) -> dict[DataConfig, Splits]:
    """Open the data sets of all runs, each once."""
    configs = {run.config.data: run.config for run in runs}
    return {
        data: Splits(open_data(config, "train"), open_data(config, "test"), data.on_corrupt)
        for data, config in configs.items()
    }


def _train(run: Training) -> Outcome:
    """Train, then free the memory of the networks and of what was compiled of them: they refer to each other."""
    try:
        return train(run.config, run.folder)
    finally:
        forget_compiled()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(text: str, remarks: Sequence[str]) -> str:
    return "; ".join([text, *remarks])


def _measure(run: Training, data: Splits, shown: int, images: int, measure: Callable[..., list[Measurement]]) -> Result:
    """Take the run's stored measurements of the present weights and images, and measure and store what they lack."""
    model = DCVAE.from_pretrained(run.folder, device=pick_device(run.config.train.device))
    path, head = run.folder / EVALUATION_FILE, describe(model, shown)
    content, measured = read(path), {}
    if all(content.get(name) == head[name] for name in ("images", "weights")):
        stored = _stored(run.folder)
        measured = {key: stored[key] for key in run.needed if key in stored and _is_of(stored[key], data, images)}
    missing: dict[Key, str] = {}

    def report(measurement: Measurement) -> None:
        store(path, head, measurement)
        key = Key(measurement.metric, measurement.of, measurement.protocol)
        if key in run.needed:
            measured[key] = measurement

    for metrics, protocol in _together([key for key in run.needed if key not in measured]):
        try:
            measure(model, data, metrics, protocol=protocol, report=report)
        except EvaluationError as error:
            wanted = [key for key in run.needed if _metric(key) in metrics and key.protocol == protocol]
            missing |= {key: str(error) for key in wanted if key not in measured}
    return Result(run.remarks(shown, images) + _too_few(measured), measured, missing, head)


def _too_few(measured: dict[Key, Measurement]) -> tuple[str, ...]:
    """Return a remark for each FID and IS of fewer images than the paper's: the score depends on how many they are."""
    remarks = {
        f"FID and IS of {measurement.of} on {measurement.count:,} images, not {IMAGES:,}"
        for key, measurement in measured.items()
        if key.metric in ("fid", "is") and measurement.count < IMAGES
    }
    return tuple(sorted(remarks))


def _metric(key: Key) -> str:
    """Return the name of a metric in `evaluate`, such as pixel for pixel_mse."""
    return key.metric.split("_")[0]


def _together(keys: Sequence[Key]) -> list[tuple[tuple[str, ...], str]]:
    """Group metrics by the network that they need, and by protocol: weights that are missing fail one group only."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for key in keys:
        network = "inception" if _metric(key) in ("fid", "is") else _metric(key)
        groups.setdefault((network, key.protocol), {})[_metric(key)] = None
    return [(tuple(metrics), protocol) for (_, protocol), metrics in groups.items()]


def _stored(folder: Path) -> dict[Key, Measurement]:
    """Return the measurements in a run's file, except those written by versions with other fields."""
    names = Measurement.__dataclass_fields__
    measurements = [
        Measurement(**{name: stored[name] for name in names})
        for stored in read(folder / EVALUATION_FILE).get("measurements", [])
        if names.keys() <= stored.keys()
    ]
    return {Key(each.metric, each.of, each.protocol): each for each in measurements}


def _is_of(measurement: Measurement, data: Splits, images: int) -> bool:
    """Return whether it was measured on these images of this data set, on as many of them, with the usual noise."""
    if measurement.data != data_of(measurement.metric, measurement.of, data) or measurement.seed != 0:
        return False
    if measurement.of == "latents":  # of all images that have labels
        return True
    if measurement.of == "reconstructions":
        return measurement.count == min(images, len(data.test))
    return measurement.count == (2 * images if measurement.metric == "ppl" else images)


def _curve(run: Training, data: Splits) -> Curve:
    """Return the error of held-out images over training, from the run's log."""
    lines = read_metrics(run.folder)
    points = {line["images"]: line["held_out/pixel_mse"] for line in lines if "held_out/pixel_mse" in line}
    epochs = [images / len(data.train) for images in points]
    held_out = min(held_out_images(run.config), len(data.test))
    return Curve(f"K = {run.config.contrast.negatives:,}", epochs, list(points.values()), held_out)
