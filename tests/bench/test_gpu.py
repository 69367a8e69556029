"""`python bench/gpu.py`: what its rehearsal writes and prints, and how it reads a test report."""

import json
import sys

import pytest
import torch

import gpu
import records


def cells(document, row):
    (found,) = (r for r in document["rows"] if r["name"] == row)
    return {(cell["peer"], cell["mode"]): cell for cell in found["cells"]}


@pytest.mark.multiprocess
def test_result_says_where_it_comes_from(document):
    assert document["device"] == "cpu"
    assert document["rehearsal"] is True
    assert document["torch"] == torch.__version__
    assert (document["commit"], document["dirty"]) == ("0123456789abcdef", True)
    assert document["driver"] is document["cuda"] is document["device_rates"] is None


@pytest.mark.multiprocess
def test_result_holds_shapes_and_floors_of_what_ran(document):
    rows = {row["name"]: row for row in document["rows"]}
    dcvae, clip = rows["dcvae"], rows["clip"]
    assert [dcvae[key] for key in ("scales", "batch", "queue", "dim", "dtype")] == [2, 128, 1024, 16, "float32"]
    # q, k and the queue; backward also dq, and a second product.
    assert dcvae["floors"]["forward"] == {"bytes": 2 * (128 + 128 + 1024) * 16 * 4, "flops": 2 * 2 * 128 * 1024 * 16}
    assert dcvae["floors"]["forward_backward"] == {
        "bytes": 2 * (128 + 128 + 1024 + 128) * 16 * 4,
        "flops": 2 * 2 * 2 * 128 * 1024 * 16,
    }
    # Without a queue dk too, and a third product.
    assert [clip[key] for key in ("batch", "queue", "dim", "dtype", "symmetric")] == [128, None, 512, "bfloat16", True]
    assert clip["floors"]["forward_backward"] == {"bytes": 4 * 128 * 512 * 2, "flops": 3 * 2 * 128 * 128 * 512}


@pytest.mark.multiprocess
def test_result_has_times_and_errors(document):
    for row in document["rows"]:
        for mode in ("forward", "forward_backward"):
            for peer in ("ours", "eager"):
                cell = cells(document, row["name"])[peer, mode]
                wall = cell["wall"]
                assert cell["reason"] is None
                assert 0 < wall["q1_us"] <= wall["median_us"] <= wall["q3_us"]
                assert cell["errors"]["loss_error"] < (1e-6 if row["dtype"] == "float32" else 0.03)
                assert ("gradient_error" in cell["errors"]) == (mode == "forward_backward")
                assert cell["graph"] is cell["peak_bytes"] is cell["launches"] is None  # for a GPU


@pytest.mark.multiprocess
def test_result_of_spectral_norm(spectral_norm_document):
    rows = spectral_norm_document["rows"]
    assert [(row["name"], row["layers"]) for row in rows] == [("dcvae", 23), ("sngan", 18), ("stylegan2", 22)]
    for row in rows:
        assert row["floors"]["forward_backward"] == {"bytes": 7 * 4 * row["elements"]}  # of the narrow network
        for (peer, mode), cell in cells(spectral_norm_document, row["name"]).items():
            if peer in ("torch.compile", "older compiled"):
                assert "needs a C++ compiler" in cell["reason"]
                continue
            assert cell["reason"] is None
            assert 0 < cell["wall"]["median_us"]
            assert len(cell["errors"]) == (1 if mode == "forward" else 2)
            assert max(cell["errors"].values()) < 1e-5


@pytest.mark.multiprocess
def test_who_cannot_run_says_why(document):
    for row in document["rows"]:
        for cell in row["cells"]:
            assert (cell["wall"] is None) == bool(cell["reason"]), cell
            assert cell["reason"] != "not run"
    assert cells(document, "dcvae")["liger-kernel", "forward"]["reason"] == "it has no queue"
    assert "needs a C++ compiler" in cells(document, "dcvae")["torch.compile", "forward"]["reason"]
    for package, version in document["packages"].items():
        reasons = [cell["reason"] for row in document["rows"] for cell in row["cells"] if cell["peer"] == package]
        assert (f"{package} is not installed" in reasons) == (version is None)


@pytest.mark.multiprocess
def test_rehearsal_meets_no_target(document, spectral_norm_document, rehearsal):
    found = document["targets"] + spectral_norm_document["targets"]
    assert (len(document["targets"]), len(found)) == (10, 13)
    assert all(target["met"] is target["measured"] is None for target in found)
    assert rehearsal[1].count("not measured  ") == 13


@pytest.mark.multiprocess
def test_file_is_written_in_one_way(document, rehearsal, tmp_path):
    path = rehearsal[0] / "cpu" / "info_nce.json"
    records.write(tmp_path / "again.json", dict(reversed(document.items())))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["info_nce.json", "spectral_norm.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path):
    records.write(tmp_path / "a.json", {"whole": 1})
    with pytest.raises(TypeError):
        records.write(tmp_path / "a.json", {"broken": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"whole": 1}


def test_slug():
    assert records.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_report_names_failures_and_missing_packages(tmp_path):
    report = tmp_path / "report.xml"
    missing = "E   ModuleNotFoundError: No module named '{}'"
    report.write_text(
        f"""<testsuites><testsuite>
        <testcase classname="tests.a" name="passes"/>
        <testcase classname="tests.a" name="skips"><skipped message="no"/></testcase>
        <testcase classname="" name="tests.b"><error message="collection failure">{missing.format("yaml")}
        </error></testcase></testsuite></testsuites>"""
    )
    line, failed = gpu.tests_line("tests", report, stopped=True)
    assert not failed
    assert line == (
        "tests: 1 passed, 1 skipped, 0 failed; not collected: tests.b (needs yaml); "
        f"stopped after {gpu.TESTS_SECONDS} s, the rest not run"
    )
    report.write_text(
        f"""<testsuites><testsuite>
        <testcase classname="tests.a" name="fails"><failure message="1 != 2">assert</failure></testcase>
        <testcase classname="" name="tests.b"><error message="collection failure">{missing.format("dcvae_kernels.x")}
        </error></testcase></testsuite></testsuites>"""
    )
    assert gpu.tests_line("tests", report, stopped=False) == (
        "tests: 0 passed, 0 skipped, 2 failed; failed: tests.a.fails, tests.b",
        True,
    )


@pytest.mark.multiprocess
def test_what_takes_too_long_is_stopped(tmp_path, capfd):
    (tmp_path / "test_sleep.py").write_text("import time\ndef test_sleep():\n    time.sleep(60)\n")
    assert gpu.run_pytest([str(tmp_path)], rehearsal=True, seconds=8, grace=10) is None
    assert "KeyboardInterrupt" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("pytest", "no_such_module"))
    assert gpu.main(["--cpu-rehearsal"]) == 2
    assert capsys.readouterr().err == "not installed: no_such_module\n"


def test_results_import_no_torch(script):
    code = f"import sys; sys.path.insert(0, {str(records.ROOT / 'bench')!r}); import gpu, compare, tables; "
    code += "assert 'torch' not in sys.modules"
    assert gpu.subprocess.run([sys.executable, "-c", code]).returncode == 0
