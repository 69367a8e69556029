"""Run the tests and benchmarks that need a GPU, and print a summary that fits on one screen.

With `--first`, for a machine on which the project has never run, also check the device, run each op and each kind of
training iteration once, and train, stop, resume and sample, all within 470 seconds. A failing part does not stop later
parts.

Needs only a checkout, Python 3.11, torch, Triton, pytest and pytest-benchmark. Installs and downloads nothing. Skips
whatever needs other packages, and names it. Runs tests in parallel if pytest-xdist is installed. Writes results to
OUT/<device>/<benchmark>.json, and logs, test outcomes and pictures to OUT/logs.tar.gz. Exits with 1 if a check, a test
or one of our benchmarks fails; missed targets are only reported.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import outcomes
import results
import tables
from results import Document

FIRST_SECONDS = 470
# Time limits in seconds. At its limit a job gets SIGINT, so that it can write its results, and GRACE later SIGKILL.
DEVICE_SECONDS, SMOKE_SECONDS, TRAIN_SECONDS, TESTS_SECONDS, TEST_SECONDS = 40, 150, 170, 180, 120
GRACE = 10
# A benchmark that reaches its limit starts no new measurement and has OVERTIME to finish the current one.
BENCHMARKS = {"info_nce": 110, "spectral_norm": 40, "step": 420, "switches": 420, "pipelines": 50}
OVERTIME = 20
CHECKS = ("device", "smoke", "train")
PARTS = (*CHECKS, "tests", *BENCHMARKS)
USUAL = ("tests", "info_nce", "spectral_norm", "pipelines")
FIRST = (*CHECKS, "tests", "info_nce", "spectral_norm", "step")
NEEDED = ("torch", "triton", "pytest", "pytest_benchmark")
TEST_FOLDERS = ("training", "kernels", "pipelines", "models", "evaluation", "bench")  # the slowest first
TEST_FILES = sorted(path.name for path in (results.ROOT / "tests").glob("test_*.py"))
ALL_TESTS = [f"tests/{name}" for name in (*TEST_FOLDERS, *TEST_FILES)]
WORKERS = 10
NOT_PACKED = ("checkpoints", "tensorboard")
OUTCOMES = "outcomes.jsonl"
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", results.REHEARSAL_VARIABLE: "1"}
COMPILE_THREADS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="run everything once on a new machine; needs --out")
    parser.add_argument("--out", type=Path, help="folder for results and logs; default: bench/results, build/gpu")
    choices = f"{', '.join(PARTS)}, or test files and ids"
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"{choices}; default: {', '.join(USUAL)}")
    parser.add_argument("--seconds", type=float, help=f"time for everything; with --first {FIRST_SECONDS}")
    rehearsal = "on the CPU, small, without time limits; writes only to --out"
    parser.add_argument("--cpu-rehearsal", action="store_true", help=rehearsal)
    options = parser.parse_args(arguments)
    if options.first and options.out is None:
        parser.error("--first needs --out DIR, a folder for results and logs")
    only = options.only or list(FIRST if options.first else USUAL)
    if unknown := [part for part in only if part not in PARTS and not (results.ROOT / part.split("::")[0]).exists()]:
        parser.error(f"--only {unknown[0]}: choose from {choices}")
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    if not options.cpu_rehearsal and not has_gpu():
        print("torch sees no CUDA device; --cpu-rehearsal shows what would run", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # handle like Ctrl-C: kill all jobs, pack the logs
        signal.signal(number, signal.default_int_handler)
    seconds = options.seconds or (FIRST_SECONDS if options.first else math.inf)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or (Path(temporary) / "results" if options.cpu_rehearsal else results.COMMITTED)
        run = Run(Path(temporary) / "logs", out, options.cpu_rehearsal, time.monotonic() + seconds)
        try:
            run.run(only)
        except KeyboardInterrupt:
            run.add(["interrupted: the rest was not run"], failed=True)
        finally:
            if options.out is not None or not options.cpu_rehearsal:
                run.pack(options.out or results.ROOT / "build" / "gpu")
    print("\n" + "\n".join(run.summary), flush=True)
    return int(run.failed)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# --- jobs: Python processes that run in parallel, each with a time limit and a log ---


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
    """How a job ended: its exit status, or None if it was stopped at its time limit, and how long it ran."""

    job: Job
    status: int | None
    seconds: float

    def __str__(self) -> str:
        how = "stopped at its time limit" if self.status is None else f"exit status {self.status}"
        return f"{self.job.name}: {how}, {self.seconds:.0f} s"


def run_jobs(jobs: Sequence[Job]) -> Generator[Ended]:
    """Run jobs in parallel, and yield each one when it ends.

    Kill the children of a job when it ends, and all jobs if the caller stops iterating or presses Ctrl-C.
    """
    begin, running = time.monotonic(), {}
    try:
        for job in jobs:
            running[start(job)] = job
        while running:
            for process in [process for process in running if process.poll() is not None]:
                kill(process)  # its children
                status = None if process.returncode in (124, 128 + signal.SIGKILL) else process.returncode
                yield Ended(running.pop(process), status, time.monotonic() - begin)
            time.sleep(0.05)
    finally:
        for process in running:
            kill(process)


def start(job: Job) -> subprocess.Popen:
    limit = 0 if math.isinf(job.seconds) else job.seconds
    paths = [str(results.ROOT / folder) for folder in (".", "bench", "kernels", "pipelines")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    variables = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **job.environment}
    with contextlib.ExitStack() as stack:
        log = job.log and stack.enter_context(job.log.open("w", encoding="utf-8"))
        return subprocess.Popen(
            ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(limit), sys.executable, *job.command],
            cwd=results.ROOT,
            env=inherited | variables,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """Kill a process and everything in its group, even if the process itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def smoke_jobs() -> list[Job]:
    """Run the ops and training iterations once: float32 eager, float32 with graphs, and the fast path."""
    return [
        smoke_job("ops", ["ops"], SMOKE_SECONDS),
        smoke_job("iterations", ["step", "none", "graphs"], SMOKE_SECONDS),
        smoke_job("fast-iterations", ["step", "ours"], SMOKE_SECONDS),
    ]


