"""`python bench/compare.py`: what counts as slower."""

import copy

import pytest

import compare as compare_script
import gpu
import results

pytestmark = pytest.mark.multiprocess

DEVICE = "nvidia-h100-80gb-hbm3"


@pytest.fixture
def document() -> dict:
    return results.read(results.COMMITTED / DEVICE / "info_nce.json")


@pytest.fixture
def spectral_norm_document() -> dict:
    return results.read(results.COMMITTED / DEVICE / "spectral_norm.json")


@pytest.fixture
def compare(document, tmp_path, script):
    """Compare a committed result with a copy in which `change` has modified a row."""

    def run(change, row="dcvae"):
        fresh = copy.deepcopy(document)
        (changed,) = (r for r in fresh["rows"] if r["name"] == row)
        change(changed, {(cell["peer"], cell["mode"]): cell for cell in changed["cells"]})
        results.write(tmp_path / "committed" / "cpu" / "info_nce.json", document)
        results.write(tmp_path / "fresh" / "cpu" / "info_nce.json", fresh)
        result = script("compare", "--committed", tmp_path / "committed", "--fresh", tmp_path / "fresh")
        return result.returncode, result.stdout

    return run


def slower(peer, factor):
    def change(row, cells):
        cells[peer, "forward_backward"]["wall"]["median_us"] *= factor

    return change


def test_nine_percent_pass(compare):
    assert compare(slower("ours", 1.09)) == (0, "nothing is over 10% slower than committed\n")


def test_eleven_percent_fail_and_name_the_row(compare):
    status, text = compare(slower("ours", 1.11), row="moco-bf16")
    assert status == 1
    assert text.startswith("moco-bf16 forward_backward wall: ")
    assert "11% over" in text
    assert text.count("\n") == 1


def test_other_implementations_do_not_count(compare):
    assert compare(slower("eager", 2))[0] == 0


def test_graph_replay_counts(compare, document):
    cell = next(cell for cell in document["rows"][0]["cells"] if cell["peer"] == "ours")
    cell["graph"] = {"median_us": 1.0}

    def change(row, cells):
        cells["ours", "forward"]["graph"] = None
        cells["ours", "forward"]["graph_reason"] = "capture failed"

    assert compare(change) == (1, "dcvae forward graph: not measured (capture failed)\n")


def test_another_shape_is_not_compared(compare):
    status, text = compare(lambda row, cells: row.update(batch=64))
    assert status == 1
    assert text.startswith("dcvae: differs from the committed row")


def test_device_without_committed_file(tmp_path, script):
    result = script("compare", "--committed", tmp_path, "--fresh", results.COMMITTED)
    assert result.returncode == 1
    assert "does not exist" in result.stdout


def test_fresh_run(tmp_path, monkeypatch, capfd):
    """Measure ours, and compare with a committed file in which it is 1000 times slower."""
    run = gpu.run_benchmark

    def run_and_commit(name, out, *arguments):
        status = run(name, out, *arguments)
        document = results.read(out / "cpu" / f"{name}.json")
        for cell in (cell for row in document["rows"] for cell in row["cells"] if cell["wall"]):
            assert cell["peer"] == "ours"
            cell["wall"]["median_us"] *= 1000
        results.write(tmp_path / "cpu" / f"{name}.json", document)
        return status

    monkeypatch.setattr(gpu, "BENCHMARKS", {"spectral_norm": 1000})  # one is enough
    monkeypatch.setattr(gpu, "run_benchmark", run_and_commit)
    status = compare_script.main(["--cpu-rehearsal", "--committed", str(tmp_path)])
    printed = capfd.readouterr().out
    assert status == 0, printed
    assert "ours              forward" in printed
    assert "eager" not in printed


def test_every_benchmark_is_compared(compare, spectral_norm_document, tmp_path):
    results.write(tmp_path / "fresh" / "cpu" / "spectral_norm.json", spectral_norm_document)
    cell = next(cell for cell in spectral_norm_document["rows"][1]["cells"] if cell["peer"] == "ours")
    cell["wall"]["median_us"] /= 2
    results.write(tmp_path / "committed" / "cpu" / "spectral_norm.json", spectral_norm_document)
    status, text = compare(lambda row, cells: None)
    assert status == 1
    assert text.startswith("sngan forward wall: ")
    assert "100% over" in text
