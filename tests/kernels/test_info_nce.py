"""Results of every info_nce implementation, against fp64 references, hand-computed numbers and eager PyTorch."""

import math
import random
from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dcvae_kernels
from checks import Implementation, cross_entropy, info_nce_fp64, leaves, poison_allocations
from dcvae_kernels import InfoNCEStats, KeyQueue
from dcvae_kernels.reference import info_nce_reference

FLOATS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
TEMPERATURES = [0.005, 0.01, 0.07, 1.0]


# Values ---------------------------------------------------------------------------------------------------------------


def test_hand_computed(on: Implementation):
    q = torch.tensor([[2.0, 0.0]])  # cosine 1 with its key, 0 and -1 with the negatives
    queue = torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    loss, stats = on.info_nce(q, q, queue, temperature=0.5, return_stats=True)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4)), rel=1e-6)
    assert isinstance(stats, InfoNCEStats)
    assert stats.rank.tolist() == [0]


def sizes() -> list[tuple[int, int, int, int, float]]:
    """All pairs (B, K) with cycling D, S and temperature, then all D with one or several scales.

    The cycle lengths have no common factor, so that no K always has the same temperature.
    """
    dims, scales, temperatures = cycle((1, 15, 16, 48, 7, 16, 17)), cycle((3, 1, 2)), cycle((*TEMPERATURES, 0.2))
    pairs = product([1, 63, 65, 129], [1, 31, 8096, 8192])
    cases = [(b, k, next(dims), next(scales), next(temperatures)) for b, k in pairs]
    cases += [(5, 31, d, s, next(temperatures)) for d, s in product([1, 15, 16, 48, 128], [1, 2, 3])]
    cases += [(5, 31, 513, 2, 0.07)]
    return cases


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("b", "k", "d", "s", "temperature"), sizes())
def test_error_against_fp64_is_not_larger_than_eager(
    on: Implementation, b: int, k: int, d: int, s: int, temperature: float, dtype: torch.dtype
):
    if on.interpreted and k > 8000:
        k, d, s = k // 64, min(d, 16), 1  # K is 126 or 128; only 128 is a multiple of a block
    shapes = [(s, b, d), (s, b, d), (s, k, d)]
    q, keys, queue = (on.randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    q, keys, queue = leaves(q, keys, queue)
    exact_in, eager_in = leaves(q, keys, queue, dtype=torch.float64), leaves(q, keys, queue)

    ours = on.info_nce(q, keys, queue, temperature=temperature, reduction="none")
    exact, eager = (
        torch.stack([cross_entropy(a[i], b[i], c[i], temperature) for i in range(s)])
        for a, b, c in (exact_in, eager_in)
    )
    assert ours.dtype == torch.float32
    for loss in (ours, exact, eager):
        loss.double().mean().backward()

    error = (ours.double() - exact).abs().max() / exact.abs().max()
    eager_error = (eager.double() - exact).abs().max() / exact.abs().max()
    assert error <= 2 * eager_error + FLOATS[dtype]
    for x, x_exact, x_eager in zip((q, keys, queue), exact_in, eager_in, strict=True):
        assert x.grad is not None and x_exact.grad is not None and x_eager.grad is not None
        assert x.grad.dtype == dtype
        # In one dimension the exact gradient is 0, the difference of terms of magnitude 1/τ.
        scale = x_exact.grad.norm() if d > 1 else 1 / temperature
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2
        if on.impl == "triton" and not on.interpreted:
            # The compiler can sum the squares of a row in another order in backward than in forward. The similarities
            # then differ by a rounding error, which e^{similarity/τ} multiplies by 1/τ.
            tolerance = max(tolerance, 2**-23 / temperature)
        tolerance *= scale
        error, eager_error = ((grad.double() - x_exact.grad).norm() for grad in (x.grad, x_eager.grad))
        assert error <= 2 * eager_error + tolerance


@pytest.mark.parametrize("b", [1, 2, 63, 65])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_in_batch_and_symmetric(on: Implementation, b: int, temperature: float):
    q, k = leaves(on.randn(b, 16, dtype=on.widest), on.randn(b, 16, seed=1, dtype=on.widest))
    q2, k2 = leaves(q, k)
    logits = F.normalize(q2, dim=1) @ F.normalize(k2, dim=1).T / temperature
    target = torch.arange(b)
    rows, columns = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)

    torch.testing.assert_close(on.info_nce(q, k, temperature=temperature), rows)
    loss, stats = on.info_nce(q, k, temperature=temperature, symmetric=True, return_stats=True)
    torch.testing.assert_close(loss, (rows + columns) / 2)
    torch.testing.assert_close(stats.rank, (logits > logits.diagonal()[:, None]).sum(1))
    expected = torch.autograd.grad((rows + columns) / 2, (q2, k2))
    torch.testing.assert_close(torch.autograd.grad(loss, (q, k)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_in_batch_gradients(on: Implementation, dtype: torch.dtype):
    """Compare the gradients of queries and keys with fp64."""
    b, d = (70, 128) if on.interpreted else (4096, 128) if on.device == "cuda" else (512, 128)
    q, k = leaves(on.randn(b, d, dtype=dtype), on.randn(b, d, seed=1, dtype=dtype))
    exact_q, exact_k = leaves(q, k, dtype=torch.float64)
    logits = F.normalize(exact_q, dim=1) @ F.normalize(exact_k, dim=1).T / 0.07
    expected = torch.autograd.grad(F.cross_entropy(logits, torch.arange(b)), (exact_q, exact_k))
    for x, y in zip(torch.autograd.grad(on.info_nce(q, k), (q, k)), expected, strict=True):
        assert (x.double() - y).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * y.norm()


def test_simclr(on: Implementation):
    """NT-Xent of two views of each image, as in the README."""
    a, b = on.randn(5, 8), on.randn(5, 8, seed=1)
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    ids = torch.arange(5).repeat(2)
    torch.testing.assert_close(
        on.info_nce(torch.cat([a, b]), torch.cat([b, a]), temperature=0.5, query_ids=ids), expected
    )


def test_scales_are_independent_and_averaged(on: Implementation):
    q, k, queue = on.randn(2, 4, 8), on.randn(2, 4, 8, seed=1), on.randn(2, 9, 8, seed=2)
    losses = torch.stack([on.info_nce(q[i], k[i], queue[i], reduction="none") for i in range(2)])
    torch.testing.assert_close(on.info_nce(q, k, queue, reduction="none"), losses)
    torch.testing.assert_close(on.info_nce(q, k, queue), losses.mean())
    torch.testing.assert_close(on.info_nce(q, k, queue, reduction="sum"), losses.sum())
    in_batch = torch.stack([on.info_nce(q[i], k[i], reduction="none") for i in range(2)])
    torch.testing.assert_close(on.info_nce(q, k, reduction="none"), in_batch)


def test_2d_queries_with_a_single_scale_queue(on: Implementation):
    q, k, queue = on.randn(4, 8), on.randn(4, 8, seed=1), on.randn(9, 8, seed=2)
    loss, stats = on.info_nce(q, k, queue[None], reduction="none", return_stats=True)
    assert loss.shape == stats.rank.shape == (4,)
    assert torch.equal(loss, on.info_nce(q, k, queue, reduction="none"))


def test_small_losses_are_precise(on: Implementation):
    """If the loss is far below 1, log-sum-exp minus the positive is mostly rounding error."""
    q, queue = on.randn(8, 64), on.randn(31, 64, seed=1)
    exact, eager = (cross_entropy(x, x, y, 0.07) for x, y in ((q.double(), queue.double()), (q, queue)))
    assert exact.max() < 1e-3
    torch.testing.assert_close(on.info_nce(q, q, queue, reduction="none").double(), exact, rtol=1e-5, atol=0)
    assert ((eager - exact) / exact).abs().max() > 1e-4


def test_extreme_scores(on: Implementation):
    """Positives opposite to their queries, negatives equal to them, at the lowest temperature: loss 2/τ + ln K."""
    q = on.randn(3, 16).requires_grad_()
    loss = on.info_nce(q, -q.detach(), q.detach()[:1].expand(5, 16), temperature=0.005, reduction="none")
    assert loss[0].item() == pytest.approx(400 + math.log(5), rel=1e-5)
    loss.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    far = on.info_nce(q, q.detach(), -q.detach()[:1], temperature=0.005, reduction="none")
    assert far[0].item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("temperature", [0.011, 0.02, 0.03, 0.035])
def test_all_negatives_opposite(on: Implementation, temperature: float):
    """All scores, including the positive, are −1/τ, the lowest possible value: loss ln(1 + K)."""
    q = on.randn(3, 16)[:1].expand(3, 16).clone().requires_grad_()
    keys = -q.detach()
    loss = on.info_nce(q, keys, torch.cat([keys, keys[:2]]), temperature=temperature, reduction="none")
    torch.testing.assert_close(loss.detach(), torch.full((3,), math.log(6)), rtol=1e-4, atol=0)
    rotated = keys + 0.1 * on.randn(3, 16, seed=1)
    exact_q = q.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(info_nce_fp64(exact_q, keys, [rotated] * 3, temperature).sum(), exact_q)
    ours = on.info_nce(q, keys, rotated, temperature=temperature, reduction="sum")
    (gradient,) = torch.autograd.grad(ours, q)
    assert (gradient - exact).norm() <= 1e-4 * exact.norm()


def test_reduction_none_with_any_grad_output(on: Implementation):
    q, k, queue = leaves(*(on.randn(*s, seed=i, dtype=on.widest) for i, s in enumerate([(5, 8), (5, 8), (7, 8)])))
    weights = on.randn(5, seed=3, dtype=on.widest)
    loss = on.info_nce(q, k, queue, temperature=0.2, reduction="none")
    exact = info_nce_fp64(q, k, [queue] * 5, 0.2).to(loss.dtype)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (q, k, queue), weights), torch.autograd.grad(exact, (q, k, queue), weights)
    )


