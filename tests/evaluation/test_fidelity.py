"""FID and its like: torch-fidelity's numbers, SciPy's distance, streamed images, and a cache that is never stale."""

import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.data import Dataset

from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import evaluate, images
from dcvae_fast.evaluation.fidelity import content_key, features_of, frechet_distance
from dcvae_fast.evaluation.images import evenly_spaced, parts
from dcvae_pipelines import DataError, load_dataset
from image_files import write_noise

ALL = ("fid", "is", "kid", "prc")


def values(measured):
    return {(one.metric, one.of): one.value for one in measured}


def by_scipy(features, real):
    moments = [(x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)) for x in (features, real)]
    (mean, covariance), (real_mean, real_covariance) = moments
    root = np.real(np.asarray(scipy.linalg.sqrtm(covariance @ real_covariance)))
    return ((mean - real_mean) ** 2).sum() + np.trace(covariance + real_covariance - 2 * root)


@pytest.mark.parametrize(("count", "size"), [(300, 16), (5000, 64)])
def test_frechet_distance_is_scipys(count, size):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator)
    features = torch.randn(count, size, generator=generator) @ mixing + 0.3
    real = torch.randn(count // 2, size, generator=generator).exp()
    assert frechet_distance(features, real) == pytest.approx(by_scipy(features, real), rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


class Shown(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def bytes_of(images, rounded=True):
    pixels = (images + 1) * 127.5
    return (pixels.round() if rounded else pixels.floor()).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def test_all_of_them_are_those_of_torch_fidelity_itself(model, data, features):
    from torch_fidelity import calculate_metrics

    measured = evaluate(model, data, ALL, images=50, batch=7, seed=4, features=features)
    assert {one.extractor for one in measured} == {"random, not Inception"}
    assert {one.metric for one in measured} == {"fid", "is", "kid", "precision", "recall"}
    latents = torch.randn(1024, 6, generator=torch.Generator().manual_seed(4))[:50]
    real = data.test.images.float() / 127.5 - 1
    made = {"samples": model.decode(latents), "reconstructions": model.decode(model.encode(real).mean)}
    for of, shown in made.items():
        theirs = calculate_metrics(
            input1=Shown(bytes_of(shown)),
            input2=Shown(data.train.images),
            feature_extractor=features.name,
            **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
            kid_subset_size=len(shown),
            save_cpu_ram=True,
            cache=False,
            cuda=False,
            verbose=False,
        )
        ours = {one.metric: one for one in measured if one.of == of}
        assert ours["fid"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
        assert ours["is"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
        assert ours["is"].spread == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-7)
        assert ours["kid"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
        assert ours["precision"].value == theirs["precision"]
        assert ours["recall"].value == theirs["recall"]
        assert {one.count for one in ours.values()} == {len(shown)}


@torch.no_grad()
def test_official_is_the_authors_protocol(model, data, features):
    """Clamped samples, draws from the posterior over and over with fresh noise, whole batches, pixels rounded down."""
    measured = evaluate(model, data, ["fid"], protocol="official", images=50, seed=4, features=features)
    assert [(one.of, one.count, one.protocol) for one in measured] == [
        ("samples", 64, "official"),
        ("reconstructions", 64, "official"),
    ]
    noise = torch.randn(1024, 6, generator=torch.Generator().manual_seed(4))[:64]
    real = data.test.images[torch.arange(64) % 37].float() / 127.5 - 1
    made = {"samples": model.decode(noise.clamp(-1, 1)), "reconstructions": model.decode(model.encode(real).at(noise))}
    reference = features_of([data.train.images], features)["pool"]
    for one in measured:
        shown = features_of([bytes_of(made[one.of], rounded=False)], features)["pool"]
        assert one.value == pytest.approx(by_scipy(shown, reference), rel=1e-4)


def test_the_configuration_may_clamp_samples(model, data, features):
    plain, clamped = (
        values(evaluate(model, data, ["fid"], images=20, features=features))
        for model.config in (model.config, replace(model.config, sample_clamp=0.1))
    )
    assert plain["fid", "samples"] != clamped["fid", "samples"]
    assert plain["fid", "reconstructions"] == clamped["fid", "reconstructions"]


def test_numbers_do_not_depend_on_the_batch_and_repeat_by_seed(model, data, features):
    def measure(batch, seed=0, protocol="paper"):
        return values(
            evaluate(model, data, ALL, images=50, batch=batch, seed=seed, protocol=protocol, features=features)
        )

    for protocol in ("paper", "official"):
        once = measure(64, protocol=protocol)
        assert measure(64, protocol=protocol) == once
        assert measure(7, protocol=protocol) == pytest.approx(once, rel=1e-4)
        assert measure(64, 1, protocol)["fid", "samples"] != once["fid", "samples"]


def test_features_are_kept_by_content(model, data, features, tmp_path):
    extracted = []

    def measure(data, metrics=("fid",)):
        extracted.clear()
        progress = lambda what, done, total: extracted.append(what)  # noqa: E731
        found = evaluate(model, data, metrics, images=20, features=features, cache=tmp_path / "kept", progress=progress)
        return values(found), "training images" in extracted

    first, new = measure(data)
    assert new
    assert measure(data) == (first, False)
    assert measure(data, ("fid", "kid"))[1] is False
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # as a full disk leaves it
    assert measure(data) == (first, True)
    assert measure(data) == (first, False)
    data.train.images[7, 0, 3, 3] ^= 255
    other, new = measure(data)
    assert new and other != first
    assert measure(replace(data, test=data.train))[1] is False


def test_files_are_told_apart_by_what_is_in_them_whatever_their_dates(tmp_path):
    found = load_dataset("folder", write_noise(tmp_path / "images", 24, 40, 50, 3, ending="bmp"))
    indices, config = torch.arange(len(found)), ModelConfig()
    key = content_key(found, indices, config)
    assert content_key(load_dataset("folder", tmp_path / "images"), indices, config) == key
    assert content_key(found, indices[1:], config) != key
    assert content_key(found, indices, replace(config, image_channels=1)) != key
    path = tmp_path / "images" / "20.bmp"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert content_key(found, indices, config) != key


def test_files_are_decoded_a_part_at_a_time(tmp_path, monkeypatch):
    found = load_dataset("folder", write_noise(tmp_path / "images", 24, 40, 50, 3, ending="bmp"))
    (whole,) = parts(found, torch.arange(20), ModelConfig())
    monkeypatch.setattr(images, "PART_BYTES", 3 * 32**2 * 6)
    some = list(parts(found, torch.arange(20), ModelConfig()))
    assert [len(part) for part in some] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([part.images for part in some]), whole.images)


def test_decoded_images_are_shrunk_to_what_the_model_has_grown_to(data, model):
    small = ModelConfig(architecture="progressive", resolution=16)
    (part,) = parts(data.train, torch.arange(5), small)
    assert part.images.shape == (5, 3, 16, 16)
    with pytest.raises(DataError, match=r"noise has images of \[3, 32, 32\], but the model's are \[1, 32, 32\]"):
        next(parts(data.train, torch.arange(5), ModelConfig(image_channels=1)))
    with pytest.raises(DataError, match="64, 64"):
        next(parts(data.train, torch.arange(5), ModelConfig(architecture="progressive", resolution=64)))


def test_evenly():
    assert evenly_spaced(10, 20).tolist() == list(range(10))
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]


def test_grey_images_are_shown_as_rgb(features):
    grey = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    shown, colour = (features_of([each], features)["pool"] for each in (grey, grey.repeat(1, 3, 1, 1)))
    assert torch.equal(shown, colour)
