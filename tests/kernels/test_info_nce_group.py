"""info_nce across the ranks of a group, against one process that has the whole batch, which each rank plays itself.

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

WORLD, BATCH, DIM = 3, 4, 5
IDS = torch.tensor([1, -1, 2, 2, 1, -1, -1, 3, 7, 2, -1, 2**63 - 1])  # the same within a rank and across; unknown
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-13}

FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ids": {"query_ids": IDS, "reduction": "none"},
    "symmetric": {"symmetric": True},
    "symmetric, ids": {"symmetric": True, "query_ids": IDS, "reduction": "none"},
    "as given": {"normalize": False},
}


# In pytest ------------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_like_one_process(tmp_path: Path):
    run_ranks(Path(__file__), WORLD, tmp_path)


def test_what_is_no_group():
    q = randn(2, 3)
    no_groups: list[Any] = ["gloo", 0, q]
    for group, kind in zip(no_groups, ("str", "int", "Tensor"), strict=True):
        with pytest.raises(TypeError, match=rf"group must be a torch\.distributed\.ProcessGroup; it is a {kind}"):
            info_nce(q, q, group=group)


def test_without_distributed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    q: Any = randn(2, 3)
    info_nce(q, q)
    with pytest.raises(ValueError, match=r"group needs torch\.distributed, which this build of PyTorch lacks"):
        info_nce(q, q, group=q)


# In each rank ---------------------------------------------------------------------------------------------------------


class Rank:
    """One rank of a group, its rows of the batch and how it gets what the whole group has."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.world = group, group.size()
        self.rows = slice(group.rank() * BATCH, (group.rank() + 1) * BATCH)

    def whole(self, scales: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """q, k and the temperature of all ranks."""
        shape = (*scales, self.world * BATCH, DIM)
        return leaves(randn(*shape), randn(*shape, seed=1), torch.tensor(0.4), dtype=dtype)

    def mine(self, whole: list[Tensor]) -> list[Tensor]:
        """Leaves with the own rows."""
        q, k, temperature = whole
        return leaves(q[..., self.rows, :], k[..., self.rows, :], temperature)

    def options(self, options: dict[str, Any], alone: bool) -> dict[str, Any]:
        """Of one process with the whole batch, or of this rank."""
        options = dict(options)
        if "query_ids" in options:
            options["query_ids"] = options["query_ids"][: self.world * BATCH][slice(None) if alone else self.rows]
        return options if alone else options | {"group": self.group}

    def summed(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def assert_equal(self, ours: tuple[Tensor, ...], whole: tuple[Tensor, ...], tolerance: float) -> None:
        """Of this rank's q and k the rows of the whole's; of what all have, the sum."""
        for x, y in zip(ours, whole, strict=True):
            x, y = (self.summed(x), y) if y.ndim == 0 else (x, y[..., self.rows, :])
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def values_and_gradients(on: Rank, form: str, scales: tuple[int, ...], dtype: torch.dtype, impl: Any = "torch") -> None:
    options, tolerance = FORMS[form] | {"impl": impl}, TOLERANCE[dtype]
    whole = on.whole(scales, dtype)
    mine = on.mine(whole)
    (ours, stats), (expected, whole_stats) = (
        info_nce(q, k, temperature=temperature, return_stats=True, **on.options(options, alone))
        for (q, k, temperature), alone in ((mine, False), (whole, True))
    )
    assert torch.equal(stats.rank, whole_stats.rank[..., on.rows])
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        grad_output = torch.linspace(-1, 2, expected.numel(), dtype=expected.dtype).view_as(expected)
        own_grad_output = grad_output[..., on.rows]
        torch.testing.assert_close(ours, expected[..., on.rows], rtol=tolerance, atol=tolerance)
    else:  # the mean is that of the ranks' means, the sum that of their sums
        grad_output = torch.ones_like(expected)
        own_grad_output = grad_output / on.world if reduction == "mean" else grad_output
        torch.testing.assert_close(on.summed(ours * own_grad_output), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(ours, mine, own_grad_output)
    on.assert_equal(gradients, torch.autograd.grad(expected, whole, grad_output), tolerance)


def frozen_keys(on: Rank) -> None:
    whole = on.whole((), torch.float64)
    mine = on.mine(whole)
    ours, expected = (
        torch.autograd.grad(info_nce(q, k.detach(), reduction="sum", **on.options({}, alone)), q)
        for (q, k, _), alone in ((mine, False), (whole, True))
    )
    on.assert_equal(ours, expected, 1e-13)


def second_derivatives(on: Rank, form: str) -> None:
    """A penalty on the gradient of the sum of all ranks' losses, summed over ranks."""
    whole = on.whole((2,), torch.float64)
    mine = on.mine(whole)

    def derivatives(inputs: list[Tensor], alone: bool) -> tuple[Tensor, ...]:
        q, k, temperature = inputs
        options = on.options({"reduction": "sum"} | FORMS[form], alone)
        loss = info_nce(q, k, temperature=temperature, **options).sum()
        penalty = sum(x.pow(3).sum() for x in torch.autograd.grad(loss, (q, k), create_graph=True))
        assert isinstance(penalty, Tensor)
        return torch.autograd.grad(penalty, inputs)

    on.assert_equal(derivatives(mine, False), derivatives(whole, True), 1e-12)


def transforms(on: Rank) -> None:
    """torch.func's, of the plain definition."""
    q, k, temperature = on.mine(on.whole((), torch.float64))

    def loss(q: Tensor) -> Tensor:
        return info_nce(q, 2 * q + k, temperature=temperature, symmetric=True, reduction="sum", group=on.group)

    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(grad(loss)(q), expected)
    torch.testing.assert_close(vmap(loss)(torch.stack([q, -q])), torch.stack([loss(q), loss(-q)]))


def compiled(on: Rank) -> None:
    q, k, temperature = on.mine(on.whole((), torch.float32))

    def loss(q: Tensor) -> Tensor:
        options: dict[str, Any] = {"query_ids": IDS[on.rows], "symmetric": True}
        return info_nce(q, k, temperature=temperature, group=on.group, **options) + info_nce(q, q, group=on.group)

    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(q), loss(q))
    torch.testing.assert_close(torch.autograd.grad(whole(q), (q, k)), torch.autograd.grad(loss(q), (q, k)))


class Towers(nn.Module):
    """CLIP's two encoders, with its loss and learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(3, DIM), nn.Linear(2, DIM)
        self.criterion = InfoNCE(0.2, learnable=True, symmetric=True)

    def forward(self, images: Tensor, texts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return self.criterion(self.images(images), self.texts(texts), group=group)


def data_parallel(on: Rank) -> None:
    """DistributedDataParallel's averages are the gradients of one process, and so are the weights after steps."""
    torch.manual_seed(0)
    alone, towers = Towers(), Towers()
    towers.load_state_dict(alone.state_dict())
    together = DistributedDataParallel(towers, process_group=on.group)
    for step in range(3):
        images, texts = randn(on.world * BATCH, 3, seed=10 + step), randn(on.world * BATCH, 2, seed=20 + step)
        alone(images, texts, None).backward()
        together(images[on.rows], texts[on.rows], on.group).backward()
        with torch.no_grad():
            for ours, expected in zip(towers.parameters(), alone.parameters(), strict=True):
                assert ours.grad is not None and expected.grad is not None
                torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-6, atol=1e-6)
                ours -= 0.1 * ours.grad
                expected -= 0.1 * expected.grad
                ours.grad = expected.grad = None
    torch.testing.assert_close(towers.state_dict(), alone.state_dict(), rtol=1e-6, atol=1e-6)


def of_one_rank(on: Rank) -> None:
    """As without a group; the other ranks are not in it."""
    groups: Any = [dist.new_group([rank]) for rank in range(WORLD)]
    rank = dist.get_rank()
    q, k, _ = on.mine(on.whole((), torch.float32))
    ids = IDS[on.rows]
    assert torch.equal(info_nce(q, k, query_ids=ids, group=groups[rank]), info_nce(q, k, query_ids=ids))
    with pytest.raises(ValueError, match="group must be one that this process is in"):
        info_nce(q, k, group=groups[rank - 1])


def no_rows(on: Rank) -> None:
    q = torch.zeros(0, DIM, requires_grad=True)
    loss = info_nce(q, q, symmetric=True, group=on.group)
    loss.backward()
    assert loss == 0 and q.grad is not None and q.grad.shape == q.shape


def errors(on: Rank) -> None:
    q, k, _ = on.mine(on.whole((), torch.float32))
    with pytest.raises(ValueError, match="group gathers the negatives of a batch, and a queue is already shared"):
        info_nce(q, k, k, group=on.group)
    with pytest.raises(ValueError, match="negative_ids cannot be given with group"):
        info_nce(q, k, query_ids=IDS[on.rows], negative_ids=IDS[on.rows], group=on.group)
    with pytest.raises(ValueError, match=r"query_ids must be \[4\]; it is \[3\]"):
        info_nce(q, k, query_ids=IDS[:3], group=on.group)
    with pytest.raises(TypeError, match='impl="triton" cannot be used: it computes in float32'):
        info_nce(q.double(), k, impl="triton", group=on.group)


def of_two_ranks(on: Rank) -> None:
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


def of_all_ranks(on: Rank) -> None:
    values_and_gradients(on, "symmetric, ids", (2,), torch.float64)
    second_derivatives(on, "ids")
    data_parallel(on)
    of_one_rank(on)


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=WORLD)
    two: Any = dist.new_group([0, 2])
    if two != dist.GroupMember.NON_GROUP_MEMBER:
        of_two_ranks(Rank(two))
    everyone: Any = dist.group.WORLD
    of_all_ranks(Rank(everyone))
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"group needs torch\.distributed to be initialized"):
        info_nce(randn(2, 3), randn(2, 3), group=everyone)
