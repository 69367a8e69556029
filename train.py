"""Train a DC-VAE: `python train.py --recipe cifar10 --data.root DIR --run RUN`. Equivalent to `dcvae train`."""

import sys

from dcvae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
