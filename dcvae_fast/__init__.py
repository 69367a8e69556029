"""DC-VAE (Dual Contradistinctive Generative Autoencoder, CVPR 2021): fast training and trained models."""

from typing import TYPE_CHECKING, Any

from dcvae_fast.errors import UserError

if TYPE_CHECKING:
    from dcvae_fast.models.dcvae import DCVAE, Posterior

__all__ = ["DCVAE", "Posterior", "UserError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the model, and torch, at the first use, so that `dcvae --help` does not wait for torch."""
    if name not in ("DCVAE", "Posterior"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dcvae_fast.models import dcvae

    return getattr(dcvae, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
