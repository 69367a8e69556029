"""Measurements that all benchmarks share, and the contents of their result files.

All implementations are timed by the same functions, after calls whose result is checked and which compile what is to be
compiled. Inputs stay where they are between calls, so small ones are in the cache for all of them.

wall   Time of a call from Python. pytest-benchmark times batches of calls by `torch.utils.benchmark.timer`, which waits
       for the device. `triton.testing.do_bench` would fill a buffer before each call to clear the L2 cache; while the
       GPU does that, Python runs ahead, which hides up to 0.1 ms of launches.
graph  Time of a call replayed from a CUDA graph: `triton.testing.do_bench_cudagraph`, which does not clear it either.

torch keeps its default settings: float32 products are not rounded to tf32.
"""

import contextlib
import gc
import importlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer, timer

import results
from results import NO_TIME, NOT_RUN, Document

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
REHEARSING = results.REHEARSAL_VARIABLE in os.environ
MODES = ("forward", "forward_backward")
TIMER = {
    "wall": "pytest-benchmark, torch.utils.benchmark.timer, warm cache",
    "graph": "triton.testing.do_bench_cudagraph, warm cache",
}
GRAPH_MS = 20  # calls in one graph take about as long
Outputs = tuple[list[Tensor], list[Tensor]]  # of an op, and the gradients in its inputs
Check = Callable[[Callable[[], Outputs]], Document]


class Unavailable(Exception):
    """Raised where something cannot be measured; the message is the reason, one short sentence."""


class Absent(Unavailable):
    """Raised where this machine lacks something; does not count as a failure, not even of our implementation."""


@dataclass(frozen=True)
class Benchmark:
    """Contents of a result file.

    Attributes:
        rows: problems, with a name, targets, `shrunk` for a rehearsal, and `description`: everything that distinguishes
            a problem and, of an op, the minimum of bytes and FLOPs
        packages: distributions whose versions it records
        on_cpu: whether times on a CPU are of interest; otherwise a run on a CPU is a rehearsal
    """

    name: str
    rows: Sequence[Any]
    peers: Iterable[str]
    packages: Sequence[str] = ()
    modes: Sequence[str] = MODES
    on_cpu: bool = False

    def document(self) -> Document:
        """Return the result file's contents before anything has run."""
        rehearsal = not ON_GPU and (REHEARSING or not self.on_cpu)
        empty = dict.fromkeys(("wall", "graph", "graph_reason", "peak_bytes", "launches", "errors"))
        cells = [{"peer": p, "mode": m, "reason": NOT_RUN, **empty} for p in self.peers for m in self.modes]
        rows = [row.shrunk() if rehearsal else row for row in self.rows]
        return {
            **results.environment(self.packages),
            "benchmark": self.name,
            "timer": TIMER,
            "rehearsal": rehearsal,
            "device_rates": device_rates(),
            "rows": [{**row.description(), "cells": [dict(cell) for cell in cells]} for row in rows],
        }

    def write(self, document: Document, folder: Path) -> None:
        targets = results.target_entries(document, {row.name: row.targets for row in self.rows})
        results.write(results.path_of(folder, document), {**document, "targets": targets})


def cases(*groups: Iterable[tuple[Any, str, str]]) -> pytest.MarkDecorator:
    """Parametrize a test by (row, implementation, mode), in the order in which they are measured."""
    every = [case for group in groups for case in group]
    return pytest.mark.parametrize(("row", "peer", "mode"), every, ids=[f"{r.name}-{p}-{m}" for r, p, m in every])


def timed(seconds: float, batch_seconds: float = 0.0, min_batches: int = 3) -> pytest.MarkDecorator:
    """Mark tests with how long `wall` measures, and how long each batch of calls takes at least."""
    if REHEARSING:
        seconds, batch_seconds, min_batches = 0.005, 0.0005, 3
    options = {"max_time": seconds, "min_time": batch_seconds, "min_rounds": min_batches}
    return pytest.mark.benchmark(timer=timer, disable_gc=True, **options)


