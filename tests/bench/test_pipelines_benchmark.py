"""Tests of the benchmark of data sources: rehearsal, wrong batches, the time spent waiting, targets, table."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu
import harness
import results
import tables
import test_pipelines as bench  # the benchmark's own file
from dcvae_pipelines import Batch, ImageSet, load_dataset
from harness import Absent, Unavailable, imported
from test_pipelines import FOLDER_VARIABLE, PEERS, ROWS, Row, errors, expected, iteration, waiting_share

SMALL = Row("small", "faces1024", 24, 4, None, batches=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six JPEGs as faces1024, and none of the other images."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    (root / "faces1024").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        coarse = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8)
        smooth = image.frombytes("RGB", (6, 6), bytes(coarse.flatten().tolist())).resize((512, 512), image.BICUBIC)
        smooth.save(root / "faces1024" / f"{i}.jpg", quality=95)
    return root


@pytest.fixture
def images(folder):
    return load_dataset("folder", folder / "faces1024")


@pytest.fixture(scope="module")
def rehearsal(folder, tmp_path_factory):
    """The result of bench/test_pipelines.py, run small, and pytest's status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        out = tmp_path_factory.mktemp("results")
        status = gpu.run_benchmark("pipelines", out, rehearsal=True)
    return results.read(out / "cpu" / "pipelines.json"), status


@pytest.mark.multiprocess
def test_rehearsal_times_available_implementations(rehearsal):
    document, status = rehearsal
    assert status == 0  # absent images do not count as a failure
    assert document["rehearsal"] is True
    assert document["cpu"]
    rows = {row["name"]: {cell["peer"]: cell for cell in row["cells"]} for row in document["rows"]}
    assert list(rows) == ["faces512", "faces256", "bedroom128", "cifar10"]
    for name in ("bedroom128", "cifar10"):
        assert {cell["reason"] for cell in rows[name].values()} == {"real images absent"}
    for name in ("faces512", "faces256"):
        for peer in PEERS:
            package = "nvidia-dali" if peer == "ours" else "torchvision"
            cell = rows[name][peer]
            if cell["reason"] == f"{package} is not installed":
                continue
            assert cell["reason"] is None
            assert cell["wall"]["median_us"] > 0
            assert cell["wall"]["calls_per_batch"] % 2 == 0  # two batches a round
            assert cell["errors"]["image_error"] < 1
            assert cell["waiting_share"] is None  # measured on GPUs only
    assert all(row["cores"] == len(os.sched_getaffinity(0)) for row in document["rows"])


@pytest.mark.multiprocess
def test_cifar10_batches_agree(monkeypatch):
    """Random images of the same size replace CIFAR-10."""
    image, datasets = pytest.importorskip("PIL.Image"), pytest.importorskip("torchvision.datasets")
    images = ImageSet("cifar10", torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8), None)

    class Cifar10:
        def __init__(self, root, transform):
            self.transform = transform

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            array = images.images[index].permute(1, 2, 0).contiguous()
            return self.transform(image.frombytes("RGB", (32, 32), bytes(array.flatten().tolist()))), 0

    monkeypatch.setattr(bench, "torchvision_root", lambda: None)
    monkeypatch.setattr(datasets, "CIFAR10", Cifar10)
    row = replace(ROWS[3], batch=8)
    for peer in ("ours", "dataloader"):
        batches = PEERS[peer](row, images)
        assert errors(row, images, next(batches))["image_error"] < 0.001  # nothing is decoded or resized
        batches.close()  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="these images are not files"):
        bench.torchvision_io(row, images)


def batch_of(images, ids):
    ids = torch.tensor(ids)
    return Batch(expected(images, ids, SMALL.resolution), ids)


