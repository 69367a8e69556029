"""Which implementation takes an operation's inputs."""

import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

Impl = Literal["auto", "triton", "torch"]
F = TypeVar("F", bound=Callable)

DATA = (Tensor, nn.Parameter, nn.Buffer)
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def constant(function: F) -> F:
    """Does what torch.compiler.assume_constant_result does, which would import the compiler: seconds, for everybody."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_impl(impl: str) -> None:
    """Raises: ValueError for what is none."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch"; it is {impl!r}')


def obstacle_to_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, if they cannot."""
    if device.type == "cuda":
        if not _triton_runs_on(device.index):
            return f"Triton and an NVIDIA GPU of compute capability 8.0 or newer are needed, not {device}"
        return obstacle_to_building()
    if TRITON_INTERPRETED and TRITON_INSTALLED and device.type == "cpu":
        return None
    return f"it needs a GPU, or TRITON_INTERPRET=1 in the environment before the import, not {device}"


@constant
def _triton_runs_on(index: int) -> bool:
    return TRITON_INSTALLED and torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


@constant
def obstacle_to_building() -> str | None:
    """Return why Triton cannot compile the C code that launches its kernels, or None. Logs a warning once.

    Without this check Triton would raise at the first launch, in the middle of a forward pass.
    """
    return _obstacle_to_building()


@cache
def _obstacle_to_building() -> str | None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        obstacle = "it needs a C compiler: install gcc, or set CC to the path of one"
    else:
        scheme = sysconfig.get_default_scheme()  # Triton does the same, for Debian
        include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
        command = [compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"]
        try:
            result = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
        except OSError as error:
            obstacle = f"the C compiler {compiler} cannot be run ({error.strerror})"
        else:
            if result.returncode == 0:
                return None
            obstacle = f"{compiler} cannot compile against {include}/Python.h; install Python's headers (python3-dev)"
    message = (
        "Triton's kernels cannot be launched: %s. Where the implementation is chosen automatically, PyTorch's is used."
    )
    logging.getLogger(__name__).warning(message, obstacle)
    return obstacle


def is_batched(grad_output: Tensor) -> bool:
    """Whether a gradient stands for many at once, as with `torch.autograd.grad(..., is_grads_batched=True)`."""
    return is_batchedtensor(grad_output) or is_legacy_batchedtensor(grad_output)


def needs_definition(*tensors: Tensor) -> bool:
    """Whether only operations that PyTorch can look into will do: for torch.func's transforms, and for tensors that are
    more than data."""
    return torch._C._are_functorch_transforms_active() or any(type(x) not in DATA for x in tensors)
