"""Data sets for training: from files to normalised batches on the device.

Importing this package imports torch only; torchvision, scikit-learn and Pillow are imported by what needs them.
"""

from dcvae_pipelines.datasets import ImageSet, load_dataset, load_image
from dcvae_pipelines.resident import ResidentSource
from dcvae_pipelines.source import Batch, DataError, Source

__all__ = ["Batch", "DataError", "ImageSet", "ResidentSource", "Source", "load_dataset", "load_image"]
