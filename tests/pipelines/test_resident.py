from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor

from dcvae_pipelines import Batch, DataError, ResidentSource
from dcvae_pipelines.pixels import normalize, resize


def numbered(count: int) -> Tensor:
    """Images with their index in the middle of the first row; the bright last column is first if they are mirrored."""
    images = torch.zeros(count, 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 1] = torch.arange(count, dtype=torch.uint8)
    images[:, 0, :, 2] = 255
    return images


def ids(source: ResidentSource, batches: int) -> list[int]:
    return torch.cat([batch.ids for batch in islice(source, batches)]).tolist()


def mirrored(batch: Batch) -> Tensor:
    return batch.images[:, 0, 1, 0] == 1


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.images, b.images)


def test_values_are_normalised_exactly():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = next(iter(ResidentSource(values, batch=1, seed=0))).images
    assert images.dtype == torch.float32 and images.shape == (1, 1, 16, 16)
    assert images[0, 0, 0, 0] == -1 and images[0, 0, -1, -1] == 1
    assert torch.equal(images, values.float() / 127.5 - 1)


def test_ids_are_indices_of_the_images():
    batch = next(iter(ResidentSource(numbered(50), batch=20, seed=3)))
    assert batch.ids.dtype == torch.int64
    assert torch.equal(batch.images, numbered(50)[batch.ids].float() / 127.5 - 1)


