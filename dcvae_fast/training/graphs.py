"""Iterations as CUDA graphs: all that one launches is recorded once, and from then on launched as one."""

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dcvae_fast.config import Config
from dcvae_fast.distributed import SINGLE, Ranks
from dcvae_fast.errors import ConfigError

T = TypeVar("T")
Results = dict[str, Tensor]

# Iterations of a kind that run as they are before it is recorded: they make optimizers, compile, choose algorithms.
WARM_UPS = 3

# Iterations for which the first kind to be ready waits for the others: what runs as it is cannot use a graph's memory.
PATIENCE = 64


class Recorder(Protocol):
    """Records what `work` launches: its result, and what launches it again, on the same memory, and fills the result
    anew."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]: ...


class CudaRecorder:
    """By CUDA graphs; the memory of all of them is shared, for they run one after the other."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        # Reference cycles may keep autograd graphs of earlier iterations alive. Their AccumulateGrad nodes would be
        # reused, and would accumulate in the stream of those iterations, outside the capture.
        gc.collect()
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            # Other threads, which decode images, may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        return result, graph.replay


class Graph(NamedTuple):
    inputs: list[Tensor]
    results: Results
    replay: Callable[[], None]


class Graphs:
    """Runs iterations, and records each kind of them after a few."""

    def __init__(self, recorder: Callable[[], Recorder]):
        """
        Args:
            recorder: makes one, with memory of its own.
        """
        # torch.optim imports it in the first step of an optimizer, which must not happen during a capture.
        import torch._dynamo  # noqa: F401

        self._make_recorder = recorder
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory; the next iterations run as they are again."""
        self._graphs: dict[Hashable, Graph] = {}
        self._seen: dict[Hashable, int] = defaultdict(int)
        self._record: Recorder | None = None

    def run(self, kind: Hashable, work: Callable[[list[Tensor]], Results], inputs: list[Tensor]) -> Results:
        """Return the scalars that work(inputs) returns.

        Args:
            kind: work that launches the same on inputs of the same shapes is of one kind. It may read and write other
                tensors, always the same ones until `forget` is called, and has no other effects.
        """
        kind = (kind, tuple(x.shape for x in inputs))
        if kind not in self._graphs:
            self._seen[kind] += 1
            seen = self._seen.values()
            if self._seen[kind] <= WARM_UPS or (min(seen) < WARM_UPS and sum(seen) < PATIENCE):
                return work(inputs)
            self._graphs[kind] = self._recorded(work, inputs)
        graph = self._graphs[kind]
        torch._foreach_copy_(graph.inputs, inputs)
        graph.replay()
        # The next replay overwrites the results.
        return dict(zip(graph.results, torch.stack(list(graph.results.values())).unbind(), strict=True))

    def _recorded(self, work: Callable[[list[Tensor]], Results], inputs: list[Tensor]) -> Graph:
        if self._record is None:
            self._record = self._make_recorder()
        own = [torch.empty_like(x).copy_(x) for x in inputs]
        results, replay = self._record(lambda: work(own))
        return Graph(own, results, replay)


def uses_graphs(config: Config, device: torch.device, ranks: Ranks = SINGLE) -> bool:
    """Whether iterations become CUDA graphs: as `train.graphs` says, or where it leaves that open, where they can.

    Raises:
        ConfigError: it asks for them where there can be none.
    """
    wanted, train = config.train.graphs, config.train
    if wanted is False or device.type == "meta":
        return False
    obstacle = None
    if device.type != "cuda":
        obstacle = f"the device is {device}"
    elif train.uses_deepspeed:
        obstacle = "DeepSpeed steps the parameters"
    elif train.precision == "float16":
        obstacle = "float16 looks at every gradient to scale its losses"
    elif config.optim.implementation in ("apex", "deepspeed"):
        obstacle = f"optim.implementation is {config.optim.implementation}"
    if wanted and obstacle:
        raise ConfigError(f"train.graphs is true, but {obstacle}: there can be no CUDA graphs.")
    return obstacle is None and (wanted or ranks.world_size == 1)
