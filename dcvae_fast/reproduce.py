"""`dcvae reproduce`: the paper's tables and Figure 7, from training to the page. To resume, call it again."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dcvae_fast.config import Config, DataConfig, changes, to_dict
from dcvae_fast.errors import DivergedError, EvaluationError, UserError
from dcvae_fast.evaluation import Measurement, Splits, evaluate
from dcvae_fast.evaluation.fidelity import FEWEST
from dcvae_fast.evaluation.measurement import EVALUATION_FILE, describe, read, store
from dcvae_fast.evaluation.plot import plot_curves
from dcvae_fast.evaluation.protocol import Progress, data_of
from dcvae_fast.evaluation.tables import Key, Result, Table, as_json, markdown
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.recipes import RECIPES, recipe_config
from dcvae_fast.training.checkpoint import images_shown, write_aside
from dcvae_fast.training.compiled import forget_compiled
from dcvae_fast.training.held_out import held_out_images
from dcvae_fast.training.log import METRICS_FILE, remarked, say
from dcvae_fast.training.loop import open_data, pick_device, train
from dcvae_fast.training.plan import training_flops
from dcvae_fast.training.schedule import stages

# What the hours of a plan assume; a plan says so.
FLOPS_PER_SECOND = 320e12

# That the paper's protocol measures.
IMAGES = 50_000

# For the points of a curve of a shortened run, which would else take longer than training.
SHORT_HELD_OUT = 1000


@dataclass(frozen=True)
class Training:
    """A run as it is asked for.

    Attributes:
        name: of the recipe
        folder: of the run
        config: with what the user changes, shortened to the budget
        full: images that the paper's training shows
        changed: settings that the user has changed, with their values
        needed: what is measured of it
    """

    name: str
    folder: Path
    config: Config
    full: int
    changed: tuple[str, ...]
    needed: tuple[Key, ...]

    def shortened(self, shown: int) -> str | None:
        """That so many images are fewer than the paper's."""
        if shown >= self.full:
            return None
        in_proportion = ", its growth in proportion" if self.config.model.grows else ""
        return f"shortened: {shown:,} of {self.full:,} images{in_proportion}"

    def remarks(self, shown: int, images: int) -> tuple[str, ...]:
        """In what it departs from the paper's, once so many images are shown and so many measured."""
        short = self.shortened(shown)
        found = [short] if short else []
        if self.changed:
            found.append(f"changed: {', '.join(self.changed)}")
        if images != IMAGES:
            found.append(f"measured on {images:,} images, not {IMAGES:,}")
        return tuple(found)


def trainings(
    table: Table,
    out: Path,
    settings: Sequence[str],
    budget: int | None,
    configure: Callable[[Sequence[str]], Config],
) -> list[Training]:
    """The runs of a table.

    Args:
        out: folder of all runs.
        settings: of `dcvae train`, as given on the command line.
        budget: images to which each run is shortened; None for the paper's.
        configure: what makes a configuration of a command line of `dcvae train`.

    Raises:
        ConfigError: a setting is unknown, or its value has no meaning.
        UserError: it is what the rows differ in, or the budget is too small.
    """
    names = {token.split("=")[0].removeprefix("--") for token in settings if token.startswith("--")}
    if strange := sorted(name for name in names if "." not in name):
        raise UserError(f"--{strange[0]} is no option of reproduce, and no setting of dcvae train.")
    if "train.images" in names:
        raise UserError("--train.images is the paper's; --budget IMAGES shortens every training.")
    found = []
    for name, needed in table.needed().items():
        if fixed := sorted(name for name in names & set(RECIPES[name].settings) if not name.startswith("log.")):
            raise UserError(f"--{fixed[0]} is what defines the runs of {table.name}; it cannot be changed.")
        base, config = recipe_config(name), configure(["--recipe", name, *settings])
        changed = tuple(f"{setting} {now}" for setting, _, now in changes(to_dict(base), config))
        full = base.train.images
        if budget is not None:
            config = _shortened(config, budget, full, points="log.metrics_every" not in names)
        found.append(Training(name, out / name, config, full, changed, tuple(needed)))
    return found