def test_mirrored_images_are_right(images):
    batch = batch_of(images, [3, 0, 0, 4])
    assert errors(SMALL, images, batch) == {"image_error": 0.0}
    some = batch.images.clone()
    some[1:3] = some[1:3].flip(3)
    assert errors(SMALL, images, Batch(some, batch.ids)) == {"image_error": 0.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.roll(1, 0), "an image is wrong by"),
        (lambda x: x.flip(2), "an image is wrong by"),
        (lambda x: x.flip(1), "an image is wrong by"),
        (lambda x: (x + 1) / 2, "an image is wrong by"),
        (lambda x: torch.full_like(x, torch.nan), "an image is wrong by nan"),
        (lambda x: x.bfloat16(), r"its batches are torch.bfloat16 \[4, 3, 24, 24\]"),
        (lambda x: x[..., 1:], r"its batches are torch.float32 \[4, 3, 24, 23\]"),
    ],
)
def test_wrong_batches_are_told_from_right(images, wrong, message):
    batch = batch_of(images, [1, 2, 3, 4])
    with pytest.raises(Unavailable, match=message):
        errors(SMALL, images, Batch(wrong(batch.images), batch.ids))


def test_waiting_share(monkeypatch):
    now = 0.0
    monkeypatch.setattr(harness, "timer", lambda: now)

    def step(batch):
        nonlocal now
        now += 3

    def batches(ready) -> Iterator[Any]:
        nonlocal now
        for i in itertools.count():
            now += 0 if i < ready else 1
            yield i

    assert waiting_share(step, batches(ready=0), ahead=0) == 0.25
    assert waiting_share(step, batches(ready=11), ahead=10) == 0.25  # what lay ready has been taken away
    assert waiting_share(step, batches(ready=1000), ahead=10) == 0


def test_simulated_iterations_do_their_arithmetic(monkeypatch):
    assert [flops and round(flops / 1e12, 2) for flops in (row.flops for row in ROWS)] == [11.27, 21.07, 18.04, None]
    products = []
    monkeypatch.setattr(bench, "SIZE", 10)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(a.shape))
    iteration(replace(SMALL, forward_gflop=1e-6))(batch=None)  # type: ignore[arg-type]
    assert products == [(10, 10)] * 82  # 41 · 4 · 1000 FLOP, 2000 a product


def test_missing_packages_are_absent():
    with pytest.raises(Absent, match="some-package is not installed"):
        imported("no_such_module.inside", "some-package")


@pytest.fixture
def document(make_document):
    """All rows measured on 16 cores, and times of ours and the DataLoader."""
    times = {(row.name, peer): (time, None) for row in ROWS for peer, time in (("ours", 100.0), ("dataloader", 499.0))}
    document = make_document(bench.BENCHMARK, times)
    for row in document["rows"]:
        row["cores"] = 16
        for peer in ("ours", "dataloader"):
            results.cells_of(row)[peer]["waiting_share"] = 0.013
    return document


@pytest.mark.parametrize(("on_gpu", "cores", "encoded"), [(False, 2, 1.5), (True, 16, 5), (True, 4, None)])
def test_targets(document, on_gpu, cores, encoded, monkeypatch):
    """Sources of encoded images have a target for one number of cores on each kind of device."""
    monkeypatch.setattr(bench, "ON_GPU", on_gpu)
    monkeypatch.setattr(bench, "CORES", cores)
    entries = results.target_entries(document, {row.name: row.targets for row in ROWS})
    speeds = {x["row"]: (x["required"], x["measured"], x["met"]) for x in entries if x["against"] == "dataloader"}
    expected_speeds = {"cifar10": (20, 4.99, False)}
    if encoded:
        names = ("faces512", "faces256", "bedroom128")
        expected_speeds |= {name: (encoded, 4.99, encoded < 4.99) for name in names}
    assert speeds == expected_speeds
    waiting = {x["row"]: (x["what"], x["measured"], x["met"]) for x in entries if x["against"] is None}
    what = "share of an iteration that is not waiting for data"
    assert len(waiting) == (4 if on_gpu else 0)
    if on_gpu:
        assert waiting["cifar10"] == (what, 0.987, True)
        assert waiting["faces512"] == (f"{what}, simulated", 0.987, True)


def test_table(document):
    text = tables.tables({**document, "targets": []})
    assert text.startswith(f"**{document['cpu']}**: torch {torch.__version__}")
    assert "| faces512: faces1024 at 512×512, batch 6, 16 cores | 60,000 | 12,024 | 1.3% / 1.3% |" in text
