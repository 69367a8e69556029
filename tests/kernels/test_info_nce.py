"""info_nce against fp64 definitions written out query by query, hand-computed numbers and eager PyTorch."""

import copy
import math
from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import grad

from dcvae_kernels import InfoNCE, InfoNCEStats, KeyQueue, info_nce

FLOATS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
TEMPERATURES = [0.005, 0.01, 0.07, 1.0]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The loss as everyone writes it, in the inputs' own dtype; [B, D], [B, D], [K, D] -> [B]."""
    q, k, queue = (F.normalize(t, dim=-1) for t in (q, k, queue))
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")


def by_definition(q: Tensor, k: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """Eq. 6 in fp64, one query at a time; negatives[i] [K_i, D] are those of query i."""
    losses = []
    for query, key, others in zip(q.double(), k.double(), negatives, strict=True):
        positive = torch.cosine_similarity(query, key, dim=0) / temperature
        scores = torch.cosine_similarity(query[None], others.double(), dim=1) / temperature
        losses.append(torch.cat([positive[None], scores]).logsumexp(0) - positive)
    return torch.stack(losses)


# Values ---------------------------------------------------------------------------------------------------------------


def test_hand_computed():
    q = torch.tensor([[2.0, 0.0]])  # cosine 1 with its key, 0 and -1 with the negatives
    queue = torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    loss, stats = info_nce(q, q, queue, temperature=0.5, return_stats=True)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4)), rel=1e-6)
    assert isinstance(stats, InfoNCEStats)
    assert stats.rank.tolist() == [0]


def sizes() -> list[tuple[int, int, int, int, float]]:
    """Every pair (B, K), with small D, S and the temperature taking turns, then every pair (D, S)."""
    dims, scales, temperatures = cycle((1, 15, 16, 48)), cycle((3, 1, 2)), cycle(TEMPERATURES)
    cases = [(b, k, next(dims), next(scales), next(temperatures)) for b, k in product([1, 63, 65, 129], [1, 31, 8096])]
    cases += [(5, 31, d, s, next(temperatures)) for d, s in product([1, 15, 16, 48, 128, 513], [1, 2, 3])]
    return cases


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("b", "k", "d", "s", "temperature"), sizes())
def test_no_worse_than_eager_against_fp64(b: int, k: int, d: int, s: int, temperature: float, dtype: torch.dtype):
    shapes = [(s, b, d), (s, b, d), (s, k, d)]
    q, keys, queue = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    q, keys, queue = leaves(q, keys, queue)
    exact_in, eager_in = leaves(q, keys, queue, dtype=torch.float64), leaves(q, keys, queue)

    ours = info_nce(q, keys, queue, temperature=temperature, reduction="none")
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
        # With one dimension a direction cannot turn: the gradient is 0, left over from terms of size 1/τ.
        scale = x_exact.grad.norm() if d > 1 else 1 / temperature
        tolerance = (2e-6 if dtype == torch.float32 else 1e-2) * scale
        error, eager_error = ((grad.double() - x_exact.grad).norm() for grad in (x.grad, x_eager.grad))
        assert error <= 2 * eager_error + tolerance


@pytest.mark.parametrize("b", [1, 2, 63, 65])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_in_batch_and_symmetric(b: int, temperature: float):
    q, k = leaves(randn(b, 16, dtype=torch.float64), randn(b, 16, seed=1, dtype=torch.float64))
    q2, k2 = leaves(q, k)
    logits = F.normalize(q2, dim=1) @ F.normalize(k2, dim=1).T / temperature
    target = torch.arange(b)
    rows, columns = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)

    torch.testing.assert_close(info_nce(q, k, temperature=temperature), rows)
    loss, stats = info_nce(q, k, temperature=temperature, symmetric=True, return_stats=True)
    torch.testing.assert_close(loss, (rows + columns) / 2)
    torch.testing.assert_close(stats.rank, (logits > logits.diagonal()[:, None]).sum(1))
    expected = torch.autograd.grad((rows + columns) / 2, (q2, k2))
    torch.testing.assert_close(torch.autograd.grad(loss, (q, k)), expected)


def test_simclr():
    """NT-Xent of two views of each image, as the README writes it."""
    a, b = randn(5, 8), randn(5, 8, seed=1)
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    ids = torch.arange(5).repeat(2)
    torch.testing.assert_close(info_nce(torch.cat([a, b]), torch.cat([b, a]), temperature=0.5, query_ids=ids), expected)


