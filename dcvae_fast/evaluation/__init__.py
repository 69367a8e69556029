"""What a trained model is worth. Evaluation sees a `DCVAE` and a data set: nothing of training."""

from dcvae_fast.evaluation.images import Splits
from dcvae_fast.evaluation.measurement import Measurement
from dcvae_fast.evaluation.protocol import METRICS, evaluate

__all__ = ["METRICS", "Measurement", "Splits", "evaluate"]
