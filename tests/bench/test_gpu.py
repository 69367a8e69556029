"""Tests of `python bench/gpu.py`: results, summary and logs of its rehearsal, jobs and time limits, Ctrl-C."""

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import gpu
import outcomes
import results


@pytest.fixture
def document(rehearsal) -> dict:
    return results.read(rehearsal[0] / "cpu" / "info_nce.json")


@pytest.fixture
def spectral_norm_document(rehearsal) -> dict:
    return results.read(rehearsal[0] / "cpu" / "spectral_norm.json")


@pytest.fixture
def step_document(rehearsal) -> dict:
    return results.read(rehearsal[0] / "cpu" / "step.json")


def cells(document, row):
    (match,) = (r for r in document["rows"] if r["name"] == row)
    return {(cell["peer"], cell["mode"]): cell for cell in match["cells"]}


@pytest.mark.multiprocess
def test_result_says_where_it_comes_from(document):
    assert document["device"] == "cpu"
    assert document["rehearsal"] is True
    assert document["torch"] == torch.__version__
    assert (document["commit"], document["dirty"]) == ("0123456789abcdef", True)
    assert document["driver"] is document["cuda"] is document["device_rates"] is None
    assert "torch.utils.benchmark" in document["timer"]["wall"] and "do_bench_cudagraph" in document["timer"]["graph"]


@pytest.mark.multiprocess
def test_result_holds_shapes_and_floors(document):
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
def test_reasons_of_missing_times(document):
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
def test_rehearsal_meets_no_target(document, spectral_norm_document, step_document, rehearsal):
    targets = [target for x in (document, spectral_norm_document, step_document) for target in x["targets"]]
    assert (len(document["targets"]), len(targets)) == (10, 14)
    assert all(target["met"] is target["measured"] is None for target in targets)
    assert "| target |" not in rehearsal[1]


@pytest.mark.multiprocess
def test_result_of_iterations(step_document):
    assert [row["name"] for row in step_document["rows"]] == ["cifar10-8", "faces16"]
    for row in step_document["rows"]:
        assert 0 < row["flops"]["ours"] < row["flops"]["baseline"]
        for cell in row["cells"]:
            assert cell["reason"] is None and cell["wall"]["median_us"] > 0 and cell["mode"] == "iteration"
    errors = {cell["peer"]: cell["errors"] for cell in step_document["rows"][1]["cells"]}
    assert errors["baseline"] == {"loss_error": 0.0} and errors["ours"]["loss_error"] < 1e-5


@pytest.mark.multiprocess
def test_one_screen_says_how_everything_went(rehearsal):
    _, lines = rehearsal[1].split("\n\n", 1)
    for name, passed, skipped in (("device", 1, 0), ("ops", 21, 0), ("iterations", 2, 2), ("fast-iterations", 0, 2)):
        assert f"\n{name}: {passed} passed, {skipped} skipped, 0 failed, " in f"\n{lines}"
    assert "\ntests: 0 passed, 2 skipped, 0 failed, " in lines
    assert f"'torch': '{torch.__version__}'" in lines
    assert "skipped test_iterations[faces64-ours]: there are no CUDA graphs on a CPU\n" in lines