def test_without_normalisation(on: Implementation):
    q, k, queue = (on.randn(*s, seed=i) for i, s in enumerate([(5, 8), (5, 8), (7, 8)]))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 2.0
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(on.info_nce(q, k, queue, temperature=2, normalize=False), expected)


def test_strided_and_transposed_inputs(on: Implementation):
    q, k, queue = on.randn(8, 2 * 6)[:, ::2], on.randn(6, 8, seed=1).T, on.randn(6, 31, seed=2).T
    assert not (q.is_contiguous() or k.is_contiguous() or queue.is_contiguous())
    contiguous = on.info_nce(q.contiguous(), k.contiguous(), queue.contiguous())
    torch.testing.assert_close(on.info_nce(q, k, queue), contiguous)
    scaled = [x.expand(3, *x.shape) for x in (q, k, queue)]
    torch.testing.assert_close(on.info_nce(*scaled), contiguous)


# Random cases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations_match_the_reference(on: Implementation, seed: int):
    """Compare loss, rank and all gradients with fp64 for random shapes, layouts, dtypes and options."""
    draw = random.Random(seed)
    b, k, d, s = draw.choice([1, 5, 33]), draw.choice([1, 7, 70]), draw.choice([1, 8, 17, 40]), draw.choice([1, 2])
    form = draw.choice(["queue", "queue", "in-batch", "symmetric"])
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (on.widest == torch.float64)
    tensors = [on.randn(s, n, d, seed=i, dtype=draw.choice(dtypes)) for i, n in enumerate((b, b, k))]
    tensors = [strided(x, draw.choice([0, 1, 2])) for x in tensors]
    options: dict[str, Any] = {"symmetric": form == "symmetric", "normalize": draw.random() < 0.7}
    options["temperature"] = draw.choice([0.02, 0.03, 0.2, 1.0])
    keys = tensors[2].shape[1] if form == "queue" else b
    if draw.random() < 0.6:
        ids = torch.tensor([[draw.randint(-1, 3)] * 2 for _ in range(b + keys)])[:, 0]  # strided
        options |= {"query_ids": ids[:b], "negative_ids": ids[b:]}
    if form == "queue" and draw.random() < 0.4:
        valid = draw.randint(0, keys)
        options["valid"] = torch.tensor(valid) if draw.random() < 0.5 else valid
    needs = [draw.random() < 0.7 for _ in range(4)]
    needs[0] |= not any(needs)

    def run(call: Any, dtype: torch.dtype | None, **more: Any) -> list[Tensor | None]:
        inputs = [x.detach().to(dtype or x.dtype) for x in tensors] + [
            torch.tensor(options["temperature"], dtype=dtype)
        ]
        differentiated = [x.requires_grad_() for x, needed in zip(inputs, needs, strict=True) if needed]
        q, k, queue, temperature = inputs
        arguments = options | more | ({"temperature": temperature} if needs[3] else {})
        loss, stats = call(q, k, queue if form == "queue" else None, reduction="none", return_stats=True, **arguments)
        grad_output = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        gradients = torch.autograd.grad(loss, differentiated, grad_output, allow_unused=True)
        return [loss, stats.rank, *gradients]

    ours, exact = run(on.info_nce, None), run(reference_with_stats, torch.float64)
    half = any(x.dtype.itemsize == 2 for x in tensors)
    for i, (x, y) in enumerate(zip(ours, exact, strict=True)):
        assert (x is None) == (y is None)
        if x is None or y is None:
            continue
        if i == 1:
            assert torch.equal(x, y) or d == 1 or half  # ties and near-ties are common in these cases
        else:
            scale = max(y.norm().item(), 1e-6 if i == 0 else 1 / options["temperature"] * 1e-2)
            assert (x.double() - y).norm() <= (5e-2 if half and i else 2e-5) * scale, i


