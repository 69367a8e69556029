"""One of two ranks that use the ops with data parallelism; run as `data_parallel.py RANK FILE`.

Each rank compares its results with those of a single process with the whole batch, which it also computes.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checks import randn
from dcvae_kernels import KeyQueue, info_nce, spectral_norm

WORLD_SIZE, BATCH, STEPS = 2, 6, 3


def gathered(x: Tensor) -> Tensor:
    """Return the rows of all ranks, [WORLD_SIZE · B, ...], without gradient."""
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


def encoder() -> nn.Linear:
    model = nn.Linear(5, 8)
    with torch.no_grad():
        model.weight.copy_(randn(8, 5, seed=9))
        model.bias.zero_()
    return model


def shared_queue(rank: int, impl: Any) -> None:
    """MoCo: every rank enqueues the gathered keys, so queues and steps equal those of a single process."""
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    single = encoder()
    parallel = DistributedDataParallel(encoder())
    queues = [KeyQueue(20, 8, seed=0) for _ in range(2)]
    for step in range(STEPS):
        x, k = randn(WORLD_SIZE * BATCH, 5, seed=10 + step), randn(WORLD_SIZE * BATCH, 8, seed=20 + step)
        for model, queue, used in ((single, queues[0], slice(None)), (parallel, queues[1], rows)):
            model.zero_grad()
            info_nce(model(x[used]), k[used], queue.keys, valid=queue.valid, impl=impl).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        queues[0].enqueue(k)
        queues[1].enqueue(gathered(k[rows].contiguous()))
        assert torch.equal(queues[0].keys, queues[1].keys)
        torch.testing.assert_close(single.weight, parallel.module.weight, rtol=1e-6, atol=1e-6)


def separate_queues(rank: int, impl: Any) -> None:
    """A queue outside the wrapped module is not synchronised between ranks."""
    queue = KeyQueue(4, 8)
    queue.enqueue(randn(4, 8, seed=rank))
    parallel = DistributedDataParallel(encoder())
    x, k = randn(BATCH, 5, seed=30 + rank), randn(BATCH, 8, seed=40 + rank)
    loss = info_nce(parallel(x), k, queue.keys, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss.detach(), info_nce(encoder()(x).detach(), k, randn(4, 8, seed=rank)))
    losses = gathered(loss[None])
    assert losses[0] != losses[1]


def gathered_keys(rank: int, impl: Any) -> None:
    """In-batch negatives from all ranks: the gathered keys are the queue, and ids exclude the positive."""
    x, k = randn(WORLD_SIZE * BATCH, 5, seed=50), randn(WORLD_SIZE * BATCH, 8, seed=51)
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    ids = torch.arange(WORLD_SIZE * BATCH)
    single, parallel = encoder(), DistributedDataParallel(encoder())
    expected = info_nce(single(x), k)
    expected.backward()
    keys = gathered(k[rows].contiguous())
    loss = info_nce(parallel(x[rows]), k[rows], keys, query_ids=ids[rows], negative_ids=ids, impl=impl)
    loss.backward()
    torch.testing.assert_close(gathered(loss[None]).mean(), expected.detach())
    torch.testing.assert_close(parallel.module.weight.grad, single.weight.grad, rtol=1e-5, atol=1e-6)


def spectral_norm_buffers(rank: int, impl: Any) -> None:
    """All ranks end with the same state_dict, although each has seen other images."""
    torch.manual_seed(0)
    net = spectral_norm(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), impl=impl)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        parallel(randn(BATCH, 5, seed=60 + 10 * rank + step)).square().mean().backward()
        optimizer.step()
    for value in net.state_dict().values():
        first, second = gathered(value[None])
        assert torch.equal(first, second)


if __name__ == "__main__":
    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD_SIZE)
    for impl in ("torch", "triton"):
        shared_queue(rank, impl)
        separate_queues(rank, impl)
        gathered_keys(rank, impl)
        spectral_norm_buffers(rank, impl)
    dist.destroy_process_group()
