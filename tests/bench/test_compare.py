"""`python bench/compare.py`: what counts as slower."""

import pytest

import compare as compare_script
import gpu
import results

DEVICES = {"info_nce": "nvidia-h200", "spectral_norm": "nvidia-h100-80gb-hbm3"}


@pytest.fixture
def compare(tmp_path, capsys):
    """Compare a committed result with a copy in which `change` has modified a row or the cell of an implementation."""

    def run(change, name="info_nce", row="dcvae", peer="ours"):
        path = f"{DEVICES[name]}/{name}.json"
        document = results.read(results.COMMITTED / path)
        (match,) = (r for r in document["rows"] if r["name"] == row)
        change(match, results.cells_of(match)[peer])
        results.write(tmp_path / path, document)
        status = compare_script.main(["--fresh", str(tmp_path)])
        return status, capsys.readouterr().out

    return run


def slower(factor):
    def change(row, cell):
        cell["wall"]["median_us"] *= factor

    return change


def test_nine_percent_pass(compare):
    assert compare(slower(1.09)) == (0, "nothing is over 10% slower than committed\n")


@pytest.mark.parametrize(("name", "row"), [("info_nce", "moco-bf16"), ("spectral_norm", "sngan")])
def test_eleven_percent_fail_and_name_the_row(compare, name, row):
    status, text = compare(slower(1.11), name, row)
    assert status == 1
    assert text.startswith(f"{row} forward_backward wall: ")
    assert "11% over" in text
    assert text.count("\n") == 1


def test_other_implementations_do_not_count(compare):
    assert compare(slower(2), peer="eager")[0] == 0


def test_graph_replay_counts(compare):
    status, text = compare(lambda row, cell: cell.update(graph=None, graph_reason="capture failed"))
    assert (status, text) == (1, "dcvae forward_backward graph: not measured (capture failed)\n")


def test_another_shape_is_not_compared(compare):
    status, text = compare(lambda row, cell: row.update(batch=64))
    assert status == 1
    assert text.startswith("dcvae: differs from the committed row")


def test_times_of_different_timers_are_not_compared():
    document = results.read(results.COMMITTED / "nvidia-h100-80gb-hbm3/step.json")
    (line,) = compare_script.regressions(document, {**document, "timer": {"wall": "another"}})
    assert line == "step: the committed result is of another timer; measure and commit it again"


def test_a_benchmark_without_a_result_fails(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "BENCHMARKS", ("spectral_norm",))
    monkeypatch.setattr(gpu, "run_benchmark", lambda *arguments: 1)
    assert compare_script.main([]) == 1
    assert capsys.readouterr().out == "spectral_norm: no result file\n"


@pytest.mark.multiprocess
def test_fresh_run_measures_ours_only(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "BENCHMARKS", ("spectral_norm",))  # one is enough
    assert compare_script.main(["--cpu-rehearsal", "--committed", str(tmp_path)]) == 1
    printed = capfd.readouterr().out
    assert "ours              forward" in printed
    assert "eager" not in printed
    assert printed.endswith("cpu/spectral_norm.json does not exist\n")