def test_queue_can_be_the_same_tensor_as_queries_or_keys(on: Implementation):
    q, k = on.randn(2, 5, 8), on.randn(2, 5, 8, seed=1)
    for queue in (q, k):
        assert torch.equal(on.info_nce(q, k, queue), on.info_nce(q, k, queue.clone()))


def strided(x: Tensor, kind: int) -> Tensor:
    """Return x unchanged (0), transposed in memory (1), or with gaps between its elements (2)."""
    if kind == 0:
        return x
    return x.mT.contiguous().mT if kind == 1 else torch.stack([x, x], -1)[..., 0]


def reference_with_stats(
    q: Tensor, k: Tensor, queue: Tensor | None, reduction: str, return_stats: bool, **options: Any
) -> Any:
    options = {"valid": None, "query_ids": None, "negative_ids": None} | options
    if isinstance(options["valid"], int):
        options["valid"] = torch.tensor(options["valid"])
    loss, rank = info_nce_reference(q, k, queue, with_rank=True, **options)
    assert rank is not None
    return loss, InfoNCEStats(rank)


# Rank -----------------------------------------------------------------------------------------------------------------


def test_rank_counts_strictly_higher_negatives(on: Implementation):
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    k = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    queue = torch.tensor(
        [[3.0, 0.0], [3.0, 9.0], [2.0, 0.0], [1.0, 0.0]]
    )  # two equal scores above 2, one tie, one below
    _, stats = on.info_nce(q, k, queue, normalize=False, return_stats=True)
    assert stats.rank.tolist() == [2, 0]
    assert stats.rank.dtype == torch.int64 and not stats.rank.requires_grad
    _, stats = on.info_nce(q, k, queue, normalize=False, return_stats=True, valid=1)
    assert stats.rank.tolist() == [1, 0]