def train_jobs() -> list[Job]:
    """Train the digits with the default settings, and without torch.compile and CUDA graphs."""
    eager = ["--train.compile", "false", "--train.graphs", "false"]
    return [smoke_job(name, ["train", *s], TRAIN_SECONDS) for name, s in (("train", []), ("train-eager", eager))]


def smoke_job(name: str, arguments: list[str], seconds: float) -> Job:
    return Job(name, ["bench/smoke.py", *arguments], seconds, environment=COMPILE_THREADS)


def tests_job(tests: Sequence[str], outcomes_file: Path) -> Job:
    """Run the tests marked gpu among `tests`, in parallel if pytest-xdist is installed."""
    command = ["-m", "pytest", *tests, "-m", "gpu", "-v", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-p", "outcomes", f"--outcomes={outcomes_file}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(TEST_SECONDS)]
    return Job("tests", command, TESTS_SECONDS, environment={"OMP_NUM_THREADS": "1", **COMPILE_THREADS})


def run_benchmark(
    name: str,
    out: Path,
    rehearsal: bool,
    only: str | None = None,
    seconds: float | None = None,
    log: Path | None = None,
) -> tuple[Path | None, Ended]:
    """Run bench/test_NAME.py. Return the result file, or None if there is none, and how pytest ended.

    Args:
        only: pytest's -k
        seconds: time limit; default: BENCHMARKS[name]
        log: file for its output; default: the terminal
    """
    seconds = seconds or BENCHMARKS[name]
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{name}.json")}
    command = ["-m", "pytest", f"bench/test_{name}.py", "-q", "-s", "--benchmark-quiet", f"--results={out.resolve()}"]
    command += ["-p", "no:cacheprovider", f"--deadline={seconds}"] + (["-k", only] if only else [])
    (ended,) = run_jobs([Job(name, command, seconds + OVERTIME, log, REHEARSAL if rehearsal else {})])
    written = [path for path in out.glob(f"*/{name}.json") if path.stat().st_mtime_ns != before.get(path)]
    return (written[0] if written else None), ended


# --- the run and its summary ---


