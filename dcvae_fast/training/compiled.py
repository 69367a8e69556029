"""The networks' forward passes, and so their backward passes, by torch.compile."""

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
    """Compiles what these modules compute, but not the hooks on them, when first called; for each kind of input, and of
    parameters with or without gradients, anew."""
    import torch._dynamo.config  # not before it is wanted, for that takes a while

    # A version for each batch size, for parameters with and without gradients, for C and C′; of 8, torch's limit, more
    # would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False)


def forget_compiled() -> None:
    """What was compiled for a resolution is of no use at another, and torch keeps only so many versions."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def uncompiled() -> AbstractContextManager:
    """Inside, modules compute as they are: for second derivatives, which the compiler has not, and for single passes,
    for which it takes too long."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def compiling() -> Iterator[None]:
    """
    Raises:
        ConfigError: torch cannot compile here, for want of a compiler as a rule.
    """
    try:
        yield
    except Exception as error:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not isinstance(error, dynamo.exc.TorchDynamoException):
            raise
        cause = reason(getattr(error, "inner_exception", error))
        raise ConfigError(
            f"the networks cannot be compiled here ({cause}); --train.compile false does without."
        ) from error
