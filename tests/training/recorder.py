"""What a CUDA graph does, on a CPU: operations are noted while they run, and run again on the same memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

# What a graph cannot hold: numbers that the processor asks for or brings along, and random ones drawn as the seed of
# the time says.
NO_PART_OF_A_GRAPH = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")


class Noted(TorchDispatchMode):
    """Notes operations, with what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in NO_PART_OF_A_GRAPH and torch.Tag.nondeterministic_seeded not in func.tags, name
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, tuple(args), kwargs or {}, result))
        return result


class CpuRecorder:
    """A `Recorder`. Unlike a GPU's it computes while it records, and then puts back what that has changed."""

    def __init__(self, state: Callable[[], Sequence[Tensor]]):
        """
        Args:
            state: the tensors that the work writes to.
        """
        self._state = state
        self.operations: list[int] = []
        self.replays = 0

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        saved = [(x, x.detach().clone()) for x in self._state()]
        with Noted() as noted:
            result = work()
        with torch.no_grad():
            for x, value in saved:
                x.copy_(value)
            for x in tree_leaves(result):
                x.fill_(float("nan"))  # nothing is computed before the first replay
        self.operations.append(len(noted.operations))

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, recorded in noted.operations:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                        # New memory is at the same place in each replay; views and arguments lie there already.
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return result, replay
