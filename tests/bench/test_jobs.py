"""Tests of parallel jobs: time limits, exit statuses, and cleanup of processes."""

import time
from pathlib import Path

import pytest

import jobs
import outcomes
from jobs import Job, run_jobs


def clock(monkeypatch: pytest.MonkeyPatch, log: Path, *times: float) -> None:
    """Stop the clock of `jobs` at 0 until the log has content, then return `times`, and the last one from then on."""
    rest = iter(times)
    last = 0.0

    def monotonic() -> float:
        nonlocal last
        last = next(rest, last) if log.exists() and log.read_text() else 0.0
        return last

    monkeypatch.setattr(jobs.time, "monotonic", monotonic)


def test_a_job_is_interrupted_at_its_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code = "import time; print('begun', flush=True); time.sleep(600)"
    clock(monkeypatch, tmp_path / "log", 50 + jobs.GRACE)
    (ended,) = run_jobs([Job("slow", ["-c", code], 50, tmp_path / "log")])
    assert ended.status is None and str(ended) == f"slow: stopped at its time limit, {50 + jobs.GRACE} s"
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()


def test_a_job_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); "
    clock(monkeypatch, tmp_path / "log", 51, 51, 51 + jobs.GRACE)
    (ended,) = run_jobs([Job("deaf", ["-c", ignore + "time.sleep(600)"], 50, tmp_path / "log")])
    assert ended.status is None and (tmp_path / "log").read_text() == "begun\n"


def test_jobs_end_one_by_one(tmp_path: Path):
    code = "import os, sys; print(os.environ['NAME']); sys.exit(3)"
    first, second = Job("first", ["-c", code], 600, tmp_path / "log", {"NAME": "x"}), Job("second", ["-c", ""], 600)
    statuses = {ended.job.name: ended.status for ended in run_jobs([first, second])}
    assert statuses == {"first": 3, "second": 0} and (tmp_path / "log").read_text() == "x\n"


def test_what_a_job_has_started_ends_with_it(tmp_path: Path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    (ended,) = run_jobs([Job("parent", ["-c", code], 600, tmp_path / "log")])
    assert ended.status == 0
    child, until = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat"), time.monotonic() + 60
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_jobs_end_when_the_iteration_is_left(tmp_path: Path):
    pid, ready = tmp_path / "pid", tmp_path / "ready"
    sleep = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); "
    sleep += f"pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(0.05)"
    running = run_jobs([Job("waits", ["-c", wait], 600), Job("sleeps", ["-c", sleep], 600)])
    assert next(running).job.name == "waits"
    running.close()
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_killed_tests_leave_their_outcomes(tmp_path: Path):
    (tmp_path / "test_a.py").write_text("import os\ndef test_1(): pass\ndef test_2(): os._exit(9)\n")
    file = tmp_path / "outcomes.jsonl"
    command = ["-m", "pytest", str(tmp_path), "-p", "outcomes", f"--outcomes={file}", "-p", "no:cacheprovider"]
    (ended,) = run_jobs([Job("tests", command, 600, tmp_path / "log")])
    assert ended.status == 9
    assert [(x["test"].partition("::")[2], x["outcome"]) for x in outcomes.read(file)] == [("test_1", "passed")]
