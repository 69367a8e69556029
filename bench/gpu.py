"""Run the tests and benchmarks that need a GPU, and print a summary that fits on one screen.

With `--first`, for a machine on which the project has never run, also check the device, run each op and each kind of
training iteration once, and train, stop, resume and sample (test_smoke.py), all within 470 seconds. A failing part does
not stop later parts.

Needs only a checkout, Python 3.11, torch, Triton, pytest and pytest-benchmark. Installs and downloads nothing. Skips
checks that need other packages, and names them. Runs tests in parallel if pytest-xdist is installed. Writes results to
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
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import outcomes
import results
import tables
from results import Document

FIRST_SECONDS = 470
# Time limits in seconds. At its limit a job gets SIGINT, so that it can write its results, and GRACE later SIGKILL.
# A benchmark starts no new measurement in the last OVERTIME seconds before its limit.
GRACE, OVERTIME, TEST_SECONDS = 10, 20, 120
CHECKS = {"device": 40, "ops": 150, "iterations": 150, "fast-iterations": 150, "train": 170, "train-eager": 170}
BENCHMARKS = {"info_nce": 110, "spectral_norm": 60, "step": 440, "switches": 440, "pipelines": 70}
LIMITS = {**CHECKS, "tests": 180, **BENCHMARKS}
SMOKE = {
    "device": "test_device",
    "ops": "test_info_nce_op or test_spectral_norm_op",
    "iterations": "test_iterations and (none or graphs)",
    "fast-iterations": "test_iterations and ours",
    "train": "test_training and fast",
    "train-eager": "test_training and eager",
}
PARTS = {"device": ["device"], "smoke": ["ops", "iterations", "fast-iterations"], "train": ["train", "train-eager"]}
PARTS |= {name: [name] for name in ("tests", *BENCHMARKS)}
# Checks and tests run in parallel; the device and the benchmarks are measured alone.
GROUPS = [["device"], [*PARTS["smoke"], *PARTS["train"], "tests"], *([name] for name in BENCHMARKS)]
USUAL = ("tests", "info_nce", "spectral_norm", "pipelines")
FIRST = ("device", "smoke", "train", "tests", "info_nce", "spectral_norm", "step")
NEEDED = ("torch", "triton", "pytest", "pytest_benchmark")
TEST_FOLDERS = ("training", "kernels", "pipelines", "models", "evaluation", "bench")  # the slowest first
TEST_FILES = sorted(path.name for path in (results.ROOT / "tests").glob("test_*.py"))
ALL_TESTS = [f"tests/{name}" for name in (*TEST_FOLDERS, *TEST_FILES)]
WORKERS = 10
NOT_PACKED = ("checkpoints", "tensorboard")
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", results.REHEARSAL_VARIABLE: "1"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="run everything once on a new machine; needs --out")
    parser.add_argument("--out", type=Path, help="folder for results and logs; default: bench/results, build/gpu")
    choices = f"{', '.join(PARTS)}, or test files and ids"
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"{choices}; default: {', '.join(USUAL)}")
    rehearsal = "on the CPU, small, without time limits; writes only to --out"
    parser.add_argument("--cpu-rehearsal", action="store_true", help=rehearsal)
    options = parser.parse_args(arguments)
    if options.first and options.out is None:
        parser.error("--first needs --out DIR, a folder for results and logs")
    only = options.only or (FIRST if options.first else USUAL)
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
    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary) / "logs"
        out = options.out or (Path(temporary) / "results" if options.cpu_rehearsal else results.COMMITTED)
        summary, failed = run(only, logs, out, options.cpu_rehearsal, FIRST_SECONDS if options.first else math.inf)
        if options.out is not None or not options.cpu_rehearsal:
            pack(logs, summary, options.out or results.ROOT / "build" / "gpu")
    print("\n" + "\n".join(summary), flush=True)
    return int(failed)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(only: Sequence[str], logs: Path, out: Path, rehearsal: bool, seconds: float) -> tuple[list[str], bool]:
    """Run parts and return the lines of a summary, and whether something failed.

    Args:
        logs: folder for <job>.log and for a folder per job, passed to the job as $OUT
        out: folder for result files
        seconds: time limit for everything
    """
    tests = [part for part in only if part not in PARTS]
    chosen = [name for part in only for name in PARTS.get(part, ["tests"])]
    end, summary, failed = time.monotonic() + seconds, [], False
    try:
        for names in ([name for name in group if name in chosen] for group in GROUPS):
            if end - time.monotonic() <= GRACE + OVERTIME:
                summary += [f"{name}: no time left" for name in names]
                continue
            left = math.inf if rehearsal else end - time.monotonic() - GRACE
            limits = {name: math.inf if rehearsal else min(LIMITS[name], left) for name in names}
            jobs = [Job(name, arguments(name, limits[name], tests or ALL_TESTS, out), limits[name]) for name in names]
            with contextlib.closing(run_jobs(jobs, logs, rehearsal)) as ended_jobs:
                for ended in ended_jobs:
                    lines, job_failed = outcome_lines(ended, logs / ended.name)
                    print(lines[0], flush=True)
                    summary += lines
                    failed |= job_failed
                    if ended.name in BENCHMARKS:
                        summary += result_lines(ended.name, out)
    except KeyboardInterrupt:
        return [*summary, "interrupted: the rest was not run"], True
    return summary, failed


# --- jobs: pytest processes, each with a time limit and a log ---


class Job(NamedTuple):
    """A pytest process with its arguments and its time limit in seconds."""

    name: str
    arguments: Sequence[str]
    seconds: float


class Ended(NamedTuple):
    """End of a job: exit status, or None if it was stopped at its time limit, and duration in seconds."""

    name: str
    status: int | None
    seconds: float


def arguments(name: str, seconds: float, tests: Sequence[str], out: Path) -> list[str]:
    """Return pytest's arguments for a job with a time limit."""
    if name in BENCHMARKS:
        options = ["-q", "-s", "--benchmark-quiet", f"--results={out.resolve()}", f"--deadline={seconds - OVERTIME}"]
        return [f"bench/test_{name}.py", *options]
    if name in SMOKE:
        return ["bench/test_smoke.py", "-k", SMOKE[name], "-v", "-s", "--tb=short"]
    options = ["-m", "gpu", "-v", "--tb=short", "--no-header", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", str(TEST_SECONDS)]
    return [*tests, *options]


def run_benchmark(name: str, out: Path, rehearsal: bool, *more: str) -> int:
    """Run a benchmark in the terminal, without a log, and return pytest's exit status."""
    command = pytest_command([*arguments(name, LIMITS[name], [], out), *more])
    return subprocess.run(command, cwd=results.ROOT, env=environment(rehearsal)).returncode


def pytest_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]