def test_scales_are_independent_and_averaged():
    q, k, queue = randn(2, 4, 8), randn(2, 4, 8, seed=1), randn(2, 9, 8, seed=2)
    each = torch.stack([info_nce(q[i], k[i], queue[i], reduction="none") for i in range(2)])
    torch.testing.assert_close(info_nce(q, k, queue, reduction="none"), each)
    torch.testing.assert_close(info_nce(q, k, queue), each.mean())
    torch.testing.assert_close(info_nce(q, k, queue, reduction="sum"), each.sum())
    in_batch = torch.stack([info_nce(q[i], k[i], reduction="none") for i in range(2)])
    torch.testing.assert_close(info_nce(q, k, reduction="none"), in_batch)


def test_queries_without_scales_take_the_keys_of_a_queue_with_one():
    q, k, queue = randn(4, 8), randn(4, 8, seed=1), randn(9, 8, seed=2)
    loss, stats = info_nce(q, k, queue[None], reduction="none", return_stats=True)
    assert loss.shape == stats.rank.shape == (4,)
    assert torch.equal(loss, info_nce(q, k, queue, reduction="none"))


def test_easy_positives_keep_their_precision():
    """Where the loss is far below 1, log-sum-exp minus the positive is mostly rounding."""
    q, queue = randn(8, 64), randn(31, 64, seed=1)
    exact, eager = (cross_entropy(x, x, y, 0.07) for x, y in ((q.double(), queue.double()), (q, queue)))
    assert exact.max() < 1e-3
    torch.testing.assert_close(info_nce(q, q, queue, reduction="none").double(), exact, rtol=1e-5, atol=0)
    assert ((eager - exact) / exact).abs().max() > 1e-4


def test_scores_far_below_and_above():
    """Positives opposite to their queries among identical negatives, at the lowest temperature: loss 2/τ + ln K."""
    q = randn(3, 16).requires_grad_()
    loss = info_nce(q, -q.detach(), q.detach()[:1].expand(5, 16), temperature=0.005, reduction="none")
    assert loss[0].item() == pytest.approx(400 + math.log(5), rel=1e-5)
    loss.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    far = info_nce(q, q.detach(), -q.detach()[:1], temperature=0.005, reduction="none")
    assert far[0].item() == pytest.approx(0, abs=1e-30)


def test_reduction_none_takes_any_incoming_gradient():
    q, k, queue = leaves(*(randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(5, 8), (5, 8), (7, 8)])))
    weights = randn(5, seed=3, dtype=torch.float64)
    loss = info_nce(q, k, queue, temperature=0.2, reduction="none")
    exact = by_definition(q, k, [queue] * 5, 0.2)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (q, k, queue), weights), torch.autograd.grad(exact, (q, k, queue), weights)
    )


def test_without_normalisation():
    q, k, queue = (randn(*s, seed=i) for i, s in enumerate([(5, 8), (5, 8), (7, 8)]))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 2.0
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(info_nce(q, k, queue, temperature=2, normalize=False), expected)


def test_strided_and_transposed_inputs():
    q, k, queue = randn(8, 2 * 6)[:, ::2], randn(6, 8, seed=1).T, randn(6, 31, seed=2).T
    assert not (q.is_contiguous() or k.is_contiguous() or queue.is_contiguous())
    contiguous = info_nce(q.contiguous(), k.contiguous(), queue.contiguous())
    torch.testing.assert_close(info_nce(q, k, queue), contiguous)
    scaled = [x.expand(3, *x.shape) for x in (q, k, queue)]
    torch.testing.assert_close(info_nce(*scaled), contiguous)


# Rank -----------------------------------------------------------------------------------------------------------------


def test_rank_counts_every_better_negative_and_no_tie():
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    k = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    queue = torch.tensor(
        [[3.0, 0.0], [3.0, 9.0], [2.0, 0.0], [1.0, 0.0]]
    )  # two equal scores above 2, one tie, one below
    _, stats = info_nce(q, k, queue, normalize=False, return_stats=True)
    assert stats.rank.tolist() == [2, 0]
    assert stats.rank.dtype == torch.int64 and not stats.rank.requires_grad
    _, stats = info_nce(q, k, queue, normalize=False, return_stats=True, valid=1)
    assert stats.rank.tolist() == [1, 0]


