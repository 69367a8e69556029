"""Published weights of pretrained networks: location, download and verification."""

import hashlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from dcvae_fast.errors import EvaluationError, reason


@dataclass(frozen=True)
class Extractor:
    """Feature extractor, and its name in measurements."""

    name: str
    network: nn.Module


def find_weights(url: str, folder: Path | None) -> Path:
    """Find the weights published at `url` in a folder; if it is None, in torch's cache, downloading them if needed.

    Raises:
        EvaluationError: the file is missing and cannot be downloaded, or its hash is not the published one.
    """
    name = PurePosixPath(urlparse(url).path).name
    match = re.search(r"-([0-9a-f]{8,})\.", name)  # by torch's convention, the beginning of the SHA-256
    digits = match[1] if match else None
    published = f"SHA-256 {digits}…" if digits else "no hash is published"
    remedy = f"download {url} ({published}) and pass its folder with --weights DIR"
    path = (folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if not path.is_file():
        if folder is not None:
            raise EvaluationError(f"--weights: looked for {path} and did not find it; {remedy}.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digits)
        except (OSError, RuntimeError, HTTPException) as error:
            raise EvaluationError(f"{name} cannot be downloaded ({reason(error)}); {remedy}.") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digits and not digest.startswith(digits):
        raise EvaluationError(f"{path}: is damaged: its SHA-256 is {digest[: len(digits)]}…; {remedy}.")
    return path


def read_weights(path: Path) -> dict[str, Any]:
    """Load a file of weights.

    Raises:
        EvaluationError: the file cannot be read, or holds anything but tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise EvaluationError(f"{path}: cannot be read as weights ({reason(error)}).") from error


@contextmanager
def downloads_in(folder: Path) -> Iterator[None]:
    """Context manager that makes torch.hub take downloads from this folder."""
    before = torch.hub.get_dir()
    with TemporaryDirectory() as hub:
        (Path(hub) / "checkpoints").symlink_to(folder.resolve(), target_is_directory=True)
        torch.hub.set_dir(hub)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
