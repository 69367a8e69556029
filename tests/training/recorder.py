"""CPU emulation of CUDA graphs: operations are recorded while they run, and replayed on the same memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

# Operations that a CUDA graph cannot capture, because they move values between CPU and GPU.
NOT_CAPTURABLE = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")


class OperationRecorder(TorchDispatchMode):
    """Records operations, their arguments and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in NOT_CAPTURABLE and torch.Tag.nondeterministic_seeded not in func.tags, name
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, tuple(args), kwargs or {}, result))
        return result


class CpuRecorder:
    """A `Recorder` for CPUs. Unlike a CUDA graph, recording also runs the work; the state is restored afterwards."""

    def __init__(self, state: Callable[[], Sequence[Tensor]]):
        """
        Args:
            state: returns the tensors that the work writes to.
        """
        self._state = state
        self.operations: list[int] = []
        self.replays = 0

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        saved = [(x, x.detach().clone()) for x in self._state()]
        with OperationRecorder() as recording:
            result = work()
        with torch.no_grad():
            for x, value in saved:
                x.copy_(value)
            for x in tree_leaves(result):
                x.fill_(float("nan"))  # results are undefined before the first replay
        self.operations.append(len(recording.operations))

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, recorded in recording.operations:
                    outputs = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(recorded), tree_leaves(outputs), strict=True):
                        # Replays must write to the recorded memory; views and in-place results already do.
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return result, replay
