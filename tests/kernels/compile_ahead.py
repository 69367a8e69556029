"""Compile the launches of a Triton module for GPUs that need not be present, and report registers, spills, memory and
instructions.

Launches are recorded instead of executed, so exactly the programs of the launch code are compiled. Run as a script with
`info_nce` or `spectral_norm`, this prints the resources of the kernels as JSON; with `--all`, for all configurations;
with `--instructions`, also the instructions per pair. `--rows` prints a Markdown table of the kernels that the rows of
the benchmark launch on an H100; `info_nce --rows --json` prints JSON.
"""

import argparse
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcvae_kernels.arguments import Inputs, Settings
from dcvae_kernels.reference import Layers
from dcvae_kernels.triton import info_nce, spectral_norm
from sass import TENSOR_CORES, instructions_per_tile, warp_flops

BENCH = Path(__file__).parents[2] / "bench"
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = (80, 90, 100)
# An H100 SXM at its boost clock: 4 × 32 lanes per multiprocessor; dense bfloat16 products, twice as fast as tf32.
MULTIPROCESSORS = 132
LANE_INSTRUCTIONS_PER_US = MULTIPROCESSORS * 128 * 1755
FLOPS_PER_US = 989e6
BYTES_PER_US = 3.35e6
REGISTERS = 65536  # of a multiprocessor
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """Module and name of a kernel, and the types, constants and options of one launch."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel.

    Attributes:
        registers: registers per thread.
        spilled: bytes of local memory per thread, where spilled registers are stored.
        shared: bytes of shared memory per program.
        repeated_rows: whether several warps compute the same rows of a product on tensor cores.
        pair_instructions: instructions × lanes per pair of rows in the main loop. None if the kernel visits no pairs or
            was not disassembled.
        pair_flops: FLOPs on tensor cores per pair in the main loop, except on sm_100. Those of tf32 count twice: they
            take twice as long as those of bfloat16.
        tensor_cores: the instruction that uses them: "HGMMA" (sm_90), "UTCHMMA" (sm_100), "HMMA" or "".
    """

    registers: int
    spilled: int
    shared: int
    repeated_rows: bool
    pair_instructions: float | None = None
    pair_flops: float = 0
    tensor_cores: str = ""


