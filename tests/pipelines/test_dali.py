import logging
import os
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dcvae_pipelines.image
from dcvae_pipelines import Batch, DaliSource, DataError, EncodedSet, ResidentSource, decode_images, load_dataset
from dcvae_pipelines.encoded import Files
from dcvae_pipelines.image import centre_square
from image_files import encode, turned

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

COUNT = 24


def make_images(folder: Path, count: int = COUNT, width: int = 20, height: int = 16) -> EncodedSet:
    """Write PNGs of noise, image i to file i.png."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return EncodedSet("noise", Files(folder, [f"{i:02d}.png" for i in range(count)]), torch.arange(count))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> EncodedSet:
    return make_images(tmp_path_factory.mktemp("images"))


def source(images: EncodedSet, **settings) -> DaliSource:
    return DaliSource(images, **{"resolution": 8, "batch": 4, "seed": 0, "threads": 2, **settings})


def ids(batches: Iterator[Batch], count: int) -> list[int]:
    return torch.cat([batch.ids for batch in islice(batches, count)]).tolist()


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.images, b.images)


# --- batches ---


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_equal_those_of_a_resident_source(images: EncodedSet, channels: int):
    """Order, flips and pixels are equal, whether a data set is decoded once or in each epoch."""
    decoded = decode_images(images, COUNT, resolution=8, channels=channels).images
    settings = {"batch": 5, "seed": 3, "mirror": True}
    resident, dali = ResidentSource(decoded, **settings), source(images, channels=channels, **settings)
    assert all(same(a, b) for a, b in islice(zip(resident, dali, strict=True), 12))


@pytest.mark.parametrize("finish", ["_finish_on_cpu", "_finish_on_gpu"])
def test_batches_in_bfloat16_and_channels_last(images: EncodedSet, finish: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DaliSource, "_finish_on_cpu", getattr(DaliSource, finish))
    plain, converted = source(images), source(images, dtype=torch.bfloat16, channels_last=True)
    a, b = next(iter(plain)).images, next(iter(converted)).images
    assert a.dtype == torch.float32 and a.is_contiguous() and a.shape == (4, 3, 8, 8)
    assert b.dtype == torch.bfloat16 and b.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(a.bfloat16(), b)


def test_ranks_share_an_epoch_without_overlap(images: EncodedSet):
    ranks = [iter(source(images, rank=rank, ranks=3, batch=4)) for rank in range(3)]
    for _ in range(2):
        assert sorted(index for rank in ranks for index in ids(rank, 2)) == list(range(COUNT))


@pytest.mark.parametrize("finish", ["_finish_on_cpu", "_finish_on_gpu"])
def test_images_of_many_sizes_share_a_batch(finish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DaliSource, "_finish_on_cpu", getattr(DaliSource, finish))
    shapes = [(8, 8), (16, 8), (9, 31), (16, 16), (8, 8), (40, 40)]
    for i, shape in enumerate(shapes):
        Image.fromarray(np.full((*shape, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    mixed = EncodedSet("mixed", Files(tmp_path, [f"{i}.png" for i in range(6)]), torch.arange(6))
    batch = next(iter(source(mixed, batch=6)))
    assert torch.equal(batch.images, (40 * batch.ids / 127.5 - 1)[:, None, None, None].expand(6, 3, 8, 8))


def test_every_kind_of_image_is_decoded_like_pillow(tmp_path: Path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
    grey = colour.convert("L")
    transparent = colour.copy()
    transparent.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    plain_exif = Image.Exif()
    plain_exif[0x010F] = "a maker"
    kinds = [
        encode(colour, "JPEG"),
        encode(colour, "JPEG", progressive=True, subsampling=2),
        encode(colour, "JPEG", exif=turned(6)),
        encode(grey, "JPEG"),
        encode(colour.convert("CMYK"), "JPEG"),
        encode(colour, "PNG", exif=turned(6)),
        encode(transparent, "PNG"),
        encode(colour.convert("P"), "PNG"),
        encode(grey, "PNG"),
        encode(grey.convert("1"), "PNG"),
        encode(grey.convert("LA"), "PNG"),
        encode(deep, "PNG"),
        encode(colour, "WEBP"),
        encode(transparent, "WEBP", lossless=True),
        encode(colour, "WEBP", lossless=True, exif=plain_exif),  # which DALI rejects
        encode(colour.convert("P"), "GIF", save_all=True, append_images=[grey]),
        encode(colour.convert("P"), "GIF"),
        encode(colour.convert("CMYK"), "TIFF"),
        encode(colour, "TIFF", exif=turned(6)),
        b"P6 20 16 100\n" + bytes(i % 101 for i in range(960)),
        encode(colour, "WEBP", save_all=True, append_images=[colour.rotate(180)]),
        encode(colour, "TIFF"),
        encode(deep, "TIFF"),
        encode(colour, "BMP"),
        encode(colour, "PPM"),
        encode(colour, "JPEG2000"),
    ]
    for i, content in enumerate(kinds):
        (tmp_path / str(i)).write_bytes(content)
    files = EncodedSet("kinds", Files(tmp_path, list(map(str, range(len(kinds))))), torch.arange(len(kinds)))
    for channels in (1, 3):
        pillow = decode_images(files, len(kinds), resolution=16, channels=channels).images
        batch = next(iter(source(files, batch=len(kinds), resolution=16, channels=channels)))
        difference = (batch.images - (pillow[batch.ids].float() / 127.5 - 1)).abs().amax((1, 2, 3)) * 127.5
        # Both compute grey in fixed point, but with different weights.
        assert difference.max() <= (1.01 if channels == 1 else 0.01), dict(
            zip(batch.ids.tolist(), difference, strict=True)
        )


def agreement(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return mean and 99.9th percentile of the differences, in steps of 1/255."""
    difference = (images.float() - reference.float()).abs().flatten() * 127.5
    return difference.mean().item(), difference.kthvalue(int(0.999 * difference.numel())).values.item()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", ["faces1024", "bedroom256"])
