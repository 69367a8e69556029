"""A repeated call of `info_nce` with frozen keys uses a plan; its results are those of the first call."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from checks import Implementation, leaves

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(sys.modules["dcvae_kernels.info_nce"], "_PLANS", plans)
    return plans


def problem(on: Implementation, queue_ndim: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    (q,) = leaves(on.randn(4, 8))
    queue = on.randn(9, 8, seed=2).mul_(1)  # it has been written to, like every queue
    return q, on.randn(4, 8, seed=1), queue if queue_ndim == 2 else queue[None]


@pytest.mark.parametrize("queue_ndim", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_derivatives(triton_on: Implementation, plans: dict[Any, Any], reduction: str, queue_ndim: int):
    q, k, queue = problem(triton_on, queue_ndim)

    def results(temperature: float) -> list[Tensor]:
        loss = triton_on.info_nce(q, k, queue, reduction=reduction, temperature=temperature)
        weights = torch.linspace(-1, 2, loss.numel(), device=loss.device).view_as(loss)
        (plain,) = torch.autograd.grad(loss, q, weights, retain_graph=True)
        batch = torch.stack([weights, 2 * weights])
        (batched,) = torch.autograd.grad(loss, q, batch, is_grads_batched=True, retain_graph=True)
        (graph,) = torch.autograd.grad(loss, q, weights, create_graph=True)
        return [loss.detach(), plain, batched, graph.detach(), *torch.autograd.grad(graph.square().sum(), q)]

    for temperature in (0.2, 0.1, 0.02):  # 2/0.02 is above FIXED_MAXIMUM_BELOW
        plans.clear()
        first = results(temperature)
        if temperature == 0.1:
            plans.clear()
            results(0.2)  # a plan is for any τ on the same side of the bound
        assert len(plans) == 1
        torch.testing.assert_close(results(temperature), first, rtol=0, atol=0)
    results(0.2)
    assert len(plans) == 2


def test_layouts_have_their_own_plans(triton_on: Implementation):
    q, k, queue = problem(triton_on)
    expected = triton_on.info_nce(q, k, queue)
    torch.testing.assert_close(triton_on.info_nce(q, k, queue.mT.contiguous().mT), expected)
    torch.testing.assert_close(triton_on.info_nce(q, k, queue.repeat(1, 2)[:, :8]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoint_recomputes_the_first_call_with_a_plan(triton_on: Implementation, dtype: torch.dtype):
    q, k, queue = (x.detach().to(dtype) for x in problem(triton_on))
    q.requires_grad_()
    loss = checkpoint(triton_on.info_nce, q, k, queue, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, q)[0], torch.autograd.grad(triton_on.info_nce(q, k, queue), q)[0])


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


@pytest.mark.parametrize("return_stats", [False, True])
def test_undefined_gradient(triton_on: Implementation, return_stats: bool):
    q, k, queue = problem(triton_on)
    for _ in range(2):
        loss = triton_on.info_nce(q, k, queue, return_stats=return_stats)
        NoGradient.apply(loss[0] if return_stats else loss).backward()
        assert q.grad is None


def test_modified_queue(triton_on: Implementation):
    q, k, queue = problem(triton_on)
    for _ in range(2):
        loss = triton_on.info_nce(q, k, queue)
        queue.mul_(2)
        with pytest.raises(RuntimeError, match="the queue was modified after the forward pass"):
            torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("which", range(3))
def test_tangents_are_not_dropped(triton_on: Implementation, which: int):
    inputs = [x.detach() for x in problem(triton_on)]
    triton_on.info_nce(*inputs)
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(NotImplementedError, match="jvp"):
            triton_on.info_nce(*inputs)


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_vectors(triton_on: Implementation, missing: int):
    inputs: list[Any] = list(problem(triton_on))
    inputs[missing] = None
    with pytest.raises(TypeError, match=f"{'qk'[missing]} must be a tensor; it is a NoneType"):
        triton_on.info_nce(*inputs)
