"""Locations and splits of data sets: folders, shards, LMDBs."""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcvae_pipelines import DataError, EncodedSet, datasets, decode_images, decoded, load_dataset
from dcvae_pipelines.encoded import Files, Lmdb, Shards, find_images
from image_files import encode, make_lmdb, make_shard


def jpeg(value: int, width: int = 8, height: int = 8) -> bytes:
    """Uniform grey image, which JPEG preserves exactly."""
    return encode(Image.new("RGB", (width, height), (value, value, value)), "JPEG")


def make_folder(folder: Path, names: list[str]) -> Path:
    """Write uniform images; image i has the value i."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(value))
    return folder


def values(images: EncodedSet) -> list[int]:
    return decode_images(images, len(images), resolution=8).images[:, 0, 0, 0].tolist()


def names(images: EncodedSet) -> list[str]:
    return [images.image_name(i) for i in range(len(images))]


# --- folders ---


def test_images_are_found_by_extension_and_sorted(tmp_path: Path):
    images = ["B.JPG", "a/z.png", "a/b/c.webp", "a.jpeg", "d.tiff", "Z.GIF"]
    make_folder(tmp_path, [*images, ".hidden.jpg", ".cache/e.jpg", "notes.txt", "jpg", "a/Thumbs.db"])
    assert find_images(tmp_path) == sorted(images)


def test_one_in_twenty_images_is_held_out_by_its_name(tmp_path: Path):
    files = [f"{i:03d}.jpg" for i in range(60)]
    make_folder(tmp_path, files)
    train, test = (load_dataset("folder", tmp_path, split) for split in ("train", "test"))
    held_out = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())[:3]
    assert [int(Path(name).stem) for name in names(test)] == values(test) == sorted(int(name[:3]) for name in held_out)
    assert sorted(values(train) + values(test)) == list(range(60))

    make_folder(tmp_path, [*files, "later.jpg"])  # existing images stay in their split
    assert set(names(train)) < set(names(load_dataset("folder", tmp_path)))


def test_at_most_1000_images_are_held_out():
    held_out = datasets._hold_out("x", [str(i) for i in range(30_000)])
    assert held_out.sum() == 1000 and datasets._hold_out("x", ["a", "b"]).sum() == 1


def test_folders_named_train_and_test_are_the_split(tmp_path: Path):
    make_folder(tmp_path, ["train/a.jpg", "train/b.jpg", "test/c.jpg"])
    assert values(load_dataset("folder", tmp_path)) == [0, 1]
    assert values(load_dataset("folder", tmp_path, "test")) == [2]


def test_links_out_of_the_folder_are_rejected_and_links_within_are_followed(tmp_path: Path):
    inside, outside = make_folder(tmp_path / "in", ["a.jpg", "b.jpg"]), make_folder(tmp_path / "out", ["c.jpg"])
    (inside / "same.jpg").symlink_to("a.jpg")
    assert find_images(inside) == ["a.jpg", "b.jpg", "same.jpg"]
    (tmp_path / "link").symlink_to(inside)  # the folder itself can be a link
    assert find_images(tmp_path / "link") == ["a.jpg", "b.jpg", "same.jpg"]
    os.mkfifo(inside / "pipe.png")  # opening it would block
    assert find_images(inside) == ["a.jpg", "b.jpg", "same.jpg"]
    for target in ("gone.jpg", "e.jpg"):
        (inside / "e.jpg").symlink_to(target)
        with pytest.raises(DataError, match=rf"{inside / 'e.jpg'}: is a broken link"):
            find_images(inside)
        (inside / "e.jpg").unlink()
    (inside / "d.jpg").symlink_to(outside / "c.jpg")
    with pytest.raises(DataError, match=rf"{inside / 'd.jpg'}: is a link out of {inside}"):
        load_dataset("folder", inside)


@pytest.mark.parametrize("name", ["folder", "celebahq", "lsun_bedroom"])
def test_a_missing_or_empty_folder_is_named(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=f"{name}: data.root is not set; set --data.root"):
        load_dataset(name)
    with pytest.raises(DataError, match=f"{name}: looked for images in {tmp_path / 'absent'}, which is not a folder"):
        load_dataset(name, tmp_path / "absent")
    with pytest.raises(DataError, match=f"{name}: looked for images .* in {tmp_path} and below, and found none"):
        load_dataset(name, tmp_path)
    with pytest.raises(DataError, match=f"{name}: there is only one image"):
        load_dataset(name, make_folder(tmp_path, ["a.jpg"]))


def test_a_removed_file_is_named(tmp_path: Path):
    images = load_dataset("folder", make_folder(tmp_path, ["a.jpg", "b.jpg", "c.jpg"]))
    name = images.image_name(0)
    os.remove(name)
    with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
        images.read(0)


# --- CelebA, CelebA-HQ, LSUN ---


def celeba(root: Path) -> Path:
    """Write six images of 178×218, two per split: grey, but white in the 128×128 around the face."""
    array = np.full((218, 178, 3), 128, np.uint8)
    array[57:185, 25:153] = 255
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in range(1, 7):
        Image.fromarray(array).save(folder / f"{number:06d}.jpg", quality=100)
    rows = [f"{number:06d}.jpg {(number - 1) // 2}\n" for number in range(1, 7)]
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(rows))
    return root


def test_celeba_is_split_as_published_and_cropped_to_the_face(tmp_path: Path):
    celeba(tmp_path)
    for split, numbers in (("train", [1, 2]), ("valid", [3, 4]), ("test", [5, 6])):
        images = load_dataset("celeba", tmp_path, split)
        assert [int(Path(name).stem) for name in names(images)] == numbers
    faces = decode_images(load_dataset("celeba", tmp_path), 2, resolution=128).images
    assert faces.shape == (2, 3, 128, 128) and faces.min() > 245


def test_missing_parts_of_celeba_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"looked for .*/celeba/img_align_celeba and did not find it; set --data.root"):
        load_dataset("celeba", tmp_path)
    folder = celeba(tmp_path) / "celeba"
    (folder / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(DataError, match=r"celeba: 1 of the 2 train images .* missing in .*, for example 000002\.jpg"):
        load_dataset("celeba", tmp_path)
    (folder / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(DataError, match=r"list_eval_partition\.txt is not the published list"):
        load_dataset("celeba", tmp_path)
    (folder / "list_eval_partition.txt").unlink()
    with pytest.raises(DataError, match=r"looked for .*list_eval_partition\.txt and did not find it"):
        load_dataset("celeba", tmp_path)


def test_an_image_that_is_not_aligned_is_named(tmp_path: Path):
    celeba(tmp_path)
    path = tmp_path / "celeba" / "img_align_celeba" / "000001.jpg"
    path.write_bytes(jpeg(0, 178, 219))
    with pytest.raises(
        DataError, match=rf"{path}: celeba: aligned images have 178 × 218 pixels; this one has 178 × 219"
    ):
        decode_images(load_dataset("celeba", tmp_path), 1, resolution=128)


def test_decoding_reports_progress(tmp_path: Path):
    images, reported = load_dataset("folder", make_folder(tmp_path, [f"{i}.jpg" for i in range(5)])), []
    decode_images(images, 3, resolution=8, progress=lambda *counts: reported.append(counts))
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_celebahq_holds_out_a_fixed_thousand(tmp_path: Path):
    held_out = datasets._celebahq_held_out()
    assert len(held_out) == 1000 and held_out <= set(range(30_000))
    digest = hashlib.sha256("".join(f"{number}\n" for number in sorted(held_out)).encode()).hexdigest()
    assert digest == "660ab6cb749bff9e2ac894f1868864382a561e05c78f3b284f5e85574095be29"  # as in earlier versions
    numbers = sorted(held_out)[:2] + sorted(set(range(200)) - held_out)[:5]
    make_folder(tmp_path, [f"{n:05d}.jpg" for n in numbers[:4]] + [f"face_{n}.png" for n in numbers[4:]])
    assert values(load_dataset("celebahq", tmp_path, "test")) == [0, 1]
    assert sorted(values(load_dataset("celebahq", tmp_path, "train"))) == [2, 3, 4, 5, 6]


def test_a_subset_of_celebahq_without_held_out_images_is_split_like_a_folder(tmp_path: Path):
    numbers = sorted(set(range(200)) - datasets._celebahq_held_out())[:21]
    make_folder(tmp_path, [f"{number:05d}.jpg" for number in numbers])
    train, test = (load_dataset("celebahq", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 1)


LSUN_KEYS = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(600)]


def test_lsun_holds_out_training_images_and_keeps_the_validation_images_apart(tmp_path: Path):
    webp = encode(Image.new("RGB", (8, 8), (200, 200, 200)), "WEBP", lossless=True)
    make_lmdb(tmp_path / "bedroom_train_lmdb", {"b": jpeg(2), "a": jpeg(1), "c": webp})
    make_lmdb(tmp_path / "bedroom_val_lmdb", {"d": jpeg(4), "e": jpeg(5)})
    train, valid, test = (load_dataset("lsun_bedroom", tmp_path, split) for split in ("train", "valid", "test"))
    # SHA-256 of b, c and a begins with 3e, 2e and ca.
    assert (values(train), values(valid), values(test)) == ([1, 2], [4, 5], [200])
    assert train.image_name(1) == f"{tmp_path / 'bedroom_train_lmdb'}: b"


def test_lsun_holds_out_a_fixed_list_without_reading_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An LMDB and its export to nested folders have the same held-out images."""
    make_lmdb(tmp_path / "lmdb" / "bedroom_train_lmdb", dict.fromkeys(LSUN_KEYS, b"not read"))
    for key in LSUN_KEYS:
        folder = tmp_path / "folders" / "bedroom_train" / key[0] / key[1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.webp").touch()
    (tmp_path / "folders" / "bedroom_val").mkdir()
    for store in (Lmdb, Files):
        monkeypatch.delattr(store, "read")
    expected = sorted(LSUN_KEYS, key=lambda key: hashlib.sha256(key.encode()).digest())[:10]
    digest = hashlib.sha256("".join(f"{key}\n" for key in sorted(expected)).encode()).hexdigest()
    assert digest == "3ff7bf64294cc3896b717b9eaf259c9fc3c566042222b6e2d1738f457373bb1d"
    for layout in ("lmdb", "folders"):
        train, test = (load_dataset("lsun_bedroom", tmp_path / layout, split) for split in ("train", "test"))
        assert [Path(train.store.key(int(i))).stem for i in test.indices] == sorted(expected)
        assert sorted([*train.indices.tolist(), *test.indices.tolist()]) == list(range(600))


def test_lsun_holds_out_the_right_number_of_images_with_similar_names(tmp_path: Path):
    store = {f"{part}/bedroom.{number:04d}.png": b"" for part in "ab" for number in range(60)}
    for name in store:
        path = tmp_path / "bedroom_train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store[name])
    train, test = (load_dataset("lsun_bedroom", tmp_path, split) for split in ("train", "test"))
    assert len(train) == 118
    smallest = min(range(60), key=lambda number: hashlib.sha256(f"bedroom.{number:04d}".encode()).digest())
    assert [test.store.key(i) for i in test.indices.tolist()] == [f"{part}/bedroom.{smallest:04d}.png" for part in "ab"]


def test_lsun_holds_out_fifty_thousand_images_or_one_in_sixty():
    totals = {2: 1, 119: 1, 120: 2, 600: 10, 2_999_999: 49_999, 3_000_000: 50_000, 3_033_042: 50_000}
    assert {total: datasets._lsun_held_out(total) for total in totals} == totals


def test_lsun_is_read_from_folders(tmp_path: Path):
    make_folder(tmp_path, ["bedroom_train/a.jpg", "bedroom_train/b.jpg", "bedroom_val/c.jpg"])
    assert [values(load_dataset("lsun_bedroom", tmp_path, split)) for split in ("train", "valid", "test")] == [
        [0],
        [2],
        [1],
    ]
    folder = make_folder(tmp_path / "one", [f"{i}.jpg" for i in range(40)])
    held_out = [len(load_dataset("lsun_bedroom", folder, split)) for split in ("train", "valid", "test")]
    assert held_out == [38, 2, 2]


def test_a_missing_or_broken_lmdb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_lmdb(tmp_path / "bedroom_train_lmdb", {"a": jpeg(1), "b": jpeg(2)})
    assert len(load_dataset("lsun_bedroom", tmp_path, "test")) == 1
    with pytest.raises(DataError, match=r"looked for .*bedroom_val_lmdb/data.mdb .*; unpack bedroom_val_lmdb\.zip"):
        load_dataset("lsun_bedroom", tmp_path, "valid")
    (tmp_path / "bedroom_val_lmdb").mkdir()
    (tmp_path / "bedroom_val_lmdb" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="bedroom_val_lmdb: cannot be read as an LMDB"):
        load_dataset("lsun_bedroom", tmp_path, "valid")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"lmdb is needed here .*: pip install lmdb"):
        Lmdb(tmp_path / "bedroom_train_lmdb")


