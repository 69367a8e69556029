"""`dcvae sample`, `reconstruct` and `interpolate`: images from a trained model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dcvae_fast.commands.common import add_model, add_out, load_model, write_grid
from dcvae_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dcvae_fast.models.dcvae import DCVAE


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add sample, reconstruct and interpolate to argparse's subparsers."""
    text = "Sample images from the prior."
    parser = commands.add_parser("sample", help=text, description=text)
    add_model(parser)
    parser.add_argument("-n", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents (default: 0)")
    add_out(parser, "samples.png")
    parser.set_defaults(run_command=run_sample)

    text = "Reconstruct image files; each reconstruction is written to the right of its image."
    parser = commands.add_parser("reconstruct", help=text, description=text)
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image file")
    add_out(parser, "reconstructions.png")
    parser.set_defaults(run_command=run_reconstruct)

    text = "Interpolate between two images."
    parser = commands.add_parser("interpolate", help=text, description=text)
    add_model(parser)
    parser.add_argument("start", metavar="IMAGE1", type=Path, help="first image file")
    parser.add_argument("end", metavar="IMAGE2", type=Path, help="last image file")
    parser.add_argument("--steps", type=int, default=8, help="decoded images, including both ends (default: 8)")
    add_out(parser, "interpolation.png")
    parser.set_defaults(run_command=run_interpolate)


def run_sample(arguments: argparse.Namespace) -> int:
    if arguments.n < 1:
        raise UserError(f"-n is {arguments.n}; it must be at least 1.")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; it must be between 0 and 2⁶³ − 1.")
    import torch

    from dcvae_fast.evaluation.perceptual import inference_batch_size

    model, generator = load_model(arguments), torch.Generator().manual_seed(arguments.seed)
    batch = inference_batch_size(model.config.resolution)
    sizes = [min(batch, arguments.n - start) for start in range(0, arguments.n, batch)]
    samples = torch.cat([model.sample(size, generator=generator).cpu() for size in sizes])
    write_grid(arguments.out, samples, columns=min(8, arguments.n))
    return 0


def run_reconstruct(arguments: argparse.Namespace) -> int:
    import torch

    model = load_model(arguments)
    images = _load_images(model, arguments.images)
    pairs = torch.stack([images, model.reconstruct(images)], dim=1)  # each image, its reconstruction to the right
    write_grid(arguments.out, pairs.flatten(0, 1), columns=2 * min(4, len(images)))
    return 0


def run_interpolate(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2:
        raise UserError(f"--steps is {arguments.steps}; it must be at least 2.")
    from dcvae_fast.evaluation.latent import interpolate

    model = load_model(arguments)
    start, end = _load_images(model, [arguments.start, arguments.end]).split(1)
    write_grid(arguments.out, interpolate(model, start, end, arguments.steps)[0], columns=arguments.steps + 2)
    return 0


def _load_images(model: "DCVAE", paths: Sequence[Path]) -> "Tensor":
    """Load image files in the model's shape, [N, C, R, R] in [-1, 1], on its device."""
    import torch

    from dcvae_pipelines import load_image

    config = model.config
    return torch.stack([load_image(path, config.image_channels, config.resolution) for path in paths]).to(model.device)