def record(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """Return the kernel launches that `call` would make; its tensors can be meta tensors."""
    launches = []

    class Recorder:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append(_launch(module, self.name, self.kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name, x in vars(module).items() if isinstance(x, triton.JITFunction)]:
            patch.setattr(module, name, Recorder(name))
        call()
    return launches


def _launch(module: ModuleType, name: str, kernel: Any, args: tuple, options: dict[str, Any]) -> Launch:
    """Specialise arguments as Triton does: None, 1 and constexprs are constants, multiples of 16 are marked aligned."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {key: options.pop(key) for key in list(options) if key in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
            aligned.append(parameter.name)
        elif isinstance(value, tuple):  # of addresses
            signature.append((parameter.name, ("i64",) * len(value)))
            if specialized:
                aligned += [(parameter.name, i) for i in range(len(value))]
        elif parameter.is_constexpr or value is None or (specialized and value == 1 and isinstance(value, int)):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, int):
            signature.append((parameter.name, "i32"))
            if specialized and value % 16 == 0:
                aligned.append(parameter.name)
        else:
            signature.append((parameter.name, "fp32"))
    return Launch(
        module.__name__, name, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
    )


def tile(launch: Launch) -> tuple[int, int] | None:
    """Return the rows that a program owns and those of the other operand that it loads at a time, or None."""
    sizes = dict(launch.constants)
    own, other = sizes.get("BLOCK_X"), sizes.get("BLOCK_Y")
    return None if own is None or other is None else (own, other)


def compile_all(jobs: Iterable[tuple[Launch, int]], disassemble: bool) -> dict[tuple[Launch, int], Resources]:
    """Compile launches for the compute capability of each (80 is sm_80), on all cores.

    With `disassemble`, count the instructions of kernels that visit pairs of rows. This takes half a second per kernel.
    """
    jobs = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor() as pool:
        return dict(zip(jobs, pool.map(partial(_compile, disassemble), jobs), strict=True))


def _compile(disassemble: bool, job: tuple[Launch, int]) -> Resources:
    launch, capability = job
    kernel = getattr(__import__(launch.module, fromlist=["_"]), launch.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(index[name],): value for name, value in launch.constants},
        attrs={_path(name, index): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _output("cuobjdump", "--dump-resource-usage", file.name)
        listing = _output("nvdisasm", "--print-code", file.name) if disassemble and tile(launch) else None
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    spilled, shared = max(usage["STACK"], usage["LOCAL"]), compiled.metadata.shared
    resources = Resources(usage["REG"], spilled, shared, repeats_rows(compiled.asm["ttgir"]))
    return resources if listing is None else _per_pair(resources, launch, listing, compiled.metadata.num_warps)


def _per_pair(resources: Resources, launch: Launch, listing: str, warps: int) -> Resources:
    """Add the instructions per pair of rows, given the output of nvdisasm."""
    constants, size = dict(launch.constants), tile(launch)
    assert size is not None
    counts = instructions_per_tile(listing, d_steps=triton.cdiv(constants["D"], constants["BLOCK_D"]))
    warps_per_pair = warps / math.prod(size)
    return replace(
        resources,
        pair_instructions=32 * counts.total() * warps_per_pair,
        pair_flops=sum(warp_flops(opcode) * count for opcode, count in counts.items()) * warps_per_pair,
        tensor_cores=next((name for name in TENSOR_CORES if any(opcode.startswith(name) for opcode in counts)), ""),
    )


def _output(program: str, *arguments: str) -> str:
    return subprocess.run([BIN / program, *arguments], check=True, capture_output=True, text=True).stdout


def repeats_rows(ttgir: str) -> bool:
    """Return whether a product on tensor cores has more warps along its rows than it has rows for, 16 each."""
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma<.*warpsPerCTA = \[(\d+)", ttgir, re.MULTILINE)
    warps = {layout: int(count) for layout, count in layouts}
    products = re.findall(r"dot .* -> tensor<(\d+)x\d+x\w+, (#\w+)>", ttgir)
    return any(16 * warps.get(layout, 0) > int(rows) for rows, layout in products)


def _path(name: Any, index: dict[str, int]) -> tuple[int, ...]:
    """Return the path of an argument, or of element i of a tuple argument if name is (name, i)."""
    return (index[name],) if isinstance(name, str) else (index[name[0]], name[1])


@contextmanager
def assumed_gpu(capability: int, multiprocessors: int | None = None) -> Iterator[None]:
    """Context manager that makes the launch code of info_nce choose tiles for this GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(info_nce, "_capability", lambda device: capability)
        if multiprocessors is not None:
            patch.setattr(info_nce, "_multiprocessors", lambda device: multiprocessors)
        yield


def info_nce_launches(full: bool) -> dict[Launch, dict[str, Any]]:
    """Record the launches of info_nce for several D, dtypes and numbers of queries, with all options enabled.

    Args:
        full: use every D with few and with many queries, and vary the kind of maximum and the number of splits.
            Otherwise, use the shapes of DC-VAE and of a large batch.
    """
    dims = (16, 64, 128, 256, 512)
    shapes = itertools.product(dims, (128, 4096)) if full else ((16, 128), (128, 4096))
    launches = {}
    for (d, queries), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        for launch in record(info_nce, partial(_launch_everything, queries, d, dtype, full)):
            launches[launch] = {"kernel": launch.kernel, "D": d, "dtype": str(dtype).removeprefix("torch.")}
    return launches


def _launch_everything(queries: int, d: int, dtype: torch.dtype, full: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    valid, learned, ids = empty(dtype=torch.int64), empty(dtype=torch.float32), empty(queries, dtype=torch.int64)
    q, queue = empty(1, queries, d), empty(1, 8096, d)
    cases = [(queue, None)]
    if full:  # also with one split and with a few
        cases += [(queue, learned), (empty(1, 16, d), None), (queue[:, :300], None)]
    for keys, temperature in cases:
        key_ids = empty(keys.shape[1], dtype=torch.int64)
        settings = Settings(0.07, normalize=True, symmetric=False, reduction="mean", implementation="triton")
        inputs = Inputs(q, temperature, q, keys, valid, ids, key_ids)
        info_nce.forward(inputs, settings, [True] * 5)
        _backward_sweep(inputs, settings, empty(1, 3, queries, dtype=torch.float32), wrt_q=False, wrt_keys=True)
    inputs, settings = Inputs(q, learned, q, None, None, ids, ids), settings._replace(symmetric=True)
    info_nce.forward(inputs, settings, [False, False, False, True, True])
    _backward_sweep(inputs, settings, empty(2, 3, queries, dtype=torch.float32), wrt_q=True, wrt_keys=True)


def _backward_sweep(inputs: Inputs, settings: Settings, state: Tensor, wrt_q: bool, wrt_keys: bool) -> None:
    grad_output, learned = torch.empty((), device="meta"), inputs.temperature is not None
    info_nce.backward_sweep(inputs, settings, grad_output, state, wrt_q, wrt_keys, with_dtemperature=wrt_q and learned)


def benchmark_row_launches(capability: int) -> list[tuple[Any, list[Launch]]]:
    """Return every row of bench/test_info_nce.py and its launches, forward and backward, with the size of an H100."""
    sys.path.append(str(BENCH))
    rows = runpy.run_path(str(BENCH / "test_info_nce.py"))["ROWS"]  # this folder has a module of the same name
    with assumed_gpu(capability, MULTIPROCESSORS):
        return [(row, list(dict.fromkeys(record(info_nce, partial(_launch_row, row))))) for row in rows]


def _launch_row(row: Any) -> None:
    """Launch what `FusedInfoNCE` launches if q and, without a queue, k require gradients."""
    empty = partial(torch.empty, dtype=getattr(torch, row.dtype), device="meta")
    in_batch = row.queue is None
    q = empty(row.scales, row.batch, row.dim)
    queue = None if in_batch else empty(row.scales, row.queue, row.dim)
    inputs = Inputs(q, None, q, queue, None, None, None)
    settings = Settings(0.07, normalize=True, symmetric=row.symmetric, reduction="mean", implementation="triton")
    *_, state = info_nce.forward(inputs, settings, [not row.symmetric, False, False, in_batch, False])
    if state is not None:
        _backward_sweep(inputs, settings, state, wrt_q=row.symmetric, wrt_keys=True)


def benchmark_row_report() -> list[dict[str, Any]]:
    """Return the resources of each kernel of each row of the benchmark, compiled for sm_90."""
    rows = benchmark_row_launches(90)
    jobs = [(launch, 90) for _, launches in rows for launch in launches]
    resources = compile_all(jobs, disassemble=True)
    return [
        {"row": row.name, "kernel": launch.kernel, "dtype": row.dtype, "D": row.dim, "tile": tile(launch)}
        | {"pairs": row.scales * row.batch * (row.queue or row.batch)}
        | asdict(resources[launch, 90])
        for row, launches in rows
        for launch in launches
    ]


def markdown(programs: list[dict[str, Any]]) -> str:
    """Return a table of a report of the benchmark's rows.

    The bounds are for visiting each pair of the row once: instructions at the rate at which all lanes issue them, and
    products at the rate of the tensor cores.
    """
    header = "row|kernel|tile|registers|shared, KiB|instructions per pair|issue bound, µs|tensor bound, µs".split("|")
    lines = [header, ["---"] * 3 + ["---:"] * 5]
    for x in programs:
        line = [x["row"], f"`{x['kernel']}`", "", str(x["registers"]), f"{x['shared'] / 1024:.1f}", "", "", ""]
        if x["tile"]:
            issue = x["pairs"] * x["pair_instructions"] / LANE_INSTRUCTIONS_PER_US
            tensor = x["pairs"] * x["pair_flops"] / FLOPS_PER_US
            line[2] = "{} × {}".format(*x["tile"])
            line[5:] = f"{x['pair_instructions']:.1f}", f"{issue:.1f}", f"{tensor:.1f}" if tensor else ""
        lines.append(line)
    return table(lines)


def table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spectral_norm_launches(full: bool) -> dict[Launch, dict[str, Any]]:
    """Record the launches for one and for many layers, with two power iterations."""
    launches = {}
    for layers, dtype in itertools.product((1, 25, 100) if full else (1, 100), (torch.float32, torch.bfloat16)):
        for launch in record(spectral_norm, partial(_launch_update, layers, dtype)):
            launches[launch] = {"kernel": launch.kernel, "layers": layers, "dtype": str(dtype).removeprefix("torch.")}
    return launches


def _launch_update(layers: int, dtype: torch.dtype) -> None:
    weights = [torch.zeros(64, 32, 3, 3, dtype=dtype) for _ in range(layers)]
    us, vs = ([torch.zeros(n, dtype=dtype) for _ in weights] for n in (64, 288))
    spectral_norm._LAYOUTS.clear()  # layouts contain kernels
    spectral_norm._PLANS.clear()
    plan = spectral_norm.find_plan(Layers(weights, us, vs, [0] * layers))
    assert plan is not None
    saved = spectral_norm.update(plan, weights[0], 2, 1e-12)
    spectral_norm.gradients(plan.layout, *saved, weights)


def spectral_norm_rows() -> str:
    """Return a table of the launches of bench/test_spectral_norm.py, compiled for sm_90.

    The bound is the time in which memory delivers what a kernel reads and writes, if each tensor is moved once.
    """
    sys.path.append(str(BENCH))
    header = "row|kernel|programs|threads|registers|programs per multiprocessor|MB moved|bound, µs".split("|")
    lines = [header, ["---"] * 2 + ["---:"] * 6]
    for row in runpy.run_path(str(BENCH / "test_spectral_norm.py"))["ROWS"]:
        with torch.device("meta"):
            weights = [layer.get_parameter("weight").detach() for layer in row.layers()]
        elements = sum(weight.numel() for weight in weights)
        layout = spectral_norm.find_layout(weights, [0] * len(weights))
        moved = {
            "iterate_kernel": (layout.first_iteration, 4 * (elements + 2 * layout.workspace)),
            "divide_kernel": (layout.divide[True], 4 * 2 * elements),
            "inner_kernel": (layout.inner, 4 * 2 * elements),
            "gradient_kernel": (layout.gradient, 4 * 2 * elements),
        }
        launches = {}
        for launch in record(spectral_norm, partial(_launch_update, len(weights), torch.float32)):
            launches.setdefault(launch.kernel, launch)  # the first iteration; shapes are no part of the code
        resources = compile_all([(launches[kernel], 90) for kernel in moved], disassemble=False)
        for kernel, (launch, size) in moved.items():
            threads = 32 * launch.options["num_warps"]
            registers = resources[launches[kernel], 90].registers
            resident = REGISTERS // (threads * math.ceil(registers / 8) * 8)
            numbers = launch.grid[0], threads, registers, resident, f"{size / 1e6:.1f}", f"{size / BYTES_PER_US:.1f}"
            lines.append([row.name, f"`{kernel}`", *(f"{x:,}" if isinstance(x, int) else x for x in numbers)])
    return table(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=["info_nce", "spectral_norm"])
    for option in ("--all", "--instructions", "--rows", "--json"):
        parser.add_argument(option, action="store_true")
    options = parser.parse_args()
    if options.rows and options.operation == "spectral_norm":
        print(spectral_norm_rows())
    elif options.rows:
        programs = benchmark_row_report()
        print(json.dumps(programs) if options.json else markdown(programs))
    else:
        record_all = {"info_nce": info_nce_launches, "spectral_norm": spectral_norm_launches}[options.operation]
        report = {}
        for capability in CAPABILITIES:
            with assumed_gpu(capability):
                report |= {(launch, capability): x for launch, x in record_all(options.all).items()}
        resources = compile_all(report, options.instructions)
        print(json.dumps([x | {"capability": job[1]} | asdict(resources[job]) for job, x in report.items()]))