def test_rank_against_sorting(on: Implementation):
    q, k, queue = on.randn(2, 65, 16), on.randn(2, 65, 16, seed=1), on.randn(2, 31, 16, seed=2)
    positive = torch.cosine_similarity(q, k, dim=-1)
    scores = torch.cosine_similarity(q[:, :, None], queue[:, None], dim=-1)
    order = torch.cat([positive[..., None], scores], dim=-1).argsort(dim=-1, descending=True)
    _, stats = on.info_nce(q, k, queue, return_stats=True)
    assert torch.equal(stats.rank, (order == 0).int().argmax(-1))


# Excluded negatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("valid", [0, 1, 30, 31])
@pytest.mark.parametrize("normalize", [False, True])
def test_valid_equals_a_slice_of_the_queue(on: Implementation, valid: int, as_tensor: bool, normalize: bool):
    q, k, queue = leaves(on.randn(2, 5, 8), on.randn(2, 5, 8, seed=1), on.randn(2, 31, 8, seed=2))
    with torch.no_grad():
        queue[:, valid:] = float("nan")
    count = torch.tensor(valid) if as_tensor else valid
    q2, k2 = leaves(q, k)
    (cut,) = leaves(queue[:, :valid])
    loss = on.info_nce(q, k, queue, valid=count, normalize=normalize)
    expected = on.info_nce(q2, k2, cut, normalize=normalize)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close((q.grad, k.grad), (q2.grad, k2.grad))
    assert queue.grad is not None
    torch.testing.assert_close(queue.grad[:, :valid], cut.grad)
    assert not queue.grad[:, valid:].any()