def fill(
    document: Document,
    benchmark: Any,
    out_of_time: bool,
    row: Any,
    peer: str,
    mode: str,
    measure: Callable[[Document, Any, Any, str, str], None],
) -> None:
    """Measure a case, or note the reason why it cannot be measured, and print the result.

    Args:
        measure: fills a cell, given the cell, pytest-benchmark's fixture, row, implementation and mode. Any exception
            but Absent is a failure of the test if the implementation is ours.
    """
    (cells,) = (r["cells"] for r in document["rows"] if r["name"] == row.name)
    (cell,) = (c for c in cells if c["peer"] == peer and c["mode"] == mode)
    failure, reason = None, ""
    try:
        if out_of_time:
            raise Unavailable(NO_TIME)
        measure(cell, benchmark, row.shrunk() if document["rehearsal"] else row, peer, mode)
        cell["reason"] = None
    except Exception as error:
        failure, reason = error, str(error) if isinstance(error, Unavailable) else one_sentence(error)
        cell.update({"reason": None, "graph_reason": reason} if cell["wall"] else {"reason": reason})
    times = [f"{cell[timing]['median_us']:,.1f}" if cell[timing] else "–" for timing in ("wall", "graph")]
    print(f"{row.name:12} {peer:17} {mode:17} {times[0]:>12} {times[1]:>12} µs  {reason}", flush=True)
    if failure is not None:
        benchmark.skipped = True
        if not device_works():
            pytest.exit(f"{peer} in row {row.name} left the device unusable: {reason}", returncode=3)
        if peer == "ours" and not out_of_time and not isinstance(failure, Absent):
            pytest.fail(reason, pytrace=False)


def one_sentence(error: BaseException) -> str:
    """Return an error message that is short enough for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    # Compiler errors contain a traceback of a subprocess; its last line is the actual error.
    quoted = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    text = f"{type(error).__name__}: {quoted[-1] if quoted else lines[0] if lines else 'no message'}"
    return text if len(text) <= 160 else text[:159] + "…"


def imported(module: str, package: str) -> ModuleType:
    """
    Raises:
        Absent: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == module.partition(".")[0]:
            raise Absent(f"{package} is not installed") from None
        raise


def require_gpu(reason: str) -> None:
    if not ON_GPU:
        raise Unavailable(reason)


def device_works() -> bool:
    """Return False after an error from which a CUDA process cannot recover, such as an illegal access."""
    try:
        torch.ones(1, device=DEVICE).item()
    except RuntimeError:
        return False
    return True


# --- measurements ---


def make_call(
    mode: str, op: Callable[[], list[Tensor]], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None = None
) -> Callable[[], Outputs]:
    """Return the call that is timed: it returns the outputs of an op and, in forward_backward, the gradients."""

    @torch.no_grad()
    def forward() -> Outputs:
        return op(), []

    def forward_backward() -> Outputs:
        outputs = op()
        return outputs, list(torch.autograd.grad(outputs, inputs, grad_outputs))

    return forward if mode == "forward" else forward_backward


def relative_errors(name: str, outputs: Outputs, expected: Outputs, tolerances: tuple[float, float]) -> Document:
    """Return the largest errors of outputs, called `name`, and of gradients, if any: relative, by Frobenius norm.

    Raises:
        Unavailable: an error is larger than its tolerance, or a shape is wrong.
    """
    errors = {}
    for what, tensors, exact, tolerance in zip((name, "gradient"), outputs, expected, tolerances, strict=True):
        if what == "gradient" and not tensors:
            continue
        if [x.shape for x in tensors] != [y.shape for y in exact]:
            raise Unavailable(f"its {what} has a wrong shape")
        relative = [(x.detach().double() - y).norm() / y.norm() for x, y in zip(tensors, exact, strict=True)]
        worst = torch.stack(relative).max().item()  # NaN if one is
        if not worst <= tolerance:
            raise Unavailable(f"its {what} is wrong by {worst:.3%}")
        errors[f"{what}_error"] = float(f"{worst:.3g}")
    return errors


