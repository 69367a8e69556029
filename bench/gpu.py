"""Everything that needs a GPU: its tests, the benchmarks, what came of them. Within eight minutes; training iterations
(`--only step`) and what makes them fast (`--only switches`) within another eight each.

Works from a plain checkout: Python 3.11, torch, Triton, pytest and pytest-benchmark are enough, nothing is installed
and nothing fetched. Other implementations are measured where they are installed, by `pip install -e ".[bench]"`. Fails
if a test does, or a benchmark of ours; a missed target is only reported.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import records
import tables

# Seconds, 480 in all, but those by themselves. When its time is over, a benchmark starts no further measurement, and
# has its overtime to finish the last one. What then goes on is told to stop, and after the grace it is ended.
TESTS_SECONDS, TESTS_GRACE = 170, 10
# Side by side, for most of their time goes into compiling, on one core each.
TESTS = {
    "tests of info_nce, sizes": ["tests/kernels/test_info_nce.py", "-k", "eager_against"],
    "tests of info_nce, the rest": ["tests/kernels/test_info_nce.py", "-k", "not eager_against"],
    "tests of the ops, all else": ["tests/kernels", "--ignore=tests/kernels/test_info_nce.py"],
    "tests of the project, all else": ["tests", "--ignore=tests/kernels"],
}
BENCHMARKS = {"info_nce": 130, "spectral_norm": 45, "pipelines": 50, "step": 420, "switches": 420}
BY_THEMSELVES = ("step", "switches")
OVERTIME, BENCHMARK_GRACE = 20, 5
NEEDED = ("torch", "triton", "pytest", "pytest_benchmark")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for <device>/<benchmark>.json; default: bench/results")
    parts = ("tests", *BENCHMARKS)
    parser.add_argument(
        "--only",
        choices=parts,
        nargs="+",
        metavar="PART",
        help=f"of {', '.join(parts)}; default: all but {' and '.join(BY_THEMSELVES)}",
    )
    parser.add_argument("--cpu-rehearsal", action="store_true", help="on the CPU, small; writes only where --out says")
    options = parser.parse_args(arguments)
    options.only = options.only or [part for part in parts if part not in BY_THEMSELVES]
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    if not options.cpu_rehearsal and not has_gpu():
        print("torch sees no CUDA device; --cpu-rehearsal shows what would run", file=sys.stderr)
        return 2

    summary, failed = [], False
    if "tests" in options.only:
        with ThreadPoolExecutor(len(TESTS)) as pool:
            results = list(pool.map(partial(run_tests, rehearsal=options.cpu_rehearsal), TESTS))
        summary += [line for line, _ in results]
        failed = any(part_failed for _, part_failed in results)
    with tempfile.TemporaryDirectory() as forgotten:
        out = options.out or (Path(forgotten) if options.cpu_rehearsal else records.COMMITTED)
        for name in (name for name in BENCHMARKS if name in options.only):
            path, status = run_benchmark(name, out, options.cpu_rehearsal)
            failed |= status != 0
            summary.append(f"{name}: {path}" if path else f"{name}: no result file")
            summary += summarised(records.read(path)) if path else []
    print("\n" + "\n".join(summary), flush=True)
    return int(failed)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_tests(name: str, rehearsal: bool) -> tuple[str, bool]:
    """Runs the tests of a part that are marked gpu: a line that says how it went, and whether it went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = run_pytest(
            [*TESTS[name], "-m", "gpu", "-q", "--continue-on-collection-errors", f"--junitxml={report}"],
            rehearsal,
            TESTS_SECONDS,
            TESTS_GRACE,
        )
        if not report.exists():
            return f"{name}: ended without a report, status {status}", True
        line, failed = tests_line(name, report, stopped=status is None)
        # 1 may stand for nothing worse than a file not collected, 5 for no tests.
        return line, failed or status not in (0, 1, 5, None)


def tests_line(name: str, report: Path, stopped: bool) -> tuple[str, bool]:
    """What a JUnit report says, in a line, and whether a test failed.

    A file that cannot be collected for want of somebody else's package is no failure, but is named with the package.
    """
    passed, skipped, failed, uncollected = 0, 0, [], []
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((x for x in case if x.tag in ("failure", "error")), None)
        text = "" if problem is None else problem.text or ""
        absent = re.search(r"ModuleNotFoundError: No module named '((?!dcvae_)[\w.]+)'", text)
        test = ".".join(filter(None, (case.get("classname"), case.get("name"))))
        if problem is None:
            is_skipped = case.find("skipped") is not None
            passed, skipped = passed + (not is_skipped), skipped + is_skipped
        elif absent and problem.get("message") == "collection failure":
            uncollected.append(f"{test} (needs {absent[1]})")
        else:
            failed.append(test)
    parts = [f"{name}: {passed} passed, {skipped} skipped, {len(failed)} failed"]
    parts += [f"failed: {', '.join(failed)}"] if failed else []
    parts += [f"not collected: {', '.join(uncollected)}"] if uncollected else []
    parts += [f"stopped after {TESTS_SECONDS} s, the rest not run"] if stopped else []
    return "; ".join(parts), bool(failed)


def run_benchmark(name: str, out: Path, rehearsal: bool, only: str | None = None) -> tuple[Path | None, int | None]:
    """Runs bench/test_NAME.py: the file it wrote, None if none, and pytest's status, None if it had to be stopped.

    Args:
        only: what pytest's -k takes.
    """
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{name}.json")}
    command = [f"bench/test_{name}.py", "-q", "-s", "--benchmark-quiet", f"--results={out.resolve()}"]
    command += [f"--deadline={BENCHMARKS[name]}"] + (["-k", only] if only else [])
    status = run_pytest(command, rehearsal, BENCHMARKS[name] + OVERTIME, BENCHMARK_GRACE)
    written = [path for path in out.glob(f"*/{name}.json") if path.stat().st_mtime_ns != before.get(path)]
    return (written[0] if written else None), status


def run_pytest(arguments: list[str], rehearsal: bool, seconds: float, grace: float) -> int | None:
    """pytest's exit status, or None if it was interrupted after `seconds`, and killed if not gone `grace` later."""
    paths = [str(records.ROOT / folder) for folder in (".", "kernels", "pipelines")]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")},
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": "", records.REHEARSAL_VARIABLE: "1"} if rehearsal else {}),
    }
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]
    print(f"\n$ pytest {' '.join(arguments)}", flush=True)
    process = subprocess.Popen(
        command, cwd=records.ROOT, env=environment, start_new_session=True, preexec_fn=_hear_interrupts
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then reports what it has
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            print(f"killed: it did not stop within {grace} s", flush=True)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
            process.wait()


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def summarised(document: dict[str, Any]) -> list[str]:
    """A screenful: times, targets, and by name what has none."""
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
    for reason in ("no time left", "not run"):
        lines += [f"{reason}: {names}"] if (names := named(document, reason)) else []
    absent = [package for package, version in document["packages"].items() if version is None]
    lines += [f"not installed: {', '.join(absent)}"] if absent else []
    return lines


def named(document: dict[str, Any], reason: str) -> str:
    """Rows, and in brackets the implementations, of which something was not measured for this reason."""
    rows = []
    for row in document["rows"]:
        cells = [cell for cell in row["cells"] if reason in (cell["reason"], cell["graph_reason"])]
        peers = dict.fromkeys(cell["peer"] for cell in cells)
        rows += [f"{row['name']} ({', '.join(peers)})"] if peers else []
    return ", ".join(rows)


if __name__ == "__main__":
    sys.exit(main())