class Run:
    """Run parts, and collect a summary and logs.

    Args:
        logs: folder to create; receives <job>.log and a folder per job, passed to the job as $OUT
        out: folder for result files
        end: deadline for all parts, in seconds of time.monotonic()

    Attributes:
        summary: lines to print at the end
        failed: whether a check, a test or a benchmark failed
    """

    def __init__(self, logs: Path, out: Path, rehearsal: bool, end: float):
        self.logs, self.out, self.rehearsal, self.end = logs, out, rehearsal, end
        self.summary: list[str] = []
        self.failed = False
        logs.mkdir(parents=True)

    def run(self, only: Sequence[str]) -> None:
        if "device" in only:  # alone, because it measures
            self.run_checks([smoke_job("device", ["device"], DEVICE_SECONDS)])
        jobs = [*(smoke_jobs() if "smoke" in only else []), *(train_jobs() if "train" in only else [])]
        tests = [part for part in only if part not in PARTS]
        if "tests" in only or tests:
            jobs.append(tests_job(tests or ALL_TESTS, self.logs / "tests" / OUTCOMES))
        self.run_checks(jobs)
        for name in (name for name in BENCHMARKS if name in only):
            self.run_benchmark(name)

    def add(self, lines: list[str], failed: bool) -> None:
        self.summary += lines
        self.failed |= failed

    def limit(self, seconds: float, reserve: float) -> float:
        """Return `seconds`, or less if the time left for all parts, minus `reserve`, is shorter."""
        return math.inf if self.rehearsal else min(seconds, self.end - time.monotonic() - reserve)

    def run_checks(self, jobs: Sequence[Job]) -> None:
        prepared = []
        for job in jobs:
            folder = self.logs / job.name
            folder.mkdir()
            environment = {**job.environment, "OUT": str(folder), **(REHEARSAL if self.rehearsal else {})}
            seconds = max(1.0, self.limit(job.seconds, GRACE))
            prepared.append(job._replace(log=folder.with_suffix(".log"), environment=environment, seconds=seconds))
        with contextlib.closing(run_jobs(prepared)) as ended_jobs:
            for ended in ended_jobs:
                print(ended, flush=True)
                self.add(*(tests_lines if ended.job.name == "tests" else check_lines)(ended))

    def run_benchmark(self, name: str) -> None:
        seconds = self.limit(BENCHMARKS[name], OVERTIME + GRACE)
        if seconds <= 0:
            self.add([f"{name}: no time left"], failed=False)
            return
        path, ended = run_benchmark(name, self.out, self.rehearsal, seconds=seconds, log=self.logs / f"{name}.log")
        print(ended, flush=True)
        self.add([f"{ended}, {path or 'no result file'}"], failed=ended.status != 0)
        self.add(benchmark_lines(results.read(path)) if path else [], failed=False)

    def pack(self, folder: Path) -> None:
        """Write the summary, the logs and the jobs' folders to `folder`/logs.tar.gz."""
        path = folder / "logs.tar.gz"
        self.summary.append(f"logs: {path}")
        (self.logs / "summary.txt").write_text("\n".join(self.summary) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(self.logs, "logs", filter=lambda x: None if Path(x.name).name in NOT_PACKED else x)


def check_lines(ended: Ended) -> tuple[list[str], bool]:
    """Return the summary lines of a bench/smoke.py job, and whether a check failed.

    For the device, all results are listed; for other jobs, only totals, skipped checks and failures.
    """
    assert ended.job.log is not None
    lines = ended.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    passed, skipped, failures = ([x for x in lines if x.startswith(w)] for w in ("ok ", "skipped ", "FAILED "))
    name, stopped = ended.job.name, "stopped at its time limit, " if ended.status is None else ""
    result = [f"{name}: {len(passed)} passed, {len(failures)} failed, {stopped}{ended.seconds:.0f} s"]
    result += [line.removeprefix("ok").strip() for line in passed] if name == "device" else []
    if ended.status not in (0, None) and not failures:
        failures = [f"FAILED  {name}: exit status {ended.status}, last line: {lines[-1] if lines else ''}"]
    return result + skipped + failures, bool(failures) or ended.status is None


def tests_lines(ended: Ended) -> tuple[list[str], bool]:
    """Return the summary lines of the tests (totals, then one line per failure), and whether a test failed.

    A file that cannot be collected because a package is missing is listed with the package, not as a failure.
    """
    count, failed, uncollected = Counter(), [], []
    tests = outcomes.read(Path(ended.job.environment["OUT"]) / OUTCOMES)
    for test in tests:
        text = test.get("text", "")
        absent = re.search(r"ModuleNotFoundError: No module named '((?!dcvae_)[\w.]+)'", text)
        if test["outcome"] == "failed" and absent and "::" not in test["test"]:
            uncollected.append(f"{test['test']} (needs {absent[1]})")
            continue
        count[test["outcome"]] += 1
        if test["outcome"] == "failed":
            lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()
            failed.append(f"FAILED  {test['test']}: {lines[0][:160] if lines else 'no message'}")
    total = f"tests: {count['passed']} passed, {count['skipped']} skipped, {len(failed)} failed, {ended.seconds:.0f} s"
    total += f"; not collected: {', '.join(uncollected)}" if uncollected else ""
    total += "; stopped at the time limit, the rest not run" if ended.status is None else ""
    # pytest also exits with 1 if a file could not be collected, and with 5 if no test was selected.
    broken = ended.status not in (0, 1, 5, None) or (ended.status == 1 and not tests)
    total += f"; pytest's exit status {ended.status}, see its log" if broken else ""
    return [total, *failed], bool(failed) or broken or ended.status is None


def benchmark_lines(document: Document) -> list[str]:
    """Return summary lines: tables, failures of our implementation, what was not measured, missing packages."""
    lines = tables.tables(document).replace("\n\n", "\n").splitlines()
    unmeasured: dict[str, dict[str, list[str]]] = {}
    for row in document["rows"]:
        for cell in row["cells"]:
            reasons = [reason for reason in (cell["reason"], cell["graph_reason"]) if reason]
            for reason in reasons:
                if reason in results.UNMEASURED:
                    unmeasured.setdefault(reason, {}).setdefault(row["name"], []).append(cell["peer"])
                elif cell["peer"] == "ours":
                    lines.append(f"FAILED  {row['name']}, ours, {cell['mode']}: {reason}")
    for reason, rows in unmeasured.items():
        names = [f"{row} ({', '.join(dict.fromkeys(peers))})" for row, peers in rows.items()]
        lines.append(f"{reason}: {', '.join(names)}")
    absent = [package for package, version in document["packages"].items() if version is None]
    return lines + ([f"not installed: {', '.join(absent)}"] if absent else [])


if __name__ == "__main__":
    sys.exit(main())
