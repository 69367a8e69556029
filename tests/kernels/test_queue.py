"""KeyQueue against expected contents computed in Python."""

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dcvae_kernels import KeyQueue, info_nce


def rows(start: int, count: int, scales: int = 1, dim: int = 3) -> Tensor:
    """Return rows numbered from `start`, [S, B, D], with distinct values in every scale and feature."""
    number = torch.arange(start, start + count, dtype=torch.float32)
    return number[None, :, None] + 1000 * torch.arange(scales)[:, None, None] + 0.1 * torch.arange(dim)


def row_numbers(queue: KeyQueue) -> list[int]:
    return queue.keys[0, :, 0].int().tolist()


@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 31])
def test_wraps_around(size: int, scales: int):
    """After batches of many sizes, row n is in slot n mod K, for each of the last K rows."""
    queue = KeyQueue(size, 3, scales)
    count = 0
    for batch in (0, 1, 3, 5, 4, 31, 7, 63, 2, 62):
        new = rows(count, batch, scales)
        queue.enqueue(new, ids=torch.arange(count, count + batch))
        count += batch
        expected = torch.zeros(scales, size, 3)
        ids = [-1] * size
        for n in range(max(count - size, 0), count):
            expected[:, n % size] = rows(n, 1, scales)[:, 0]
            ids[n % size] = n
        assert torch.equal(queue.keys, expected)
        assert queue.ids.tolist() == ids
        assert queue.valid.item() == min(count, size)
        assert queue.cursor.item() == count % size


def test_hand_computed():
    queue = KeyQueue(4, 1)
    queue.enqueue(torch.tensor([[1.0], [2.0], [3.0]]))
    assert row_numbers(queue) == [1, 2, 3, 0] and queue.valid.item() == 3
    queue.enqueue(torch.tensor([[4.0], [5.0]]))
    assert row_numbers(queue) == [5, 2, 3, 4] and queue.valid.item() == 4
    queue.enqueue(torch.arange(6.0, 12.0)[:, None])  # 6 … 11, starting at slot 1; the last four remain
    assert row_numbers(queue) == [9, 10, 11, 8] and queue.cursor.item() == 3