def test_rank_against_sorting():
    q, k, queue = randn(2, 65, 16), randn(2, 65, 16, seed=1), randn(2, 31, 16, seed=2)
    positive = torch.cosine_similarity(q, k, dim=-1)
    scores = torch.cosine_similarity(q[:, :, None], queue[:, None], dim=-1)
    order = torch.cat([positive[..., None], scores], dim=-1).argsort(dim=-1, descending=True)
    _, stats = info_nce(q, k, queue, return_stats=True)
    assert torch.equal(stats.rank, (order == 0).int().argmax(-1))


# What counts as a negative --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("valid", [0, 1, 30, 31])
@pytest.mark.parametrize("normalize", [False, True])
def test_valid_is_a_slice_whatever_lies_beyond(valid: int, as_tensor: bool, normalize: bool):
    q, k, queue = leaves(randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(2, 31, 8, seed=2))
    with torch.no_grad():
        queue[:, valid:] = float("nan")
    count = torch.tensor(valid) if as_tensor else valid
    q2, k2 = leaves(q, k)
    (cut,) = leaves(queue[:, :valid])
    loss = info_nce(q, k, queue, valid=count, normalize=normalize)
    expected = info_nce(q2, k2, cut, normalize=normalize)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close((q.grad, k.grad), (q2.grad, k2.grad))
    assert queue.grad is not None
    torch.testing.assert_close(queue.grad[:, :valid], cut.grad)
    assert not queue.grad[:, valid:].any()


def test_ids_leave_out_repeated_images_but_unknown_ones_stay():
    q, k, queue = randn(4, 8), randn(4, 8, seed=1), randn(6, 8, seed=2)
    query_ids, negative_ids = torch.tensor([7, 8, -1, 9]), torch.tensor([7, -1, 8, 7, -1, 5])
    kept = [[1, 2, 4, 5], [0, 1, 3, 4, 5], range(6), range(6)]
    exact = by_definition(q, k, [queue[list(x)] for x in kept], 0.07)
    loss = info_nce(q, k, queue, query_ids=query_ids, negative_ids=negative_ids, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    both = info_nce(q, k, queue, query_ids=query_ids, negative_ids=negative_ids, valid=3, reduction="none")
    exact = by_definition(q, k, [queue[[i for i in x if i < 3]] for x in kept], 0.07)
    torch.testing.assert_close(both.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("explicit", [False, True])
def test_ids_within_a_batch(explicit: bool):
    q, k = randn(4, 8), randn(4, 8, seed=1)
    ids = torch.tensor([3, 3, -1, -1])
    options: dict[str, Any] = {"query_ids": ids, "negative_ids": ids} if explicit else {"query_ids": ids}
    kept = [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]
    rows = by_definition(q, k, [k[x] for x in kept], 0.07)
    columns = by_definition(k, q, [q[x] for x in kept], 0.07)
    torch.testing.assert_close(info_nce(q, k, **options).double(), rows.mean(), rtol=1e-5, atol=0)
    symmetric = info_nce(q, k, symmetric=True, reduction="none", **options)
    torch.testing.assert_close(symmetric.double(), (rows + columns) / 2, rtol=1e-5, atol=1e-6)


def test_symmetric_ids_need_not_be_symmetric():
    """Excluding pair (0, 1) takes key 1 from query 0, and query 0 from key 1."""
    q, k = randn(3, 8), randn(3, 8, seed=1)
    loss = info_nce(
        q, k, query_ids=torch.tensor([5, 1, 2]), negative_ids=torch.tensor([0, 5, 9]), symmetric=True, reduction="none"
    )
    rows = by_definition(q, k, [k[[2]], k[[0, 2]], k[[0, 1]]], 0.07)
    columns = by_definition(k, q, [q[[1, 2]], q[[2]], q[[0, 1]]], 0.07)
    torch.testing.assert_close(loss.double(), (rows + columns) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"queue": torch.zeros(0, 8)},
        {"queue": randn(9, 8), "valid": 0},
        {"queue": randn(9, 8), "valid": torch.tensor(0)},
        {"queue": randn(2, 8), "query_ids": torch.tensor([4, 4]), "negative_ids": torch.tensor([4, 4])},
        {"query_ids": torch.tensor([4, 4])},
        {"query_ids": torch.tensor([4, 4]), "symmetric": True},
    ],
    ids=["no slots", "no slot filled", "no slot filled, tensor", "all excluded", "in-batch", "symmetric"],
)
def test_no_negatives_is_loss_zero_and_gradient_zero(options: dict[str, Any]):
    q, k = leaves(randn(2, 8), randn(2, 8, seed=1))
    temperature = torch.tensor(0.07, requires_grad=True)
    loss, stats = info_nce(q, k, temperature=temperature, return_stats=True, reduction="none", **options)
    assert loss.tolist() == [0, 0]
    assert stats.rank.tolist() == [0, 0]
    for gradient in torch.autograd.grad(loss.sum(), (q, k, temperature)):
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_queries(shape: tuple[int, ...]):
    q = torch.zeros(shape, requires_grad=True)
    for loss in (info_nce(q, q), info_nce(q, q, torch.ones(*shape[:-2], 3, 8)), info_nce(q, q, symmetric=True)):
        assert loss.item() == 0
        loss.backward()