def test_real_images_match_pillow_and_torch(real_data: Path, folder: str, device: str):
    files = sorted(path.name for path in (real_data / folder).glob("*.jpg"))[:24]
    real = EncodedSet(folder, Files(real_data / folder, files), torch.arange(len(files)))
    dali = source(real, batch=len(files), device=device)
    batches = iter(dali)
    for resolution in (64, 128, 256, 512):
        dali.set_resolution(resolution)
        batch = next(batches)
        assert batch.images.device.type == device and sorted(batch.ids.tolist()) == list(range(len(files)))
        expected = []
        for index in batch.ids:
            with Image.open(real_data / folder / files[int(index)]) as image:
                top, left, side = centre_square(*image.size)
                square = image.convert("RGB").crop((left, top, left + side, top + side))
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
            size = (resolution, resolution)
            resized = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
            expected.append(resized.clamp(0, 255) / 127.5 - 1)
        mean, tail = agreement(batch.images.cpu(), torch.cat(expected))
        assert mean <= 2 and tail <= 4, f"{folder} at {resolution}: {mean:.2f}, {tail:.2f} of 255"


# --- position ---


def test_resuming_at_any_position_is_exact(images: EncodedSet):
    uninterrupted = list(islice(source(images, mirror=True, batch=5), 14))
    for shown in (0, 1, 4, 5, 9, 13):
        first = source(images, mirror=True, batch=5)
        list(islice(first, shown))
        assert first.state_dict() == {"images": 5 * shown, "of": COUNT, "skipped": 0, "ranks": 1}
        resumed = source(images, mirror=True, batch=5, prefetch=1, threads=1)
        resumed.load_state_dict(first.state_dict())
        assert same(next(iter(resumed)), uninterrupted[shown])


