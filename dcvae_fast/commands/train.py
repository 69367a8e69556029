"""`dcvae train`, and the parser of its settings, which `data` and `reproduce` use too."""

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

# Settings that may differ from rank to rank.
OF_A_MACHINE = {"data.root", "data.threads", "train.device"}

# Options that print something and exit; they need no recipe.
SHOWING = {"-h", "--help", "--print_config"}


class Options(NamedTuple):
    """Options of `dcvae train`."""

    config: Config
    run: Path
    dry_run: bool
    profile: bool


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add train to argparse's subparsers."""
    text = "Train a run, or continue one: see `dcvae train --help`."
    parser = commands.add_parser("train", help=text, add_help=False, allow_abbrev=False)
    parser.set_defaults(run_command=run, takes_settings=True)


def parse_config(argv: Sequence[str]) -> Options:
    """Parse the command line of `dcvae train`.

    Raises:
        ConfigError: a setting is unknown or has been renamed, or its value has no meaning.
    """
    check_names(argv)
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description=f"Train a DC-VAE, or continue. Recipes: {known_recipes()}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action=jsonargparse.ActionConfigFile, help="a recipe's name, or a .yaml file")
    parser.add_argument("--run", type=str | None, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done and what it costs, then stop")
    parser.add_argument("--profile", action="store_true", help="profile a few iterations, into RUN/profile")
    parser.add_class_arguments(Config)

    # Options that launchers of several processes add, and that users of DeepSpeed expect.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--local_rank", type=int)
    first.add_argument("--deepspeed", action="store_true")
    first.add_argument("--deepspeed_config")
    chosen, argv = first.parse_known_args(argv)
    if chosen.deepspeed_config is not None:
        argv = [*argv, "--train.deepspeed_config", chosen.deepspeed_config]
    recipe = chosen.recipe
    if recipe is not None:  # first, so that settings on the command line override it
        argv = ["--recipe", recipe_argument(recipe), *argv]
    elif not SHOWING & set(argv):
        raise ConfigError(f"--recipe is missing; the recipes are {known_recipes()}.")
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


def run(arguments: argparse.Namespace) -> int:
    """Train; returns 0, or 128 + the signal that stopped it."""
    if SHOWING & set(arguments.settings):
        parse_config(arguments.settings)  # exits, before torch is imported
    from dcvae_fast.distributed import init_distributed

    ranks = init_distributed()
    with ranks.raise_on_all_ranks():
        config, folder, dry_run, profile = parse_config(arguments.settings)
    settings = {f"{section}.{name}": x for section, some in to_dict(config).items() for name, x in some.items()}
    ranks.check_same({"--dry-run": dry_run, **{name: x for name, x in settings.items() if name not in OF_A_MACHINE}})
    if dry_run:
        if ranks.is_first:
            _print_plan(config)
        return 0
    from dcvae_fast.training.loop import train

    began = time.perf_counter()
    outcome = train(config, folder, ranks, profile)
    if ranks.is_first:
        _report(config, folder, outcome, minutes=(time.perf_counter() - began) / 60)
    return 128 + outcome.signal if outcome.signal else 0


def _report(config: Config, folder: Path, outcome: "Outcome", minutes: float) -> None:
    images, asked = outcome.images, config.train.images
    if outcome.signal:
        logger.info(f"Stopped after {images:,} of {asked:,} images; run the same command to resume.")
        return
    if outcome.trained:
        logger.info(f"{images:,} images shown; this call took {minutes:.1f} minutes.")
    else:
        logger.info(f"{folder} is done: {images:,} images shown, {asked:,} asked for.")
    logger.info(_summary(folder, images))


def _print_plan(config: Config) -> None:
    from dcvae_fast.distributed import pick_device
    from dcvae_fast.training.data import open_data
    from dcvae_fast.training.plan import plan

    print(plan(config, open_data(config, "train"), pick_device(config.train.device)))


def _summary(folder: Path, images: int) -> str:
    """Return the metrics of held-out images after `images` images, if the run has measured any, and where to look."""
    from dcvae_fast.run_folder import GRIDS, read_metrics

    records = [record for record in read_metrics(folder) if "held_out/pixel_mse" in record]
    measured = records[-1] if records and records[-1]["images"] == images else {}
    texts = {
        "pixel_mse": "pixel error {:.4f}",
        "probe_accuracy": "accuracy of a linear probe {:.1%}",
        "fid": "FID {:.4g}",
    }
    parts = [
        text.format(measured[f"held_out/{name}"]) for name, text in texts.items() if f"held_out/{name}" in measured
    ]
    look = f"Look at {folder / GRIDS}."
    return f"On held-out images: {', '.join(parts)}. {look}" if parts else look
