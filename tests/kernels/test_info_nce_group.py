"""info_nce across the ranks of a group, against a single process with the whole batch, which each rank also computes.

Run as `test_info_nce_group.py RANK FILE`, this is one of three ranks.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.parallel import DistributedDataParallel

from checks import leaves, randn, run_ranks
from dcvae_kernels import InfoNCE, info_nce

WORLD_SIZE, BATCH, DIM = 3, 4, 5
IDS = torch.tensor([1, -1, 2, 2, 1, -1, -1, 3, 7, 2, -1, 2**63 - 1])  # equal within and across ranks; some unknown
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-13}

FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ids": {"query_ids": IDS, "reduction": "none"},
    "symmetric": {"symmetric": True},
    "symmetric, ids": {"symmetric": True, "query_ids": IDS, "reduction": "none"},
    "unnormalised": {"normalize": False},
}


# In pytest ------------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_ranks_match_a_single_process(tmp_path: Path):
    run_ranks(Path(__file__), WORLD_SIZE, tmp_path)


def test_group_of_the_wrong_type():
    q = randn(2, 3)
    groups: list[Any] = ["gloo", 0, q]
    for group, kind in zip(groups, ("str", "int", "Tensor"), strict=True):
        with pytest.raises(TypeError, match=rf"group must be a torch\.distributed\.ProcessGroup; it is a {kind}"):
            info_nce(q, q, group=group)


def test_pytorch_without_distributed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    q: Any = randn(2, 3)
    info_nce(q, q)
    with pytest.raises(ValueError, match=r"group needs torch\.distributed, which this build of PyTorch lacks"):
        info_nce(q, q, group=q)


# In each rank ---------------------------------------------------------------------------------------------------------


class Rank:
    """One rank of a group: its rows of the batch, and comparisons with the whole batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.world_size = group, group.size()
        self.rows = slice(group.rank() * BATCH, (group.rank() + 1) * BATCH)

    def whole_batch(self, scales: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """Return q and k of all ranks, and the temperature."""
        shape = (*scales, self.world_size * BATCH, DIM)
        return leaves(randn(*shape), randn(*shape, seed=1), torch.tensor(0.4), dtype=dtype)

    def local(self, whole: list[Tensor]) -> list[Tensor]:
        """Return leaves with this rank's rows."""
        q, k, temperature = whole
        return leaves(q[..., self.rows, :], k[..., self.rows, :], temperature)

    def options(self, options: dict[str, Any], single: bool) -> dict[str, Any]:
        """Return the options of this rank, or of a single process with the whole batch."""
        options = dict(options)
        if "query_ids" in options:
            options["query_ids"] = options["query_ids"][: self.world_size * BATCH][slice(None) if single else self.rows]
        return options if single else options | {"group": self.group}

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def assert_close(self, local: tuple[Tensor, ...], whole: tuple[Tensor, ...], tolerance: float) -> None:
        """Compare rows with those of the whole batch, and scalars summed over ranks."""
        for x, y in zip(local, whole, strict=True):
            x, y = (self.all_reduce(x), y) if y.ndim == 0 else (x, y[..., self.rows, :])
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def values_and_gradients(on: Rank, form: str, scales: tuple[int, ...], dtype: torch.dtype, impl: Any = "torch") -> None:
    options, tolerance = FORMS[form] | {"impl": impl}, TOLERANCE[dtype]
    whole = on.whole_batch(scales, dtype)
    local = on.local(whole)
    (local_loss, stats), (expected, whole_stats) = (
        info_nce(q, k, temperature=temperature, return_stats=True, **on.options(options, single))
        for (q, k, temperature), single in ((local, False), (whole, True))
    )
    assert torch.equal(stats.rank, whole_stats.rank[..., on.rows])
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        grad_output = torch.linspace(-1, 2, expected.numel(), dtype=expected.dtype).view_as(expected)
        local_grad = grad_output[..., on.rows]
        torch.testing.assert_close(local_loss, expected[..., on.rows], rtol=tolerance, atol=tolerance)
    else:  # the mean over ranks of the means, or the sum over ranks of the sums
        grad_output = torch.ones_like(expected)
        local_grad = grad_output / on.world_size if reduction == "mean" else grad_output
        torch.testing.assert_close(on.all_reduce(local_loss * local_grad), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(local_loss, local, local_grad)
    on.assert_close(gradients, torch.autograd.grad(expected, whole, grad_output), tolerance)


def frozen_keys(on: Rank) -> None:
    whole = on.whole_batch((), torch.float64)
    local = on.local(whole)
    gradient, expected = (
        torch.autograd.grad(info_nce(q, k.detach(), reduction="sum", **on.options({}, single)), q)
        for (q, k, _), single in ((local, False), (whole, True))
    )
    on.assert_close(gradient, expected, 1e-13)


def second_derivatives(on: Rank, form: str) -> None:
    """Gradient of a penalty on the gradient of the loss, both summed over ranks."""
    whole = on.whole_batch((2,), torch.float64)
    local = on.local(whole)

    def derivatives(inputs: list[Tensor], single: bool) -> tuple[Tensor, ...]:
        q, k, temperature = inputs
        options = on.options({"reduction": "sum"} | FORMS[form], single)
        loss = info_nce(q, k, temperature=temperature, **options).sum()
        penalty = sum(x.pow(3).sum() for x in torch.autograd.grad(loss, (q, k), create_graph=True))
        assert isinstance(penalty, Tensor)
        return torch.autograd.grad(penalty, inputs)

    on.assert_close(derivatives(local, False), derivatives(whole, True), 1e-12)


def transforms(on: Rank) -> None:
    """torch.func transforms, which use the reference implementation."""
    q, k, temperature = on.local(on.whole_batch((), torch.float64))

    def loss(q: Tensor) -> Tensor:
        return info_nce(q, 2 * q + k, temperature=temperature, symmetric=True, reduction="sum", group=on.group)

    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(grad(loss)(q), expected)
    torch.testing.assert_close(vmap(loss)(torch.stack([q, -q])), torch.stack([loss(q), loss(-q)]))


def compiled(on: Rank) -> None:
    q, k, temperature = on.local(on.whole_batch((), torch.float32))

    def loss(q: Tensor) -> Tensor:
        options: dict[str, Any] = {"query_ids": IDS[on.rows], "symmetric": True}
        return info_nce(q, k, temperature=temperature, group=on.group, **options) + info_nce(q, q, group=on.group)

    compiled_loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_loss(q), loss(q))
    torch.testing.assert_close(torch.autograd.grad(compiled_loss(q), (q, k)), torch.autograd.grad(loss(q), (q, k)))


class Towers(nn.Module):
    """Two encoders with the loss and learnable temperature of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(3, DIM), nn.Linear(2, DIM)
        self.criterion = InfoNCE(0.2, learnable=True, symmetric=True)

    def forward(self, images: Tensor, texts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return self.criterion(self.images(images), self.texts(texts), group=group)


def data_parallel(on: Rank) -> None:
    """Averaged gradients, and weights after several steps, equal those of a single process."""
    torch.manual_seed(0)
    single, towers = Towers(), Towers()
    towers.load_state_dict(single.state_dict())
    parallel = DistributedDataParallel(towers, process_group=on.group)
    for step in range(3):
        images, texts = randn(on.world_size * BATCH, 3, seed=10 + step), randn(on.world_size * BATCH, 2, seed=20 + step)
        single(images, texts, None).backward()
        parallel(images[on.rows], texts[on.rows], on.group).backward()
        with torch.no_grad():
            for parameter, expected in zip(towers.parameters(), single.parameters(), strict=True):
                assert parameter.grad is not None and expected.grad is not None
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-6, atol=1e-6)
                parameter -= 0.1 * parameter.grad
                expected -= 0.1 * expected.grad
                parameter.grad = expected.grad = None
    torch.testing.assert_close(towers.state_dict(), single.state_dict(), rtol=1e-6, atol=1e-6)


def single_rank_group(on: Rank) -> None:
    """A group of one rank changes nothing, and cannot be used by another rank."""
    groups: Any = [dist.new_group([rank]) for rank in range(WORLD_SIZE)]
    rank = dist.get_rank()
    q, k, _ = on.local(on.whole_batch((), torch.float32))
    ids = IDS[on.rows]
    assert torch.equal(info_nce(q, k, query_ids=ids, group=groups[rank]), info_nce(q, k, query_ids=ids))
    with pytest.raises(ValueError, match="group must contain this process"):
        info_nce(q, k, group=groups[rank - 1])


def no_rows(on: Rank) -> None:
    q = torch.zeros(0, DIM, requires_grad=True)
    loss = info_nce(q, q, symmetric=True, group=on.group)
    loss.backward()
    assert loss == 0 and q.grad is not None and q.grad.shape == q.shape


def errors(on: Rank) -> None:
    q, k, _ = on.local(on.whole_batch((), torch.float32))
    with pytest.raises(ValueError, match="group cannot be used with a queue"):
        info_nce(q, k, k, group=on.group)
    with pytest.raises(ValueError, match="negative_ids cannot be used with group"):
        info_nce(q, k, query_ids=IDS[on.rows], negative_ids=IDS[on.rows], group=on.group)
    with pytest.raises(ValueError, match=r"query_ids must be \[4\]; it is \[3\]"):
        info_nce(q, k, query_ids=IDS[:3], group=on.group)
    with pytest.raises(TypeError, match='impl="triton" cannot be used: it computes in float32'):
        info_nce(q.double(), k, impl="triton", group=on.group)


def two_ranks(on: Rank) -> None:
    for form in FORMS:
        values_and_gradients(on, form, (), torch.float32)
        values_and_gradients(on, form, (2,), torch.float64)
    values_and_gradients(on, "symmetric, ids", (2,), torch.bfloat16)
    values_and_gradients(on, "symmetric, ids", (2,), torch.float32, "triton")
    for form in ("mean", "symmetric, ids"):
        second_derivatives(on, form)
    frozen_keys(on)
    transforms(on)
    compiled(on)
    data_parallel(on)
    no_rows(on)
    errors(on)


def all_ranks(on: Rank) -> None:
    values_and_gradients(on, "symmetric, ids", (2,), torch.float64)
    second_derivatives(on, "ids")
    data_parallel(on)
    single_rank_group(on)


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=WORLD_SIZE)
    pair: Any = dist.new_group([0, 2])
    if pair != dist.GroupMember.NON_GROUP_MEMBER:
        two_ranks(Rank(pair))
    world: Any = dist.group.WORLD
    all_ranks(Rank(world))
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"group needs an initialized torch\.distributed"):
        info_nce(randn(2, 3), randn(2, 3), group=world)