def measure_op(cell: Document, benchmark: Any, call: Callable[[], Outputs], check: Check) -> None:
    """Fill the cell of an op.

    Args:
        check: takes a function that makes the call, once, and returns its outputs; returns their errors, or raises
            Unavailable if they are too large.
    """
    cell["errors"] = check(call)
    for _ in range(3):  # warm-up, so that pytest-benchmark chooses the right number of calls in a batch
        call()
    cell["wall"] = wall(benchmark, call)
    cell["peak_bytes"], events = peak_bytes(call), device_events(call)
    cell["launches"] = len(events) if events else None
    if ON_GPU:
        cell["graph"] = graph(call, check)


def wall(benchmark: Any, call: Callable[[], Any], iterations: int = 1) -> dict[str, float]:
    """Return the time of an iteration in µs, if a call makes `iterations` of them: median and quartiles of batches."""
    benchmark(call)
    stats = benchmark.stats.stats
    median, q1, q3 = (round(x * 1e6 / iterations, 3) for x in (stats.median, stats.q1, stats.q3))
    calls = benchmark.stats.iterations * iterations
    return {"median_us": median, "q1_us": q1, "q3_us": q3, "batches": stats.rounds, "calls_per_batch": calls}


def graph(call: Callable[[], Outputs], check: Check) -> dict[str, float]:
    """Return the time of a replayed call in µs, after checking the outputs of a replay."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()
    try:
        check(captured(call))
        times: Any = do_bench_cudagraph(call, rep=GRAPH_MS, quantiles=[0.5, 0.25, 0.75])
    except Exception:
        # A failed capture leaves the random generator in capture mode, in which drawing raises. A new one resets it.
        with contextlib.suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=DEVICE)
        raise
    return {name: round(time * 1e3, 3) for name, time in zip(("median_us", "q1_us", "q3_us"), times, strict=True)}


def captured(call: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Return a function that replays a CUDA graph of a call and returns its outputs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def fastest(calls: Sequence[Callable[[], Any]]) -> int:
    """Return the index of the fastest call; calls that raise are left out unless all do."""
    times: dict[int, float] = {}
    for index, call in enumerate(calls):
        try:
            call()
            measurement = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[index] = measurement.blocked_autorange(min_run_time=0.001 if REHEARSING else 0.05).median
        except Exception:
            if index == len(calls) - 1 and not times:
                raise
    return min(times, key=times.__getitem__)


def free_memory() -> None:
    """Return unused memory to the GPU, and reset the peak."""
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_reserved() -> int | None:
    """Return the peak of memory reserved by torch since `free_memory`, in bytes; None on a CPU."""
    return torch.cuda.max_memory_reserved() if ON_GPU else None


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Return the peak of memory that a call allocates, results included, in bytes; None on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_events(call: Callable[[], Any]) -> list[Any] | None:
    """Return the kernels, copies and fills of a call; None on a CPU or without a working profiler."""
    if not ON_GPU:
        return None
    events = []
    try:
        for _ in range(2):  # the first time the profiler may miss the beginning
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            events = profile.events() or []
    except (AssertionError, RuntimeError):  # torch was built, or runs, without its tracing library
        return None
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return on_device or None


def device_rates() -> dict[str, float] | None:
    """Return the rates of large matrix products in TFLOP/s by dtype, and of "copy", reads plus writes, in GB/s.

    Returns None on a CPU.
    """
    if not ON_GPU:
        return None
    from triton.testing import do_bench

    rates = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        milliseconds: Any = do_bench(lambda a=a, b=b: a @ b, return_mode="median")
        rates[str(dtype).removeprefix("torch.")] = round(2 * size**3 / milliseconds / 1e9, 1)
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    return {**rates, "copy": round(2 * source.numel() / milliseconds / 1e6, 1)}
