"""`dcvae train`, and the parser of its settings, which `data` and `reproduce` share."""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dcvae_fast.config import Config, to_dict
from dcvae_fast.errors import ConfigError
from dcvae_fast.recipes import RECIPES, known_recipes, recipe_argument
from dcvae_fast.renamed import check_names

if TYPE_CHECKING:
    from dcvae_fast.training.loop import Outcome

logger = logging.getLogger(__name__)

# Settings that can differ between ranks.
PER_RANK = {"data.root", "data.threads", "train.device"}

# Options that print something and exit, and need no recipe.
PRINT_ONLY = {"-h", "--help", "--print_config"}


class Options(NamedTuple):
    """Options of `dcvae train`."""

    config: Config
    run: Path
    dry_run: bool
    profile: bool


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add train to argparse's subparsers."""
    text = "Train a model, or resume a run: see `dcvae train --help`."
    parser = commands.add_parser("train", help=text, add_help=False, allow_abbrev=False)
    parser.set_defaults(run_command=run, takes_settings=True)


def parse_config(argv: Sequence[str]) -> Options:
    """Parse the command line of `dcvae train`.

    Raises:
        ConfigError: a setting is unknown, has been renamed or has an invalid value.
    """
    check_names(argv)
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description=f"Train a DC-VAE; to resume a run, run the same command again. Recipes: {known_recipes()}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action=jsonargparse.ActionConfigFile, help="name of a recipe, or a .yaml file")
    parser.add_argument("--run", type=str | None, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--dry-run", action="store_true", help="show the training plan and its cost, then exit")
    parser.add_argument("--profile", action="store_true", help="profile a few iterations; traces go to RUN/profile")
    parser.add_class_arguments(Config)

    # Options that launchers add, and that DeepSpeed users expect.
    launcher_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher_parser.add_argument("--recipe")
    launcher_parser.add_argument("--local_rank", type=int)
    launcher_parser.add_argument("--deepspeed", action="store_true")
    launcher_parser.add_argument("--deepspeed_config")
    launcher, argv = launcher_parser.parse_known_args(argv)
    if launcher.deepspeed_config is not None:
        argv = [*argv, "--train.deepspeed_config", launcher.deepspeed_config]
    recipe = launcher.recipe
    if recipe is not None:  # placed first, so that settings on the command line override it
        argv = ["--recipe", recipe_argument(recipe), *argv]
    elif not PRINT_ONLY & set(argv):
        raise ConfigError(f"--recipe is missing; choose from {known_recipes()}.")
    try:
        parsed = parser.parse_args(argv)
        settings = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, ValueError) as error:  # a malformed recipe can raise any of these
        raise ConfigError(f"{' '.join(str(error).split())} (in recipe {recipe} or on the command line).") from error
    config = Config(**{section: settings[section] for section in Config.__dataclass_fields__})
    if config.train.engine == "auto" and (launcher.deepspeed or launcher.local_rank is not None):
        config = replace(config, train=replace(config.train, engine="deepspeed"))
    name = recipe if recipe in RECIPES else Path(str(recipe)).stem
    return Options(config, Path(parsed.run or f"runs/{name}"), parsed.dry_run, parsed.profile)


def run(arguments: argparse.Namespace) -> int:
    """Train; return 0, or 128 + the signal that stopped training."""
    if PRINT_ONLY & set(arguments.settings):
        parse_config(arguments.settings)  # exits before torch is imported
    from dcvae_fast.distributed import init_distributed

    ranks = init_distributed()
    with ranks.raise_on_all_ranks():
        config, folder, dry_run, profile = parse_config(arguments.settings)
    settings = {
        f"{section}.{name}": value for section, values in to_dict(config).items() for name, value in values.items()
    }
    shared = {name: value for name, value in settings.items() if name not in PER_RANK}
    ranks.check_same({"--dry-run": dry_run, **shared})
    if dry_run:
        if ranks.is_first:
            _print_plan(config)
        return 0
    from dcvae_fast.training.loop import train

    start = time.perf_counter()
    outcome = train(config, folder, ranks, profile)
    if ranks.is_first:
        _report(config, folder, outcome, minutes=(time.perf_counter() - start) / 60)
    return 128 + outcome.signal if outcome.signal else 0


def _report(config: Config, folder: Path, outcome: "Outcome", minutes: float) -> None:
    images, target = outcome.images, config.train.images
    if outcome.signal:
        logger.info(f"Stopped after {images:,} of {target:,} images; run the same command to resume.")
        return
    if outcome.trained:
        logger.info(f"{images:,} images shown; this command took {minutes:.1f} minutes.")
    else:
        logger.info(f"{folder} is complete: {images:,} images shown, train.images is {target:,}.")
    logger.info(_summary(folder, images))


def _print_plan(config: Config) -> None:
    from dcvae_fast.distributed import pick_device
    from dcvae_fast.training.data import open_data
    from dcvae_fast.training.plan import plan

    print(plan(config, open_data(config, "train"), pick_device(config.train.device)))


def _summary(folder: Path, images: int) -> str:
    """Return the held-out metrics after `images` images shown, if the run has measured any, and the folder of grids."""
    from dcvae_fast.run_folder import GRIDS, read_metrics

    records = [record for record in read_metrics(folder) if "held_out/pixel_mse" in record]
    measured = records[-1] if records and records[-1]["images"] == images else {}
    texts = {
        "pixel_mse": "pixel error {:.4f}",
        "probe_accuracy": "linear probe accuracy {:.1%}",
        "fid": "FID {:.4g}",
    }
    parts = [
        text.format(measured[f"held_out/{name}"]) for name, text in texts.items() if f"held_out/{name}" in measured
    ]
    grids = f"Image grids are in {folder / GRIDS}."
    return f"On held-out images: {', '.join(parts)}. {grids}" if parts else grids
