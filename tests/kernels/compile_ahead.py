"""Compile the launches of a Triton module for GPUs that need not be present, and report registers, spills and memory.

Launches are recorded instead of executed, so exactly the programs of the launch code are compiled. Run as a script with
`info_nce` or `spectral_norm`, this prints the resources of the kernels as JSON; with `--all`, for all configurations.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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
    """

    registers: int
    spilled: int
    shared: int


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


def compile_all(launches: Iterable[Launch], capabilities: Iterable[int]) -> dict[tuple[Launch, int], Resources]:
    """Compile every launch for every compute capability (80 is sm_80), on all cores."""
    jobs = [(launch, capability) for launch in dict.fromkeys(launches) for capability in capabilities]
    with ProcessPoolExecutor() as pool:
        return dict(zip(jobs, pool.map(_compile, jobs), strict=True))


def _compile(job: tuple[Launch, int]) -> Resources:
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
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(usage["REG"], max(usage["STACK"], usage["LOCAL"]), compiled.metadata.shared)


def _path(name: Any, index: dict[str, int]) -> tuple[int, ...]:
    """Return the path of an argument, or of element i of a tuple argument if name is (name, i)."""
    return (index[name],) if isinstance(name, str) else (index[name[0]], name[1])


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
        info_nce.forward(Inputs(q, temperature, q, keys, valid, ids, key_ids), settings, [True] * 5)
    inputs, settings = Inputs(q, learned, q, None, None, ids, ids), settings._replace(symmetric=True)
    grad_output, state = empty(dtype=torch.float32), empty(2, 3, queries, dtype=torch.float32)
    info_nce.backward_sweep(inputs, settings, grad_output, state, wrt_keys=False, with_dtemperature=True)


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
    plan = spectral_norm.make_plan(Layers(weights, us, vs, [0] * layers))
    assert plan is not None
    _, saved = spectral_norm.update(plan, weights, 2, 1e-12)
    spectral_norm.gradients(plan, saved, weights)


if __name__ == "__main__":
    operation, *options = sys.argv[1:]
    record_all = {"info_nce": info_nce_launches, "spectral_norm": spectral_norm_launches}[operation]
    launches = record_all(full=options == ["--all"])
    results = compile_all(launches, (80, 90, 100))
    report = [launches[launch] | {"capability": x} | asdict(result) for (launch, x), result in results.items()]
    print(json.dumps(report))
