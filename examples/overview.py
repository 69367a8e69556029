"""Show what a trained model does in one picture: reconstructions, samples and an interpolation.

    python examples/overview.py runs/digits --out overview.png

Rows: test images, their reconstructions, two rows of samples, and an interpolation between the first and the last of
these test images.
"""

import argparse
from pathlib import Path

import torch

from dcvae_fast import DCVAE
from dcvae_fast.evaluation.images import evenly_spaced, parts
from dcvae_fast.evaluation.latent import interpolate
from dcvae_fast.images import make_grid, png_bytes
from dcvae_pipelines import load_dataset
from dcvae_pipelines.pixels import normalize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="a run folder, a saved model, or a name on the Hugging Face hub")
    parser.add_argument("--data", default="digits", help="name of the data set (default: %(default)s)")
    parser.add_argument("--root", help="its folder")
    parser.add_argument("--columns", type=int, default=12, help="images in a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("overview.png"), help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.columns < 3:
        parser.error(f"--columns is {arguments.columns}; it must be at least 3")

    model = DCVAE.from_pretrained(arguments.model)
    test_set = load_dataset(arguments.data, arguments.root, "test")
    columns = min(arguments.columns, len(test_set))
    chosen = next(parts(test_set, evenly_spaced(len(test_set), columns), model.config))
    images = normalize(chosen.images).to(model.device)
    samples = model.sample(2 * columns, generator=torch.Generator().manual_seed(arguments.seed))
    (path,) = interpolate(model, images[:1], images[-1:], steps=columns - 2)
    rows = [images, model.reconstruct(images), samples, path]
    arguments.out.write_bytes(png_bytes(make_grid(torch.cat(rows), columns)))
    print(arguments.out)


if __name__ == "__main__":
    main()
