"""The public model `DCVAE`: encode, decode, reconstruct, sample, save and load."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcvae_fast.config import ModelConfig, to_dict
from dcvae_fast.errors import ConfigError, RunError, reason
from dcvae_fast.models.build import build_autoencoder

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"


@dataclass(frozen=True)
class Posterior:
    """Posterior q(z|x), a Gaussian with diagonal covariance.

    Attributes:
        mean: [B, Z]
        logvar: log-variance [B, Z]
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw z = mean + exp(logvar / 2) · noise, [B, Z], with gradients for mean and logvar.

        A seed gives the same noise, up to rounding, in every dtype; see `standard_normal`.
        """
        noise = standard_normal(self.mean.shape, generator, self.mean.device)
        return self.at(noise.to(self.mean.dtype))

    def at(self, noise: Tensor) -> Tensor:
        """Return z = mean + exp(logvar / 2) · noise, [B, Z], for noise [B, Z] from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class DCVAE(nn.Module):
    """Encoder and decoder of a DC-VAE; the decoder has the EMA of the trained weights.

    Images are floating-point tensors [B, C, R, R] in [-1, 1] with R = `config.resolution`; latents are [B, Z]. Inputs
    of any floating-point dtype are converted to the dtype of the weights. Results have that dtype too, unless autocast
    chooses another.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_autoencoder(config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, float32 unless the model was converted."""
        return _dtype(self)

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of images [B, C, R, R] in [-1, 1].

        Raises:
            ValueError: images have another shape, or are not floating point.
        """
        channels, size = self.config.image_channels, self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"images have shape {list(images.shape)}; this model expects [B, {channels}, {size}, {size}]."
            )
        if not images.is_floating_point():
            raise ValueError(f"images have dtype {images.dtype}; this model expects floating-point values in [-1, 1].")
        return Posterior(*self.encoder(images.to(_dtype(self.encoder))))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, Z] to images [B, C, R, R], approximately in [-1, 1].

        Raises:
            ValueError: latents have another shape, or are not floating point.
        """
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; this model expects [B, {self.config.latent_dim}]."
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents have dtype {latents.dtype}; this model expects floating-point values.")
        return self.decoder(latents.to(_dtype(self.decoder)))

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructions from the posterior mean, with gradients."""
        return self.decode(self.encode(images).mean)

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, sample_posterior: bool | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return reconstructions of images from the posterior mean, or from a sample of the posterior.

        Args:
            images: [B, C, R, R] in [-1, 1].
            sample_posterior: whether to decode a sample of the posterior; None follows `config.reconstruct_from`.
            generator: random generator for the sample.
        """
        if sample_posterior is None:
            sample_posterior = self.config.reconstruct_from == "sample"
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mean)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return n images [n, C, R, R] decoded from the prior N(0, I); `config.sample_clamp` clamps the latents.

        Latents are drawn in float32 on the generator's device, so that a seed gives the same latents on every device,
        and up to rounding in every dtype.
        """
        latents = standard_normal((n, self.config.latent_dim), generator, self.device)
        if self.config.sample_clamp is not None:
            latents = latents.clamp(-self.config.sample_clamp, self.config.sample_clamp)
        return self.decode(latents)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and a model card, README.md, to the folder `path`."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps({"model": to_dict(self.config)}, indent=2) + "\n")
        (folder / CARD_FILE).write_text(_model_card(self.config))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str | torch.device = "cpu") -> "DCVAE":
        """Load a model in evaluation mode from a run folder, a folder of `save_pretrained`, or the Hugging Face hub.

        From a run folder, the newest intact checkpoint is loaded, with the EMA decoder. The weights keep their stored
        dtype.

        Raises:
            RunError: no model is found, or its files are damaged.
            ConfigError: the model has settings that are unknown or invalid.
        """
        from dcvae_fast.run_folder import is_run, load_weights

        folder = Path(name_or_path)
        if is_run(folder):
            stored, weights = load_weights(folder)
        else:
            if not folder.is_dir():
                folder = _download(str(name_or_path))
            stored, weights = _read_pretrained(folder)
        model = cls(_model_config(stored, folder))
        if model.config.grows:  # drop layers of resolutions not reached yet
            weights = {name: weights[name] for name in model.state_dict() if name in weights}
        _convert_dtypes(model, weights)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"{folder}: the weights do not fit the stored configuration ({reason(error)}).") from error
        return model.to(device).eval()


def standard_normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw noise from N(0, I), float32, on the generator's device, and move it to `device`.

    The values that a generator gives depend on the dtype and device of the draw, so half precision would give different
    noise.
    """
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _convert_dtypes(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Convert parameters and buffers to the dtypes of stored weights, because `load_state_dict` keeps the model's."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights and weights[name].is_floating_point():
            tensor.data = tensor.data.to(weights[name].dtype)


def _model_config(config: Any, folder: Path) -> ModelConfig:
    stored = config.get("model") if isinstance(config, dict) else None
    if not isinstance(stored, dict):
        raise RunError(f"{folder}: {CONFIG_FILE} is not the configuration of a dcvae_fast model.")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(stored) - known):
        raise ConfigError(
            f"{folder}: saved by another version of dcvae_fast; these model settings are unknown: {', '.join(unknown)}."
        )
    try:
        return ModelConfig(**stored)
    except TypeError as error:
        raise ConfigError(f"{folder}: a model setting in {CONFIG_FILE} has the wrong type ({error}).") from error


def _read_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise RunError(f"{folder}: neither a run folder with a checkpoint nor a saved model ({file} is missing).")
    try:
        return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{folder}: {CONFIG_FILE} or {WEIGHTS_FILE} is damaged ({reason(error)}).") from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RunError(
            f"{name}: no such folder, and it could not be downloaded from the Hugging Face hub ({reason(error)})."
        ) from error


def _model_card(config: ModelConfig) -> str:
    channels, size = config.image_channels, config.resolution
    return f"""---
library_name: dcvae_fast
pipeline_tag: unconditional-image-generation
tags: [vae, gan, contrastive, dc-vae]
---

# DC-VAE, {size}×{size}, {channels} channel{"s" if channels > 1 else ""}, latent dimension {config.latent_dim}

A *Dual Contradistinctive Generative Autoencoder* (Parmar, Li, Lee, Tu; CVPR 2021) trained with dcvae_fast. It encodes,
reconstructs and samples images [B, {channels}, {size}, {size}] in [-1, 1].

```python
from dcvae_fast import DCVAE

model = DCVAE.from_pretrained("path/or/hub-name")
posterior = model.encode(images)          # .mean, .logvar [B, {config.latent_dim}]
images = model.decode(posterior.mean)
images = model.sample(64)
```

Not to be confused with diffusers' `AutoencoderDC` (Deep Compression), which is another method.
"""
