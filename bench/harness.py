"""How every benchmark measures: time, graph replay, memory, launches, and what the device can do at best.

On a GPU time is taken by CUDA events around batches of calls, on a CPU by the clock. All implementations are measured
by the same functions, after a warm-up that includes any compiling. Inputs stay where they are between calls, so that
small ones are in the cache, for everybody. torch's settings are its defaults: no float32 product is rounded to tf32.
"""

import contextlib
import gc
import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

MODES = ("forward", "forward_backward")
BATCH_SECONDS, MEASURE_SECONDS, WARMUP_SECONDS = (0.01, 0.3, 0.05) if ON_GPU else (0.002, 0.02, 0.002)
MIN_BATCHES, MAX_BATCHES = 5, 50
# Calls in one captured graph: launching a graph costs microseconds, which are not the operation's.
CALLS_PER_GRAPH = 10


class Unavailable(Exception):
    """Why something is not measured, in one short sentence."""


class Absent(Unavailable):
    """It needs what this machine does not have: no mistake, not even of ours."""


def one_sentence(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    # Compiler errors contain a traceback of a subprocess; its last line is the actual error.
    quoted = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    text = f"{type(error).__name__}: {quoted[-1] if quoted else lines[0] if lines else 'no message'}"
    return text if len(text) <= 160 else text[:159] + "…"


def device_works() -> bool:
    """False after an error that no CUDA process recovers from, such as an access outside an allocation."""
    try:
        torch.ones(1, device=DEVICE).item()
    except RuntimeError:
        return False
    return True


def free_memory() -> None:
    """On a GPU, gives back what nobody refers to."""
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


def _cuda_timer() -> Callable[[], float]:
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    now = 0.0

    def timer() -> float:
        nonlocal last, now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        # Summed up here because the events' own float32 cannot tell microseconds apart once minutes have passed.
        now += last.elapsed_time(event) / 1000
        last = event
        return now

    return timer


# Seconds on the device's clock, once it has done all that was asked of it so far. For pytest-benchmark too.
timer = _cuda_timer() if ON_GPU else time.perf_counter


def seconds_per_call(call: Callable[[], Any]) -> float:
    """A rough figure, and the warm-up: after it nothing is left to compile, and the device's clock is up."""
    call()
    calls, seconds, start = 1, 0.0, time.perf_counter()
    while seconds < BATCH_SECONDS / 2 or time.perf_counter() - start < WARMUP_SECONDS:
        begin = timer()
        for _ in range(calls):
            call()
        seconds = timer() - begin
        if seconds < BATCH_SECONDS / 2:
            calls *= 2
    return seconds / calls


def measure(
    benchmark: Any,
    call: Callable[[], Any],
    calls: int = 1,
    measure_seconds: float = MEASURE_SECONDS,
    min_batches: int = MIN_BATCHES,
) -> dict[str, float]:
    """The time of one operation in µs, when `call` does `calls` of them: median and quartiles over batches.

    Args:
        benchmark: pytest-benchmark's fixture, made with `timer`.
        measure_seconds: how long it measures, warm-up apart; longer if that is less than `min_batches`.
    """
    seconds = seconds_per_call(call)
    iterations = max(1, min(1000, math.ceil(BATCH_SECONDS / seconds)))
    rounds = max(min_batches, min(MAX_BATCHES, int(measure_seconds / (iterations * seconds))))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
    stats = benchmark.stats.stats
    median, q1, q3 = (round(x * 1e6 / calls, 3) for x in (stats.median, stats.q1, stats.q3))
    return {"median_us": median, "q1_us": q1, "q3_us": q3, "batches": rounds, "calls_per_batch": iterations * calls}


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """`CALLS_PER_GRAPH` calls as one CUDA graph: what replays it, and the last call's result, filled by the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    result = None
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS_PER_GRAPH):
                result = call()
    except Exception:
        # A failed capture leaves the random generator in capture mode, in which drawing raises. A new one resets it.
        with contextlib.suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=DEVICE)
        raise
    return graph.replay, result


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """The most memory that one call holds beyond what was allocated before, its results included. None on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def reset_peak() -> None:
    """Forget what memory was needed until now, and give back what nobody refers to."""
    free_memory()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def peak_since_reset() -> int | None:
    """The most memory that was taken from the device since, in bytes, with what already was. None on a CPU."""
    return torch.cuda.max_memory_reserved() if ON_GPU else None


def launches(call: Callable[[], Any]) -> int | None:
    """How many kernels, copies and fills one call puts on the device. None on a CPU, or without a working profiler."""
    events = device_events(call)
    return None if events is None else len(events)


def waiting_share(call: Callable[[], Any], wall_us: float) -> float | None:
    """Return a lower bound of the share of time in which the device is idle, or None on a CPU or without a profiler.

    The profiler makes kernels slower, especially in CUDA graphs, so the true idle share may be larger.

    Args:
        call: uses a single stream.
        wall_us: time of one call without the profiler, in µs.
    """
    events = device_events(call)
    if events is None:
        return None
    return float(f"{max(0.0, 1 - sum(e.time_range.elapsed_us() for e in events) / wall_us):.3g}")


def device_events(call: Callable[[], Any]) -> list[Any] | None:
    """Kernels, copies and fills of one call. None on a CPU, or without a working profiler."""
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
    except (AssertionError, RuntimeError):  # where torch was built, or runs, without its tracing library
        return None
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return on_device or None


def device_rates() -> dict[str, float] | None:
    """What the device reaches with torch alone: products of large matrices in TFLOP/s, copying in GB/s. None on a CPU.

    The keys are the dtypes' names, and "copy": bytes read plus bytes written.
    """
    if not ON_GPU:
        return None
    rates = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds = _median_seconds(lambda a=a, b=b: a @ b)
        rates[str(dtype).removeprefix("torch.")] = round(2 * size**3 / seconds / 1e12, 1)
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rates["copy"] = round(2 * source.numel() / _median_seconds(lambda: target.copy_(source)) / 1e9, 1)
    return rates


def _median_seconds(call: Callable[[], Any], batches: int = 15) -> float:
    calls = max(1, math.ceil(BATCH_SECONDS / seconds_per_call(call)))
    times = []
    for _ in range(batches):
        begin = timer()
        for _ in range(calls):
            call()
        times.append((timer() - begin) / calls)
    return sorted(times)[batches // 2]
