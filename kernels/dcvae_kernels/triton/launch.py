"""Launches of Triton kernels with little work on the host."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

# Set explicitly, because the kernels were tested with it: a·b + c can be fused into one instruction.
LAUNCH = {"enable_fp_fusion": True}

# Compiled kernels by everything that their code depends on. Triton's inspection of the arguments of a launch takes ten
# times as long as the rest of it.
_COMPILED: dict[tuple[Any, ...], Callable[..., None]] = {}
_MAX_COMPILED = 1024


class Launch:
    """A kernel with its grid, integer arguments, constants and options.

    Calls pass tensors and floats. The tensors of all calls must have the same dtypes, alignment and device. A tuple of
    addresses can take the place of a tensor; all of them must be multiples of 16.

    Args:
        kernel: its parameters are tensors, integers, floats and constants, in this order.
        integers: strides and sizes.
        options: constants, whose names are upper case, in the order of the parameters, and options of the launch.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], integers: tuple[int, ...], **options: Any) -> None:
        self.kernel, self.grid, self.integers, self.options = kernel, grid, integers, options
        self.constants = tuple(value for name, value in options.items() if name.isupper())
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | tuple[int, ...] | None, floats: tuple[float, ...]) -> None:
        key = None
        if self.compiled is None and isinstance(self.kernel, JITFunction):  # not interpreted
            key = (id(self.kernel), self.grid, self.integers, *self.options.values(), *map(_type, tensors))
            self.compiled = _COMPILED.get(key)
        if self.compiled is not None:
            self.compiled(*tensors, *self.integers, *floats, *self.constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.integers, *floats, **self.options, **LAUNCH)
        if key is not None and compiled is not None:  # None if a hook of Triton prevents the launch
            if len(_COMPILED) >= _MAX_COMPILED:
                _COMPILED.clear()
            self.compiled = _COMPILED[key] = compiled[self.grid]


def _type(x: Tensor | tuple[int, ...] | None) -> Any:
    """Return the properties of an argument on which the compiled code depends."""
    if x is None:
        return None
    return len(x) if isinstance(x, tuple) else (x.dtype, x.data_ptr() % 16, x.device)


# Plain integers: triton.cdiv and triton.next_power_of_2 take microseconds on the host.
def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def power_of_2(x: int) -> int:
    """Return the smallest power of 2 that is at least x."""
    return 1 << (x - 1).bit_length()
