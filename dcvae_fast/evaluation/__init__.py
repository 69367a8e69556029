"""Evaluation of trained models, from a `DCVAE` and a data set; independent of training."""

from dcvae_fast.evaluation.images import Splits
from dcvae_fast.evaluation.measurement import Measurement
from dcvae_fast.evaluation.protocol import METRICS, evaluate

__all__ = ["METRICS", "Measurement", "Splits", "evaluate"]
