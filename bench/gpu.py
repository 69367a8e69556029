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
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import outcomes
import records
import tables
from jobs import GRACE, Ended, Job, run_jobs
from targets import UNMEASURED

FIRST_SECONDS = 470
# Time limits in seconds.
DEVICE_SECONDS, SMOKE_SECONDS, TRAIN_SECONDS, TESTS_SECONDS, TEST_SECONDS = 40, 150, 170, 180, 120
# A benchmark that reaches its limit starts no new measurement and has OVERTIME to finish the current one.
BENCHMARKS = {"info_nce": 90, "spectral_norm": 40, "step": 420, "switches": 420, "pipelines": 50}
OVERTIME = 20
CHECKS = ("device", "smoke", "train")
PARTS = (*CHECKS, "tests", *BENCHMARKS)
USUAL = ("tests", "info_nce", "spectral_norm", "pipelines")
FIRST = (*CHECKS, "tests", "info_nce", "spectral_norm", "step")
NEEDED = ("torch", "triton", "pytest", "pytest_benchmark")
# The slowest first.
TEST_FOLDERS = ("training", "kernels", "pipelines", "models", "evaluation", "bench")
TEST_FILES = sorted(path.name for path in (records.ROOT / "tests").glob("test_*.py"))
ALL_TESTS = [f"tests/{name}" for name in (*TEST_FOLDERS, *TEST_FILES)]
WORKERS = 10
NOT_PACKED = ("checkpoints", "tensorboard")
DEFAULT_LOGS = records.ROOT / "build" / "gpu"
OUTCOMES = "outcomes.jsonl"
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", records.REHEARSAL_VARIABLE: "1"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="run everything once on a new machine; needs --out")
    parser.add_argument("--out", type=Path, help="folder for results and logs; default: bench/results, build/gpu")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help=f"{', '.join(PARTS)}, or test files and ids; default: {', '.join(USUAL)}",
    )
    parser.add_argument("--seconds", type=float, help=f"time for everything; with --first {FIRST_SECONDS}")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="on the CPU, small, without time limits; writes only to --out"
    )
    options = parser.parse_args(arguments)
    if options.first and options.out is None:
        parser.error("--first needs --out DIR, a folder for results and logs")
    only = options.only or list(FIRST if options.first else USUAL)
    if unknown := [part for part in only if part not in PARTS and not is_test(part)]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}, or name a test file or id")
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    if not options.cpu_rehearsal and not has_gpu():
        print("torch sees no CUDA device; --cpu-rehearsal shows what would run", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # handle like Ctrl-C: kill all jobs, pack the logs
        signal.signal(number, signal.default_int_handler)
    seconds = options.seconds or (FIRST_SECONDS if options.first else math.inf)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or (Path(temporary) / "results" if options.cpu_rehearsal else records.COMMITTED)
        run = Run(Path(temporary) / "logs", out, options.cpu_rehearsal, time.monotonic() + seconds)
        try:
            run.run(only)
        except KeyboardInterrupt:
            run.add(["interrupted: the rest was not run"], failed=True)
        finally:
            if options.out is not None or not options.cpu_rehearsal:
                run.pack(options.out or DEFAULT_LOGS)
    print("\n" + "\n".join(run.summary), flush=True)
    return int(run.failed)


def is_test(part: str) -> bool:
    return (records.ROOT / part.partition("::")[0]).exists()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Run:
    """Runs parts, and collects a summary and logs.

    Attributes:
        summary: lines to print at the end
        failed: whether a check, a test or a benchmark failed
    """

    def __init__(self, logs: Path, out: Path, rehearsal: bool, end: float):
        """
        Args:
            logs: folder to create; receives <job>.log and a folder per job, passed to the job as $OUT
            end: deadline for all parts, in seconds of time.monotonic()
        """
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
        self.add(summarised(records.read(path)) if path else [], failed=False)

    def pack(self, folder: Path) -> None:
        """Write the summary, the logs and the jobs' folders to `folder`/logs.tar.gz."""
        path = folder / "logs.tar.gz"
        self.summary.append(f"logs: {path}")
        (self.logs / "summary.txt").write_text("\n".join(self.summary) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(self.logs, "logs", filter=lambda x: None if Path(x.name).name in NOT_PACKED else x)


def smoke_job(name: str, arguments: list[str], seconds: float, **environment: str) -> Job:
    return Job(name, ["bench/smoke.py", *arguments], seconds, environment=environment)


def smoke_jobs() -> list[Job]:
    """Jobs that run the ops and training iterations once: float32 eager, float32 with graphs, and the fast path."""
    return [
        smoke_job("ops", ["ops"], SMOKE_SECONDS),
        smoke_job("iterations", ["step", "none", "graphs"], SMOKE_SECONDS),
        smoke_job("fast-iterations", ["step", "ours"], SMOKE_SECONDS, TORCHINDUCTOR_COMPILE_THREADS="4"),
    ]


def train_jobs() -> list[Job]:
    """Jobs that train the digits: with the default settings, and without torch.compile and CUDA graphs."""
    eager = ["--train.compile", "false", "--train.graphs", "false"]
    return [
        smoke_job("train", ["train"], TRAIN_SECONDS, TORCHINDUCTOR_COMPILE_THREADS="4"),
        smoke_job("train-eager", ["train", *eager], TRAIN_SECONDS),
    ]


def tests_job(tests: Sequence[str], outcomes_file: Path) -> Job:
    """Job that runs the tests marked gpu among `tests`, in parallel if pytest-xdist is installed."""
    command = ["-m", "pytest", *tests, "-m", "gpu", "-v", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-p", "outcomes", f"--outcomes={outcomes_file}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(TEST_SECONDS)]
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return Job("tests", command, TESTS_SECONDS, environment=environment)


def check_lines(ended: Ended) -> tuple[list[str], bool]:
    """Return the summary lines of a bench/smoke.py job, and whether a check failed.

    For the device, all results are listed; for other jobs, only totals, skipped checks and failures.
    """
    assert ended.job.log is not None
    lines = ended.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    passed = [line for line in lines if line.startswith("ok ")]
    failures = [line for line in lines if line.startswith("FAILED ")]
    skipped = [line for line in lines if line.startswith("skipped ")]
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
        only: pytest's -k.
        seconds: time limit; default: BENCHMARKS[name].
        log: file for its output; default: the terminal.
    """
    seconds = seconds or BENCHMARKS[name]
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{name}.json")}
    command = ["-m", "pytest", f"bench/test_{name}.py", "-q", "-s", "--benchmark-quiet", f"--results={out.resolve()}"]
    command += ["-p", "no:cacheprovider", f"--deadline={seconds}"] + (["-k", only] if only else [])
    (ended,) = run_jobs([Job(name, command, seconds + OVERTIME, log, REHEARSAL if rehearsal else {})])
    written = [path for path in out.glob(f"*/{name}.json") if path.stat().st_mtime_ns != before.get(path)]
    return (written[0] if written else None), ended


def summarised(document: dict[str, Any]) -> list[str]:
    """Return summary lines: times, targets, failures of our implementation, and cells without a time."""
    kind = tables.KINDS[document["benchmark"]]
    *headings, last = (heading.replace("`", "") for heading in kind.speeds)
    lines = [
        tables.head(document).replace("*", ""),
        kind.unit,
        f"{'':13}{''.join(f'{heading:>22}' for heading in headings)}  {last}",
    ]
    for row in document["rows"]:
        *speeds, last = tables.filled(document, row, kind.speeds)
        lines.append(f"{row['name']:13}{''.join(f'{speed:>22}' for speed in speeds)}  {last}")
    lines += ["targets:"] if document["targets"] else []
    for target in document["targets"]:
        what, required, measured, verdict = tables.target_columns(target)
        lines.append(f"{verdict:>13}  {what}: {required}, measured {measured}")
    for row in document["rows"]:
        for cell in (cell for cell in row["cells"] if cell["peer"] == "ours"):
            reasons = {cell["reason"], cell["graph_reason"]} - {None, *UNMEASURED}
            lines += [f"FAILED  {row['name']}, ours, {cell['mode']}: {reason}" for reason in sorted(reasons)]
    for reason in UNMEASURED:
        lines += [f"{reason}: {names}"] if (names := named(document, reason)) else []
    absent = [package for package, version in document["packages"].items() if version is None]
    lines += [f"not installed: {', '.join(absent)}"] if absent else []
    return lines


def named(document: dict[str, Any], reason: str) -> str:
    """List the rows that have cells with this reason, with the implementations in brackets."""
    rows = []
    for row in document["rows"]:
        cells = [cell for cell in row["cells"] if reason in (cell["reason"], cell["graph_reason"])]
        peers = dict.fromkeys(cell["peer"] for cell in cells)
        rows += [f"{row['name']} ({', '.join(peers)})"] if peers else []
    return ", ".join(rows)


if __name__ == "__main__":
    sys.exit(main())