def _shortened(config: Config, budget: int, full: int, points: bool) -> Config:
    """Of at most so many images; growth takes its share of them, so that the last resolution is reached.

    Args:
        points: whether a curve keeps as many, being measured more often, on fewer images.
    """
    images = min(budget, full)
    growth, log, steps = config.growth, config.log, stages(config)
    if points and log.metrics_every is not None:
        held_out = None if log.held_out is None else min(log.held_out, SHORT_HELD_OUT)
        log = replace(log, metrics_every=max(1, log.metrics_every * images // full), held_out=held_out)
    if config.model.grows:
        least = len(steps) * max(growth.batch[stage.resolution] for stage in steps)
        if images < least:
            raise UserError(f"--budget is {budget:,}; to grow to {config.model.resolution} takes {least:,} or more.")
        fade, stable = (each * images // full for each in (growth.fade_images, growth.stable_images))
        growth = replace(growth, fade_images=fade, stable_images=stable)
    return replace(config, growth=growth, log=log, train=replace(config.train, images=images))


def plan(table: Table, runs: Sequence[Training], images: int) -> str:
    """What is there and what is left to do, in images, PFLOP and GPU-hours; each line with its run's remarks."""
    lines = [("run", "recipe", "images", "shown so far", "numbers so far", "PFLOP left", "GPU-hours left", "remarks")]
    total, said = 0.0, {}
    for run in runs:
        asked, shown = run.config.train.images, images_shown(run.folder)
        flops = training_flops(run.config, shown) if shown < asked else 0.0
        total += flops
        done = shown >= asked and read(run.folder / EVALUATION_FILE).get("images") == shown
        there = len(set(run.needed) & set(_stored(run.folder))) if done else 0
        remarks = "; ".join(run.remarks(max(shown, asked), images))
        said[remarks] = None
        of_run = (f"{asked:,}", f"{shown:,}", f"{there} of {len(run.needed)}", *_cost(flops), remarks)
        lines.append((run.name, RECIPES[run.name].base or run.name, *of_run))
    lines.append(("in all", "", "", "", "", *_cost(total), "; ".join(filter(None, said))))
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
        runs: the table's, of `trainings`.
        out: folder for the pages.
        images, weights, cache, progress: of `evaluate`.

    Returns:
        0, or 128 + the signal that stopped a training.

    Raises:
        EvaluationError: all that could be measured was, and written; some numbers are missing.
        UserError, DataError: as `train`, but a run that diverges is only left out.
    """
    if images < FEWEST:
        raise UserError(f"--images is {images}; it must be at least {FEWEST}.")
    for package in _packages(table):  # rather missed now than hours later
        import_module(package)
    for run in runs:
        read(run.folder / EVALUATION_FILE)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    splits: dict[DataConfig, Splits] = {}
    for run in runs:
        if (data := run.config.data) not in splits:
            train_set, test_set = (open_data(run.config, split) for split in ("train", "test"))
            splits[data] = Splits(train_set, test_set, data.on_corrupt)
    results: dict[str, Result] = {}
    for run in runs:
        data, asked = splits[run.config.data], run.config.train.images
        say(_line(f"{run.name}: {asked:,} images", run.remarks(asked, images)))
        try:
            with remarked(run.shortened(asked)):
                outcome = train(run.config, run.folder)
        except DivergedError as error:
            results[run.name] = Result(run.remarks(asked, images), missing=dict.fromkeys(run.needed, str(error)))
            _write(table, runs, results, splits, out)
            continue
        finally:
            _release()
        if outcome.signal:
            stopped = f"{run.name}: stopped after {outcome.images:,} of {asked:,} images, the same command goes on"
            say(_line(stopped, run.remarks(asked, images)))
            return 128 + outcome.signal
        short = run.shortened(outcome.images)

        def counted(what: str, done: int, total: int, short: str | None = short) -> None:
            progress(f"{what} [{short}]" if short else what, done, total)

        result = _measure(run, data, outcome.images, images, weights, cache, counted)
        results[run.name] = result
        _write(table, runs, results, splits, out)
        say(_line(f"{run.name}: {len(result.measured)} of {len(run.needed)} numbers", result.remarks))
    say("\n" + markdown(table, results))
    say(_line(str(out / f"{table.name}.md"), tuple(dict.fromkeys(x for one in results.values() for x in one.remarks))))
    if reasons := list(dict.fromkeys(why for one in results.values() for why in one.missing.values())):
        count = sum(len(one.missing) for one in results.values())
        raise EvaluationError(f"{count} numbers of {table.name} are missing, all others are kept: {' '.join(reasons)}")
    return 0


def _packages(table: Table) -> list[str]:
    """What measuring needs and training does not."""
    metrics = {key.metric for keys in table.needed().values() for key in keys}
    found = ["scipy"] if metrics & {"fid", "probe_error"} else []
    found += ["torch_fidelity"] if metrics & {"fid", "is", "ppl"} else []
    return [*found, "matplotlib"] if table.name == "figure7" else found


def _release() -> None:
    """Give back what a training held: its networks, and what was compiled of them, refer to each other."""
    forget_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(text: str, remarks: Sequence[str]) -> str:
    return "; ".join([text, *remarks])


def _measure(
    run: Training,
    data: Splits,
    shown: int,
    images: int,
    weights: Path | None,
    cache: Path | None,
    progress: Progress,
) -> Result:
    """What the run's file of measurements holds of these very weights; what it lacks is measured, and kept there."""
    model = DCVAE.from_pretrained(run.folder, device=pick_device(run.config.train.device))
    path, head = run.folder / EVALUATION_FILE, describe(model, shown)
    stored = read(path)
    measured: dict[Key, Measurement] = {}
    if all(stored.get(name) == head[name] for name in ("images", "weights")):
        found = _stored(run.folder)
        measured = {key: found[key] for key in run.needed if key in found and _is_of(found[key], data, images)}
    missing: dict[Key, str] = {}

    def report(measurement: Measurement) -> None:
        store(path, head, measurement)
        key = Key(measurement.metric, measurement.of, measurement.protocol)
        if key in run.needed:
            measured[key] = measurement

    for metrics, protocol in _together([key for key in run.needed if key not in measured]):
        try:
            evaluate(
                model,
                data,
                metrics,
                protocol=protocol,
                images=images,
                weights=weights,
                cache=cache,
                report=report,
                progress=progress,
            )
        except EvaluationError as error:
            wanted = [key for key in run.needed if (_metric(key) in metrics and key.protocol == protocol)]
            missing |= {key: str(error) for key in wanted if key not in measured}
    return Result(run.remarks(shown, images) + _too_few(measured), measured, missing, head)


def _too_few(measured: dict[Key, Measurement]) -> tuple[str, ...]:
    """Fréchet distances, of which fewer images make more, and Inception scores."""
    found = {
        f"FID and IS of {one.of} on {one.count:,} images, not {IMAGES:,}"
        for key, one in measured.items()
        if key.metric in ("fid", "is") and one.count < IMAGES
    }
    return tuple(sorted(found))


def _metric(key: Key) -> str:
    """What `evaluate` calls it: pixel, where the measurement is pixel_mse."""
    return key.metric.split("_")[0]


def _together(keys: Sequence[Key]) -> list[tuple[tuple[str, ...], str]]:
    """Metrics, by protocol, that one pass over the images measures: so nothing fails for another network's weights."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for key in keys:
        network = "inception" if _metric(key) in ("fid", "is") else _metric(key)
        found.setdefault((network, key.protocol), {})[_metric(key)] = None
    return [(tuple(metrics), protocol) for (_, protocol), metrics in found.items()]


def _stored(folder: Path) -> dict[Key, Measurement]:
    """All that a run's file of measurements holds, but what other versions of this project have written."""
    names = Measurement.__dataclass_fields__
    found = [
        Measurement(**{name: one[name] for name in names})
        for one in read(folder / EVALUATION_FILE).get("measurements", [])
        if names.keys() <= one.keys()
    ]
    return {Key(one.metric, one.of, one.protocol): one for one in found}


def _is_of(one: Measurement, data: Splits, images: int) -> bool:
    """Whether it was measured on these images of this data set, on as many, and with the noise that is usual."""
    if one.data != data_of(one.metric, one.of, data) or one.seed != 0:
        return False
    if one.of == "latents":  # of all that have labels
        return True
    if one.of == "reconstructions":
        return one.count == min(images, len(data.test))
    return one.count == (2 * images if one.metric == "ppl" else images)


def _write(
    table: Table,
    runs: Sequence[Training],
    results: dict[str, Result],
    splits: dict[DataConfig, Splits],
    out: Path,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / f"{table.name}.md", markdown(table, results).encode())
    content = json.dumps(as_json(table, results), indent=2, ensure_ascii=False) + "\n"
    write_aside(out / f"{table.name}.json", content.encode())
    if table.name == "figure7":
        _plot(table, runs, results, splits, out)


def _plot(
    table: Table,
    runs: Sequence[Training],
    results: dict[str, Result],
    splits: dict[DataConfig, Splits],
    out: Path,
) -> None:
    """The error of held-out images over training, a curve for each K."""
    curves, held_out = {}, 0
    for run in runs:
        if run.name not in results:
            continue
        held_out = min(held_out_images(run.config), len(splits[run.config.data].test))
        lines = _whole_lines(run.folder / METRICS_FILE)
        points = {line["images"]: line["held_out/pixel_mse"] for line in lines if "held_out/pixel_mse" in line}
        epochs = [images / len(splits[run.config.data].train) for images in points]
        curves[f"K = {run.config.contrast.negatives:,}"] = (epochs, list(points.values()))
    remarks = dict.fromkeys(remark for result in results.values() for remark in result.remarks)
    plot_curves(
        out / f"{table.name}.png",
        curves,
        title="\n".join(["Figure 7: reconstruction of CIFAR-10's test images by negatives K", *remarks]),
        across="training epochs",
        up=f"pixel error of {held_out:,} images: mean square on [-1, 1]",
    )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a log, the last line of which may have been cut short."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
