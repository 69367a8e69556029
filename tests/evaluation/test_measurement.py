"""The measurement file, invalid arguments, and missing, damaged or malicious weights."""

import hashlib
import json
import pickle
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch

from dcvae_fast import UserError
from dcvae_fast.evaluation import METRICS, Measurement, evaluate
from dcvae_fast.evaluation.fidelity import load_features, load_lpips
from dcvae_fast.evaluation.measurement import describe, hash_weights, store, table
from dcvae_fast.evaluation.pretrained import find_weights, read_weights
from dcvae_pipelines import ImageSet

FID = Measurement(
    metric="fid",
    subject="samples",
    protocol="paper",
    value=17.9,
    count=50_000,
    data="cifar10: 50,000 training images",
    seed=0,
    extractor="random, not Inception",
)


def test_a_measurement_replaces_only_its_older_value(model, tmp_path):
    path, head = tmp_path / "new" / "evaluation.json", describe(model, 640)
    others = [replace(FID, subject="reconstructions"), replace(FID, protocol="official"), replace(FID, metric="is")]
    for measurement in (FID, *others):
        store(path, head, measurement)
    store(path, head, replace(FID, value=16.0))
    stored = json.loads(path.read_text())
    assert (stored["images"], stored["device"], stored["versions"]["torch"]) == (640, "cpu", torch.__version__[:6])
    assert sorted(m["value"] for m in stored["measurements"]) == [16.0, 17.9, 17.9, 17.9]
    assert {m["extractor"] for m in stored["measurements"]} == {"random, not Inception"}

    store(path, {**head, "device": "another"}, replace(FID, metric="ppl"))
    stored = json.loads(path.read_text())
    assert [m.get("device") for m in stored["measurements"]] == ["cpu"] * 4 + [None]

    with torch.no_grad():
        next(model.parameters()).add_(1)
    store(path, describe(model, 640), FID)
    assert [m["metric"] for m in json.loads(path.read_text())["measurements"]] == ["fid"]


def test_other_files_are_not_overwritten(model, tmp_path):
    path = tmp_path / "summary.json"
    head = '{"weights": "w", "measurements": '
    for content in ('{"images": 3}', "[1, 2]", "not JSON", head + "null}", head + '["fid"]}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"summary\.json is not a measurement file"):
            store(path, describe(model, None), FID)
        assert path.read_text() == content


def test_the_table_names_the_extractor():
    lines = table([FID, replace(FID, metric="is", value=8.2, spread=0.061)]).splitlines()
    assert lines[1].split() == ["fid", "samples", "paper", "17.9", "50,000", "random,", "not", "Inception"]
    assert "8.2 ± 0.061" in lines[2]
    assert len({line.index("paper") for line in lines[1:]}) == 1


def test_the_table_ends_with_each_note_once():
    noted = replace(FID, protocol="official", note="Not comparable.")
    assert table([FID, noted, replace(noted, metric="is")]).splitlines()[4:] == ["Not comparable."]
    assert "Not" not in table([FID])


def test_weights_are_hashed_with_their_names(model):
    before = hash_weights(model)
    assert hash_weights(model) == before
    model.decoder.norm.running_mean[0] += 1e-3
    assert hash_weights(model) != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid", "fld"]}, "metrics has fld; known are fid, is, kid"),
        ({"metrics": []}, "metrics is empty"),
        ({"protocol": "other"}, "protocol is 'other'; known are paper, once, official"),
        ({"images": 9}, "images is 9; it must be at least 10"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"data": None}, "only ppl can be measured without it"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_loaded(model, data, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, **{"data": data, "metrics": METRICS, **arguments})


def test_a_few_images_suffice_unless_features_of_each_are_compared_once(model, data, features):
    few = replace(data, test=ImageSet("noise", data.test.images[:3], None))
    assert evaluate(model, few, ["pixel"])[0].count == 3
    assert [m.count for m in evaluate(model, few, ["fid"], images=20, features=features)] == [20, 20]  # repeated
    with pytest.raises(UserError, match="noise has 3 test images; fid, is, kid and prc need 10"):
        evaluate(model, few, ["fid"], protocol="once", features=features)
    few_trained = replace(data, train=ImageSet("noise", data.train.images[:3], None))
    with pytest.raises(UserError, match="noise has 3 training images; fid, is, kid and prc need 10"):
        evaluate(model, few_trained, ["fid"], features=features)


def test_missing_weights_are_named_with_their_origin_and_hash(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS

    with pytest.raises(UserError) as caught:
        load_features(tmp_path)
    for part in (str(tmp_path / "weights-inception-2015-12-05-6726825d.pth"), URL_INCEPTION_V3, "SHA-256 6726825d…"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"weights-vgg16-lpips\.pth.*no hash is published") as caught:
        load_lpips(tmp_path)
    assert URL_VGG16_LPIPS in str(caught.value)


def test_weights_are_downloaded_to_the_cache_of_torch_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    content = b"weights"
    digits = hashlib.sha256(content).hexdigest()[:8]
    url = f"https://example.org/net-{digits}.pth"

    def fail(*arguments):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=rf"net-{digits}\.pth cannot be downloaded .*no route.*--weights DIR"):
        find_weights(url, None)

    def fetch(url, path, digits):
        with open(path, "wb") as file:
            file.write(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    path = find_weights(url, None)
    assert path == tmp_path / "checkpoints" / f"net-{digits}.pth"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"net-{digits}\.pth.*SHA-256"):
        find_weights(url, None)


def test_weights_that_would_execute_code_are_rejected(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "weights-vgg16-lpips.pth"
    torch.save({"lin0": Harm()}, path)
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Harm(), protocol=2))
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(path)
    assert not (tmp_path / "harm").exists()
