"""Compiles the launches of a Triton module for GPUs that are not there, and reports what the compiler says of them.

Launches are recorded instead of executed, so the compiled programs are those that the launch code asks for. Run as a
script with `info_nce` or `spectral_norm`, prints the resources of kernels as JSON; with `--all`, of all configurations.
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
    """A kernel of a module, by name, with the types and constants that it was launched with."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """What a program needs: registers of a thread, bytes of local memory of a thread (spilled registers), of shared
    memory."""

    registers: int
    spilled: int
    shared: int


def record(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """Return the launches that `call` would make of the module's kernels; its tensors may be meta tensors."""
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
    """As Triton specialises arguments: None, 1 and constexprs are constants, multiples of 16 are known as such."""
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
    """Compiles each for each compute capability (80 is sm_80), on all cores."""
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
    """Of an argument, or of an element (name, i) of one that is a tuple."""
    return (index[name],) if isinstance(name, str) else (index[name[0]], name[1])


def info_nce_launches(full: bool) -> dict[Launch, dict[str, Any]]:
    """Record the launches of info_nce by D, dtype and number of queries, with all options on.

    Args:
        full: all D, each with few and many queries, also varying the kind of maximum and the number of splits.
            Otherwise the shapes of DC-VAE, and those of a large batch.
    """
    dims = (16, 64, 128, 256, 512)
    shapes = itertools.product(dims, (128, 4096)) if full else ((16, 128), (128, 4096))
    found = {}
    for (d, queries), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        for launch in record(info_nce, partial(_launch_everything, queries, d, dtype, full)):
            found[launch] = {"kernel": launch.kernel, "D": d, "dtype": str(dtype).removeprefix("torch.")}
    return found


def _launch_everything(queries: int, d: int, dtype: torch.dtype, full: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    valid, learned, ids = empty(dtype=torch.int64), empty(dtype=torch.float32), empty(queries, dtype=torch.int64)
    q, queue = empty(1, queries, d), empty(1, 8096, d)
    cases = [(queue, None)]
    if full:  # also one split, and few
        cases += [(queue, learned), (empty(1, 16, d), None), (queue[:, :300], None)]
    for keys, temperature in cases:
        key_ids = empty(keys.shape[1], dtype=torch.int64)
        settings = Settings(0.07, normalize=True, symmetric=False, reduction="mean", implementation="triton")
        info_nce.forward(Inputs(q, temperature, q, keys, valid, ids, key_ids), settings, [True] * 5)
    inputs, settings = Inputs(q, learned, q, None, None, ids, ids), settings._replace(symmetric=True)
    grad_output, state = empty(dtype=torch.float32), empty(2, 3, queries, dtype=torch.float32)
    info_nce.backward_sweep(inputs, settings, grad_output, state, wrt_keys=False, with_dtemperature=True)


def spectral_norm_launches(full: bool) -> dict[Launch, dict[str, Any]]:
    """Record the launches for one layer and for many, in one and in two iterations."""
    found = {}
    for layers, dtype in itertools.product((1, 25, 100) if full else (1, 100), (torch.float32, torch.bfloat16)):
        for launch in record(spectral_norm, partial(_launch_update, layers, dtype)):
            found[launch] = {"kernel": launch.kernel, "layers": layers, "dtype": str(dtype).removeprefix("torch.")}
    return found


def _launch_update(layers: int, dtype: torch.dtype) -> None:
    weights = [torch.zeros(64, 32, 3, 3, dtype=dtype) for _ in range(layers)]
    us, vs = ([torch.zeros(n, dtype=dtype) for _ in weights] for n in (64, 288))
    plan = spectral_norm.make_plan(Layers(weights, us, vs, [0] * layers))
    assert plan is not None
    _, saved = spectral_norm.update(plan, weights, 2, 1e-12)
    spectral_norm.gradients(plan, saved, weights)


if __name__ == "__main__":
    operation, *options = sys.argv[1:]
    recorded = {"info_nce": info_nce_launches, "spectral_norm": spectral_norm_launches}[operation]
    launches = recorded(full=options == ["--all"])
    results = compile_all(launches, (80, 90, 100))
    report = [launches[launch] | {"capability": x} | asdict(result) for (launch, x), result in results.items()]
    print(json.dumps(report))