def test_equal_ids_are_excluded_and_unknown_ids_are_not(on: Implementation):
    q, k, queue = on.randn(4, 8), on.randn(4, 8, seed=1), on.randn(6, 8, seed=2)
    query_ids, negative_ids = torch.tensor([7, 8, -1, 9]), torch.tensor([7, -1, 8, 7, -1, 5])
    kept = [[1, 2, 4, 5], [0, 1, 3, 4, 5], range(6), range(6)]
    exact = info_nce_fp64(q, k, [queue[list(x)] for x in kept], 0.07)
    loss = on.info_nce(q, k, queue, query_ids=query_ids, negative_ids=negative_ids, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    with_valid = on.info_nce(q, k, queue, query_ids=query_ids, negative_ids=negative_ids, valid=3, reduction="none")
    exact = info_nce_fp64(q, k, [queue[[i for i in x if i < 3]] for x in kept], 0.07)
    torch.testing.assert_close(with_valid.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("explicit", [False, True])
def test_ids_within_a_batch(on: Implementation, explicit: bool):
    q, k = on.randn(4, 8), on.randn(4, 8, seed=1)
    ids = torch.tensor([3, 3, -1, -1])
    options: dict[str, Any] = {"query_ids": ids, "negative_ids": ids} if explicit else {"query_ids": ids}
    kept = [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]
    rows = info_nce_fp64(q, k, [k[x] for x in kept], 0.07)
    columns = info_nce_fp64(k, q, [q[x] for x in kept], 0.07)
    torch.testing.assert_close(on.info_nce(q, k, **options).double(), rows.mean(), rtol=1e-5, atol=0)
    symmetric = on.info_nce(q, k, symmetric=True, reduction="none", **options)
    torch.testing.assert_close(symmetric.double(), (rows + columns) / 2, rtol=1e-5, atol=1e-6)


def test_symmetric_loss_with_different_query_and_negative_ids(on: Implementation):
    """Excluding pair (0, 1) excludes key 1 for query 0, and query 0 for key 1."""
    q, k = on.randn(3, 8), on.randn(3, 8, seed=1)
    loss = on.info_nce(
        q, k, query_ids=torch.tensor([5, 1, 2]), negative_ids=torch.tensor([0, 5, 9]), symmetric=True, reduction="none"
    )
    rows = info_nce_fp64(q, k, [k[[2]], k[[0, 2]], k[[0, 1]]], 0.07)
    columns = info_nce_fp64(k, q, [q[[1, 2]], q[[2]], q[[0, 1]]], 0.07)
    torch.testing.assert_close(loss.double(), (rows + columns) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"queue": torch.zeros(0, 8)},
        {"queue": torch.ones(9, 8), "valid": 0},
        {"queue": torch.ones(9, 8), "valid": torch.tensor(0)},
        {"queue": torch.ones(2, 8), "query_ids": torch.tensor([4, 4]), "negative_ids": torch.tensor([4, 4])},
        {"query_ids": torch.tensor([4, 4])},
        {"query_ids": torch.tensor([4, 4]), "symmetric": True},
    ],
    ids=["no slots", "no slot filled", "no slot filled, tensor", "all excluded", "in-batch", "symmetric"],
)
@pytest.mark.parametrize("d", [8, 300])
def test_loss_and_gradient_are_zero_without_negatives(on: Implementation, options: dict[str, Any], d: int):
    options = {name: x.to(on.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    if "queue" in options:
        options["queue"] = torch.ones(len(options["queue"]), d)
    q, k = leaves(on.randn(2, d), on.randn(2, d, seed=1))
    temperature = torch.tensor(0.07, requires_grad=True)
    with poison_allocations():  # fresh memory often contains the expected zeros
        loss, stats = on.info_nce(q, k, temperature=temperature, return_stats=True, reduction="none", **options)
        assert loss.tolist() == [0, 0]
        assert stats.rank.tolist() == [0, 0]
        for gradient in torch.autograd.grad(loss.sum(), (q, k, temperature)):
            assert not gradient.any()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_queries(on: Implementation, shape: tuple[int, ...]):
    q = torch.zeros(shape, requires_grad=True)
    for loss in (
        on.info_nce(q, q),
        on.info_nce(q, q, torch.ones(*shape[:-2], 3, 8)),
        on.info_nce(q, q, symmetric=True),
    ):
        assert loss.item() == 0
        loss.backward()


# Special values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_too", [False, True])
def test_zero_rows(on: Implementation, queue_too: bool):
    q, k, queue = leaves(*(on.randn(*s, seed=i) for i, s in enumerate([(3, 8), (3, 8), (5, 8)])))
    with torch.no_grad():
        q[0], k[1] = 0, 0
        if queue_too:
            queue[2] = 0
    loss = on.info_nce(q, k, queue, reduction="none")
    assert loss[0].item() == pytest.approx(math.log(6), rel=1e-6)  # all scores 0
    torch.testing.assert_close(loss, cross_entropy(q, k, queue, 0.07))
    first = torch.autograd.grad(loss.sum(), (q, k, queue), create_graph=True)
    expected = torch.autograd.grad(cross_entropy(q, k, queue, 0.07).sum(), (q, k, queue))
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    second = torch.autograd.grad(torch.cat(first).square().mean(), (q, k, queue))
    assert all(x.isfinite().all() for x in second)


@pytest.mark.parametrize("where", ["q", "k", "queue"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("other", [1.0, -1.0])
def test_nan_and_infinity_reach_the_loss(on: Implementation, where: str, value: float, normalize: bool, other: float):
    """For both signs of the infinite scores."""
    k, queue = torch.full((2, 4), other), torch.full((3, 4), other)
    tensors: dict[str, Any] = {"q": torch.ones(2, 4), "k": k, "queue": queue}
    tensors[where][1, 2] = value
    assert not on.info_nce(**tensors, normalize=normalize).isfinite()
    if where != "queue":
        assert not on.info_nce(tensors["q"], tensors["k"], normalize=normalize).isfinite()


# Temperature ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["queue", "in-batch", "symmetric"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_of_a_tensor_temperature(on: Implementation, form: str, reduction: str):
    q, k, queue = (on.randn(2, n, 8, seed=i, dtype=on.widest) for i, n in enumerate((5, 5, 7)))
    options: dict[str, Any] = {"symmetric": form == "symmetric", "reduction": reduction}
    step = 1e-6

    def loss(temperature: Any, call: Any = on.info_nce, dtype: torch.dtype = on.widest) -> Tensor:
        negatives = queue.to(dtype) if form == "queue" else None
        return call(q.to(dtype), k.to(dtype), negatives, temperature=temperature, **options)

    temperature = torch.tensor(0.3, dtype=on.widest, requires_grad=True)
    result = loss(temperature)
    torch.testing.assert_close(result.detach(), loss(0.3))
    grad_output = on.randn(*result.shape, seed=3, dtype=on.widest)
    (gradient,) = torch.autograd.grad(result, temperature, grad_output)
    above, below = (loss(0.3 + x, dcvae_kernels.info_nce, torch.float64) for x in (step, -step))
    expected = ((above - below) / (2 * step) * grad_output).sum()
    assert gradient.dtype == temperature.dtype
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-5 if on.widest == torch.float32 else 1e-7)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_enqueue_before_backward_does_not_change_gradients(
    on: Implementation, normalize: bool, valid: bool, compiled: bool
):
    def gradient(enqueue: bool) -> Tensor:
        queue = KeyQueue(6, 8, seed=0)
        q, k = on.randn(4, 8).requires_grad_(), on.randn(4, 8, seed=1)
        function = torch.compile(on.info_nce, backend="aot_eager", fullgraph=True) if compiled else on.info_nce
        loss = function(q, k, queue.keys, valid=queue.valid if valid else None, normalize=normalize)
        if enqueue:
            queue.enqueue(k)
        return torch.autograd.grad(loss, q)[0]

    assert torch.equal(gradient(enqueue=True), gradient(enqueue=False))


# Precision and compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_no_effect(on: Implementation, dtype: torch.dtype):
    q, k, queue = leaves(on.randn(5, 16), on.randn(5, 16, seed=1), on.randn(31, 16, seed=2))
    expected = on.info_nce(q, k, queue)
    with torch.autocast(on.device, dtype=dtype):
        loss = on.info_nce(q, k, queue)
        half = (q @ torch.eye(16)).detach()  # as from a network under autocast: half-precision queries, float32 queue
        mixed = on.info_nce(half, k, queue)
    assert half.dtype == dtype
    assert torch.equal(loss, expected)
    assert mixed.dtype == torch.float32
    # Compiled kernels for half precision can add in another order than those for float32.
    torch.testing.assert_close(mixed, on.info_nce(half.float(), k, queue), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, (q, k, queue))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, queue)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_loss(on: Implementation, dtype: torch.dtype):
    if dtype.itemsize > on.widest.itemsize:
        pytest.skip("not supported; see the tests of errors")
    q = on.randn(3, 8, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert on.info_nce(q, q, q).dtype == expected
    if on.widest == torch.float64:
        assert on.info_nce(q, q, q.double()).dtype == torch.float64


@pytest.mark.parametrize("form", ["everything", "symmetric"])
def test_compiles_to_one_graph(on: Implementation, form: str):
    q, k, queue = leaves(on.randn(2, 5, 8), on.randn(2, 5, 8, seed=1), on.randn(2, 9, 8, seed=2))
    temperature, valid = torch.tensor(0.1, requires_grad=True), torch.tensor(7)
    inputs = (q, k, queue, temperature) if form == "everything" else (q, k, temperature)
    ids = torch.arange(5), torch.arange(9)  # not in the compiled function, where they would be on the CPU

    def loss() -> tuple[Tensor, InfoNCEStats]:
        if form == "symmetric":
            return on.info_nce(q, k, temperature=temperature, symmetric=True, return_stats=True)
        options: dict[str, Any] = {"query_ids": ids[0], "negative_ids": ids[1], "valid": valid}
        return on.info_nce(q, k, queue, temperature=temperature, return_stats=True, **options)

    compiled, stats = torch.compile(loss, backend="aot_eager", fullgraph=True)()
    eager, eager_stats = loss()
    assert torch.equal(compiled, eager) and torch.equal(stats.rank, eager_stats.rank)
    gradients = torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
