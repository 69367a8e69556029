"""`dcvae evaluate`: measure a model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcvae_fast.commands.common import add_measuring, add_model, check_weights, load_model
from dcvae_fast.config import DataConfig
from dcvae_fast.errors import UserError
from dcvae_fast.progress import progress_bars

if TYPE_CHECKING:
    from dcvae_fast.evaluation import Splits


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add evaluate to argparse's subparsers."""
    text = "Measure a model as the paper does, print a table and write RUN/evaluation.json."
    parser = commands.add_parser("evaluate", help=text, description=text)
    add_model(parser)
    metrics = "fid, is (Inception score), kid, prc (precision, recall), pixel, perceptual, ppl (path length), probe"
    text = f"comma-separated list of {metrics} (default: %(default)s)"
    parser.add_argument("--metrics", default="fid,is,pixel,perceptual", help=text)
    text = (
        "paper (default: FID and IS of 50,000 samples and 50,000 reconstructions, each from a draw from the posterior);"
        " once (each published test image once, from the posterior mean, and no samples); or official (authors' code:"
        " clamped latents, all reconstructions from draws, pixels rounded down). Features come from torch-fidelity's"
        " Inception, and real images from the training split. Values of official are not exactly comparable with the"
        " authors', who use pytorch-fid's Inception and stored statistics of real images"
    )
    parser.add_argument("--protocol", default="paper", help=text)
    parser.add_argument("--data.name", dest="data_name", metavar="NAME", help="data set (default: the run's)")
    parser.add_argument("--data.root", dest="data_root", metavar="DIR", help="folder of the data (default: the run's)")
    add_measuring(parser)
    parser.add_argument("--batch", type=int, help="images per forward pass (default: fewer at higher resolution)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write (default: evaluation.json in RUN)")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    from dcvae_fast.evaluation import Measurement, evaluate
    from dcvae_fast.evaluation.measurement import EVALUATION_FILE, describe, read, store, table

    metrics = [metric.strip() for metric in arguments.metrics.split(",") if metric.strip()]
    check_weights(arguments.weights)
    folder = Path(arguments.model)
    out = arguments.out or (folder if folder.is_dir() else Path()) / EVALUATION_FILE
    read(out)  # reject any other kind of file now, not after hours
    model = load_model(arguments)
    data, images = _data_of(arguments, needed=metrics != ["ppl"])
    head = describe(model, images)

    def report(measurement: Measurement) -> None:
        store(out, head, measurement)

    with progress_bars() as progress:
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
            progress=progress,
        )
    print(table(measured))
    print(out)
    return 0


def _data_of(arguments: argparse.Namespace, needed: bool) -> "tuple[Splits | None, int | None]":
    """Return the data set and the number of images shown in training.

    The data set comes from the options or the run's settings; None if `needed` is false. The number is None if the
    model is not a run.
    """
    from dcvae_fast.evaluation import Splits
    from dcvae_fast.evaluation.images import published_images
    from dcvae_fast.run_folder import is_run, load_checkpoint
    from dcvae_pipelines import load_dataset

    data, images, folder = None, None, Path(arguments.model)
    if is_run(folder) and (state := load_checkpoint(folder)):
        data, images = DataConfig(**state["config"]["data"]), state["step"]["images"]
    name, root = arguments.data_name, arguments.data_root
    if name is not None and (data is None or name != data.name):
        data = DataConfig(name=name)
    if not needed:
        return None, images
    if data is None:
        raise UserError(f"--data.name is missing; only a run folder stores its data set, and {folder} is not one.")
    if root is not None:
        data = replace(data, root=root)
    train, test = (load_dataset(data.name, data.root, split, data.download) for split in ("train", "test"))
    published = published_images(data) if arguments.protocol == "once" else None
    return Splits(train, test, data.on_corrupt, published), images
