"""Tests of `python bench/gpu.py`: results, summary and logs of its rehearsal, jobs and time limits, Ctrl-C."""

import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import gpu
import results
from dcvae_fast.recipes import recipe_config

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def documents(rehearsal) -> dict[str, dict]:
    """Result files by benchmark."""
    return {path.stem: results.read(path) for path in (rehearsal[0] / "cpu").iterdir()}


def cells(document, row):
    (match,) = (r for r in document["rows"] if r["name"] == row)
    return {(cell["peer"], cell["mode"]): cell for cell in match["cells"]}


def test_result_says_where_it_comes_from(documents):
    document = documents["info_nce"]
    assert document["device"] == "cpu"
    assert document["rehearsal"] is True
    assert document["torch"] == torch.__version__
    assert (document["commit"], document["dirty"]) == ("0123456789abcdef", True)
    assert document["driver"] is document["cuda"] is document["device_rates"] is None
    assert "torch.utils.benchmark" in document["timer"]["wall"] and "do_bench_cudagraph" in document["timer"]["graph"]


def test_result_of_info_nce(documents):
    document = documents["info_nce"]
    dcvae, _, _, clip, *_ = document["rows"]
    assert [dcvae[key] for key in ("scales", "batch", "queue", "dim", "dtype")] == [2, 128, 1024, 16, "float32"]
    assert [clip[key] for key in ("batch", "queue", "dim", "dtype", "symmetric")] == [128, None, 512, "bfloat16", True]
    for row in document["rows"]:
        for (peer, mode), cell in cells(document, row["name"]).items():
            assert (cell["wall"] is None) == bool(cell["reason"])
            assert cell["reason"] != "not run"
            if peer in ("ours", "eager"):
                wall = cell["wall"]
                assert 0 < wall["q1_us"] <= wall["median_us"] <= wall["q3_us"]
                assert cell["errors"]["loss_error"] < (1e-6 if row["dtype"] == "float32" else 0.03)
                assert ("gradient_error" in cell["errors"]) == (mode == "forward_backward")
                assert cell["graph"] is cell["peak_bytes"] is cell["launches"] is None  # only on a GPU
    assert cells(document, "dcvae")["liger-kernel", "forward"]["reason"] == "it has no queue"
    assert "needs a C++ compiler" in cells(document, "dcvae")["torch.compile", "forward"]["reason"]
    for package, version in document["packages"].items():
        reasons = [cell["reason"] for row in document["rows"] for cell in row["cells"] if cell["peer"] == package]
        assert (f"{package} is not installed" in reasons) == (version is None)


def test_result_of_spectral_norm(documents):
    document = documents["spectral_norm"]
    assert [(row["name"], row["layers"]) for row in document["rows"]] == [
        ("dcvae", 23),
        ("sngan", 18),
        ("stylegan2", 22),
    ]
    for row in document["rows"]:
        for (peer, mode), cell in cells(document, row["name"]).items():
            if peer in ("ours compiled", "torch.compile", "older compiled"):
                assert "needs a C++ compiler" in cell["reason"]
                continue
            assert cell["reason"] is None
            assert 0 < cell["wall"]["median_us"]
            assert len(cell["errors"]) == (1 if mode == "forward" else 2)
            assert max(cell["errors"].values()) < 1e-5


def test_result_of_iterations(documents):
    document = documents["step"]
    assert [row["name"] for row in document["rows"]] == ["cifar10-8", "faces16"]
    for row in document["rows"]:
        assert 0 < row["flops"]["ours"] < row["flops"]["baseline"]
        period = recipe_config(row["recipe"]).train.n_critic
        for cell in row["cells"]:
            assert cell["wall"]["calls_per_batch"] % period == 0  # a time is the mean of whole periods
            assert cell["reason"] is None and cell["wall"]["median_us"] > 0 and cell["mode"] == "iteration"
    faces = cells(document, "faces16")
    assert faces["baseline", "iteration"]["errors"] == {"loss_error": 0.0}
    assert faces["ours", "iteration"]["errors"]["loss_error"] < 1e-5


