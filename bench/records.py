"""Result files: what is in their heads, where they lie, how they are written. Imports no torch by itself."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "bench" / "results"
# The commit, with "-dirty" if tracked files differ from it; and what names it on a machine without the repository.
DESCRIBE = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
COMMIT_VARIABLE = "DCVAE_COMMIT"
# Set for a run that only shows that everything works: on a CPU, small, and its times count for nothing.
REHEARSAL_VARIABLE = "DCVAE_REHEARSAL"


def slug(device: str) -> str:
    """The folder of a device: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Device, versions, date and commit: the head of every result file.

    Args:
        packages: distributions whose versions belong in it too; those not installed are None.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    commit = os.environ.get(COMMIT_VARIABLE) or _output(*DESCRIBE)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": cpu_model(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
    }


def cpu_model() -> str:
    """As /proc/cpuinfo has it; elsewhere what Python knows."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that the command prints; None if it is missing, fails or prints nothing."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().partition("\n")[0] or None if result.returncode == 0 else None


def write(path: Path, document: dict[str, Any]) -> None:
    """All of the file or, if interrupted, what was there before. The same document gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
