"""`dcvae reproduce`: train and measure the models of a table or figure of the paper."""

import argparse
from pathlib import Path

from dcvae_fast.commands.common import add_measuring, check_weights
from dcvae_fast.commands.train import parse_config
from dcvae_fast.errors import UserError
from dcvae_fast.progress import progress_bars


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add reproduce to argparse's subparsers."""
    parser = commands.add_parser(
        "reproduce",
        help="Train and measure the models of a table or figure of the paper: see `dcvae reproduce --help`.",
        description="Train the models of a table or figure of the paper. For a table, measure them and write the"
        " results next to the paper's numbers; for a figure, draw their images. To resume, run the same command again.",
        epilog="Also accepts all settings of `dcvae train`, such as --data.root, --train.device, or narrower networks;"
        " the results list how each run differs from the paper's.",
        allow_abbrev=False,
    )
    text = "table1 to table8, figure1, figure3, figure4, figure7, figure8, figure10 or figure14"
    parser.add_argument("table", metavar="TABLE", help=text)
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="shorten every run to this many images shown")
    parser.add_argument(
        "--dry-run", action="store_true", help="show progress and remaining cost of all runs, then exit"
    )
    text = "folder for runs and results (default: %(default)s)"
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/reproduce"), help=text)
    text = "add the row of the authors' public code to table1: recipe cifar10-official, measured by protocol official"
    parser.add_argument("--official", action="store_true", help=text)
    add_measuring(parser)
    measuring = {name: parser.get_default(name) for name in ("images", "weights", "cache")}
    parser.set_defaults(run_command=run, takes_settings=True, measuring=measuring)


def run(arguments: argparse.Namespace) -> int:
    check_weights(arguments.weights)
    if arguments.budget is not None and arguments.budget < 1:
        raise UserError(f"--budget is {arguments.budget}; it must be at least 1.")
    from dcvae_fast.reproduce import FIGURES, TABLES, WITH_OFFICIAL, plan, reproduce, reproduce_figure, trainings
    from dcvae_fast.reproduce.paper import Figure

    known = TABLES | FIGURES
    if arguments.table not in known:
        names = sorted(known, key=lambda name: (name.startswith("figure"), len(name), name))
        raise UserError(
            f"{arguments.table!r} is not a table or figure that can be reproduced; choose from {', '.join(names)}."
        )
    if arguments.table in FIGURES:
        _check_not_measuring(arguments)
    table, out = known[arguments.table], arguments.out
    if arguments.official:
        if table.name not in WITH_OFFICIAL:
            names = ", ".join(WITH_OFFICIAL)
            raise UserError(f"--official is given with {table.name}; only {names} has a row of the authors' code.")
        table = WITH_OFFICIAL[table.name]
    runs = trainings(table, out, arguments.settings, arguments.budget, lambda argv: parse_config(argv).config)
    if arguments.dry_run:
        print(plan(table, runs, arguments.images))
        return 0
    if isinstance(table, Figure):
        return reproduce_figure(table, runs, out)
    with progress_bars() as progress:
        return reproduce(
            table,
            runs,
            out,
            images=arguments.images,
            weights=arguments.weights,
            cache=arguments.cache.expanduser(),
            progress=progress,
        )


def _check_not_measuring(arguments: argparse.Namespace) -> None:
    """Check that no option for measurements is given for a figure of images.

    Raises:
        UserError: one is given.
    """
    for name, default in arguments.measuring.items():
        if getattr(arguments, name) != default:
            raise UserError(f"--{name} is an option for tables; {arguments.table} shows images and measures nothing.")