# --- shards ---


def test_shards_are_read_with_their_labels(tmp_path: Path):
    members = {"a.jpg": jpeg(1), "a.cls": b"7", "a.json": b"{}", "b.cls": b"3\n", "b.jpg": jpeg(2), "c.txt": b"none"}
    make_shard(tmp_path / "train-0.tar", members)
    make_shard(tmp_path / "train-1.tar", {"dir/d.seg.png": b"", "dir/d.jpg": jpeg(4)} | {"e.jpg": jpeg(5)})
    make_shard(tmp_path / "test-0.tar", {"f.jpg": jpeg(6), "f.cls": b"0"})
    store = Shards([tmp_path / "train-0.tar"])
    assert [store.read(i) for i in range(2)] == [jpeg(1), jpeg(2)]
    assert [store.label(i) for i in range(2)] == [7, 3]
    test = decode_images(load_dataset("shards", tmp_path, "test"), 9, resolution=8)
    assert test.images[:, 0, 0, 0].tolist() == [6] and test.labels is not None and test.labels.tolist() == [0]
    train = load_dataset("shards", tmp_path)
    assert names(train)[-1] == f"{tmp_path / 'train-1.tar'}: e.jpg" and train.label(len(train) - 1) is None


def test_without_test_shards_images_are_held_out(tmp_path: Path):
    make_shard(tmp_path / "a.tar", {f"{i:02d}.jpg": jpeg(i) for i in range(20)})
    make_shard(tmp_path / "b.tar", {f"{i:02d}.jpg": jpeg(i) for i in range(20, 40)})
    train, test = (values(load_dataset("shards", tmp_path, split)) for split in ("train", "test"))
    assert len(test) == 2 and sorted(train + test) == list(range(40))


