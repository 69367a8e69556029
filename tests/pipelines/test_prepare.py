import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, JpegImagePlugin
from wds2idx import IndexCreator

from dcvae_pipelines import DataError, EncodedSet, ImageSet, load_dataset, load_image
from dcvae_pipelines.image import decode, to_tensor
from dcvae_pipelines.loader import decode_images
from dcvae_pipelines.pixels import resize
from dcvae_pipelines.prepare import KINDS, prepare
from image_files import encode, make_lmdb, make_shard, png_of_16_bit_colours, turned

MODULE: Any = sys.modules[prepare.__module__]


def pixels(seed: int, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] or [H, W]; smooth, so that JPEG changes it little."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return np.ascontiguousarray(smooth.permute(1, 2, 0).round().to(torch.uint8).numpy()).squeeze()


def fill(folder: Path, train: dict[str, bytes], test: dict[str, bytes] | None = None) -> Path:
    """Write images in the layout of the data set "folder", by default with one valid test image."""
    for split, files in (("train", train), ("test", test or {"fine.png": encode(pixels(1000))})):
        for name, content in files.items():
            path = folder / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def mixed_images(count: int) -> dict[str, bytes]:
    formats = ("JPEG", "PNG", "WEBP")
    return {f"{i}.{formats[i % 3].lower()}": encode(pixels(i), formats[i % 3]) for i in range(count)}


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def records(folder: Path, stem: str = "train-000000") -> dict[str, dict]:
    """Read a shard's record: entries by image name."""
    return {image["name"]: image for image in json.loads((folder / f"{stem}.json").read_text())["images"]}


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of everything in a folder, by path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in tree(folder).items()}


