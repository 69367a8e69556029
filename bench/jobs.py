"""Run Python processes in parallel, each with a time limit and a log. Imports no torch."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import records

GRACE = 10  # seconds from the interrupt to the kill


class Job(NamedTuple):
    """A Python process.

    Attributes:
        command: arguments of the Python interpreter
        seconds: time limit, may be infinite
        log: file for stdout and stderr, or None for the terminal
        environment: additional variables
    """

    name: str
    command: Sequence[str]
    seconds: float
    log: Path | None = None
    environment: Mapping[str, str] = MappingProxyType({})


class Ended(NamedTuple):
    """How a job ended.

    Attributes:
        status: exit status; None if the job was stopped at its time limit
        seconds: how long it ran
    """

    job: Job
    status: int | None
    seconds: float

    def __str__(self) -> str:
        how = "stopped at its time limit" if self.status is None else f"exit status {self.status}"
        return f"{self.job.name}: {how}, {self.seconds:.0f} s"


def run_jobs(jobs: Sequence[Job]) -> Generator[Ended]:
    """Run jobs in parallel and yield each one when it ends.

    Send SIGINT to a job at its time limit, so that it can write its results, and kill it GRACE seconds later. Kill the
    children of a job when it ends. Kill all jobs if the caller stops iterating or presses Ctrl-C.
    """
    begin, running, interrupted = time.monotonic(), {}, set()
    try:
        for job in jobs:
            running[start(job)] = job
        while running:
            for process, job in list(running.items()):
                seconds = time.monotonic() - begin
                if seconds > job.seconds + GRACE:
                    kill(process)
                if process.poll() is not None:
                    kill(process)  # its children
                    del running[process]
                    yield Ended(job, None if process in interrupted else process.returncode, seconds)
                elif seconds > job.seconds and process not in interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted.add(process)
            time.sleep(0.05)
    finally:
        for process in running:
            kill(process)


def start(job: Job) -> subprocess.Popen:
    paths = [str(records.ROOT / folder) for folder in (".", "bench", "kernels", "pipelines")]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    variables = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }
    with contextlib.ExitStack() as stack:
        log = job.log and stack.enter_context(job.log.open("w", encoding="utf-8"))
        return subprocess.Popen(
            [sys.executable, *job.command],
            cwd=records.ROOT,
            env={**inherited, **variables, **job.environment},
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,
            # Background processes of a shell ignore SIGINT, and their children inherit this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def kill(process: subprocess.Popen) -> None:
    """Kill a process and everything in its group, even if the process itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
