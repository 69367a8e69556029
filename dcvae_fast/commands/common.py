"""Options that several commands share, and functions that use them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dcvae_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dcvae_fast.models.dcvae import DCVAE


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder, saved model, or name on the Hugging Face hub")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default: cuda if available)")


def add_out(parser: argparse.ArgumentParser, default: str, kind: str = "PNG file") -> None:
    parser.add_argument("--out", type=Path, default=Path(default), help=f"{kind} to write (default: %(default)s)")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options for the number of images and for the folders of weights and features."""
    text = (
        "number of samples and of reconstructions for fid, is, kid and prc, and maximum number of test images for pixel"
        " and perceptual (default: 50,000); ppl draws twice as many pairs"
    )
    parser.add_argument("-n", "--images", type=int, default=50_000, help=text)
    text = "folder with the weights of Inception, VGG16 and LPIPS (default: downloaded)"
    parser.add_argument("--weights", type=Path, metavar="DIR", help=text)
    text = "folder that caches features of training images (default: %(default)s)"
    parser.add_argument("--cache", type=Path, metavar="DIR", default=Path("~/.cache/dcvae_fast"), help=text)


def check_weights(folder: Path | None) -> None:
    """Check the folder of `--weights`, if it is given.

    Raises:
        UserError: the path is not a folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--weights {folder} is not a folder.")


def load_model(arguments: argparse.Namespace) -> "DCVAE":
    """Load the model given by the arguments of `add_model`, on the given device."""
    from dcvae_fast.distributed import pick_device
    from dcvae_fast.models.dcvae import DCVAE

    return DCVAE.from_pretrained(arguments.model, device=pick_device(arguments.device))


def write_grid(path: Path, images: "Tensor", columns: int) -> None:
    """Write images [N, C, H, W] in [-1, 1] as one PNG file, row by row, and print its path."""
    from dcvae_fast.images import make_grid, png_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(make_grid(images, columns)))
    print(path)