# Numbers that break things --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_too", [False, True])
def test_zero_rows(queue_too: bool):
    q, k, queue = leaves(*(randn(*s, seed=i) for i, s in enumerate([(3, 8), (3, 8), (5, 8)])))
    with torch.no_grad():
        q[0], k[1] = 0, 0
        if queue_too:
            queue[2] = 0
    loss = info_nce(q, k, queue, reduction="none")
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
def test_nan_and_infinity_reach_the_loss(where: str, value: float, normalize: bool, other: float):
    """Whatever the sign of the scores that become infinite."""
    k, queue = torch.full((2, 4), other), torch.full((3, 4), other)
    tensors: dict[str, Any] = {"q": torch.ones(2, 4), "k": k, "queue": queue}
    tensors[where][1, 2] = value
    assert not info_nce(**tensors, normalize=normalize).isfinite()
    if where != "queue":
        assert not info_nce(tensors["q"], tensors["k"], normalize=normalize).isfinite()


# Temperature ----------------------------------------------------------------------------------------------------------


def test_tensor_temperature_gets_its_gradient():
    q, k, queue = (randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(5, 8), (5, 8), (7, 8)]))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = info_nce(q, k, queue, temperature=temperature)
    assert torch.equal(loss.detach(), info_nce(q, k, queue, temperature=0.3))
    loss.backward()
    step = 1e-6
    above, below = (info_nce(q, k, queue, temperature=0.3 + x) for x in (step, -step))
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-7)