@pytest.mark.multiprocess
def test_results_and_logs_are_few_files(rehearsal):
    assert len([path for path in rehearsal[0].rglob("*") if path.is_file()]) <= 6
    with tarfile.open(rehearsal[0] / "logs.tar.gz") as archive:
        names = {name.removeprefix("logs/") for name in archive.getnames()}
    logs = {"device", "ops", "iterations", "fast-iterations", "tests", "info_nce", "spectral_norm", "step"}
    assert {f"{name}.log" for name in logs} | {"summary.txt", "tests/outcomes.jsonl"} <= names


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_is_stopped_resumed_and_used(tmp_path, script):
    result = script("gpu", "--first", "--cpu-rehearsal", "--out", tmp_path, "--only", "train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\ntrain: 1 passed, 0 skipped, " in result.stdout and "\ntrain-eager: 1 passed, " in result.stdout
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {"logs/train/samples.png", "logs/train/reconstructions.png", "logs/train/run/metrics.jsonl"} <= set(names)
    assert not any("checkpoints" in name for name in names)


@pytest.mark.multiprocess
def test_file_is_written_in_one_way(document, rehearsal, tmp_path):
    path = rehearsal[0] / "cpu" / "info_nce.json"
    results.write(tmp_path / "again.json", dict(reversed(document.items())))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_interrupted_write_leaves_the_old_file(tmp_path):
    results.write(tmp_path / "a.json", {"whole": 1})
    with pytest.raises(TypeError):
        results.write(tmp_path / "a.json", {"broken": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"whole": 1}


def test_path_of_a_result_file():
    document = {"device": "NVIDIA H100 80GB HBM3", "benchmark": "step"}
    assert results.path_of(Path("x"), document) == Path("x/nvidia-h100-80gb-hbm3/step.json")


def test_summary_of_a_job(tmp_path):
    def lines(status, *tests, name="tests"):
        (tmp_path / outcomes.FILE).write_text("".join(json.dumps(x) + "\n" for x in tests))
        return gpu.outcome_lines(gpu.Ended(name, status, 12.3), tmp_path)

    skip = "('/a.py', 3, 'Skipped: no GPU')"
    good = [{"test": "a.py::one", "outcome": "passed"}, {"test": "a.py::two", "outcome": "skipped", "text": skip}]
    missing = "a.py:3: in <module>\nE   ModuleNotFoundError: No module named '{}'"
    absent = {"test": "b.py", "outcome": "failed", "text": missing.format("yaml")}
    ours = {"test": "b.py", "outcome": "failed", "text": missing.format("dcvae_kernels.x")}
    wrong = {"test": "c.py::three", "outcome": "failed", "text": "c.py:1: in three\nE   assert 1 == 2\nE    +  where"}
    total = "tests: 1 passed, 1 skipped, 0 failed, 12 s"
    assert lines(0, *good) == ([total], False)
    assert lines(0, *good, name="ops")[0][1] == "skipped two: no GPU"
    assert lines(1, *good, absent) == ([f"{total}; not collected: b.py (needs yaml)"], False)
    assert lines(None, *good) == ([f"{total}; stopped at the time limit, the rest not run"], True)
    assert lines(1, *good, ours, wrong) == (
        [
            "tests: 1 passed, 1 skipped, 2 failed, 12 s",
            "FAILED  b.py: ModuleNotFoundError: No module named 'dcvae_kernels.x'",
            "FAILED  c.py::three: assert 1 == 2",
        ],
        True,
    )
    assert lines(3, *good) == ([f"{total}; pytest's exit status 3, see its log"], True)
    assert lines(5)[1] is False and lines(1)[1] is True
    (tmp_path / outcomes.FILE).write_text('{"test": "a.py::th')
    assert outcomes.read(tmp_path / outcomes.FILE) == []


@pytest.mark.multiprocess
def test_cells_without_time_are_in_the_summary(document, tmp_path):
    for row in (0, 1, 1):
        cell = next(x for x in document["rows"][row]["cells"] if x["peer"] == "eager" and x["reason"] is None)
        cell["reason"] = "no time left"
    results.write(tmp_path / "cpu" / "info_nce.json", document)
    assert "no time left: dcvae (eager), dcvae-b1024 (eager)" in gpu.result_lines("info_nce", tmp_path)


def test_each_command_takes_eight_minutes_at_most():
    limits = {name: seconds + gpu.GRACE for name, seconds in gpu.LIMITS.items()}
    assert sum(limits[name] for name in gpu.USUAL) <= 480
    assert limits["step"] <= 480 and limits["switches"] <= 480
    # With --first, the last part, the benchmark of iterations, gets the time that is left; there must be some.
    checks = limits["device"] + max(limits[name] for name in (*gpu.CHECKS, "tests"))
    left = gpu.FIRST_SECONDS - checks - limits["info_nce"] - limits["spectral_norm"]
    assert left > gpu.GRACE + gpu.OVERTIME and gpu.FIRST_SECONDS <= 470


@pytest.fixture
def run_test(tmp_path):
    """Run a test file as a job; return how it ended, and its folder."""

    def run(code: str, seconds: float = 600):
        (tmp_path / "test_it.py").write_text(code)
        job = gpu.Job("job", [str(tmp_path / "test_it.py"), "-s"], seconds)
        (ended,) = gpu.run_jobs([job], tmp_path / "logs", rehearsal=True)
        return ended, tmp_path / "logs" / "job"

    return run


@pytest.mark.multiprocess
def test_jobs_are_stopped_at_their_time_limit(run_test):
    ended, _ = run_test("import time\ndef test_sleep(): time.sleep(600)\n", seconds=0.1)
    assert ended.status is None


@pytest.mark.multiprocess
def test_jobs_that_ignore_the_interrupt_are_killed(run_test, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)\n"
    assert run_test(code, seconds=0.1)[0].status is None


@pytest.mark.multiprocess
def test_killed_jobs_leave_their_outcomes_and_no_children(run_test):
    code = "import os, subprocess\ndef test_1(): pass\n"
    code += "def test_2(): print('child', subprocess.Popen(['sleep', '600']).pid, flush=True); os._exit(9)\n"
    ended, folder = run_test(code)
    assert ended.status == 9
    tests = [(x["test"].partition("::")[2], x["outcome"]) for x in outcomes.read(folder / outcomes.FILE)]
    assert tests == [("test_1", "passed")]
    wait_until_ended(int(folder.with_suffix(".log").read_text().partition("child ")[2].split()[0]))


def wait_until_ended(pid: int) -> None:
    status, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.multiprocess
def test_ctrl_c_kills_all_jobs_and_keeps_the_logs(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, pytest, time\n@pytest.mark.gpu\ndef test_sleep():\n"
        f"    pathlib.Path({str(tmp_path / 'new')!r}).write_text(str(os.getpid()))\n"
        f"    os.rename({str(tmp_path / 'new')!r}, {str(pid)!r})\n    time.sleep(600)\n"
    )
    # Children of a shell's background jobs ignore SIGINT.
    code = "import signal, sys, gpu; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(gpu.main("
    code += f"['--cpu-rehearsal', '--out', {str(tmp_path)!r}, '--only', {str(tmp_path / 'test_it.py')!r}]))"
    command = [sys.executable, "-c", code]
    bench = str(results.ROOT / "bench")
    process = subprocess.Popen(command, cwd=bench, stdout=subprocess.PIPE, text=True)
    while not pid.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted: the rest was not run" in printed
    wait_until_ended(int(pid.read_text()))
    assert (tmp_path / "logs.tar.gz").exists()


def test_every_test_for_a_gpu_is_run():
    """The slowest folder first."""
    paths = [results.ROOT / test for test in gpu.ALL_TESTS]
    covered = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    marked = {file for file in (results.ROOT / "tests").rglob("*.py") if "mark.gpu" in file.read_text()}
    assert paths[0].name == "training"
    assert len(marked) > 5 and marked <= covered


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_wrong_arguments_are_named(capsys):
    for arguments, message in (
        (["--first"], "--first needs --out DIR"),
        (["--only", "nothing"], "--only nothing: choose"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("pytest", "no_such_module"))
    assert gpu.main(["--cpu-rehearsal"]) == 2
    assert capsys.readouterr().err == "not installed: no_such_module\n"


def test_results_import_no_torch(script):
    code = f"import sys; sys.path.insert(0, {str(results.ROOT / 'bench')!r}); import gpu, compare, tables; "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