def test_batch_larger_than_the_queue_writes_each_slot_once():
    """On a GPU, the result of writing two rows to one slot is undefined."""
    written_slots = []

    class RecordSlots(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index_copy_.default:
                written_slots.append(sorted(args[2].tolist()))
            return func(*args, **(kwargs or {}))

    queue = KeyQueue(4, 3)
    with RecordSlots():
        queue.enqueue(rows(0, 11), ids=torch.arange(11))
    assert written_slots == [[0, 1, 2, 3]] * 2


def test_ids_are_unknown_by_default():
    queue = KeyQueue(3, 3)
    queue.enqueue(rows(0, 3), ids=torch.tensor([7, 8, 9]))
    queue.enqueue(rows(3, 2))
    assert queue.ids.tolist() == [-1, -1, 9]


def test_starts_empty():
    queue = KeyQueue(4, 3, scales=2)
    assert queue.keys.shape == (2, 4, 3) and queue.keys.dtype == torch.float32
    assert queue.ids.dtype == queue.valid.dtype == queue.cursor.dtype == torch.int64
    assert queue.valid.item() == 0 and queue.ids.tolist() == [-1] * 4
    k = torch.randn(2, 5, 3)
    assert info_nce(k, k, queue.keys, valid=queue.valid).item() == 0


def test_seed_fills_with_normalised_noise():
    queue, same_seed, other_seed = (KeyQueue(4000, 16, scales=2, seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(queue.keys.norm(dim=-1), torch.ones(2, 4000))
    assert queue.keys.mean().abs() < 0.01 and queue.valid.item() == 4000 and queue.cursor.item() == 0
    assert torch.equal(queue.keys, same_seed.keys) and not torch.equal(queue.keys, other_seed.keys)
    state = torch.get_rng_state()
    KeyQueue(4, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_detached_and_cast_but_not_normalised():
    queue = KeyQueue(4, 3)
    k = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    queue.enqueue(2 * k)
    assert queue.keys[0, 0].tolist() == [6, 8, 0] and not queue.keys.requires_grad
    strided = torch.arange(12.0).view(3, 4).T[::2]
    queue.enqueue(strided)
    assert torch.equal(queue.keys[0, 1:3], strided)


def test_state_dict_round_trip_continues_at_the_cursor():
    queue = KeyQueue(5, 3, scales=2)
    queue.enqueue(rows(0, 7, 2), ids=torch.arange(7))
    state = copy.deepcopy(queue.state_dict())
    assert set(state) == {"keys", "ids", "valid", "cursor"}
    loaded = KeyQueue(5, 3, scales=2, seed=1)
    loaded.load_state_dict(state)
    copied = copy.deepcopy(queue)
    for x in (queue, loaded, copied):
        x.enqueue(rows(7, 4, 2), ids=torch.arange(7, 11))
    for x in (loaded, copied):
        assert all(torch.equal(x.state_dict()[name], value) for name, value in queue.state_dict().items())


def test_moves_with_its_module():
    queue = KeyQueue(5, 3, seed=0).to(torch.bfloat16)
    queue.enqueue(rows(0, 2))
    assert queue.keys.dtype == torch.bfloat16 and queue.valid.dtype == torch.int64
    with torch.device("meta"):
        assert KeyQueue(5, 3, seed=0).keys.device.type == "meta"
    assert repr(queue) == "KeyQueue(size=5, dim=3, scales=1)"


def test_no_host_synchronisation():
    with FakeTensorMode():
        queue = KeyQueue(5, 3)
        queue.enqueue(torch.empty(4, 3), ids=torch.empty(4).long())
        queue.enqueue(torch.empty(9, 3))


def test_compiles_to_one_graph():
    queue, eager = KeyQueue(5, 3), KeyQueue(5, 3)
    enqueue = torch.compile(queue.enqueue, backend="aot_eager", fullgraph=True)
    for start in (0, 3, 6):
        enqueue(rows(start, 3), torch.arange(start, start + 3))
        eager.enqueue(rows(start, 3), torch.arange(start, start + 3))
    assert all(torch.equal(queue.state_dict()[name], value) for name, value in eager.state_dict().items())


@pytest.mark.parametrize(
    ("k", "ids", "error", "message"),
    [
        (torch.zeros(4, 3), None, ValueError, r"k must be \[2, B, 3\]; it is \[4, 3\]"),
        (torch.zeros(1, 4, 3), None, ValueError, r"k must be \[2, B, 3\]; it is \[1, 4, 3\]"),
        (torch.zeros(2, 4, 5), None, ValueError, r"k must be \[2, B, 3\]; it is \[2, 4, 5\]"),
        (torch.zeros(2, 4, 3).long(), None, TypeError, "k must be floating point; it is torch.int64"),
        (torch.zeros(2, 4, 3, device="meta"), None, ValueError, "k must be on the queue's device, cpu; it is on meta"),
        (torch.zeros(2, 4, 3), torch.zeros(3).long(), ValueError, r"ids must be \[4\]; they are \[3\]"),
        (torch.zeros(2, 4, 3), torch.zeros(4), TypeError, "ids must be int64; they are torch.float32"),
        (torch.zeros(2, 4, 3), torch.zeros(4, device="meta").long(), ValueError, "ids must be on the queue's device"),
    ],
)
def test_errors_name_the_argument_and_do_not_modify_the_queue(
    k: Tensor, ids: Tensor | None, error: type[Exception], message: str
):
    queue = KeyQueue(5, 3, scales=2)
    with pytest.raises(error, match=message):
        queue.enqueue(k, ids)
    assert queue.valid.item() == 0 and not queue.keys.any()


def test_error_of_a_single_scale_queue_names_both_shapes():
    with pytest.raises(ValueError, match=r"k must be \[1, B, 3\] or \[B, 3\]; it is \[4\]"):
        KeyQueue(5, 3).enqueue(torch.zeros(4))


@pytest.mark.parametrize("name", ["size", "dim", "scales"])
def test_sizes_must_be_positive(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; it is 0"):
        KeyQueue(**{"size": 2, "dim": 2, name: 0})
