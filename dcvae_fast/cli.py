"""The `dcvae` command. A user's mistake gives one sentence and exit code 1, never a traceback."""

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dcvae_fast.config import Config, DataConfig, to_dict
from dcvae_fast.errors import ConfigError, RankError, RunError, UserError, reason
from dcvae_fast.recipes import RECIPES, recipe_argument, recipe_names
from dcvae_pipelines import DataError, load_dataset

SUMMARY_FILE = "summary.json"

# Settings that may differ from rank to rank.
OF_A_MACHINE = {"data.root", "data.threads", "train.device"}

# What the libraries for collectives say where another rank is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (128 + the signal where one stopped it).

    Training by several processes, or by DeepSpeed, ends this process instead.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["train"]:
        return _run(argv)
    from dcvae_fast.training.ranks import leave, met

    try:
        code = _run(argv)
    except Exception:
        if not met():
            raise
        traceback.print_exc()
        code = 1
    leave(code)
    return code


def _run(argv: list[str]) -> int:
    try:
        # All settings of a run are options of these; they have parsers of their own.
        if argv[:1] in (["train"], ["data"], ["reproduce"]):
            return {"train": _train, "data": _data, "reproduce": _reproduce}[argv[0]](argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run_command(arguments)
    except RankError:  # the other rank says it
        return 1
    except (UserError, DataError) as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.errno is None:
            raise
        message = f"{error.filename or 'writing'}: {os.strerror(error.errno)}"
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        extra = "eval" if package in ("torch_fidelity", "matplotlib", "scipy") else "train"
        message = f"{package} is not installed: pip install 'dcvae_fast[{extra}]'"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            message = f"out of memory ({reason(error)}); a smaller batch, width or number of images needs less"
        elif any(sign in str(error) for sign in LOST):
            message = "another rank has ended; its own message says why"
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"dcvae: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dcvae", description="Train and use DC-VAE models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run_command=run)
        return sub

    def model_command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, out: str
    ) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        sub.add_argument("model", metavar="RUN", help="a run folder, a saved model, or a name on the Hugging Face hub")
        sub.add_argument("--out", type=Path, default=Path(out), help=f"what to write (default: {out})")
        sub.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
        return sub

    command("train", lambda _: _train(["--help"]), "Train, or go on training, a run: see `dcvae train --help`.")

    text = "Write a grid of what a recipe's networks would see: dcvae data RECIPE [-n 64] [--data.root DIR …]."
    command("data", lambda _: _data(["--help"]), text)

    text = "Train and measure what a table of the paper shows: see `dcvae reproduce --help`."
    command("reproduce", lambda _: _reproduce(["--help"]), text)

    sub = command("prepare", _prepare, "Check all images of a data set, convert what needs it, pack them into shards.")
    sub.add_argument("source", metavar="SRC", type=Path, help="folder of the data set; nothing is ever written there")
    sub.add_argument(
        "target", metavar="DST", type=Path, help="folder for the shards: --data.name shards --data.root DST"
    )
    sub.add_argument("--name", default="folder", help="of the data set, as data.name in a recipe (default: folder)")
    sub.add_argument("--resolution", type=int, help="crop to squares and resize to this many pixels; default: leave it")
    sub.add_argument("--format", default="jpeg", help="of what is resized: jpeg (default), png or webp, both lossless")
    kinds = "corrupt, tiny, greyscale, cmyk, rotated, 16-bit"
    sub.add_argument("--skip", default="corrupt,tiny", help=f"of {kinds}: what to leave out (default: corrupt,tiny)")
    sub.add_argument("--per-shard", type=int, default=1000, help="source images a shard (default: 1000)")
    sub.add_argument("--workers", type=int, help="images worked on at once (default: one a core)")

    sub = model_command("sample", _sample, "Draw images from the prior.", "samples.png")
    sub.add_argument("-n", type=int, default=64, help="how many (default: 64)")
    sub.add_argument("--seed", type=int, default=0, help="of the latents (default: 0)")

    sub = model_command("reconstruct", _reconstruct, "Reconstruct image files.", "reconstructions.png")
    sub.add_argument("images", metavar="IMAGE", nargs="+", type=Path)

    sub = model_command("interpolate", _interpolate, "Walk from one image to another.", "interpolation.png")
    sub.add_argument("start", metavar="IMAGE1", type=Path)
    sub.add_argument("end", metavar="IMAGE2", type=Path)
    sub.add_argument("--steps", type=int, default=8, help="decoded images, both ends included (default: 8)")

    text = "Measure a model as the paper does: a table, and RUN/evaluation.json."
    sub = command("evaluate", _evaluate, text)
    sub.add_argument("model", metavar="RUN", help="a run folder, a saved model, or a name on the Hugging Face hub")
    metrics = "fid, is (Inception score), kid, prc (precision, recall), pixel, perceptual, ppl (path length), probe"
    sub.add_argument("--metrics", default="fid,is,pixel,perceptual", help=f"of {metrics} (default: %(default)s)")
    text = "paper (default), or official: clamped samples, reconstructions from draws, as in the authors' code"
    sub.add_argument("--protocol", default="paper", help=text)
    sub.add_argument("--data.name", dest="data_name", metavar="NAME", help="data set (default: the run's)")
    sub.add_argument("--data.root", dest="data_root", metavar="DIR", help="its folder (default: the run's)")
    text = "samples, and test images at most (default: 50,000); ppl takes twice as many pairs"
    sub.add_argument("-n", "--images", type=int, default=50_000, help=text)
    sub.add_argument("--batch", type=int, help="images at once (default: what needs little memory)")
    sub.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    sub.add_argument("--weights", type=Path, metavar="DIR", help="folder with Inception's, VGG16's and LPIPS's weights")
    text = "folder for features of training images (default: ~/.cache/dcvae_fast)"
    sub.add_argument("--cache", type=Path, metavar="DIR", default=Path("~/.cache/dcvae_fast"), help=text)
    sub.add_argument("--out", type=Path, metavar="FILE", help="what to write (default: evaluation.json in RUN)")

    model_command("export", _export, "Save a run's model as safetensors, config.json and a model card.", "exported")

    sub = command("import-official", _import_official, "Save a checkpoint of the authors' code as a model of ours.")
    sub.add_argument("folder", metavar="DIR", type=Path, help="folder with {epoch}_encoder.sd and the like")
    sub.add_argument("--epoch", type=int, required=True)
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