def test_rehearsal_meets_no_target(documents, rehearsal):
    targets = [target for document in documents.values() for target in document["targets"]]
    assert (len(documents["info_nce"]["targets"]), len(targets)) == (12, 17)
    assert all(target["met"] is target["measured"] is None for target in targets)
    assert "| target |" not in rehearsal[1]


def test_one_screen_says_how_everything_went(rehearsal):
    _, lines = rehearsal[1].split("\n\n", 1)
    for job in ("device: 1 passed", "ops: 21 passed", "iterations: 2 passed, 2 skipped", "fast-iterations: 2 skipped"):
        assert f"\n{job}, " in f"\n{lines}"
    assert "\ntests: 2 skipped" in lines
    assert f"'torch': '{torch.__version__}'" in lines
    assert re.search(r"SKIPPED \[2\] bench/test_smoke.py:\d+: CUDA graphs need a GPU\n", lines)


def test_results_and_logs_are_few_files(rehearsal):
    assert len([path for path in rehearsal[0].rglob("*") if path.is_file()]) <= 6
    with tarfile.open(rehearsal[0] / "logs.tar.gz") as archive:
        names = {name.removeprefix("logs/") for name in archive.getnames()}
    logs = {"device", "ops", "iterations", "fast-iterations", "tests", "info_nce", "spectral_norm", "step"}
    assert {f"{name}.log" for name in logs} | {"summary.txt"} <= names


@pytest.mark.slow
def test_training_is_stopped_resumed_and_used(tmp_path, script):
    result = script("gpu", "--first", "--cpu-rehearsal", "--out", tmp_path, "--only", "train", "train-eager")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\ntrain: 1 passed, " in result.stdout and "\ntrain-eager: 1 passed, " in result.stdout
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {"logs/train/samples.png", "logs/train/reconstructions.png", "logs/train/run/metrics.jsonl"} <= set(names)
    assert not any("checkpoints" in name for name in names)


def test_path_of_a_result_file():
    document = {"device": "NVIDIA H100 80GB HBM3", "benchmark": "step"}
    assert results.path_of(Path("x"), document) == Path("x/nvidia-h100-80gb-hbm3/step.json")


def test_number_of_cells_without_time_is_in_the_summary(documents, tmp_path):
    document = documents["info_nce"]
    for row in document["rows"][:2]:
        row["cells"][0]["reason"] = "no time left"
    results.write(tmp_path / "cpu" / "info_nce.json", document)
    assert "no time left: 2 of 144 measurements" in gpu.result_lines("info_nce", tmp_path, 0)


def test_results_of_earlier_runs_are_not_in_the_summary(documents, tmp_path):
    results.write(tmp_path / "cpu" / "step.json", documents["step"])
    begin = (tmp_path / "cpu" / "step.json").stat().st_mtime_ns
    assert gpu.result_lines("step", tmp_path, begin)[0] == str(tmp_path / "cpu" / "step.json")
    assert gpu.result_lines("step", tmp_path, begin + 1) == ["step: no result file"]


def test_each_command_takes_eight_minutes_at_most():
    limits = {name: job.seconds + gpu.GRACE for name, job in gpu.JOBS.items()}
    assert sum(limits[name] for name in gpu.USUAL) <= 480
    assert limits["step"] <= 480 and limits["switches"] <= 480
    # With --first, the last job, the benchmark of iterations, gets the time that is left; there must be some.
    checks = limits["device"] + max(limits[job.name] for job in gpu.STAGES[1])
    left = gpu.FIRST_SECONDS - checks - limits["info_nce"] - limits["spectral_norm"]
    assert left > gpu.GRACE + gpu.OVERTIME and gpu.FIRST_SECONDS <= 470


