"""Import of checkpoints of the authors' code (github.com/mlpc-ucsd/DC-VAE).

A folder holds `{epoch}_encoder.sd`, `{epoch}_decoder.sd`, `{epoch}_decoder_avg.sd`, `{epoch}_dual_encoder.sd` and, for
each contrasted layer, `{epoch}_{layer}_queue.sd`. Parameters were saved from `DataParallel` modules with torch's older
implementation of spectral norm.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcvae_fast.config import ModelConfig
from dcvae_fast.errors import RunError, reason
from dcvae_fast.models.autogan import Decoder, Discriminator
from dcvae_fast.models.dcvae import DCVAE

# The authors' module names → ours; the first pattern that matches the start of a key is replaced.
_CONVOLUTIONS = [(r"c1\.", "conv1."), (r"c2\.", "conv2."), (r"c_sc\.", "shortcut."), (r"skip_in_ops\.", "skips.")]
_ENCODER = [(r"block(\d)\.", r"trunk.b\1."), (r"l5\.", "trunk.linear.")]
_DISCRIMINATOR = [
    (r"block(\d)\.", r"critic.trunk.b\1."),
    (r"l5\.", "critic.trunk.linear."),
    (r"head_disc\.", "critic.score."),
    (r"head_(b\d)\.0\.", r"heads.\1.conv."),
    (r"head_(b\d)\.2\.", r"heads.\1.linear."),
]
_DECODER = [(r"l1\.", "linear."), (r"to_rgb\.0\.", "norm."), (r"to_rgb\.2\.", "to_image.")]


@dataclass(frozen=True)
class OfficialCheckpoint:
    """Checkpoint of the authors' code after an epoch.

    Attributes:
        model: encoder and EMA decoder in evaluation mode; latents are clamped to [-1, 1] for samples, and
            reconstructions decode samples of the posterior, as for the authors' FID
        decoder: trained decoder, without EMA
        discriminator: the "dual encoder"
        queues: keys [K, D] of each contrasted layer
    """

    model: DCVAE
    decoder: Decoder
    discriminator: Discriminator
    queues: dict[str, Tensor]


def load_official(folder: Path, epoch: int) -> OfficialCheckpoint:
    """Read the checkpoint of one epoch; widths and sizes are derived from the weights.

    Raises:
        RunError: a file is missing, cannot be read or holds other networks.
    """
    folder = Path(folder)
    encoder, decoder, decoder_ema, discriminator = (
        _read(folder, epoch, name) for name in ("encoder", "decoder", "decoder_avg", "dual_encoder")
    )
    try:
        config = ModelConfig(
            image_channels=decoder_ema["to_rgb.2.weight"].shape[0],
            latent_dim=decoder_ema["l1.weight"].shape[1],
            decoder_width=decoder_ema["cell1.c1.weight"].shape[0],
            encoder_width=encoder["block1.c1.weight_orig"].shape[0],
            discriminator_width=discriminator["block1.c1.weight_orig"].shape[0],
            contrast_dim=discriminator["l5.weight_orig"].shape[0],
            sample_clamp=1.0,
            reconstruct_from="sample",
        )
    except KeyError as error:
        raise RunError(
            f"{folder}: the networks of epoch {epoch} are not those of the authors' code ({error} is missing)."
        ) from error
    checkpoint = OfficialCheckpoint(
        model=DCVAE(config),
        decoder=Decoder(config.latent_dim, config.decoder_width, config.image_channels),
        discriminator=Discriminator(config.discriminator_width, config.image_channels, config.contrast_dim),
        queues={
            path.name.removeprefix(f"{epoch}_").removesuffix("_queue.sd"): _load(path).T.contiguous()
            for path in sorted(folder.glob(f"{epoch}_*_queue.sd"))
        },
    )
    for network, weights, names in (
        (checkpoint.model.encoder, encoder, _ENCODER),
        (checkpoint.model.decoder, decoder_ema, _DECODER),
        (checkpoint.decoder, decoder, _DECODER),
        (checkpoint.discriminator, discriminator, _DISCRIMINATOR),
    ):
        _fill(network.eval(), {_rename(key, names): value for key, value in weights.items()}, folder)
    checkpoint.model.eval()
    return checkpoint


def _rename(key: str, names: list[tuple[str, str]]) -> str:
    for pattern, ours in names:
        key, replaced = re.subn(f"^{pattern}", ours, key)
        if replaced:
            break
    for pattern, ours in _CONVOLUTIONS:
        key = re.sub(rf"\.{pattern}", f".{ours}", key)
    return key


def _fill(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder}: the weights do not fit {type(network).__name__} ({reason(error)}).") from error


def _read(folder: Path, epoch: int, name: str) -> dict[str, Tensor]:
    path = folder / f"{epoch}_{name}.sd"
    if not path.is_file():
        epochs = sorted({int(match[1]) for file in folder.glob("*.sd") if (match := re.match(r"(\d+)_", file.name))})
        available = f"has epochs {', '.join(map(str, epochs))}" if epochs else "has no {epoch}_*.sd files"
        raise RunError(f"{path} is missing; the folder {available}.")
    weights = _load(path)
    if not isinstance(weights, dict):
        raise RunError(f"{path} holds a {type(weights).__name__}, not the weights of a network.")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch's readers raise anything
        raise RunError(f"{path} cannot be read ({reason(error)}).") from error