def test_an_index_is_used_only_if_it_is_newer(tmp_path: Path):
    shard = make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    index = tmp_path / "a.idx"
    with tarfile.open(shard) as archive:
        offset = archive.getmembers()[1].offset_data
    index.write_text(f"v1.2 1\njpg {offset} {len(jpeg(2))} b.jpg\n")  # lists the second image only
    assert [Shards([shard]).key(i) for i in range(len(Shards([shard])))] == ["b.jpg"]
    assert Shards([shard]).read(0) == jpeg(2)
    os.utime(index, (0, 0))
    assert len(Shards([shard])) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "v1.1 1\njpg 512 9 a.jpg\n",
        "v1.2 2\njpg 512 9 a.jpg\n",
        "v1.2 1\njpg 512 a.jpg\n",
        "v1.2 1\njpg x 9 a.jpg\n",
        "v1.2 1\njpg 512 99999999 a.jpg\n",
        "v1.2 1\njpg -1 9 a.jpg\n",
        "v1.2 1\njpg 512 9 ../a.jpg\n",
        "\0\0",
    ],
)
def test_an_invalid_index_is_rejected(content: str, tmp_path: Path):
    shard = make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1)})
    (tmp_path / "a.idx").write_text(content)
    with pytest.raises(DataError, match=r"a\.idx: is not an index of the archive next to it \(.*\); delete it"):
        Shards([shard])


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "b/../../a.jpg"])
def test_members_outside_the_archive_are_rejected(name: str, tmp_path: Path):
    make_shard(tmp_path / "a.tar", {"fine.jpg": jpeg(1), name: jpeg(2)})
    with pytest.raises(DataError, match=rf"a\.tar: its member {re.escape(name)} lies outside the archive"):
        load_dataset("shards", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_rejected(kind: bytes, tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        header = tarfile.TarInfo("a.jpg")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)
    with pytest.raises(DataError, match=r"its member a.jpg is a link or a device, which is not allowed"):
        load_dataset("shards", tmp_path)


def test_invalid_archives_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"looked for .*/\*\.tar and found none; `dcvae prepare`"):
        load_dataset("shards", tmp_path)
    shard = make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1) + bytes(3000), "b.jpg": jpeg(2)}).read_bytes()
    for content in (b"no archive" * 100, shard[:1000]):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tar: "):
            load_dataset("shards", tmp_path)
    make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "a.cls": b"seven"})
    make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1), "a.cls": b"seven", "b.jpg": jpeg(2)})
    with pytest.raises(DataError, match=r"a\.tar: its member a\.cls holds b'seven', not a class number"):
        Shards([tmp_path / "a.tar"]).label(0)
    make_shard(tmp_path / "a.tar", {"a.txt": b"no image"})
    with pytest.raises(DataError, match="shards: "):
        load_dataset("shards", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda tar: tar.__setitem__(1024 + 10, tar[1024 + 10] ^ 1), lambda tar: tar.__delitem__(slice(1300, None))],
)
def test_a_damaged_header_is_not_mistaken_for_the_end(damage: Callable[[bytearray], None], tmp_path: Path):
    shard = make_shard(tmp_path / "a.tar", {"a.jpg": b"x", "b.jpg": b"y", "c.jpg": b"z"})
    content = bytearray(shard.read_bytes())
    damage(content)
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: is damaged or cut short after its member a\.jpg"):
        Shards([shard])


