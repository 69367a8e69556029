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
from gpu import Ended, Job, run_jobs


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
    (found,) = (r for r in document["rows"] if r["name"] == row)
    return {(cell["peer"], cell["mode"]): cell for cell in found["cells"]}


@pytest.mark.multiprocess
def test_result_says_where_it_comes_from(document):
    assert document["device"] == "cpu"
    assert document["rehearsal"] is True
    assert document["torch"] == torch.__version__
    assert (document["commit"], document["dirty"]) == ("0123456789abcdef", True)
    assert document["driver"] is document["cuda"] is document["device_rates"] is None
    assert "torch.utils.benchmark" in document["timer"]["wall"] and "do_bench_cudagraph" in document["timer"]["graph"]


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
    for name, passed in (("device", 7), ("ops", 21), ("iterations", 2), ("fast-iterations", 0)):
        assert f"\n{name}: {passed} passed, 0 failed, " in f"\n{lines}"
    assert "\ntests: 0 passed, 2 skipped, 0 failed, " in lines
    assert f"'torch': '{torch.__version__}'" in lines


@pytest.mark.multiprocess
def test_results_and_logs_are_few_files(rehearsal):
    assert len([path for path in rehearsal[0].rglob("*") if path.is_file()]) <= 6
    with tarfile.open(rehearsal[0] / "logs.tar.gz") as archive:
        names = {name.removeprefix("logs/") for name in archive.getnames()}
        logs = {"device", "ops", "iterations", "fast-iterations", "tests", "info_nce", "spectral_norm", "step"}
        assert {f"{name}.log" for name in logs} | {"summary.txt", "tests/outcomes.jsonl"} <= names
        skipped = archive.extractfile("logs/fast-iterations.log").read().decode()  # type: ignore[union-attr]
        assert skipped.count("there are no CUDA graphs on a CPU") == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_is_stopped_resumed_and_used(tmp_path, script):
    result = script("gpu", "--first", "--cpu-rehearsal", "--out", tmp_path, "--only", "train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\ntrain: 4 passed, 0 failed, " in result.stdout and "\ntrain-eager: 4 passed, " in result.stdout
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


def test_summary_of_the_tests(tmp_path):
    job = Job("tests", [], 1, environment={"OUT": str(tmp_path)})

    def lines(status, *tests):
        (tmp_path / gpu.OUTCOMES).write_text("".join(json.dumps(x) + "\n" for x in tests))
        return gpu.tests_lines(Ended(job, status, 12.3))

    good = [{"test": "a.py::one", "outcome": "passed"}, {"test": "a.py::two", "outcome": "skipped", "text": "no"}]
    missing = "a.py:3: in <module>\nE   ModuleNotFoundError: No module named '{}'"
    absent = {"test": "b.py", "outcome": "failed", "text": missing.format("yaml")}
    ours = {"test": "b.py", "outcome": "failed", "text": missing.format("dcvae_kernels.x")}
    wrong = {"test": "c.py::three", "outcome": "failed", "text": "c.py:1: in three\nE   assert 1 == 2\nE    +  where"}
    total = "tests: 1 passed, 1 skipped, 0 failed, 12 s"
    assert lines(0, *good) == ([total], False)
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
    (tmp_path / gpu.OUTCOMES).write_text('{"test": "a.py::th')
    assert outcomes.read(tmp_path / gpu.OUTCOMES) == []


def test_summary_of_checks(tmp_path):
    def lines(status, text, name="ops"):
        (tmp_path / "log").write_text(text)
        return gpu.check_lines(Ended(Job(name, [], 1, tmp_path / "log"), status, 12.3))

    some = "ok      a: 1\nnoise\nskipped b: no\n"
    assert lines(0, some) == (["ops: 1 passed, 0 failed, 12 s", "skipped b: no"], False)
    assert lines(0, "ok      a: 1\n", "device") == (["device: 1 passed, 0 failed, 12 s", "a: 1"], False)
    failed = "FAILED  b: ValueError: no"
    assert lines(1, f"ok      a: 1\n{failed}\n") == (["ops: 1 passed, 1 failed, 12 s", failed], True)
    assert lines(None, "ok      a: 1\n") == (["ops: 1 passed, 0 failed, stopped at its time limit, 12 s"], True)
    assert lines(1, "ImportError: x\n")[0][1] == "FAILED  ops: exit status 1, last line: ImportError: x"
    assert lines(-11, "ok      a: 1\n")[0][1] == "FAILED  ops: exit status -11, last line: ok      a: 1"


@pytest.mark.multiprocess
def test_failures_of_ours_are_in_the_summary(document):
    assert not [line for line in gpu.benchmark_lines(document) if line.startswith("FAILED")]
    cell = next(cell for cell in document["rows"][0]["cells"] if cell["peer"] == "ours")
    cell["reason"] = "its loss is 1, which should be 2"
    (line,) = (line for line in gpu.benchmark_lines(document) if line.startswith("FAILED"))
    assert line == "FAILED  dcvae, ours, forward: its loss is 1, which should be 2"
    for row in (0, 1, 1):
        cell = next(x for x in document["rows"][row]["cells"] if x["peer"] == "eager" and x["reason"] is None)
        cell["reason"] = "no time left"
    assert "no time left: dcvae (eager), dcvae-b1024 (eager)" in gpu.benchmark_lines(document)


def test_each_command_takes_eight_minutes_at_most():
    benchmarks = {name: seconds + gpu.OVERTIME + gpu.GRACE for name, seconds in gpu.BENCHMARKS.items()}
    tests = gpu.TESTS_SECONDS + gpu.GRACE
    assert tests + sum(benchmarks[name] for name in gpu.USUAL if name != "tests") <= 480
    assert benchmarks["step"] <= 480 and benchmarks["switches"] <= 480
    # With --first, the last part, the benchmark of iterations, gets the time that is left; there must be some.
    checks = max(gpu.SMOKE_SECONDS, gpu.TRAIN_SECONDS, gpu.TESTS_SECONDS) + gpu.DEVICE_SECONDS + 2 * gpu.GRACE
    assert checks + benchmarks["info_nce"] + benchmarks["spectral_norm"] + gpu.OVERTIME < gpu.FIRST_SECONDS <= 470


def test_a_job_is_interrupted_at_its_time_limit(tmp_path: Path):
    """The limit also holds while the job starts, when there is no KeyboardInterrupt to see yet."""
    (ended,) = run_jobs([Job("slow", ["-c", "import time; time.sleep(600)"], 0.1, tmp_path / "log")])
    assert ended.status is None and str(ended).startswith("slow: stopped at its time limit, ")


def test_a_job_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    (ended,) = run_jobs([Job("deaf", ["-c", code], 0.1, tmp_path / "log")])
    assert ended.status is None


def test_jobs_end_one_by_one(tmp_path: Path):
    code = "import os, sys; print(os.environ['NAME']); sys.exit(3)"
    first, second = Job("first", ["-c", code], 600, tmp_path / "log", {"NAME": "x"}), Job("second", ["-c", ""], 600)
    statuses = {ended.job.name: ended.status for ended in run_jobs([first, second])}
    assert statuses == {"first": 3, "second": 0} and (tmp_path / "log").read_text() == "x\n"


def test_children_of_a_job_end_with_it(tmp_path: Path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    (ended,) = run_jobs([Job("parent", ["-c", code], 600, tmp_path / "log")])
    assert ended.status == 0
    child, until = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat"), time.monotonic() + 60
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_killed_tests_leave_their_outcomes(tmp_path: Path):
    (tmp_path / "test_a.py").write_text("import os\ndef test_1(): pass\ndef test_2(): os._exit(9)\n")
    file = tmp_path / "outcomes.jsonl"
    command = ["-m", "pytest", str(tmp_path), "-p", "outcomes", f"--outcomes={file}", "-p", "no:cacheprovider"]
    (ended,) = run_jobs([Job("tests", command, 600, tmp_path / "log")])
    assert ended.status == 9
    assert [(x["test"].partition("::")[2], x["outcome"]) for x in outcomes.read(file)] == [("test_1", "passed")]


@pytest.mark.multiprocess
def test_ctrl_c_kills_all_jobs_and_keeps_the_logs(tmp_path):
    code = f"""
import signal, sys; sys.path.insert(0, {str(results.ROOT / "bench")!r}); import gpu
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background jobs ignore it
sleep = "import os, pathlib, time; x = pathlib.Path({str(tmp_path)!r}) / '%s'; y = x.with_suffix('.new'); "
sleep += "y.write_text(str(os.getpid())); y.rename(x); time.sleep(600)"
gpu.smoke_jobs = lambda: [gpu.Job(name, ["-c", sleep % name], 600) for name in "ab"]
sys.exit(gpu.main(["--cpu-rehearsal", "--out", {str(tmp_path)!r}, "--only", "smoke"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not all((tmp_path / name).exists() for name in "ab"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted: the rest was not run" in printed
    assert not any(Path(f"/proc/{(tmp_path / name).read_text()}").exists() for name in "ab")
    assert (tmp_path / "logs.tar.gz").exists()


def test_every_test_for_a_gpu_is_run(tmp_path, monkeypatch):
    """The slowest folder first."""
    jobs = []
    monkeypatch.setattr(gpu.Run, "run_checks", lambda self, checks: jobs.extend(checks))
    gpu.Run(tmp_path / "logs", tmp_path, rehearsal=True, end=0).run(["device", "tests"])
    device, tests = jobs
    paths = [results.ROOT / x for x in tests.command if x.startswith("tests/")]
    covered = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    marked = {file for file in (results.ROOT / "tests").rglob("*.py") if "mark.gpu" in file.read_text()}
    assert device.name == "device" and paths[0].name == "training"
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
