"""Checks that decide which implementation an op uses."""

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

PLAIN_TENSORS = {Tensor, nn.Parameter, nn.Buffer}
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def assume_constant_result(function: F) -> F:
    """Same effect as torch.compiler.assume_constant_result, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_impl(impl: str) -> None:
    """Raise ValueError unless impl is "auto", "triton" or "torch"."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch"; it is {impl!r}')


def obstacle_to_triton(device: torch.device) -> str | None:
    """Return the reason why the Triton kernels cannot run on this device, or None if they can."""
    if device.type == "cuda":
        if not _triton_runs_on(device.index):
            return f"it needs Triton and an NVIDIA GPU of compute capability 8.0 or newer; the device is {device}"
        return obstacle_to_building()
    if TRITON_INTERPRETED and TRITON_INSTALLED and device.type == "cpu":
        return None
    return f"it needs a GPU, or TRITON_INTERPRET=1 set before importing dcvae_kernels; the device is {device}"


@assume_constant_result
def _triton_runs_on(index: int) -> bool:
    return TRITON_INSTALLED and torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


@assume_constant_result
def obstacle_to_building() -> str | None:
    """Return the reason why Triton cannot compile the C code that launches kernels, or None. Logs a warning once.

    Without this check Triton would raise at the first launch, in the middle of a forward pass.
    """
    return _obstacle_to_building()


@cache
def _obstacle_to_building() -> str | None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        obstacle = "it needs a C compiler: install gcc, or set CC to the path of one"
    else:
        scheme = sysconfig.get_default_scheme()  # same workaround for Debian as in Triton
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
    logging.getLogger(__name__).warning("Triton kernels cannot be launched: %s. PyTorch is used instead.", obstacle)
    return obstacle


def is_batched(grad_output: Tensor) -> bool:
    """Whether a gradient is batched, as in `torch.autograd.grad(..., is_grads_batched=True)`."""
    return is_batchedtensor(grad_output) or is_legacy_batchedtensor(grad_output)


def needs_reference(*tensors: Tensor) -> bool:
    """Whether the op must consist of ordinary PyTorch operations: under torch.func transforms and for tensor
    subclasses."""
    return torch._C._are_functorch_transforms_active() or not PLAIN_TENSORS.issuperset(map(type, tensors))
