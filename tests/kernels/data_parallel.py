"""One of two processes that train with the ops in data parallel; run as `data_parallel.py RANK FILE`.

Each checks what it gets against one process that has the whole batch, which it plays itself.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checks import randn
from dcvae_kernels import KeyQueue, info_nce, spectral_norm

WORLD, BATCH, STEPS = 2, 6, 3


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks, [WORLD · B, ...], without gradient."""
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


def encoder() -> nn.Linear:
    model = nn.Linear(5, 8)
    with torch.no_grad():
        model.weight.copy_(randn(8, 5, seed=9))
        model.bias.zero_()
    return model


def queue_of_all_ranks(rank: int, impl: Any) -> None:
    """MoCo: every rank enqueues the gathered keys, so all queues are equal, and so are the steps of one process."""
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    alone = encoder()
    together = DistributedDataParallel(encoder())
    queues = [KeyQueue(20, 8, seed=0) for _ in range(2)]
    for step in range(STEPS):
        x, k = randn(WORLD * BATCH, 5, seed=10 + step), randn(WORLD * BATCH, 8, seed=20 + step)
        for model, queue, mine in ((alone, queues[0], slice(None)), (together, queues[1], rows)):
            model.zero_grad()
            info_nce(model(x[mine]), k[mine], queue.keys, valid=queue.valid, impl=impl).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        queues[0].enqueue(k)
        queues[1].enqueue(gathered(k[rows].contiguous()))
        assert torch.equal(queues[0].keys, queues[1].keys)
        torch.testing.assert_close(alone.weight, together.module.weight, rtol=1e-6, atol=1e-6)


def own_queues(rank: int, impl: Any) -> None:
    """A queue outside the wrapped module stays its rank's own."""
    queue = KeyQueue(4, 8)
    queue.enqueue(randn(4, 8, seed=rank))
    together = DistributedDataParallel(encoder())
    x, k = randn(BATCH, 5, seed=30 + rank), randn(BATCH, 8, seed=40 + rank)
    loss = info_nce(together(x), k, queue.keys, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss.detach(), info_nce(encoder()(x).detach(), k, randn(4, 8, seed=rank)))
    losses = gathered(loss[None])
    assert losses[0] != losses[1]


def keys_of_all_ranks(rank: int, impl: Any) -> None:
    """In-batch negatives from all ranks: the gathered keys as the queue, the own one left out by its id."""
    x, k = randn(WORLD * BATCH, 5, seed=50), randn(WORLD * BATCH, 8, seed=51)
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    ids = torch.arange(WORLD * BATCH)
    alone, together = encoder(), DistributedDataParallel(encoder())
    expected = info_nce(alone(x), k)
    expected.backward()
    keys = gathered(k[rows].contiguous())
    loss = info_nce(together(x[rows]), k[rows], keys, query_ids=ids[rows], negative_ids=ids, impl=impl)
    loss.backward()
    torch.testing.assert_close(gathered(loss[None]).mean(), expected.detach())
    torch.testing.assert_close(together.module.weight.grad, alone.weight.grad, rtol=1e-5, atol=1e-6)


def spectral_norm_buffers(rank: int, impl: Any) -> None:
    """The same on all ranks, whatever images each has seen."""
    torch.manual_seed(0)
    net = spectral_norm(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), impl=impl)
    together = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        together(randn(BATCH, 5, seed=60 + 10 * rank + step)).square().mean().backward()
        optimizer.step()
    for value in net.state_dict().values():
        ours, theirs = gathered(value[None])
        assert torch.equal(ours, theirs)


if __name__ == "__main__":
    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    for impl in ("torch", "triton"):
        queue_of_all_ranks(rank, impl)
        own_queues(rank, impl)
        keys_of_all_ranks(rank, impl)
        spectral_norm_buffers(rank, impl)
    dist.destroy_process_group()
