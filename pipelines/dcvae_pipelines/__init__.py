"""Data sets for training: from files to normalised batches on the device.

Importing this package imports torch only; DALI, lmdb, Pillow, scikit-learn and torchvision are imported on first use.
"""

from dcvae_pipelines.dali import DaliSource
from dcvae_pipelines.datasets import load_dataset
from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import load_image
from dcvae_pipelines.loader import decode_images, make_source
from dcvae_pipelines.pixels import cross_fade
from dcvae_pipelines.resident import ResidentSource
from dcvae_pipelines.source import Batch, DataError, Source

__all__ = [
    "Batch",
    "DaliSource",
    "DataError",
    "EncodedSet",
    "ImageSet",
    "ResidentSource",
    "Source",
    "cross_fade",
    "decode_images",
    "load_dataset",
    "load_image",
    "make_source",
]