def environment(rehearsal: bool) -> dict[str, str]:
    paths = [str(results.ROOT / folder) for folder in (".", "bench", "kernels", "pipelines")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    return {**inherited, **variables, **(REHEARSAL if rehearsal else {})}


def run_jobs(jobs: Sequence[Job], logs: Path, rehearsal: bool) -> Generator[Ended]:
    """Run jobs in parallel, and yield each one when it ends.

    Kill the children of a job when it ends, and all jobs if the caller stops iterating or presses Ctrl-C.
    """
    begin, running = time.monotonic(), {}
    try:
        for job in jobs:
            running[start(job, logs, rehearsal)] = job
        while running:
            for process in [process for process in running if process.poll() is not None]:
                kill(process)  # its children
                job, seconds = running.pop(process), time.monotonic() - begin
                yield Ended(job.name, process.returncode if seconds < job.seconds else None, seconds)
            time.sleep(0.05)
    finally:
        for process in running:
            kill(process)


def start(job: Job, logs: Path, rehearsal: bool) -> subprocess.Popen:
    folder = logs / job.name
    folder.mkdir(parents=True)
    limit = ["timeout", "--signal=INT", f"--kill-after={GRACE}", "0" if math.isinf(job.seconds) else str(job.seconds)]
    plugin = ["-p", "outcomes", f"--outcomes={folder / outcomes.FILE}"]
    threads = {"OMP_NUM_THREADS": "1"} if job.name == "tests" else {}
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*limit, *pytest_command([*job.arguments, *plugin])],
            cwd=results.ROOT,
            env={**environment(rehearsal), **threads, "OUT": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """Kill a process and everything in its group, even if the process itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- summary ---


def outcome_lines(ended: Ended, folder: Path) -> tuple[list[str], bool]:
    """Return a job's totals, its reasons for skips (except of the tests) and its failures, and whether it failed.

    A file that cannot be collected because a package is missing is listed with the package, not as a failure.
    """
    count, lines, uncollected = Counter(), [], []
    tests = outcomes.read(folder / outcomes.FILE)
    for test in tests:
        text, name = test.get("text", ""), test["test"]
        absent = re.search(r"ModuleNotFoundError: No module named '((?!dcvae_)[\w.]+)'", text)
        if test["outcome"] == "failed" and absent and "::" not in name:
            uncollected.append(f"{name} (needs {absent[1]})")
            continue
        count[test["outcome"]] += 1
        if test["outcome"] == "failed":
            errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()
            lines.append(f"FAILED  {name}: {errors[0][:160] if errors else 'no message'}")
        elif test["outcome"] == "skipped" and ended.name != "tests":
            lines.append(f"skipped {name.partition('::')[2]}: {text.rpartition('Skipped: ')[2].strip(chr(39) + ')')}")
    numbers = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
    total = f"{ended.name}: {numbers}, {ended.seconds:.0f} s"
    total += f"; not collected: {', '.join(uncollected)}" if uncollected else ""
    total += "; stopped at the time limit, the rest not run" if ended.status is None else ""
    # pytest also exits with 1 if a file could not be collected, and with 5 if no test was selected.
    broken = ended.status not in (0, 1, 5, None) or (ended.status == 1 and not tests)
    total += f"; pytest's exit status {ended.status}, see its log" if broken else ""
    facts = folder / "summary.txt"
    lines += facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return [total, *lines], count["failed"] > 0 or broken or ended.status is None


def result_lines(name: str, out: Path) -> list[str]:
    """Return the newest result's tables, what was not measured for lack of time, and missing packages."""
    paths = sorted(out.glob(f"*/{name}.json"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        return [f"{name}: no result file"]
    document: Document = results.read(paths[-1])
    lines = [str(paths[-1]), *tables.tables(document).replace("\n\n", "\n").splitlines()]
    for reason in results.UNMEASURED:
        rows = [
            f"{row['name']} ({', '.join(peers)})"
            for row in document["rows"]
            if (peers := dict.fromkeys(c["peer"] for c in row["cells"] if reason in (c["reason"], c["graph_reason"])))
        ]
        lines += [f"{reason}: {', '.join(rows)}"] if rows else []
    absent = [package for package, version in document["packages"].items() if version is None]
    return lines + ([f"not installed: {', '.join(absent)}"] if absent else [])


def pack(logs: Path, summary: list[str], folder: Path) -> None:
    """Write the summary, the logs and the jobs' folders to `folder`/logs.tar.gz."""
    path = folder / "logs.tar.gz"
    summary.append(f"logs: {path}")
    logs.mkdir(exist_ok=True)
    (logs / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(logs, "logs", filter=lambda x: None if Path(x.name).name in NOT_PACKED else x)


if __name__ == "__main__":
    sys.exit(main())
