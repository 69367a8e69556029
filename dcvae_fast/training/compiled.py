"""torch.compile for the networks: forward passes, and through them backward passes."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError, reason
from dcvae_kernels.dispatch import obstacle_to_building


def uses_compile(config: Config, device: torch.device) -> bool:
    """Return `train.compile`; if that is None, whether the device is a GPU and Triton can build its launchers."""
    if config.train.compile is not None:
        return config.train.compile and device.type != "meta"
    return device.type == "cuda" and obstacle_to_building() is None


def compile_forward(modules: Iterable[nn.Module]) -> None:
    """Compile the forward passes of modules, without their hooks. Compilation happens at the first call, and again for
    each input shape and for parameters with or without gradients."""
    import torch._dynamo.config  # imported here because it is slow

    # One version for each batch size, for parameters with and without gradients, and for C and C′. Beyond torch's
    # default limit of 8 versions, modules would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False)


def forget_compiled() -> None:
    """Discard compiled code. It is useless at another resolution, and torch limits the number of versions."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def uncompiled() -> AbstractContextManager:
    """Context manager that runs modules eagerly: for second derivatives, which torch.compile does not support, and for
    single passes, which are not worth compiling."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def compiling() -> Iterator[None]:
    """Context manager that turns failures of torch.compile into a ConfigError.

    Raises:
        ConfigError: torch.compile fails, usually because a C or C++ compiler is missing.
    """
    try:
        yield
    except Exception as error:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not isinstance(error, dynamo.exc.TorchDynamoException):
            raise
        cause = reason(getattr(error, "inner_exception", error))
        raise ConfigError(f"the networks cannot be compiled here ({cause}); use --train.compile false.") from error
