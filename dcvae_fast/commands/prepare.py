"""`dcvae prepare` and `dcvae data`: prepare and look at training images."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dcvae_fast.commands.common import add_out, write_grid
from dcvae_fast.commands.train import parse_config
from dcvae_fast.errors import UserError
from dcvae_fast.progress import progress_bars
from dcvae_fast.recipes import known_recipes

if TYPE_CHECKING:
    from dcvae_pipelines.prepare import Summary


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add prepare and data to argparse's subparsers."""
    text = "Check all images of a data set, convert those that need it, and pack them into shards."
    parser = commands.add_parser("prepare", help=text, description=text)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the data set; never modified")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="folder for the shards; train with --data.name shards --data.root DST"
    )
    parser.add_argument(
        "--name", default="folder", help="kind of data set, as in --data.name of dcvae train (default: folder)"
    )
    text = "crop images to squares and resize them to this many pixels (default: keep their size)"
    parser.add_argument("--resolution", type=int, help=text)
    text = "format of resized images: jpeg (default), png (lossless) or webp (lossless)"
    parser.add_argument("--format", default="jpeg", help=text)
    kinds = "corrupt, tiny, greyscale, cmyk, rotated, 16-bit"
    text = f"kinds of images to leave out, comma-separated, of {kinds} (default: %(default)s)"
    parser.add_argument("--skip", default="corrupt,tiny", help=text)
    parser.add_argument("--per-shard", type=int, default=1000, help="number of source images per shard (default: 1000)")
    parser.add_argument("--workers", type=int, help="images processed in parallel (default: one per core)")
    parser.set_defaults(run_command=run_prepare)

    parser = commands.add_parser(
        "data",
        help="Write a PNG grid of the first training images of a recipe, as the networks see them.",
        description="Write a PNG grid of the first training images of a recipe, as the networks see them.",
        epilog="Also accepts all settings of `dcvae train`, such as --data.root.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=known_recipes())
    parser.add_argument("-n", "--n", type=int, default=64, help="number of images (default: 64)")
    add_out(parser, "data.png")
    parser.set_defaults(run_command=run_data, takes_settings=True)


def run_prepare(arguments: argparse.Namespace) -> int:
    from dcvae_pipelines.prepare import prepare

    with progress_bars() as report:
        summary = prepare(
            arguments.source,
            arguments.target,
            name=arguments.name,
            resolution=arguments.resolution,
            format=arguments.format,
            skip=[kind for kind in arguments.skip.split(",") if kind],
            per_shard=arguments.per_shard,
            workers=arguments.workers,
            progress=partial(report, "images"),
        )
    _print_summary(summary, arguments.target)
    return 0


def _print_summary(summary: "Summary", target: Path) -> None:
    for kind, images in summary.kinds.items():
        if images.names:
            print(f"{kind}: {len(images.names):,} ({images.converted:,} converted, {images.skipped:,} left out)")
            for name in images.names[:20]:
                print(f"    {name}")
            if len(images.names) > 20:
                print(f"    and {len(images.names) - 20:,} more, in {target / 'manifest.json'}")
    packed = " and ".join(f"{count:,} for {split}" for split, count in summary.packed.items())
    size = sum(shard["bytes"] for shard in summary.shards) / 2**20
    print(
        f"Packed {packed}, {size:,.1f} MiB in {len(summary.shards):,} shards; {summary.kept:,} unchanged,"
        f" {summary.converted:,} converted, {summary.skipped:,} left out."
    )
    print(f"Train on them with --data.name shards --data.root {target}")


def run_data(arguments: argparse.Namespace) -> int:
    if arguments.n < 1:
        raise UserError(f"--n is {arguments.n}; it must be at least 1.")
    config = parse_config(["--recipe", arguments.recipe, *arguments.settings]).config
    import torch

    from dcvae_fast.distributed import pick_device
    from dcvae_fast.training.data import open_source, training_images

    source = open_source(config, training_images(config), pick_device(config.train.device))
    source.set_resolution(config.model.resolution)  # the final one
    images = []
    for batch in source:
        images += batch.images.cpu()
        if len(images) >= arguments.n:
            break
    write_grid(arguments.out, torch.stack(images[: arguments.n]), columns=8)
    return 0