# Differentiation ------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "queue": {"queue": (4, 5)},
    "queue of two scales": {"queue": (2, 4, 5)},
    "valid": {"queue": (4, 5), "valid": 2},
    "ids": {"queue": (4, 5), "query_ids": torch.tensor([1, 2, 3]), "negative_ids": torch.tensor([2, 2, 1, 0])},
    "all excluded": {"queue": (4, 5), "query_ids": torch.ones(3).long(), "negative_ids": torch.ones(4).long()},
    "empty queue": {"queue": (0, 5)},
    "in-batch": {},
    "symmetric": {"symmetric": True, "query_ids": torch.tensor([1, 2, 1])},
    "as given": {"queue": (4, 5), "normalize": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_gradgradcheck(form: str):
    options = dict(FORMS[form])
    shape = options.pop("queue", None)
    scales = shape[:-2] if shape else ()
    inputs = [randn(*scales, 3, 5, dtype=torch.float64), randn(*scales, 3, 5, seed=1, dtype=torch.float64)]
    if shape:
        inputs.append(randn(*shape, seed=2, dtype=torch.float64))
    inputs = leaves(*inputs, torch.tensor(0.4, dtype=torch.float64))

    def loss(*args: Tensor) -> Tensor:
        q, k, *queue, temperature = args
        return info_nce(q, k, queue[0] if queue else None, temperature=temperature, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_gradients_only_where_asked():
    q, k, queue = randn(3, 8).requires_grad_(), randn(3, 8, seed=1), randn(5, 8, seed=2)
    info_nce(q, k, queue).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    assert not info_nce(q.detach(), k, queue).requires_grad


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_enqueue_between_forward_and_backward_changes_no_gradient(normalize: bool, valid: bool, compiled: bool):
    def gradient(enqueue: bool) -> Tensor:
        queue = KeyQueue(6, 8, seed=0)
        q, k = randn(4, 8).requires_grad_(), randn(4, 8, seed=1)
        function = torch.compile(info_nce, backend="aot_eager", fullgraph=True) if compiled else info_nce
        loss = function(q, k, queue.keys, valid=queue.valid if valid else None, normalize=normalize)
        if enqueue:
            queue.enqueue(k)
        return torch.autograd.grad(loss, q)[0]

    assert torch.equal(gradient(enqueue=True), gradient(enqueue=False))


def test_functional_transforms():
    q, k, queue = leaves(randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2))
    torch.testing.assert_close(grad(info_nce)(q, k, queue), torch.autograd.grad(info_nce(q, k, queue), q)[0])


# Precision and compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype):
    q, k, queue = leaves(randn(5, 16), randn(5, 16, seed=1), randn(31, 16, seed=2))
    expected = info_nce(q, k, queue)
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce(q, k, queue)
        half = (q @ torch.eye(16)).detach()  # as a network under autocast gives it: half queries, float32 queue
        mixed = info_nce(half, k, queue)
    assert half.dtype == dtype
    assert torch.equal(loss, expected)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, info_nce(half.float(), k, queue))
    gradients = torch.autograd.grad(loss, (q, k, queue))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, queue)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_loss(dtype: torch.dtype):
    q = randn(3, 8, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert info_nce(q, q, q).dtype == expected
    assert info_nce(q, q, q.double()).dtype == torch.float64


@pytest.mark.parametrize("form", ["everything", "symmetric"])
def test_compiles_to_one_graph(form: str):
    q, k, queue = leaves(randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(2, 9, 8, seed=2))
    temperature = torch.tensor(0.1, requires_grad=True)
    inputs = (q, k, queue, temperature) if form == "everything" else (q, k, temperature)

    def loss() -> tuple[Tensor, InfoNCEStats]:
        if form == "symmetric":
            return info_nce(q, k, temperature=temperature, symmetric=True, return_stats=True)
        ids = torch.arange(5), torch.arange(9)
        options: dict[str, Any] = {"query_ids": ids[0], "negative_ids": ids[1], "valid": torch.tensor(7)}
        return info_nce(q, k, queue, temperature=temperature, return_stats=True, **options)

    compiled, stats = torch.compile(loss, backend="aot_eager", fullgraph=True)()
    eager, eager_stats = loss()
    assert torch.equal(compiled, eager) and torch.equal(stats.rank, eager_stats.rank)
    gradients = torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_reads_no_value_on_the_host():
    """Fake tensors have no values: whatever would wait for a device raises."""
    with FakeTensorMode():
        q, queue, ids = torch.empty(2, 5, 8, requires_grad=True), torch.empty(2, 9, 8), torch.empty(9).long()
        scalars: dict[str, Any] = {"temperature": torch.tensor(0.1), "valid": torch.empty(()).long()}
        loss, _ = info_nce(q, q, queue, query_ids=ids[:5], negative_ids=ids, return_stats=True, **scalars)
        loss.backward()
        info_nce(q, q, symmetric=True, query_ids=ids[:5]).backward()


def test_meta_tensors():
    q = torch.empty(2, 5, 8, device="meta")
    assert info_nce(q, q, q, reduction="none").shape == (2, 5)


# The module -----------------------------------------------------------------------------------------------------------


def test_module_applies_its_settings():
    q, k, queue = randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2)
    settings: dict[str, Any] = {"temperature": 0.2, "normalize": False, "reduction": "none"}
    module = InfoNCE(**settings)
    assert not list(module.parameters()) and not module.state_dict()
    assert torch.equal(module(q, k, queue, valid=3), info_nce(q, k, queue, valid=3, **settings))
    loss, stats = InfoNCE(symmetric=True)(q, k, query_ids=torch.tensor([1, 1, 2]), return_stats=True)
    assert torch.equal(loss, info_nce(q, k, query_ids=torch.tensor([1, 1, 2]), symmetric=True))
    assert stats.rank.shape == (3,)
    with pytest.raises(TypeError, match="temperatur"):
        module(q, k, temperatur=1)


def test_learnable_temperature():
    q, k, queue = randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2)
    module = InfoNCE(temperature=0.2, learnable=True)
    assert module.logit_scale is not None
    assert module.logit_scale.item() == pytest.approx(math.log(5))
    loss = module(q, k, queue)
    torch.testing.assert_close(loss, info_nce(q, k, queue, temperature=0.2))
    loss.backward()
    temperature = torch.tensor(0.2, requires_grad=True)
    info_nce(q, k, queue, temperature=temperature).backward()
    assert module.logit_scale.grad is not None and temperature.grad is not None
    torch.testing.assert_close(module.logit_scale.grad, -0.2 * temperature.grad)  # τ = e^{-logit_scale}

    twin = InfoNCE(learnable=True)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(q, k, queue), loss) and torch.equal(copy.deepcopy(module)(q, k, queue), loss)
    assert isinstance(module, nn.Module) and "learnable=True" in repr(module)