def test_a_position_holds_for_other_ranks_and_for_a_resident_source(images: EncodedSet):
    single_rank = source(images, batch=6)
    list(islice(single_rank, 3))
    two_ranks = [source(images, batch=3, rank=rank, ranks=2) for rank in range(2)]
    resident = ResidentSource(decode_images(images, COUNT, resolution=8).images, batch=6, seed=0)
    for other in (*two_ranks, resident):
        other.load_state_dict(single_rank.state_dict())
    expected, halves = next(iter(single_rank)), [next(iter(rank)) for rank in two_ranks]
    assert same(next(iter(resident)), expected)
    assert torch.equal(torch.cat([half.ids for half in halves]), expected.ids)
    assert torch.equal(torch.cat([half.images for half in halves]), expected.images)


def test_changing_the_resolution_keeps_the_position(images: EncodedSet):
    grown, plain = source(images), source(images)
    a, b = iter(grown), iter(plain)
    for resolution in (8, 4, 16, 16, 8):
        grown.set_resolution(resolution)
        batch = next(a)
        assert batch.images.shape[2:] == (resolution, resolution) and torch.equal(batch.ids, next(b).ids)
    assert grown.state_dict() == plain.state_dict()


def test_changing_the_batch_size_keeps_the_position(images: EncodedSet):
    grown = source(images, batch=4)
    order = ids(iter(source(images, batch=6)), 6)
    batches = iter(grown)
    assert ids(batches, 2) == order[:8]
    grown.set_resolution(16, batch=6)
    batch = next(batches)
    assert batch.ids.tolist() == order[8:14] and batch.images.shape == (6, 3, 16, 16)
    grown.set_resolution(16, batch=2)
    assert ids(batches, 2) == order[14:18] and grown.state_dict()["images"] == 18


def test_a_position_in_another_data_set_is_rejected(images: EncodedSet):
    with pytest.raises(DataError, match="has 24 images now and had 23 when this position was saved"):
        source(images).load_state_dict({"images": 8, "of": 23})


# --- undecodable images ---


