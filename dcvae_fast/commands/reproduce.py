"""`dcvae reproduce`: train and measure the models of a table of the paper."""

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
        help="Train and measure the models of a table of the paper: see `dcvae reproduce --help`.",
        description="Train and measure the models of a table of the paper, and write the results next to the paper's"
        " numbers. To resume, run the same command again.",
        epilog="Also accepts all settings of `dcvae train`, such as --data.root, --train.device, or narrower networks;"
        " the tables list how each run differs from the paper's.",
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="table1 to table8, or figure7")
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="shorten every run to this many images shown")
    parser.add_argument(
        "--dry-run", action="store_true", help="show progress and remaining cost of all runs, then exit"
    )
    text = "folder for runs and tables (default: %(default)s)"
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/reproduce"), help=text)
    text = "add the row of the authors' public code to table1: recipe cifar10-official, measured by protocol official"
    parser.add_argument("--official", action="store_true", help=text)
    add_measuring(parser)
    parser.set_defaults(run_command=run, takes_settings=True)


def run(arguments: argparse.Namespace) -> int:
    check_weights(arguments.weights)
    if arguments.budget is not None and arguments.budget < 1:
        raise UserError(f"--budget is {arguments.budget}; it must be at least 1.")
    from dcvae_fast.reproduce import TABLES, WITH_OFFICIAL, plan, reproduce, trainings

    table = TABLES.get(arguments.table)
    if table is None:
        raise UserError(f"{arguments.table!r} is not a table of the paper; choose from {', '.join(TABLES)}.")
    if arguments.official:
        if table.name not in WITH_OFFICIAL:
            names = ", ".join(WITH_OFFICIAL)
            raise UserError(f"--official is given with {table.name}; only {names} has a row of the authors' code.")
        table = WITH_OFFICIAL[table.name]
    out: Path = arguments.out
    runs = trainings(table, out, arguments.settings, arguments.budget, lambda argv: parse_config(argv).config)
    if arguments.dry_run:
        print(plan(table, runs, arguments.images))
        return 0
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
