"""Checkpoints of the authors' code (github.com/mlpc-ucsd/DC-VAE), read into our networks.

A folder holds `{epoch}_encoder.sd`, `{epoch}_decoder.sd`, `{epoch}_decoder_avg.sd`, `{epoch}_dual_encoder.sd` and, for
each contrasted layer, `{epoch}_{layer}_queue.sd`. Parameters were saved from `DataParallel` modules with torch's older
spectral norm.
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

# Their module names → ours; the first pattern that matches the start of a key is replaced.
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
    """What the authors' code saved after an epoch.

    Attributes:
        model: encoder and averaged decoder, in evaluation mode; samples are clamped to [-1, 1] and
            reconstructions made from draws of the posterior, as theirs are for FID
        decoder: the decoder that was being trained
        discriminator: their "dual encoder"
        queues: for each contrasted layer its keys [K, D]
    """

    model: DCVAE
    decoder: Decoder
    discriminator: Discriminator
    queues: dict[str, Tensor]


def load_official(folder: Path, epoch: int) -> OfficialCheckpoint:
    """Read the checkpoint of one epoch; widths and sizes are taken from the weights.

    Raises:
        RunError: a file is missing, unreadable or holds other networks.
    """
    folder = Path(folder)
    encoder, decoder, average, discriminator = (
        _read(folder, epoch, name) for name in ("encoder", "decoder", "decoder_avg", "dual_encoder")
    )
    try:
        config = ModelConfig(
            image_channels=average["to_rgb.2.weight"].shape[0],
            latent_dim=average["l1.weight"].shape[1],
            decoder_width=average["cell1.c1.weight"].shape[0],
            encoder_width=encoder["block1.c1.weight_orig"].shape[0],
            discriminator_width=discriminator["block1.c1.weight_orig"].shape[0],
            contrast_dim=discriminator["l5.weight_orig"].shape[0],
            sample_clamp=1.0,
            reconstruct_from="sample",
        )
    except KeyError as error:
        raise RunError(
            f"{folder}: epoch {epoch} holds other networks than the authors' ({error} is missing)."
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
        (checkpoint.model.decoder, average, _DECODER),
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
        there = f"there are epochs {', '.join(map(str, epochs))}" if epochs else "there is no {epoch}_*.sd file at all"
        raise RunError(f"{path} is missing; in {folder} {there}.")
    weights = _load(path)
    if not isinstance(weights, dict):
        raise RunError(f"{path} holds a {type(weights).__name__}, not the weights of a network.")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch's readers raise anything
        raise RunError(f"{path} cannot be read ({reason(error)}).") from error
