"""PyTorch ops: InfoNCE, a key queue for its negatives, and spectral normalisation of a whole network."""

from dcvae_kernels.info_nce import InfoNCE, InfoNCEStats, info_nce
from dcvae_kernels.queue import KeyQueue
from dcvae_kernels.spectral_norm import remove_spectral_norm, spectral_norm

__all__ = ["InfoNCE", "InfoNCEStats", "KeyQueue", "info_nce", "remove_spectral_norm", "spectral_norm"]