def damage_png(path: Path) -> None:
    """Damage the pixels but not the header."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "removed": os.remove,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "flipped": damage_png,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_raises_when_it_would_be_shown(damage: str, tmp_path: Path):
    damaged = make_images(tmp_path / "images")
    order = ids(iter(source(damaged)), 6)
    DAMAGES[damage](tmp_path / "images" / f"{order[13]:02d}.png")
    stopping = source(damaged, prefetch=1)
    batches = iter(stopping)
    with pytest.raises(DataError, match=rf"{order[13]:02d}\.png: cannot be read"):
        for _ in range(6):
            next(batches)
    shown = stopping.state_dict()["images"]
    # DALI decodes ahead, and can report an error one batch early.
    assert shown == 12 or (damage in ("flipped", "truncated") and shown == 8)
    repaired = source(make_images(tmp_path / "images"))
    repaired.load_state_dict(stopping.state_dict())
    assert ids(iter(repaired), 1) == order[shown : shown + 4]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_skipped_with_a_warning(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    damaged = make_images(tmp_path / "images")
    order = ids(iter(source(damaged)), 18)
    damaged_ids = order[5], order[17]
    for index in damaged_ids:
        DAMAGES[damage](tmp_path / "images" / f"{index:02d}.png")
    with caplog.at_level(logging.WARNING):
        skipping = source(damaged, on_corrupt="skip", mirror=True)
        batches = list(islice(skipping, 16))
    shown = torch.cat([batch.ids for batch in batches]).tolist()
    assert shown == [index for index in order if index not in damaged_ids][: len(shown)]  # the others, once per epoch
    assert skipping.state_dict() == {
        "images": 64,
        "of": COUNT,
        "skipped": sum(i in damaged_ids for i in order[:70]),
        "ranks": 1,
    }
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(message.startswith("left out: ") for message in messages)
    assert {Path(message.split(": ")[1]).stem for message in messages} == {f"{index:02d}" for index in damaged_ids}

    resumed = source(damaged, on_corrupt="skip", mirror=True)
    first = source(damaged, on_corrupt="skip", mirror=True)
    list(islice(first, 7))
    resumed.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(islice(resumed, 9), batches[7:], strict=True))


def test_too_small_images_are_named_or_left_out(images: EncodedSet):
    message = r"\.png: its square of 16 × 16 pixels is too small for resolution 32; choose a lower model.resolution"
    growing = source(images, resolution=32)
    growing.set_resolution(4)  # the error comes before resolution 32 is reached
    with pytest.raises(DataError, match=message):
        next(iter(growing))
    with pytest.raises(DataError, match=message):
        decode_images(images, 1, resolution=32)
    with pytest.raises(DataError, match="none of the 24 images can be decoded"):
        next(iter(source(images, resolution=32, on_corrupt="skip")))
    next(iter(source(images, resolution=16)))


def test_a_data_set_without_decodable_images_is_an_error(tmp_path: Path):
    damaged = make_images(tmp_path / "images", count=6)
    for i in range(6):
        damage_png(tmp_path / "images" / f"{i:02d}.png")
    with pytest.raises(DataError, match="noise: none of the 6 images can be decoded"):
        next(iter(source(damaged, on_corrupt="skip")))
    for i in range(6):
        os.remove(tmp_path / "images" / f"{i:02d}.png")
    with pytest.raises(DataError, match="noise: none of the 6 images can be decoded"):
        next(iter(source(damaged, on_corrupt="skip")))


def test_a_decompression_bomb_is_rejected(images: EncodedSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dcvae_pipelines.image, "MAX_PIXELS", 20 * 16 - 1)
    with pytest.raises(DataError, match=r"\.png: .* its 20 × 16 pixels could be a decompression bomb"):
        next(iter(source(images)))


def test_a_dali_error_not_caused_by_an_image_is_raised_unchanged(images: EncodedSet, monkeypatch: pytest.MonkeyPatch):
    failing = source(images)
    batches = iter(failing)
    next(batches)

    def fail(stream: object):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(
        type(failing._pipeline), "run", lambda self, *_: fail(self) if self.max_batch_size > 1 else None
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)


def test_closing_the_iterator_ends_the_threads(images: EncodedSet):
    before = set(threading.enumerate())
    batches = iter(source(images))
    next(batches)
    readers = set(threading.enumerate()) - before
    assert readers
    del batches
    for thread in readers:
        thread.join(timeout=5)
        assert not thread.is_alive()


# --- settings ---


def test_settings_out_of_range_are_named(images: EncodedSet, monkeypatch: pytest.MonkeyPatch):
    for settings, message in (
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"rank": 2, "ranks": 2}, "rank must be at least 0 and below ranks = 2, not 2"),
        ({"batch": 25, "drop_last": True}, "drop_last leaves no batch"),
        ({"channels": 4}, "channels must be 1"),
        ({"resolution": 0}, "resolution must be at least 1, not 0"),
        ({"prefetch": 0}, "prefetch and threads must be at least 1, not 0 and 2"),
    ):
        with pytest.raises(DataError, match=message):
            source(images, **settings)
    with pytest.raises(DataError, match="empty: the data set is empty"):
        source(EncodedSet("empty", images.store, torch.arange(0)))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"nvidia-dali-cuda130 is needed here .*: pip install nvidia-dali-cuda130"):
        source(images)


def test_a_folder_of_real_faces_is_shown_once_per_epoch(real_data: Path):
    faces = load_dataset("folder", real_data / "faces1024")
    shown = ids(iter(source(faces, batch=18, resolution=4)), 3)
    assert sorted(shown) == list(range(len(faces))) and len(faces) == 54
