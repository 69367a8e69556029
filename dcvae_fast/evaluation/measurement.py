"""A measured number, and the file that holds all those of a model."""

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
from dcvae_pipelines.atomic import atomic_write

# In a run's folder.
EVALUATION_FILE = "evaluation.json"

Subject = Literal["samples", "reconstructions", "latents"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of a model.

    Attributes:
        metric: fid (Fréchet distance), is (Inception score), kid, precision, recall; pixel_mse (on [-1, 1]),
            pixel_squares (an image's sum of squares on [0, 1]), pixel_rmse (on 0–255); perceptual_imagenet,
            perceptual_caffe; ppl; probe_error (percent)
        of: what was measured
        protocol: paper or official
        value: the number
        spread: how far it may be off, or None
        spread_is: what the spread is
        count: images, or for ppl pairs of them, that were measured
        data: the images of the data set that they were made of or compared with, or None
        seed: of the noise
        extractor: the network that looked at the images, or None
    """

    metric: str
    of: Subject
    protocol: str
    value: float
    spread: float | None = None
    spread_is: str | None = None
    count: int
    data: str | None = None
    seed: int
    extractor: str | None = None


def describe(model: nn.Module, images: int | None) -> dict[str, Any]:
    """The head of a file of measurements: images that the model was trained on, its weights' hash, versions, device."""
    device = next(model.parameters()).device
    return {
        "images": images,
        "weights": hash_weights(model),
        "versions": {name: found for name in ("torch", "torchvision", "torch-fidelity") if (found := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def read(path: Path) -> dict[str, Any]:
    """A file of measurements; empty where there is none yet.

    Raises:
        EvaluationError: there is something else at this place.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict) or not {"weights", "measurements"} <= set(stored):
            raise ValueError("it holds something else")
    except (ValueError, OSError) as error:
        raise EvaluationError(f"--out {path} is no file of measurements ({reason(error)}).") from error
    return stored


def store(path: Path, head: dict[str, Any], measurement: Measurement) -> None:
    """Put a measurement into the file, in place of an older one of the same metric, subject and protocol.

    What the file holds of another model is dropped; what was measured by other versions or elsewhere says so.

    Raises:
        EvaluationError: there is something else at this place.
    """
    stored, new, kept = read(path), asdict(measurement), []
    if all(stored.get(name) == head[name] for name in ("images", "weights")):
        elsewhere = {name: stored.get(name) for name in ("versions", "device") if stored.get(name) != head[name]}
        keys = ("metric", "of", "protocol")
        kept = [elsewhere | old for old in stored["measurements"] if any(old.get(key) != new[key] for key in keys)]
    content = json.dumps({**head, "measurements": [*kept, new]}, indent=2, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content + "\n")


def table(measured: Sequence[Measurement]) -> str:
    """The measurements in aligned columns."""
    rows = [("metric", "of", "protocol", "value", "images", "extractor")]
    for one in measured:
        value = f"{one.value:.4g}" + ("" if one.spread is None else f" ± {one.spread:.2g}")
        rows.append((one.metric, one.of, one.protocol, value, f"{one.count:,}", one.extractor or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers and their names."""
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
