"""DC-VAE (Dual Contradistinctive Generative Autoencoder, CVPR 2021): fast training, and trained models to use."""

from dcvae_fast.errors import UserError
from dcvae_fast.models.dcvae import DCVAE, Posterior

__all__ = ["DCVAE", "Posterior", "UserError"]
__version__ = "0.1.0"