def test_jobs_end_before_the_time_limit_of_the_run(tmp_path, monkeypatch):
    commands = {}

    def run_jobs(new, logs, rehearsal):
        commands.update(new)
        yield from ()

    monkeypatch.setattr(gpu, "run_jobs", run_jobs)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 1000.0)
    assert gpu.run(["ops", "info_nce"], tmp_path, tmp_path, False, 100) == ([], False)
    for command in commands.values():
        assert command[:4] == ["timeout", "--signal=INT", f"--kill-after={gpu.GRACE}", "90.0"]
    assert "--deadline=70.0" in commands["info_nce"]  # 20 s before its limit

    commands.clear()
    summary, failed = gpu.run(["ops", "info_nce"], tmp_path, tmp_path, False, 25)
    assert (summary, failed, commands) == (["ops: no time left", "info_nce: no time left"], False, {})


def test_benchmarks_start_no_measurement_after_their_deadline(tmp_path):
    gpu.run_benchmark("spectral_norm", tmp_path, True, "--deadline=-1", "-k", "ours and dcvae")
    (row, *_) = results.read(tmp_path / "cpu" / "spectral_norm.json")["rows"]
    assert {cell["reason"] for cell in row["cells"] if cell["peer"] == "ours"} == {"no time left"}


@pytest.fixture
def run_test(tmp_path):
    """Run a test file as a job; return the lines of its summary, whether it failed, and its log."""

    def run(code: str, seconds: float = 600):
        (tmp_path / "test_it.py").write_text(code)
        job = gpu.Job("job", seconds, [str(tmp_path / "test_it.py"), "-s", "-rfEs", "--continue-on-collection-errors"])
        commands = {"job": gpu.command(job, [], tmp_path)}
        ((name, status),) = gpu.run_jobs(commands, tmp_path / "logs", rehearsal=True)
        return *gpu.outcome_lines(name, status, tmp_path / "logs"), (tmp_path / "logs" / "job.log").read_text()

    return run


def test_failures_and_skips_are_in_the_summary(run_test):
    code = "import pytest\ndef test_1(): pass\ndef test_2(): pytest.skip('no GPU')\ndef test_3(): assert 1 == 2\n"
    (total, *lines), failed, _ = run_test(code)
    assert total.startswith("job: 1 failed, 1 passed, 1 skipped in ") and failed
    assert [line.split()[0] for line in lines] == ["FAILED", "SKIPPED"]
    assert lines[0].endswith("::test_3 - assert 1 == 2") and lines[1].endswith(": no GPU")


@pytest.mark.parametrize(("module", "ours"), [("no_such_module", False), ("dcvae_kernels.no_such_module", True)])
def test_missing_packages_are_not_failures(run_test, module, ours):
    (total, *lines), failed, _ = run_test(f"import {module}\n")
    assert ("not collected:" in total and f"(needs {module})" in total) is not ours
    assert failed is ours
    assert len(lines) == ours


def test_jobs_are_stopped_at_their_time_limit(run_test):
    lines, failed, _ = run_test("import time\ndef test_1(): pass\ndef test_2(): time.sleep(600)\n", seconds=4)
    assert failed
    assert re.fullmatch(r"job: 1 passed in .*s; stopped at the time limit, the rest not run", lines[0])


def test_jobs_that_ignore_the_interrupt_are_killed(run_test, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('last line')\ntime.sleep(600)\n"
    lines, failed, _ = run_test(code, seconds=4)
    assert failed
    end = "killed at the time limit or for lack of memory, the rest not run"
    assert lines == [f"job: its log ends with 'last line'; {end}"]


def test_crashed_jobs_fail_and_leave_no_children(run_test):
    code = "import os, subprocess\n"
    code += "def test_1(): print('child', subprocess.Popen(['sleep', '600']).pid, flush=True); os._exit(9)\n"
    lines, failed, log = run_test(code)
    assert failed and lines[0].endswith("; exit status 9, see its log")
    wait_until_ended(int(log.partition("child ")[2].split()[0]))


def wait_until_ended(pid: int) -> None:
    status, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


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