def rgb(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


TURNED = turned(6)

# Images of special kinds, and their kinds.
ODD: dict[str, tuple[bytes, list[str]]] = {
    "train/broken.jpg": (encode(pixels(0), "JPEG")[:-200], ["corrupt"]),
    "train/text.png": (b"not an image", ["corrupt"]),
    "train/small.png": (encode(pixels(1, 31, 40)), ["tiny"]),
    "train/grey.png": (encode(pixels(2, channels=1)), ["greyscale"]),
    "train/grey_alpha.png": (encode(pixels(3, channels=2)), ["greyscale"]),
    "train/bilevel.png": (encode(pixels(4, channels=1) > 127), ["greyscale"]),
    "train/ink.jpg": (encode(Image.frombytes("CMYK", (40, 40), pixels(5, 40, 40, 4).tobytes()), "JPEG"), ["cmyk"]),
    "train/turned.jpg": (encode(pixels(6), "JPEG", exif=TURNED), ["rotated"]),
    "train/deep.png": (encode(pixels(7, channels=1).astype(np.uint16) * 257), ["greyscale", "16-bit"]),
    "train/deep.pgm": (encode(pixels(8, channels=1).astype(np.uint16) * 257, "PPM"), ["greyscale", "16-bit"]),
    "train/deep_rgb.png": (png_of_16_bit_colours(pixels(9).astype(np.uint16) * 257), ["16-bit"]),
    "train/many.png": (encode(pixels(10, 20, 24, 1), exif=TURNED), ["tiny", "greyscale", "rotated"]),
}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    plain = {"fine.jpg": encode(pixels(11), "JPEG")}
    return fill(tmp_path / "odd", plain | {name.removeprefix("train/"): file for name, (file, _) in ODD.items()})


# --- images without a resolution ---


def test_images_are_kept_byte_for_byte_sorted_by_name(tmp_path: Path):
    images = mixed_images(7) | {"deep er/na me.v2 é.JPG": encode(pixels(7), "JPEG"), "wrong.jpg": encode(pixels(8))}
    summary = prepare(fill(tmp_path / "src", images), tmp_path / "dst")
    assert members(tmp_path / "dst/train-000000.tar") == {
        "00000000-0.jpeg": images["0.jpeg"],
        "00000001-1.png": images["1.png"],
        "00000002-2.webp": images["2.webp"],
        "00000003-3.jpeg": images["3.jpeg"],
        "00000004-4.png": images["4.png"],
        "00000005-5.webp": images["5.webp"],
        "00000006-6.jpeg": images["6.jpeg"],
        "00000007-na_me.jpeg": images["deep er/na me.v2 é.JPG"],
        "00000008-wrong.png": images["wrong.jpg"],
    }
    assert members(tmp_path / "dst/test-000000.tar") == {"00000000-fine.png": encode(pixels(1000))}
    assert (summary.kept, summary.converted, summary.skipped) == (10, 0, 0)
    assert summary.packed == {"train": 9, "test": 1}
    assert all(kind.names == [] for kind in summary.kinds.values())
    assert records(tmp_path / "dst")["train/deep er/na me.v2 é.JPG"] == {
        "name": "train/deep er/na me.v2 é.JPG",
        "sha256": hashlib.sha256(images["deep er/na me.v2 é.JPG"]).hexdigest(),
        "width": 48,
        "height": 40,
        "kinds": [],
        "action": "kept",
        "reason": "",
        "member": "00000007-na_me.jpeg",
    }


def test_every_kind_is_detected_and_converted_or_left_out(odd: Path, tmp_path: Path):
    summary = prepare(odd, tmp_path / "dst")
    expected = {kind: [name for name in sorted(ODD) if kind in ODD[name][1]] for kind in KINDS}
    assert {kind: images.names for kind, images in summary.kinds.items()} == expected
    counts = {kind: (images.converted, images.skipped) for kind, images in summary.kinds.items()}
    assert counts == {
        "corrupt": (0, 2),
        "tiny": (0, 2),
        "greyscale": (5, 1),
        "cmyk": (1, 0),
        "rotated": (1, 1),
        "16-bit": (3, 0),
    }
    assert (summary.kept, summary.converted, summary.skipped) == (2, 8, 4)
    assert summary.packed == {"train": 9, "test": 1}
    images, packed = records(tmp_path / "dst"), members(tmp_path / "dst/train-000000.tar")
    assert images["train/many.png"]["reason"] == "tiny" and images["train/many.png"]["member"] is None
    assert "broken.jpg: cannot be read as an image" in images["train/broken.jpg"]["reason"]
    for name, (file, kinds) in ODD.items():
        assert images[name]["kinds"] == kinds
        if images[name]["action"] == "converted":
            assert images[name]["reason"] == ", ".join(kinds)
            member = images[name]["member"]
            assert member.endswith(".png")
            assert np.array_equal(rgb(packed[member]), np.asarray(decode(file, name, channels=3)))
    assert (images["train/turned.jpg"]["width"], images["train/turned.jpg"]["height"]) == (40, 48)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_any_kind_can_be_left_out(odd: Path, tmp_path: Path, kind: str):
    summary = prepare(odd, tmp_path / "dst", skip=("corrupt", kind))
    left_out = {name for name, (_, kinds) in ODD.items() if {"corrupt", kind} & set(kinds)}
    images = records(tmp_path / "dst")
    assert {name for name, image in images.items() if image["action"] == "skipped"} == left_out
    assert summary.kinds[kind].skipped == len(summary.kinds[kind].names) > 0
    if kind != "tiny":  # small, but of no other kind
        assert images["train/small.png"]["action"] == "kept"


def test_a_corrupt_image_is_an_error_unless_left_out(odd: Path, tmp_path: Path):
    with pytest.raises(DataError, match=f"{odd}/train/broken.jpg: cannot be read as an image"):
        prepare(odd, tmp_path / "dst", skip=())
    assert list(contents(tmp_path / "dst")) == []


def test_old_colour_profiles_are_not_written(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = encode(pixels(0), "JPEG", exif=TURNED, icc_profile=profile)
    for resolution in (None, 32):
        target = tmp_path / f"{resolution}"
        prepare(fill(tmp_path / "src", {"a.jpg": file}), target, resolution=resolution)
        (packed,) = members(target / "train-000000.tar").values()
        with Image.open(io.BytesIO(packed)) as image:
            assert "icc_profile" not in image.info and not image.getexif()


def test_decompression_bombs_are_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = fill(tmp_path / "src", {"bomb.png": encode(pixels(0, 64, 64)), "fine.png": encode(pixels(1, 32, 32))})
    monkeypatch.setattr("dcvae_pipelines.image.MAX_PIXELS", 40 * 48)
    summary = prepare(source, tmp_path / "dst")
    assert summary.kinds["corrupt"].names == ["train/bomb.png"]
    assert "decompression bomb" in records(tmp_path / "dst")["train/bomb.png"]["reason"]


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    folder = tmp_path / "src" / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    for i in range(4):
        (folder / "img_align_celeba" / f"00000{i}.jpg").write_bytes(encode(pixels(i, 218, 178), "JPEG"))
    (folder / "img_align_celeba" / "000004.jpg").write_bytes(encode(pixels(4, 178, 218), "JPEG"))
    parts = enumerate((0, 0, 1, 2, 0))
    (folder / "list_eval_partition.txt").write_text("".join(f"00000{i}.jpg {part}\n" for i, part in parts))
    return tmp_path / "src"


@pytest.mark.parametrize("resolution", [None, 64])
def test_celeba_is_packed_as_crops_of_the_faces(celeba: Path, tmp_path: Path, resolution: int | None):
    summary = prepare(celeba, tmp_path / "dst", name="celeba", resolution=resolution, format="png")
    assert summary.packed == {"train": 2, "test": 1}
    assert summary.kinds["corrupt"].names == ["celeba/img_align_celeba/000004.jpg"]  # too low for the crop
    packed = members(tmp_path / "dst/train-000000.tar")
    assert list(packed) == ["00000000-000000.png", "00000001-000001.png"]
    source = load_dataset("celeba", celeba)
    shown = decode_images(source, 2, resolution=resolution or 128).images.permute(0, 2, 3, 1)
    assert [rgb(image).tolist() for image in packed.values()] == shown.tolist()
    assert shown.float().std() > 10


# --- images with a resolution ---


@pytest.mark.parametrize("format", ["png", "webp"])
def test_training_sees_the_same_pixels_as_without_prepare(odd: Path, tmp_path: Path, format: str):
    prepare(odd, tmp_path / "dst", resolution=24, format=format, skip=("corrupt",))
    images, packed = records(tmp_path / "dst"), members(tmp_path / "dst/train-000000.tar")
    assert len(packed) == len(ODD) + 1 - 2
    for name, image in images.items():
        if image["action"] == "skipped":
            continue
        upright = decode((odd / name).read_bytes(), name, channels=3)
        side = min(upright.size)
        top, left = (upright.height - side) // 2, (upright.width - side) // 2
        square = to_tensor(upright)[None, :, top : top + side, left : left + side]
        assert np.array_equal(rgb(packed[image["member"]]), resize(square, 24)[0].permute(1, 2, 0).numpy())
        assert image["member"].endswith(f".{format}")
        assert (image["width"], image["height"]) == upright.size
    assert images["train/fine.jpg"]["action"] == "converted" and images["train/fine.jpg"]["reason"] == "resized"
    assert images["train/ink.jpg"]["reason"] == "cmyk, resized"


def test_jpegs_have_high_quality_and_full_colour_resolution(tmp_path: Path):
    source = fill(tmp_path / "src", mixed_images(3))
    prepare(source, tmp_path / "dst", resolution=32)
    before = decode_images(load_dataset("folder", source), 3, resolution=32)
    after = decode_images(load_dataset("shards", tmp_path / "dst"), 3, resolution=32)
    assert 0 < (before.images.float() - after.images.float()).square().mean() < 4  # over 42 dB
    for name, content in members(tmp_path / "dst/train-000000.tar").items():
        with Image.open(io.BytesIO(content)) as image:
            assert name.endswith(".jpeg") and image.format == "JPEG" and image.size == (32, 32)
            assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


def test_images_that_would_be_enlarged_are_tiny(tmp_path: Path):
    images = {f"{side}.png": encode(pixels(side, side, 60)) for side in (39, 40, 41)}
    source = fill(tmp_path / "src", images)
    summary = prepare(source, tmp_path / "left_out", resolution=40, format="png")
    assert summary.kinds["tiny"].names == ["train/39.png"] and summary.kinds["tiny"].skipped == 1
    summary = prepare(source, tmp_path / "enlarged", resolution=40, format="png", skip=())
    assert summary.kinds["tiny"].names == ["train/39.png"] and summary.kinds["tiny"].converted == 1
    enlarged = members(tmp_path / "enlarged/train-000000.tar")["00000000-39.png"]
    expected = load_image(source / "train/39.png", channels=3, resolution=40)
    assert torch.equal(torch.from_numpy(rgb(enlarged).copy()).permute(2, 0, 1) / 127.5 - 1, expected)


# --- shards ---


def test_the_index_equals_that_of_wds2idx(tmp_path: Path):
    prepare(fill(tmp_path / "src", mixed_images(25)), tmp_path / "images", per_shard=10)
    prepare(None, tmp_path / "digits", name="digits", per_shard=1000)
    for archive in [*(tmp_path / "images").glob("*.tar"), *(tmp_path / "digits").glob("test*.tar")]:
        with IndexCreator(str(archive), str(tmp_path / "expected.idx"), verbose=False) as creator:
            creator.create_index()
        index = archive.with_suffix(".idx")
        assert index.read_bytes() == (tmp_path / "expected.idx").read_bytes()
        assert index.stat().st_mtime_ns >= archive.stat().st_mtime_ns


def test_members_have_no_time_and_no_owner(tmp_path: Path):
    prepare(fill(tmp_path / "src", mixed_images(1)), tmp_path / "dst")
    with tarfile.open(tmp_path / "dst/train-000000.tar") as tar:
        (member,) = tar
    assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    assert member.mode == 0o644 and member.isfile() and not member.pax_headers


def test_per_shard_counts_source_images(tmp_path: Path):
    images = mixed_images(7) | {"3.jpeg": b"broken"}
    summary = prepare(fill(tmp_path / "src", images), tmp_path / "dst", per_shard=3)
    assert [(shard["name"], shard["images"]) for shard in summary.shards] == [
        ("train-000000.tar", 3),
        ("train-000001.tar", 2),
        ("train-000002.tar", 1),
        ("test-000000.tar", 1),
    ]
    assert list(members(tmp_path / "dst/train-000001.tar")) == ["00000004-4.png", "00000005-5.webp"]


def test_the_manifest_describes_the_shards(odd: Path, tmp_path: Path):
    target = tmp_path / "dst"
    summary = prepare(odd, target, per_shard=4, resolution=16)
    manifest = json.loads((target / "manifest.json").read_text())
    for shard in manifest["shards"]:
        content = (target / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest() and shard["bytes"] == len(content)
    assert {shard["name"] for shard in manifest["shards"]} == {path.name for path in target.glob("*.tar")}
    assert manifest["shards"] == summary.shards and manifest["packed"] == summary.packed
    assert manifest["kinds"]["tiny"] == {"names": [], "converted": 0, "skipped": 0}
    assert manifest["kinds"]["cmyk"] == {"names": ["train/ink.jpg"], "converted": 1, "skipped": 0}
    settings = {"version": 1, "name": "folder", "source": str(odd), "resolution": 16, "format": "jpeg"}
    settings |= {"skip": ["corrupt", "tiny"], "per_shard": 4, "images": {"train": 13, "test": 1}, "complete": True}
    assert {key: manifest[key] for key in settings} == settings


# --- sources ---


def test_digits_keep_their_pixels_and_labels(tmp_path: Path):
    summary = prepare(None, tmp_path, name="digits")
    assert summary.packed == {"train": 1437, "test": 360} and summary.skipped == 0
    for split in ("train", "test"):
        before = load_dataset("digits", split=split)
        after = decode_images(load_dataset("shards", tmp_path, split), 2000, resolution=32, channels=1)
        assert torch.equal(after.images, before.images)
        assert after.labels is not None and after.labels.tolist() == before.labels.tolist()  # type: ignore[union-attr]
    assert Image.open(io.BytesIO(members(tmp_path / "test-000000.tar")["00000000-0.png"])).mode == "L"


def test_cifar10_can_be_packed_at_another_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = torch.from_numpy(np.stack([pixels(i, 32, 32) for i in range(4)])).permute(0, 3, 1, 2)
    cifar10 = ImageSet("cifar10", images.contiguous(), torch.tensor([3, -1, 0, 9]))
    monkeypatch.setattr(MODULE, "load_dataset", lambda name, root, split: cifar10)
    prepare(tmp_path / "src", tmp_path / "dst", name="cifar10", resolution=16)
    packed = load_dataset("shards", tmp_path / "dst")
    assert torch.equal(decode_images(packed, 4, resolution=16).images, resize(images, 16))
    assert [packed.label(i) for i in range(4)] == [3, None, 0, 9]
    assert list(members(tmp_path / "dst/train-000000.tar"))[:3] == [
        "00000000-0.png",
        "00000000-0.cls",
        "00000001-1.png",
    ]


def test_shards_can_be_packed_again_with_their_labels(tmp_path: Path):
    samples = {f"a/b{i}.jpg": encode(pixels(i), "JPEG") for i in range(3)}
    samples |= {f"a/b{i}.cls": str(7 - i).encode() for i in range(3)}
    for split in ("train", "test"):
        make_shard(tmp_path / "src" / f"{split}.tar", dict(sorted(samples.items())))
    prepare(tmp_path / "src", tmp_path / "dst", name="shards")
    for split in ("train", "test"):
        before, after = (load_dataset("shards", tmp_path / folder, split) for folder in ("src", "dst"))
        assert [after.read(i) for i in range(3)] == [before.read(i) for i in range(3)]
        assert [after.label(i) for i in range(3)] == [7, 6, 5]
    assert list(records(tmp_path / "dst")) == [f"train.tar: a/b{i}.jpg" for i in range(3)]
    assert list(members(tmp_path / "dst/train-000000.tar"))[2:4] == ["00000001-b1.jpeg", "00000001-b1.cls"]


FORMATS = {f"key{i:02d}": encode(pixels(i), ("JPEG", "WEBP")[i % 2]) for i in range(20)}


def test_lsun_is_packed_from_its_training_lmdb(tmp_path: Path):
    make_lmdb(tmp_path / "src/bedroom_train_lmdb", FORMATS)
    before = tree(tmp_path / "src")
    prepare(tmp_path / "src", tmp_path / "dst", name="lsun_bedroom")
    held_out = min(FORMATS, key=lambda key: hashlib.sha256(key.encode()).digest())
    packed = members(tmp_path / "dst/train-000000.tar")
    assert list(packed.values()) == [content for key, content in FORMATS.items() if key != held_out]
    assert list(packed)[:2] == ["00000000-key00.jpeg", "00000001-key01.webp"]
    assert list(members(tmp_path / "dst/test-000000.tar").values()) == [FORMATS[held_out]]
    assert next(iter(records(tmp_path / "dst"))) == "bedroom_train_lmdb: key00"
    assert tree(tmp_path / "src") == before


def test_an_lmdb_of_images_is_split_like_a_folder(tmp_path: Path):
    make_lmdb(tmp_path / "lmdb", FORMATS)
    prepare(tmp_path / "lmdb", tmp_path / "dst")
    held_out = min(FORMATS, key=lambda key: hashlib.sha256(key.encode()).digest())
    assert list(members(tmp_path / "dst/test-000000.tar").values()) == [FORMATS[held_out]]
    trained = [value for key, value in FORMATS.items() if key != held_out]
    assert list(members(tmp_path / "dst/train-000000.tar").values()) == trained
    assert list(records(tmp_path / "dst", "test-000000")) == [held_out]


def test_real_faces_are_packed_as_training_sees_them(real_data: Path, tmp_path: Path):
    faces = sorted((real_data / "faces1024").glob("*.jpg"))[:6]
    (tmp_path / "src").mkdir()
    for face in faces:
        shutil.copy(face, tmp_path / "src")
    before = tree(tmp_path / "src")
    prepare(tmp_path / "src", tmp_path / "unchanged")
    prepare(tmp_path / "src", tmp_path / "small", resolution=64, format="png")
    assert tree(tmp_path / "src") == before
    for split in ("train", "test"):
        source, unchanged, small = (
            load_dataset(name, tmp_path / folder, split)
            for name, folder in (("folder", "src"), ("shards", "unchanged"), ("shards", "small"))
        )
        assert isinstance(source, EncodedSet) and isinstance(unchanged, EncodedSet)
        assert [unchanged.read(i) for i in range(len(unchanged))] == [source.read(i) for i in range(len(source))]
        expected = decode_images(source, 6, resolution=64).images
        assert torch.equal(decode_images(small, 6, resolution=64).images, expected)
        assert len(expected) == {"train": 5, "test": 1}[split]


# --- interrupted and repeated calls ---


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images for three training shards of four images, one of them empty, and one test shard."""
    images = mixed_images(12) | {f"1{i}.{ending}": b"broken" for i, ending in ((0, "png"), (1, "webp"))}
    images |= {name: b"broken" for name in sorted(images)[4:8]}
    return fill(tmp_path / "source", images)


def run(source: Path, target: Path, **options):
    return prepare(source, target, **{"resolution": 16, "format": "png", "per_shard": 4, **options})


def test_empty_shards_are_not_written_and_not_made_again(source: Path, tmp_path: Path):
    target = tmp_path / "dst"
    summary = run(source, target)
    archives = ["test-000000.tar", "train-000000.tar", "train-000002.tar"]
    assert sorted(path.name for path in target.glob("*.tar")) == archives
    assert summary.kinds["corrupt"].skipped == 12 - summary.packed["train"]
    before = tree(target)
    assert run(source, target, progress=lambda done, total: pytest.fail("made again")) == summary
    assert tree(target) == before


def test_the_bytes_do_not_depend_on_workers_and_the_source_is_unchanged(source: Path, tmp_path: Path):
    before = tree(source)
    for workers in (1, 3):
        run(source, tmp_path / f"{workers}", workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") and tree(source) == before


def test_progress_counts_each_image(source: Path, tmp_path: Path):
    calls = []
    run(source, tmp_path / "dst", progress=lambda *numbers: calls.append(numbers))
    assert calls == [(done, 13) for done in range(1, 14)]
    (tmp_path / "dst/train-000002.tar").unlink()
    calls.clear()
    run(source, tmp_path / "dst", progress=lambda *numbers: calls.append(numbers))
    assert calls == [(done, 13) for done in range(10, 14)]


def test_few_images_are_processed_ahead(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check, started, ahead = MODULE.check, [], []
    monkeypatch.setattr(MODULE, "check", lambda *call: [started.append(call), check(*call)][1])
    run(source, tmp_path / "dst", workers=1, progress=lambda done, total: ahead.append(len(started) - done))
    assert len(started) == 13 and max(ahead) <= 4


@pytest.mark.parametrize("done", [1, 4, 9, 13])
def test_a_call_after_an_interrupt_makes_the_rest(source: Path, tmp_path: Path, done: int):
    def interrupt(now: int, total: int) -> None:
        if now == done:
            raise KeyboardInterrupt

    target = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run(source, target, progress=interrupt)
    summary = run(source, tmp_path / "whole")
    partial, expected = tree(target), contents(tmp_path / "whole")
    assert json.loads(partial.pop("manifest.json")[1])["complete"] is False
    assert sum(name.endswith(".json") for name in partial) == (done - 1) // 4  # records
    assert all(expected[name] == content for name, (_, content) in partial.items())
    assert run(source, target) == summary
    assert contents(target) == expected
    assert {name: tree(target)[name] for name in partial} == partial  # not made again


@pytest.mark.multiprocess
def test_a_call_after_a_kill_makes_the_rest(source: Path, tmp_path: Path):
    script = """if True:
        import os, signal, sys
        from dcvae_pipelines.prepare import prepare

        def kill(done, total):
            if done == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        prepare(sys.argv[1], sys.argv[2], resolution=16, format="png", per_shard=4, progress=kill)
    """
    target = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", script, source, target])
    assert process.returncode == -signal.SIGKILL
    assert sorted(re.sub(r"\d+\.unfinished", "unfinished", name) for name in contents(target)) == [
        ".lock",
        ".train-000001.tar.unfinished",
        "manifest.json",
        "train-000000.idx",
        "train-000000.json",
        "train-000000.tar",
    ]
    assert run(source, target) == run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


def test_a_full_disk_leaves_complete_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, count = tarfile.TarFile.addfile, 0

    def addfile(self, member, content):
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, member, content)

    target = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(OSError, match="No space left"):
            run(source, target)
    names = ["manifest.json", "train-000000.idx", "train-000000.json", "train-000000.tar", "train-000001.json"]
    assert sorted(contents(target)) == names
    run(source, target)
    run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda target: (target / "train-000000.tar").unlink(),
        lambda target: (os.truncate(target / "train-000000.tar", 1000), (target / "train-000000.idx").touch()),
        lambda target: (target / "train-000000.idx").unlink(),
        lambda target: os.utime(target / "train-000000.idx", (1, 1)),
        lambda target: (target / "train-000000.json").unlink(),
        lambda target: os.truncate(target / "train-000000.json", 100),
    ],
)
def test_a_damaged_shard_is_made_again(source: Path, tmp_path: Path, damage):
    target = tmp_path / "dst"
    summary = run(source, target)
    before = contents(target)
    damage(target)
    assert run(source, target) == summary
    assert contents(target) == before
    assert (target / "train-000000.idx").stat().st_mtime >= (target / "train-000000.tar").stat().st_mtime


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 24}, "resolution 16, not 24"),
        ({"resolution": None}, "resolution 16, not null"),
        ({"format": "webp"}, 'format "png", not "webp"'),
        ({"skip": ["cmyk", "corrupt"]}, r'skip \["corrupt", "tiny"\], not \["corrupt", "cmyk"\]'),
        ({"per_shard": 5}, "per_shard 4, not 5"),
        ({"name": "celebahq"}, 'name "folder", not "celebahq"'),
    ],
)
def test_shards_of_other_settings_are_not_mixed(source: Path, tmp_path: Path, options: dict, message: str):
    run(source, tmp_path / "dst")
    before = tree(tmp_path / "dst")
    with pytest.raises(DataError, match=f"{tmp_path / 'dst'}: holds shards made with {message}; choose another"):
        run(source, tmp_path / "dst", **options)
    assert tree(tmp_path / "dst") == before


def test_shards_of_other_images_are_not_mixed(source: Path, tmp_path: Path):
    target = tmp_path / "dst"
    run(source, target)
    shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(DataError, match=r'made with source ".*/source", not ".*/copy"'):
        run(tmp_path / "copy", target)
    (source / "train/more.png").write_bytes(encode(pixels(0)))
    with pytest.raises(DataError, match=r'made with images {"train": 12, "test": 1}, not {"train": 13, "test": 1}'):
        run(source, target)
    (source / "train/more.png").unlink()
    (source / "train/9.jpeg").write_bytes(encode(pixels(0)))
    with pytest.raises(DataError, match="the images in train-000002 have changed since it was made"):
        run(source, target)


# --- rejected arguments ---


def test_nothing_is_written_into_the_source(source: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(source)
    before = tree(source)
    for target in (source, source / "shards", tmp_path, tmp_path / "link", tmp_path / "link" / "shards"):
        with pytest.raises(DataError, match="which is only read; choose another folder"):
            run(source, target)
    assert tree(source) == before


def test_a_folder_with_other_files_is_rejected(source: Path, tmp_path: Path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"holds thesis\.tex, but no intact manifest\.json; choose an empty"):
        run(source, tmp_path / "dst")
    assert contents(tmp_path / "dst") == {"thesis.tex": b""}
    with pytest.raises(DataError, match=r"thesis\.tex: is not a folder"):
        run(source, tmp_path / "dst/thesis.tex")


def test_a_second_process_is_rejected(source: Path, tmp_path: Path):
    (tmp_path / "dst").mkdir()
    with open(tmp_path / "dst" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing shards there"):
            run(source, tmp_path / "dst")


def test_a_missing_source_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(DataError, match=f"looked for images in {tmp_path / 'absent'}"):
        prepare(tmp_path / "absent", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_result_without_images_is_an_error_in_each_call(tmp_path: Path):
    source = fill(tmp_path / "src", {"a.png": b"", "b.png": encode(pixels(0, 8, 8))}, {"c.png": b""})
    for _ in range(2):
        with pytest.raises(DataError, match="no image is left to pack; 2 are corrupt, 1 are tiny"):
            prepare(source, tmp_path / "dst")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution must be at least 1, not 0"),
        ({"per_shard": 0}, "per_shard must be at least 1, not 0"),
        ({"workers": -1}, "workers must be at least 1, not -1"),
        ({"format": "gif"}, "unknown format 'gif'; known are jpeg, png, webp"),
        ({"skip": ("grey",)}, "unknown kind 'grey'; the kinds are corrupt, tiny, greyscale, cmyk, rotated, 16-bit"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "src", tmp_path / "dst", **options)


def test_a_missing_pillow_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="pip install Pillow"):
        run(source, tmp_path / "dst")
