"""CUDA graphs: the kernels of an iteration are recorded once, and afterwards launched together."""

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

# Eager iterations of each kind before it is recorded: they create optimizer states, compile, and select algorithms.
WARM_UPS = 3

# Iterations after which a kind is recorded even if another is still warming up. Until then recording waits, because
# eager iterations cannot use the memory of a graph.
PATIENCE = 64


class Recorder(Protocol):
    """Records the kernels that `work` launches. Returns the result of `work`, and a function that launches the kernels
    again on the same memory and so updates the result."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]: ...


class CudaRecorder:
    """Records CUDA graphs. All graphs of a recorder share memory, because they run one after the other."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        # Reference cycles can keep autograd graphs of earlier iterations alive. Their AccumulateGrad nodes would be
        # reused, and would accumulate in the stream of those iterations, outside the capture.
        gc.collect()
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            # Other threads, which decode images, can allocate memory during the capture.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        return result, graph.replay


class Graph(NamedTuple):
    inputs: list[Tensor]
    results: Results
    replay: Callable[[], None]


class Graphs:
    """Runs iterations, and records each kind of iteration after its warm-up."""

    def __init__(self, make_recorder: Callable[[], Recorder]):
        """
        Args:
            make_recorder: creates a recorder with a new memory pool.
        """
        # torch.optim imports it in the first step of an optimizer, which must not happen during a capture.
        import torch._dynamo  # noqa: F401

        self._make_recorder = make_recorder
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory. The next iterations run eagerly again."""
        self._graphs: dict[Hashable, Graph] = {}
        self._seen: dict[Hashable, int] = defaultdict(int)
        self._recorder: Recorder | None = None

    def run(self, kind: Hashable, work: Callable[[list[Tensor]], Results], inputs: list[Tensor]) -> Results:
        """Return the scalars that work(inputs) returns, from a graph if one has been recorded.

        Args:
            kind: identifies the work: with the same kind and input shapes, it must launch the same kernels.
            work: can read and write other tensors, always the same ones until `forget` is called, and must have no
                other side effects.
            inputs: copied into the memory of the graph.
        """
        kind = (kind, tuple(x.shape for x in inputs))
        if kind not in self._graphs:
            self._seen[kind] += 1
            seen = self._seen.values()
            if self._seen[kind] <= WARM_UPS or (min(seen) < WARM_UPS and sum(seen) < PATIENCE):
                return work(inputs)
            self._graphs[kind] = self._record_graph(work, inputs)
        graph = self._graphs[kind]
        torch._foreach_copy_(graph.inputs, inputs)
        graph.replay()
        # The next replay overwrites the results.
        return dict(zip(graph.results, torch.stack(list(graph.results.values())).unbind(), strict=True))

    def _record_graph(self, work: Callable[[list[Tensor]], Results], inputs: list[Tensor]) -> Graph:
        if self._recorder is None:
            self._recorder = self._make_recorder()
        static_inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        results, replay = self._recorder(lambda: work(static_inputs))
        return Graph(static_inputs, results, replay)


def uses_graphs(config: Config, device: torch.device, ranks: Ranks = SINGLE) -> bool:
    """Return `train.graphs`; if that is None, whether CUDA graphs are possible and there is one rank.

    Raises:
        ConfigError: `train.graphs` is true, but CUDA graphs are not possible.
    """
    train, graphs = config.train, config.train.graphs
    if graphs is False or device.type == "meta":
        return False
    obstacle = None
    if device.type != "cuda":
        obstacle = f"the device is {device}"
    elif train.uses_deepspeed:
        obstacle = "DeepSpeed steps the parameters"
    elif train.precision == "float16":
        obstacle = "float16 inspects the gradients to choose the loss scale"
    elif config.optim.implementation in ("apex", "deepspeed"):
        obstacle = f"optim.implementation is {config.optim.implementation}"
    if graphs and obstacle:
        raise ConfigError(f"train.graphs is true, but CUDA graphs cannot be used: {obstacle}.")
    return obstacle is None and (graphs or ranks.world_size == 1)
