"""Measurements of a model, and the file that stores them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dcvae_fast.errors import EvaluationError, reason
from dcvae_fast.renamed import rename_measurement
from dcvae_pipelines.atomic import atomic_write

# In the run folder.
EVALUATION_FILE = "evaluation.json"

Subject = Literal["samples", "reconstructions", "latents"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured number of a model.

    Attributes:
        metric: fid (Fréchet distance), is (Inception score), kid, precision, recall; pixel_mse (on [-1, 1]),
            pixel_squares (an image's sum of squares on [0, 1]), pixel_rmse (on 0–255); perceptual_imagenet,
            perceptual_caffe; ppl; probe_error (percent)
        subject: samples, reconstructions or latents
        protocol: paper, once or official
        value: the number
        spread: its uncertainty, or None
        spread_kind: definition of the spread, or None
        count: number of images measured, or of pairs for ppl
        data: images of the data set that were reconstructed or compared with, or None
        seed: seed of the noise
        extractor: name of the network that extracted features, or None
        note: how the measurement differs from the authors' evaluation, or None
    """

    metric: str
    subject: Subject
    protocol: str
    value: float
    spread: float | None = None
    spread_kind: str | None = None
    count: int
    data: str | None = None
    seed: int
    extractor: str | None = None
    note: str | None = None


def describe(model: nn.Module, images: int | None) -> dict[str, Any]:
    """Return the header of a measurement file: training progress in images, hash of the weights, versions, device."""
    device = next(model.parameters()).device
    return {
        "images": images,
        "weights": hash_weights(model),
        "versions": {name: value for name in ("torch", "torchvision", "torch-fidelity") if (value := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def read(path: Path) -> dict[str, Any]:
    """Read a measurement file; return {} if it does not exist.

    Raises:
        EvaluationError: the path holds something else.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict) or not {"weights", "measurements"} <= set(stored):
            raise ValueError("it has other content")
        return {**stored, "measurements": [rename_measurement(entry) for entry in stored["measurements"]]}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise EvaluationError(f"--out {path} is not a measurement file ({reason(error)}).") from error


def store(path: Path, head: dict[str, Any], measurement: Measurement) -> None:
    """Store a measurement in the file, replacing an older one of the same metric, subject and protocol.

    Measurements of another model are dropped. Those made with other versions or on another device are marked as such.

    Raises:
        EvaluationError: the path holds something else.
    """
    stored, new, kept = read(path), asdict(measurement), []
    if all(stored.get(name) == head[name] for name in ("images", "weights")):
        elsewhere = {name: stored.get(name) for name in ("versions", "device") if stored.get(name) != head[name]}
        keys = ("metric", "subject", "protocol")
        kept = [elsewhere | old for old in stored["measurements"] if any(old.get(key) != new[key] for key in keys)]
    content = json.dumps({**head, "measurements": [*kept, new]}, indent=2, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content + "\n")


def table(measured: Sequence[Measurement]) -> str:
    """Format measurements in aligned columns, with their notes below."""
    rows = [("metric", "subject", "protocol", "value", "images", "extractor")]
    for m in measured:
        value = f"{m.value:.4g}" + ("" if m.spread is None else f" ± {m.spread:.2g}")
        rows.append((m.metric, m.subject, m.protocol, value, f"{m.count:,}", m.extractor or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    notes = dict.fromkeys(m.note for m in measured if m.note)
    return "\n".join([*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), *notes])


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers and their names."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