class Options(NamedTuple):
    """Those of `dcvae train`."""

    config: Config
    run: Path
    dry_run: bool
    profile: bool


def parse_config(argv: Sequence[str]) -> Options:
    """The command line of `dcvae train`.

    Raises:
        ConfigError: an unknown setting, or a value that has no meaning.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description="Train, or go on training, a DC-VAE. Recipes: " + ", ".join(recipe_names()) + ".",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action=jsonargparse.ActionConfigFile, help="a recipe's name, or a .yaml file")
    parser.add_argument("--run", type=str | None, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done and what it costs, then stop")
    parser.add_argument("--profile", action="store_true", help="profile a few iterations, into RUN/profile")
    parser.add_class_arguments(Config)

    # What the launchers of several processes put in, and what users of DeepSpeed are used to.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--local_rank", type=int)
    first.add_argument("--deepspeed", action="store_true")
    first.add_argument("--deepspeed_config")
    chosen, argv = first.parse_known_args(argv)
    if chosen.deepspeed_config is not None:
        argv = [*argv, "--train.deepspeed_config", chosen.deepspeed_config]
    recipe = chosen.recipe
    if recipe is not None:  # in front, wherever it stood: settings on the command line override it
        argv = ["--recipe", recipe_argument(recipe), *argv]
    elif not {"-h", "--help", "--print_config"} & set(argv):
        known = ", ".join(recipe_names())
        raise ConfigError(f"--recipe is missing; the recipes are {known}, or a path to a .yaml file.")
    try:
        parsed = parser.parse_args(argv)
        settings = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, ValueError) as error:  # a malformed recipe can raise any of them
        raise ConfigError(f"{' '.join(str(error).split())} (in recipe {recipe} or on the command line).") from error
    config = Config(**{section: settings[section] for section in Config.__dataclass_fields__})
    if config.train.engine == "auto" and (chosen.deepspeed or chosen.local_rank is not None):
        config = replace(config, train=replace(config.train, engine="deepspeed"))
    name = recipe if recipe in RECIPES else Path(str(recipe)).stem
    return Options(config, Path(parsed.run or f"runs/{name}"), parsed.dry_run, parsed.profile)


def _train(argv: Sequence[str]) -> int:
    from dcvae_fast.training.ranks import join

    ranks = join()
    with ranks.together():
        config, folder, dry_run, profile = parse_config(argv)
    settings = {f"{section}.{name}": x for section, some in to_dict(config).items() for name, x in some.items()}
    ranks.check_same({"--dry-run": dry_run, **{name: x for name, x in settings.items() if name not in OF_A_MACHINE}})
    if dry_run:
        if ranks.first:
            _print_plan(config)
        return 0
    from dcvae_fast.training.loop import train

    began = time.perf_counter()
    outcome = train(config, folder, ranks, profile)
    if outcome.signal:
        if ranks.first:
            print(f"Stopped after {outcome.images:,} of {config.train.images:,} images; the same command goes on.")
        return 128 + outcome.signal
    if not ranks.first:
        return 0
    if outcome.trained:
        print(f"{outcome.images:,} images shown; this call took {(time.perf_counter() - began) / 60:.1f} minutes.")
    else:
        print(f"{folder} is done: {outcome.images:,} images shown, {config.train.images:,} asked for.")
    print(_summary(config, folder, outcome.images))
    return 0


def _print_plan(config: Config) -> None:
    from dcvae_fast.training.loop import open_data, pick_device
    from dcvae_fast.training.plan import plan

    print(plan(config, open_data(config, "train"), pick_device(config.train.device)))


def _data(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dcvae data",
        description="Write a grid of what a recipe's networks would see, from its first batches on.",
        epilog="All settings of `dcvae train` can be given too, such as --data.root.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(recipe_names())}, or a .yaml file")
    parser.add_argument("-n", "--n", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("data.png"), help="what to write (default: data.png)")
    arguments, settings = parser.parse_known_args(argv)
    if arguments.n < 1:
        raise UserError(f"--n is {arguments.n}; it must be at least 1.")
    config = parse_config(["--recipe", arguments.recipe, *settings]).config
    import torch

    from dcvae_fast.training.loop import open_source, pick_device, training_images

    source = open_source(config, training_images(config), pick_device(config.train.device))
    source.set_resolution(config.model.resolution)  # to which it grows
    shown = []
    for batch in source:
        shown += batch.images.cpu()
        if len(shown) >= arguments.n:
            break
    return _write_sheet(arguments.out, torch.stack(shown[: arguments.n]), columns=8)


def _prepare(arguments: argparse.Namespace) -> int:
    from dcvae_pipelines.prepare import prepare

    summary = prepare(
        arguments.source,
        arguments.target,
        name=arguments.name,
        resolution=arguments.resolution,
        format=arguments.format,
        skip=[kind for kind in arguments.skip.split(",") if kind],
        per_shard=arguments.per_shard,
        workers=arguments.workers,
        progress=_counter("images"),
    )
    for kind, found in summary.kinds.items():
        if found.names:
            print(f"{kind}: {len(found.names):,} ({found.converted:,} converted, {found.skipped:,} left out)")
            for name in found.names[:20]:
                print(f"    {name}")
            if len(found.names) > 20:
                print(f"    and {len(found.names) - 20:,} more, in {arguments.target / 'manifest.json'}")
    packed = " and ".join(f"{count:,} for {split}" for split, count in summary.packed.items())
    size = sum(shard["bytes"] for shard in summary.shards) / 2**20
    print(
        f"Packed {packed}, {size:,.1f} MiB in {len(summary.shards):,} shards; {summary.kept:,} as they were,"
        f" {summary.converted:,} converted, {summary.skipped:,} left out."
    )
    print(f"Train on them with --data.name shards --data.root {arguments.target}")
    return 0


def _counter(what: str) -> Callable[[int, int], None]:
    """Progress on the terminal, ten times a second, or in a log every tenth of the way."""
    shown, began = -1.0, time.perf_counter()

    def count(done: int, total: int) -> None:
        nonlocal shown
        seconds = time.perf_counter() - began
        now, step = (seconds, 0.1) if sys.stderr.isatty() else (done / total, 0.1)
        if done < total and now < shown + step:
            return
        shown = now
        ending = "\n" if done == total or not sys.stderr.isatty() else ""
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{done:,} / {total:,} {what}, {seconds:.0f} s", end=ending, file=sys.stderr, flush=True)

    return count


def _counters() -> Callable[[str, int, int], None]:
    """Progress of several things, one after the other."""
    what_now, counter = "", _counter("")

    def count(what: str, done: int, total: int) -> None:
        nonlocal what_now, counter
        if what != what_now:
            what_now, counter = what, _counter(what)
        counter(done, total)
        if done == total:  # the next one may be of the same
            what_now = ""

    return count


def _summary(config: Config, folder: Path, images: int) -> str:
    """Reconstruction error and linear probe on held-out images, measured once and kept in RUN/summary.json."""
    from dcvae_fast.training.checkpoint import write_aside

    path = folder / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        summary = None
    if not isinstance(summary, dict) or summary.get("images") != images:
        summary = {"images": images, **_measure(config, folder)}
        write_aside(path, (json.dumps(summary, indent=2) + "\n").encode())
    probe = summary.get("probe_accuracy")
    return (
        f"On {summary['held_out']:,} held-out images: reconstruction error {summary['pixel_error']:.4f}"
        f" (predicting the mean image: {summary['mean_image_error']:.4f})"
        + ("" if probe is None else f"; a linear probe on the latents names {probe:.1%} rightly")
        + f". Look at {folder / 'grids'}."
    )


def _measure(config: Config, folder: Path) -> dict[str, float]:
    from dcvae_fast.evaluation.images import reconstructions
    from dcvae_fast.evaluation.perceptual import images_at_once, mean_image_error, pixel_error
    from dcvae_fast.evaluation.probe import linear_probe, posterior_means
    from dcvae_fast.models.dcvae import DCVAE
    from dcvae_fast.training.loop import first_images, pick_device

    model = DCVAE.from_pretrained(folder, device=pick_device(config.train.device))
    # A few thousand tell enough at the end of a run; `evaluate` measures on all.
    resolution = model.config.resolution
    few, at_once = 32**2 / resolution**2, images_at_once(resolution)  # as many pixels at every resolution
    train_set = first_images(config, "train", max(64, int(5000 * few)), resolution)
    held_out = first_images(config, "test", max(64, int(2000 * few)), resolution)
    measured = {
        "held_out": len(held_out),
        "pixel_error": pixel_error(reconstructions(model, [held_out], at_once))[0],
        "mean_image_error": mean_image_error(held_out.images, train_set.images),
    }
    if train_set.labels is not None and held_out.labels is not None:
        latents = [posterior_means(model, [images], at_once) for images in (train_set, held_out)]
        measured["probe_accuracy"] = 1 - linear_probe(*latents, device=model.device).mean().item()
    return measured


def _load_model(arguments: argparse.Namespace):
    from dcvae_fast.models.dcvae import DCVAE
    from dcvae_fast.training.loop import pick_device

    return DCVAE.from_pretrained(arguments.model, device=pick_device(arguments.device))


def _load_images(model, paths: Sequence[Path]):
    import torch

    from dcvae_pipelines import load_image

    config = model.config
    return torch.stack([load_image(path, config.image_channels, config.resolution) for path in paths]).to(model.device)


def _write_sheet(path: Path, tiles, columns: int) -> int:
    from dcvae_fast.training.log import make_grid, png_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(make_grid(tiles, columns)))
    print(path)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.n < 1:
        raise UserError(f"-n is {arguments.n}; it must be at least 1.")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; it must be from 0 to 2⁶³ − 1.")
    from dcvae_fast.evaluation.perceptual import images_at_once

    model, generator = _load_model(arguments), torch.Generator().manual_seed(arguments.seed)
    at_once = images_at_once(model.config.resolution)
    parts = [min(at_once, arguments.n - start) for start in range(0, arguments.n, at_once)]
    samples = torch.cat([model.sample(part, generator=generator).cpu() for part in parts])
    return _write_sheet(arguments.out, samples, columns=min(8, arguments.n))


def _reconstruct(arguments: argparse.Namespace) -> int:
    import torch

    model = _load_model(arguments)
    images = _load_images(model, arguments.images)
    pairs = torch.stack([images, model.reconstruct(images)], dim=1)  # the image, and to its right what became of it
    return _write_sheet(arguments.out, pairs.flatten(0, 1), columns=2 * min(4, len(images)))


def _interpolate(arguments: argparse.Namespace) -> int:
    from dcvae_fast.evaluation.latent import interpolate

    if arguments.steps < 2:
        raise UserError(f"--steps is {arguments.steps}; it must be at least 2.")
    model = _load_model(arguments)
    start, end = _load_images(model, [arguments.start, arguments.end]).split(1)
    return _write_sheet(arguments.out, interpolate(model, start, end, arguments.steps)[0], columns=arguments.steps + 2)


def _evaluate(arguments: argparse.Namespace) -> int:
    from dcvae_fast.evaluation import Measurement, evaluate
    from dcvae_fast.evaluation.measurement import EVALUATION_FILE, describe, read, store, table

    metrics = [metric.strip() for metric in arguments.metrics.split(",") if metric.strip()]
    _check_weights(arguments.weights)
    folder = Path(arguments.model)
    out = arguments.out or (folder if folder.is_dir() else Path()) / EVALUATION_FILE
    read(out)  # hours later would be too late to find that it is something else
    model = _load_model(arguments)
    data, images = _data_of(arguments, needed=metrics != ["ppl"])
    head = describe(model, images)

    def report(measurement: Measurement) -> None:
        store(out, head, measurement)

    measured = evaluate(
        model,
        data,
        metrics,
        protocol=arguments.protocol,
        images=arguments.images,
        batch=arguments.batch,
        seed=arguments.seed,
        weights=arguments.weights,
        cache=arguments.cache.expanduser(),
        report=report,
        progress=_counters(),
    )
    print(table(measured))
    print(out)
    return 0


def _check_weights(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UserError(f"--weights {folder} is no folder.")


def _reproduce(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dcvae reproduce",
        description="Train what a table of the paper needs, measure it, and write it beside the paper's numbers. Run"
        " again, it goes on where it was.",
        epilog="All settings of `dcvae train` can be given too, such as --data.root, --train.device, or narrower"
        " networks; what departs from the paper is said beside each number.",
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="table1 to table8, or figure7")
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="shorten every training to so many images")
    parser.add_argument("--dry-run", action="store_true", help="show what is there and what the rest costs, then stop")
    text = "folder for runs and tables (default: runs/reproduce)"
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/reproduce"), help=text)
    text = "samples, and test images at most (default: 50,000); ppl takes twice as many pairs"
    parser.add_argument("-n", "--images", type=int, default=50_000, help=text)
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with Inception's, VGG16's, LPIPS's weights")
    text = "folder for features of training images (default: ~/.cache/dcvae_fast)"
    parser.add_argument("--cache", type=Path, metavar="DIR", default=Path("~/.cache/dcvae_fast"), help=text)
    arguments, settings = parser.parse_known_args(argv)
    _check_weights(arguments.weights)
    if arguments.budget is not None and arguments.budget < 1:
        raise UserError(f"--budget is {arguments.budget}; it must be at least 1.")
    from dcvae_fast.reproduce import TABLES, plan, reproduce, trainings

    table = TABLES.get(arguments.table)
    if table is None:
        raise UserError(f"{arguments.table!r} is no table of the paper; there are {', '.join(TABLES)}.")
    out: Path = arguments.out
    runs = trainings(table, out, settings, arguments.budget, lambda argv: parse_config(argv).config)
    if arguments.dry_run:
        print(plan(table, runs, arguments.images))
        return 0
    return reproduce(
        table,
        runs,
        out,
        images=arguments.images,
        weights=arguments.weights,
        cache=arguments.cache.expanduser(),
        progress=_counters(),
    )


def _data_of(arguments: argparse.Namespace, needed: bool):
    """The data set that the options or the run's own settings name, and how many images the run has been shown."""
    from dcvae_fast.evaluation import Splits
    from dcvae_fast.training.checkpoint import is_run, load_checkpoint

    data, images, folder = None, None, Path(arguments.model)
    if is_run(folder) and (state := load_checkpoint(folder)):
        data, images = DataConfig(**state["config"]["data"]), state["step"]["images"]
    name, root = arguments.data_name, arguments.data_root
    if name is not None and (data is None or name != data.name):
        data = DataConfig(name=name)
    if not needed:
        return None, images
    if data is None:
        raise UserError(f"--data.name is missing: {folder} is no run, which would know its data set.")
    if root is not None:
        data = replace(data, root=root)
    train, test = (load_dataset(data.name, data.root, split, data.download) for split in ("train", "test"))
    return Splits(train, test, data.on_corrupt), images


def _export(arguments: argparse.Namespace) -> int:
    _refuse_full(arguments.out)
    _load_model(arguments).save_pretrained(arguments.out)
    print(arguments.out)
    return 0


def _import_official(arguments: argparse.Namespace) -> int:
    from dcvae_fast.models.official import load_official

    _refuse_full(arguments.out)
    load_official(arguments.folder, arguments.epoch).model.save_pretrained(arguments.out)
    print(arguments.out)
    return 0


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"--out {folder} exists and is not empty; choose another folder.")


if __name__ == "__main__":
    sys.exit(main())