def test_unfinished_or_missing_shards_are_named(tmp_path: Path):
    shard = make_shard(tmp_path / "train-000000.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    size = shard.stat().st_size
    for manifest, message in (
        ({"complete": False}, "is not complete; run the same `dcvae prepare` again"),
        ({"complete": True, "shards": [{"name": shard.name, "bytes": size + 1}]}, "train-000000.tar has another size"),
        ({"complete": True, "shards": [{"name": "train-000001.tar", "bytes": 1}]}, "train-000001.tar is missing"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=message):
            load_dataset("shards", tmp_path)
    for content in ("[]", "{}", "not a manifest"):
        (tmp_path / "manifest.json").write_text(content)
        assert len(load_dataset("shards", tmp_path)) == 1


def test_masks_and_hidden_members_are_not_images(tmp_path: Path):
    members = {"._a.jpg": b"of a Mac", "a.seg.png": b"a mask", "a.jpg": jpeg(1), "b.JPG": jpeg(2)}
    store = Shards([make_shard(tmp_path / "a.tar", members)])
    assert [store.key(i) for i in range(len(store))] == ["a.jpg", "b.JPG"]


def test_an_archive_cut_short_after_opening_is_named(tmp_path: Path):
    shard = make_shard(tmp_path / "a.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    store = Shards([shard])
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"a\.tar: b\.jpg: cannot be read: the archive was cut short"):
        store.read(1)


# --- STL-10 ---


def test_stl10_is_downscaled_and_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "STL10_COUNTS", {"train": 3, "unlabeled": 4, "test": 2})
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = torch.randint(256, (9, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part, part_images, labels in (("train", images[:3], [1, 10, 5]), ("unlabeled", images[3:7], None)):
        columns_first = part_images.transpose(2, 3).contiguous()
        (folder / f"{part}_X.bin").write_bytes(columns_first.numpy().tobytes())
        if labels:
            (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    stl10 = load_dataset("stl10", tmp_path)
    assert stl10.labels is not None and stl10.labels.tolist() == [0, 9, 4, -1, -1, -1, -1]
    for image, downscaled in zip(images, stl10.images, strict=False):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        assert (torch.from_numpy(np.array(expected)).permute(2, 0, 1).int() - downscaled.int()).abs().max() <= 1

    with pytest.raises(DataError, match=r"stl10: .*test_X\.bin is missing; set --data.root"):
        load_dataset("stl10", tmp_path, "test")
    (folder / "train_X.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train_X\.bin has 5 bytes instead of 82,944"):
        load_dataset("stl10", tmp_path)