# Errors ---------------------------------------------------------------------------------------------------------------

Q, QUEUE, IDS = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor; it is a list"),
        ({"q": Q.long()}, TypeError, "q must be float16.*int64"),
        ({"k": Q.to(torch.complex64)}, TypeError, "k must be float16.*complex64"),
        ({"queue": KeyQueue(9, 8)}, TypeError, "queue must be a tensor; it is a KeyQueue"),
        ({"k": Q.to("meta")}, ValueError, "k must be on q's device, cpu; it is on meta"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, D\] or \[S, B, D\] with D > 0; it is \[8\]"),
        ({"q": Q[:, :0], "k": Q[:, :0]}, ValueError, r"with D > 0; it is \[4, 0\]"),
        ({"k": Q[:3]}, ValueError, r"k must have q's shape, \[4, 8\]; it is \[3, 8\]"),
        ({"queue": QUEUE[:, :5]}, ValueError, r"queue must be \[K, 8\] for q of \[4, 8\]; it is \[9, 5\]"),
        ({"queue": QUEUE[0]}, ValueError, r"queue must be \[K, 8\].*it is \[8\]"),
        ({"queue": QUEUE.expand(2, 9, 8)}, ValueError, r"queue must be \[K, 8\].*it is \[2, 9, 8\]"),
        (
            {"q": Q.expand(2, 4, 8), "k": Q.expand(2, 4, 8)},
            ValueError,
            r"\[2, K, 8\] for q of \[2, 4, 8\]; it is \[9, 8\]",
        ),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite; it is 0"),
        ({"temperature": -1.0}, ValueError, "temperature .* -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature .* nan"),
        ({"temperature": float("inf")}, ValueError, "temperature .* inf"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number or a 0-d tensor; it is a str"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature must be a 0-d tensor; it is \[1\]"),
        ({"temperature": torch.tensor(1)}, TypeError, "temperature must be a floating-point tensor; it is torch.int64"),
        ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be on q's device"),
        ({"reduction": "avg"}, ValueError, "reduction must be .*'avg'"),
        ({"impl": "triton"}, ValueError, 'impl must be "auto" or "torch".*triton'),
        ({"valid": 10}, ValueError, "valid must be from 0 to the queue's 9 slots; it is 10"),
        ({"valid": -1}, ValueError, "valid .* -1"),
        ({"valid": 1.0}, TypeError, "valid must be an int or a 0-d integer tensor; it is a float"),
        ({"valid": torch.tensor(1.0)}, TypeError, "valid must be an integer tensor; it is torch.float32"),
        ({"valid": torch.tensor(True)}, TypeError, "valid must be an integer tensor; it is torch.bool"),
        ({"valid": torch.tensor([1])}, ValueError, r"valid must be a 0-d tensor; it is \[1\]"),
        ({"valid": 1, "queue": None}, ValueError, "valid counts the filled slots of a queue"),
        ({"query_ids": IDS}, ValueError, "query_ids is given without negative_ids"),
        ({"negative_ids": IDS, "queue": None}, ValueError, "negative_ids is given without query_ids"),
        ({"query_ids": IDS, "negative_ids": IDS}, ValueError, r"negative_ids must be \[9\]; it is \[4\]"),
        ({"query_ids": IDS[:3], "queue": None}, ValueError, r"query_ids must be \[4\]; it is \[3\]"),
        ({"query_ids": IDS.int(), "queue": None}, TypeError, "query_ids must be an int64 tensor; it is torch.int32"),
        ({"query_ids": [1], "queue": None}, TypeError, "query_ids must be an int64 tensor; it is list"),
        ({"query_ids": IDS.to("meta"), "queue": None}, ValueError, "query_ids must be on q's device"),
        ({"symmetric": True}, ValueError, "symmetric compares q and k within the batch"),
    ],
)
def test_errors_name_the_argument_and_what_came(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        info_nce(**dict[str, Any](q=Q, k=Q, queue=QUEUE) | arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"temperature": 0.0}, ValueError),
        ({"impl": "triton"}, ValueError),
        ({"temperature": torch.ones(())}, TypeError),
    ],
)
def test_module_checks_its_settings_at_once(arguments: dict[str, Any], error: type[Exception]):
    with pytest.raises(error, match=next(iter(arguments))):
        InfoNCE(**arguments)
