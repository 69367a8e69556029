"""Images per second of our sources beside those of torch's DataLoader, on the rows of pipelines_cases.py.

Columns: pipelines_peers.py. A batch is shuffled, mirrored, float32 in [-1, 1] and on the device; what differs from
Pillow's decoding of the same images is reported as wrong instead of timed. A measurement runs over many batches after
a warm-up, so that what was made ahead hides nothing. Files come from the page cache: no disk is measured.

All use the same cores: ours as many threads, the others as many processes. In the measuring process torch computes with
one thread, for all of them, as it does in the DataLoader's processes; on a CPU its threads, which spin while they wait,
would take the cores from whatever decodes.

Where there is a GPU, so is the share of a training iteration that is spent waiting for data. On a CPU there is none to
measure, for training and decoding want the same cores. The times count on a CPU as well, and this takes them:

    python -m pytest bench/test_pipelines.py -q -s --benchmark-quiet --results=bench/results

The real images are looked for in $DCVAE_IMAGES, in shared/data and in ../shared/data: folders faces1024, bedroom256 and
cifar10.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import harness
import suite
from dcvae_pipelines import Batch
from pipelines_cases import ROWS, Row, errors, iteration, load, waiting_share
from pipelines_peers import PEERS
from pipelines_targets import MODE, targets

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

PACKAGES = ("nvidia-dali-cuda130", "torchvision", "Pillow")
BENCHMARK = suite.Benchmark("pipelines", ROWS, PEERS, PACKAGES, targets, (MODE,), on_cpu=True)
# Implementation by implementation: what the targets need comes first.
CASES = [(row, peer, MODE, "wall") for peer, row in itertools.product(PEERS, ROWS)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@suite.parametrized(CASES)
def test_pipelines(row: Row, peer: str, mode: str, timing: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, timing, measure)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file: times are those of a batch of images."""
    images = load(row.images)
    with running(PEERS[peer](row, images)) as batches:
        found = errors(row, images, next(batches))

        def several() -> None:
            for _ in range(row.batches):
                next(batches)

        wall = harness.measure(benchmark, several, row.batches, row.seconds, min_batches=3)
        share = waiting_share(iteration(row), batches, ahead=row.batches) if harness.ON_GPU else None
    return {"wall": wall, "errors": found, "waiting_share": None if share is None else round(share, 4)}


@contextmanager
def running(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Afterwards its threads and processes are gone, which would take time from the next."""
    try:
        yield batches
    finally:
        batches.close()  # type: ignore[attr-defined]
        gc.collect()
