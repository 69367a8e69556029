"""Run the tests and benchmarks that need a GPU, and print a summary that fits on one screen.

With `--first`, for a machine on which the project has never run, also check the device, run each op and each kind of
training iteration once, and train, stop, resume and sample (test_smoke.py), all within 470 seconds. A failing job does
not stop later jobs.

Needs only a checkout, Python 3.11, torch, Triton, pytest, pytest-benchmark and GNU timeout. Installs and downloads
nothing. Skips checks that need other packages, and names them. Runs tests in parallel if pytest-xdist is installed.
Writes results to OUT/<device>/<benchmark>.json, and logs and pictures to OUT/logs.tar.gz. Exits with 1 if a check, a
test or one of our benchmarks fails; missed targets are only reported.
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
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import results
import tables
from results import Document

FIRST_SECONDS = 470
# Time limits in seconds. At its limit a job gets SIGINT, so that it can write its results, and GRACE later SIGKILL.
# A benchmark starts no new measurement in the last OVERTIME seconds before its limit.
GRACE, OVERTIME, TEST_SECONDS = 10, 20, 120
# Exit statuses of `timeout` after SIGINT, and after SIGKILL by itself or by the kernel, which it passes on to itself.
STOPPED = {
    124: "stopped at the time limit, the rest not run",
    -signal.SIGKILL: "killed at the time limit or for lack of memory, the rest not run",
}


class Job(NamedTuple):
    """A pytest process with its time limit in seconds and pytest's arguments."""

    name: str
    seconds: float
    arguments: Sequence[str]


def smoke(tests: str) -> Sequence[str]:
    return "bench/test_smoke.py", "-v", "-s", "-rfEs", "-k", tests


BENCHMARKS = {"info_nce": 110, "spectral_norm": 60, "step": 440, "switches": 440, "pipelines": 70}
# Jobs of a stage run in parallel. The device and the benchmarks are measured alone.
STAGES = (
    [Job("device", 40, smoke("test_device"))],
    [
        Job("ops", 150, smoke("test_info_nce_op or test_spectral_norm_op")),
        Job("iterations", 150, smoke("test_iterations and (none or graphs)")),
        Job("fast-iterations", 150, smoke("test_iterations and ours")),
        Job("train", 170, smoke("test_training and fast")),
        Job("train-eager", 170, smoke("test_training and eager")),
        Job("tests", 180, ("-m", "gpu", "-v", "--no-header", "--continue-on-collection-errors")),
    ],
    *(
        [Job(name, seconds, (f"bench/test_{name}.py", "-q", "-s", "--benchmark-quiet"))]
        for name, seconds in BENCHMARKS.items()
    ),
)
JOBS = {job.name: job for stage in STAGES for job in stage}
USUAL = ("tests", "info_nce", "spectral_norm", "pipelines")
FIRST = tuple(name for name in JOBS if name not in ("switches", "pipelines"))
NEEDED = ("torch", "triton", "pytest", "pytest_benchmark")
WORKERS = 10
NOT_PACKED = ("checkpoints", "tensorboard")
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", results.REHEARSAL_VARIABLE: "1"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="check a new machine in eight minutes; needs --out")
    parser.add_argument("--out", type=Path, help="folder for results and logs; default: bench/results, build/gpu")
    choices = f"{', '.join(JOBS)}, or test files and ids"
    parser.add_argument("--only", nargs="+", metavar="JOB", help=f"{choices}; default: {', '.join(USUAL)}")
    rehearsal = "on the CPU, small, without time limits; writes only to --out"
    parser.add_argument("--cpu-rehearsal", action="store_true", help=rehearsal)
    options = parser.parse_args(arguments)
    if options.first and options.out is None:
        parser.error("--first needs --out DIR, a folder for results and logs")
    only = options.only or (FIRST if options.first else USUAL)
    if unknown := [name for name in only if name not in JOBS and not (results.ROOT / name.split("::")[0]).exists()]:
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
    """Run jobs and return the lines of a summary, and whether something failed.

    Args:
        logs: folder for <job>.log and for a folder per job, passed to the job as $OUT
        out: folder for result files
        seconds: time limit for everything, except in a rehearsal
    """
    tests = [name for name in only if name not in JOBS]
    begin, end, summary, failed = time.time_ns(), time.monotonic() + seconds, [], False
    try:
        for stage in STAGES:
            left = math.inf if rehearsal else end - time.monotonic() - GRACE
            chosen = [job for job in stage if job.name in only or (job.name == "tests" and tests)]
            if left <= OVERTIME:
                summary += [f"{job.name}: no time left" for job in chosen]
                continue
            jobs = [job._replace(seconds=math.inf if rehearsal else min(job.seconds, left)) for job in chosen]
            commands = {job.name: command(job, tests or ["tests"], out) for job in jobs}
            with contextlib.closing(run_jobs(commands, logs, rehearsal)) as ended:
                for name, status in ended:
                    lines, job_failed = outcome_lines(name, status, logs)
                    print(lines[0], flush=True)
                    summary += lines
                    failed |= job_failed
                    if name in BENCHMARKS:
                        summary += result_lines(name, out, begin)
    except KeyboardInterrupt:
        return [*summary, "interrupted: the rest was not run"], True
    return summary, failed