@pytest.mark.parametrize("batch", [1, 4, 7, 20, 100, 250])
def test_each_epoch_shows_each_image_once(batch: int):
    shown = ids(ResidentSource(numbered(100), batch=batch, seed=0), batches=-(-300 // batch))
    for epoch in range(3):
        assert sorted(shown[100 * epoch : 100 * (epoch + 1)]) == list(range(100))


def test_three_ranks_share_an_epoch_without_overlap():
    sources = [ResidentSource(numbered(100), batch=4, seed=0, rank=rank, ranks=3) for rank in range(3)]
    steps = [torch.cat([batch.ids for batch in step]) for step in islice(zip(*sources, strict=True), 25)]
    shown = torch.cat(steps).tolist()
    for epoch in range(3):
        assert sorted(shown[100 * epoch : 100 * (epoch + 1)]) == list(range(100))


def test_the_order_does_not_depend_on_the_number_of_ranks():
    sources = [ResidentSource(numbered(50), batch=3, seed=1, rank=rank, ranks=2, mirror=True) for rank in range(2)]
    single_rank = ResidentSource(numbered(50), batch=6, seed=1, mirror=True)
    for first, second, expected in islice(zip(*sources, single_rank, strict=True), 20):
        assert same(expected, Batch(torch.cat([first.images, second.images]), torch.cat([first.ids, second.ids])))


def test_drop_last_shows_whole_batches_of_each_permutation():
    dropping, full = (ResidentSource(numbered(100), batch=15, seed=0, ranks=2, drop_last=x) for x in (True, False))
    first = ids(dropping, batches=3)
    assert dropping.state_dict() == {"images": 90, "of": 100}
    assert first == ids(full, batches=3)
    assert len(set(first)) == 45

    ranks = [ResidentSource(numbered(100), batch=15, seed=0, rank=rank, ranks=2, drop_last=True) for rank in range(2)]
    for _ in range(3):  # in each epoch three global batches of 30 different images
        assert len({image for source in ranks for image in ids(source, batches=3)}) == 90


def test_epochs_and_seeds_differ():
    source = ResidentSource(numbered(100), batch=100, seed=0)
    epochs = [ids(source, batches=1) for _ in range(3)]
    # Seed 1 must not show what seed 0 shows an epoch later.
    seed_1 = ResidentSource(numbered(100), batch=100, seed=1)
    orders = epochs + [ids(seed_1, batches=1) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(100)) not in orders


def test_the_order_is_fixed():
    """Runs that resume under a later version of this project must continue the same epoch."""
    source = ResidentSource(numbered(10), batch=10, seed=7, mirror=True)
    first = next(iter(source))
    assert first.ids.tolist() == [1, 2, 4, 7, 0, 5, 8, 9, 6, 3]
    assert mirrored(first).int().tolist() == [0, 1, 0, 1, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("drop_last", [False, True])
def test_resuming_at_any_batch_gives_identical_batches(drop_last: bool):
    def new_source() -> ResidentSource:
        return ResidentSource(numbered(23), batch=3, seed=5, rank=1, ranks=2, mirror=True, drop_last=drop_last)

    source, states, batches = new_source(), [], []
    for batch in islice(source, 14):  # more than three epochs, with their boundaries inside batches
        batches.append(batch)
        states.append(source.state_dict())
    assert [state["images"] for state in states] == [6 * (k + 1) for k in range(14)]

    for k in range(13):
        resumed = new_source()
        resumed.load_state_dict(states[k])
        assert all(same(a, b) for a, b in zip(resumed, batches[k + 1 :], strict=False))


def test_an_iterator_follows_a_state_loaded_later():
    source = ResidentSource(numbered(23), batch=4, seed=0)
    iterator = iter(source)
    expected = [next(iterator) for _ in range(8)]
    source.load_state_dict({"images": 4})
    assert same(next(iterator), expected[1])
    assert same(next(iter(source)), expected[2])


def test_mirror_flips_about_half_of_the_images_and_others_in_each_epoch():
    source = ResidentSource(numbered(200), batch=200, seed=0, mirror=True)
    first, second = islice(source, 2)
    for batch in (first, second):
        assert 70 < mirrored(batch).sum() < 130
        upright = numbered(200)[batch.ids].float() / 127.5 - 1
        expected = torch.where(mirrored(batch)[:, None, None, None], upright.flip(3), upright)
        assert torch.equal(batch.images, expected)
    assert not torch.equal(mirrored(first)[first.ids.argsort()], mirrored(second)[second.ids.argsort()])


def test_mirror_depends_on_seed_epoch_and_position_only():
    single = next(iter(ResidentSource(numbered(200), batch=200, seed=0, mirror=True)))
    parts = list(islice(ResidentSource(numbered(200), batch=8, seed=0, mirror=True), 25))
    assert torch.equal(torch.cat([mirrored(batch) for batch in parts]), mirrored(single))
    assert ids(ResidentSource(numbered(200), batch=200, seed=0), 1) == single.ids.tolist()


def test_batches_do_not_share_memory():
    source = ResidentSource(numbered(8), batch=8, seed=0)
    first, second = islice(source, 2)
    expected = second.ids.clone()
    first.images.zero_()
    first.ids.zero_()
    assert torch.equal(second.ids, expected)
    assert torch.equal(second.images, numbered(8)[expected].float() / 127.5 - 1)


def test_images_are_downscaled_but_not_enlarged():
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ResidentSource(images, batch=4, seed=0)
    source.set_resolution(32)
    full = next(iter(source))
    assert torch.equal(full.images, images[full.ids].float() / 127.5 - 1)
    source.set_resolution(8, batch=6)
    small = next(iter(source))
    assert torch.equal(small.images, normalize(resize(images, 8)[small.ids])) and len(small.ids) == 6
    assert source.state_dict()["images"] == 10
    with pytest.raises(DataError, match="they are 32×32, and it is 64"):
        source.set_resolution(64)
    wide = ResidentSource(images[..., :16], batch=4, seed=0)
    with pytest.raises(DataError, match="must be square: they are 32×16, and it is 16"):
        wide.set_resolution(16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResidentSource(numbered(4), batch=0, seed=0), "batch must be at least 1, not 0"),
        (lambda: ResidentSource(numbered(4), batch=1, seed=0, rank=2, ranks=2), "below ranks = 2, not 2"),
        (
            lambda: ResidentSource(numbered(4), batch=3, seed=0, ranks=2, drop_last=True),
            r"batch × ranks = 3 × 2 exceeds the 4 images; choose a smaller batch",
        ),
        (lambda: ResidentSource(numbered(4).float(), batch=1, seed=0), r"not torch.float32 \[4, 1, 2, 3\]"),
        (lambda: ResidentSource(numbered(4)[:, 0], batch=1, seed=0), r"not torch.uint8 \[4, 2, 3\]"),
        (lambda: ResidentSource(numbered(0), batch=1, seed=0), r"N > 0, not torch.uint8 \[0, 1, 2, 3\]"),
    ],
)
def test_errors_name_the_argument_and_its_value(build: Callable[[], ResidentSource], message: str):
    with pytest.raises(DataError, match=message):
        build()


@pytest.mark.gpu
def test_gpu_batches_match_the_cpu_without_synchronisation():
    on_cpu = islice(ResidentSource(numbered(23), batch=5, seed=0, mirror=True), 12)
    source = ResidentSource(numbered(23), batch=5, seed=0, mirror=True, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = list(islice(source, 12))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected, batch in zip(on_cpu, on_gpu, strict=True):
        assert batch.images.is_cuda and batch.ids.is_cuda
        assert same(expected, Batch(batch.images.cpu(), batch.ids.cpu()))


def test_a_position_in_another_data_set_is_rejected():
    source = ResidentSource(numbered(20), batch=4, seed=0)
    with pytest.raises(DataError, match="has 20 images now and had 19 when this position was saved"):
        source.load_state_dict({"images": 8, "of": 19})


def test_batches_in_bfloat16_and_channels_last():
    images = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = next(iter(ResidentSource(images, batch=8, seed=0, mirror=True)))
    settings = {"dtype": torch.bfloat16, "channels_last": True}
    converted = next(iter(ResidentSource(images, batch=8, seed=0, mirror=True, **settings)))
    assert torch.equal(converted.images, plain.images.bfloat16()) and converted.images.dtype == torch.bfloat16
    assert converted.images.is_contiguous(memory_format=torch.channels_last) and plain.images.is_contiguous()