# --- jobs ---


def command(job: Job, tests: Sequence[str], out: Path) -> list[str]:
    """Return the command of a job, which `timeout` stops at its time limit."""
    options = [*job.arguments, "--tb=short", "-p", "no:cacheprovider"]
    if job.name in BENCHMARKS:
        options += [f"--results={out.resolve()}", f"--deadline={job.seconds - OVERTIME}"]
    if job.name == "tests":
        options += tests
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            options += ["--timeout", str(TEST_SECONDS)]
    seconds = "0" if math.isinf(job.seconds) else str(job.seconds)  # 0: no limit
    return ["timeout", "--signal=INT", f"--kill-after={GRACE}", seconds, sys.executable, "-m", "pytest", *options]


def environment(rehearsal: bool) -> dict[str, str]:
    paths = [str(results.ROOT / folder) for folder in (".", "bench", "kernels", "pipelines")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    variables["COLUMNS"] = "160"  # pytest cuts the messages of failures at this width
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    return {**inherited, **variables, **(REHEARSAL if rehearsal else {})}


def run_benchmark(name: str, out: Path, rehearsal: bool, *more: str) -> int:
    """Run a benchmark in the terminal, without a log, and return pytest's exit status."""
    arguments = [*command(JOBS[name], [], out), *more]
    process = subprocess.Popen(arguments, cwd=results.ROOT, env=environment(rehearsal), start_new_session=True)
    try:
        return process.wait()
    finally:
        kill(process)


def run_jobs(commands: dict[str, list[str]], logs: Path, rehearsal: bool) -> Generator[tuple[str, int]]:
    """Run the commands of jobs in parallel; yield name and exit status of each job, in the order of `commands`.

    Kill the remaining children of a job before it is yielded, and all jobs if the caller stops iterating or presses
    Ctrl-C.
    """
    processes = {}
    try:
        for name, arguments in commands.items():
            processes[name] = start(name, arguments, logs, rehearsal)
        for name, process in processes.items():
            status = process.wait()
            kill(process)
            yield name, status
    finally:
        for process in processes.values():
            kill(process)


def start(name: str, arguments: list[str], logs: Path, rehearsal: bool) -> subprocess.Popen:
    folder = logs / name
    folder.mkdir(parents=True)
    threads = {} if name in BENCHMARKS else {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # benchmarks run alone
    threads |= {"OMP_NUM_THREADS": "1"} if name == "tests" else {}
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            arguments,
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


def outcome_lines(name: str, status: int, logs: Path) -> tuple[list[str], bool]:
    """Return pytest's totals, failures and skips from the log of a job, and whether the job failed.

    A file that cannot be collected because a package is missing is listed with the package, not as a failure.
    """
    log = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    totals = re.findall(r"^(?:=+ )?((?:\d+ |no tests ran).*in [\d.]+s.*?)(?: =+)?$", log, re.MULTILINE)
    total = f"{name}: {totals[-1]}" if totals else f"{name}: its log ends with {''.join(log.splitlines()[-1:])!r}"
    _, summarized, short_summary = log.rpartition(" short test summary info ")
    lines = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*", short_summary, re.MULTILINE) if summarized else []
    section = r"^ImportError while importing test module '(.+)'\.\n(?:(?!___).*\n)*?E   ModuleNotFoundError: .*'(.+)'"
    absent = [(os.path.relpath(x, results.ROOT), module) for x, module in re.findall(section, log, re.MULTILINE)]
    absent = {file: module for file, module in absent if not module.startswith("dcvae_")}
    if absent:
        total += f"; not collected: {', '.join(f'{file} (needs {module})' for file, module in absent.items())}"
    lines = [line for line in lines if line.split()[1] not in absent]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    problem = ""
    if status in STOPPED:
        problem = f"; {STOPPED[status]}"
    # Status 1 means failures or files that could not be collected, and 5 that no test was selected.
    elif status not in (0, 1, 5) or (status == 1 and not failures and not absent):
        problem = f"; exit status {status}, see its log"
    facts = logs / name / "summary.txt"
    lines += facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return [total + problem, *lines], bool(failures or problem)


def result_lines(name: str, out: Path, begin: int) -> list[str]:
    """Return the tables of a benchmark's result, the measurements without time left, and missing packages.

    Args:
        begin: time in nanoseconds; older result files are ignored.
    """
    paths = [path for path in out.glob(f"*/{name}.json") if path.stat().st_mtime_ns >= begin]
    if not paths:
        return [f"{name}: no result file"]
    document: Document = results.read(paths[0])
    lines = [str(paths[0]), *tables.tables(document).replace("\n\n", "\n").splitlines()]
    cells = [cell for row in document["rows"] for cell in row["cells"]]
    for reason in results.UNMEASURED:
        count = sum(reason in (cell["reason"], cell["graph_reason"]) for cell in cells)
        lines += [f"{reason}: {count} of {len(cells)} measurements"] if count else []
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
