"""Print the cost on the CPU of one DC-VAE call of each op as JSON: microseconds, function calls and launches.

The ops are `info_nce`, and `spectral_norm` of as many layers as DC-VAE's encoder and discriminator have together.

No GPU is needed: Triton compiles the kernels for sm_90, and a stub driver launches nothing. The tensors are on the CPU
and the results are undefined. Replacing the driver affects the whole process, so this is a script; run it without
TRITON_INTERPRET. The time that CUDA and Triton's launcher spend on a real launch is not included.
"""

import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import dcvae_kernels
from checks import Weights
from dcvae_kernels.triton import info_nce as triton_info_nce
from dcvae_kernels.triton import launch
from dcvae_kernels.triton import spectral_norm as triton_spectral_norm

SCALES, BATCH, KEYS, DIM = 2, 128, 8096, 16
CONVOLUTIONS, LINEAR = 20, 3  # of DC-VAE's networks for 32×32
CAPABILITY, MULTIPROCESSORS, MAX_SHARED = 90, 132, 232448  # H100
WARM_UP, REPEATS, CALLS = 20, 300, 6


class StubUtils:
    """Replacement for Triton's functions that load kernels."""

    loaded = 0

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Return module, function, registers per thread, spilled registers and maximum threads per block."""
        StubUtils.loaded += 1
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED, "multiprocessor_count": MULTIPROCESSORS}

    def unload_module(self, _: int) -> None:
        pass


class StubLauncher:
    """Replacement for the compiled code that launches a kernel. Like it, calls the hooks of profilers."""

    launches = 0

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, enter: Any, leave: Any, *_
    ) -> None:
        StubLauncher.launches += 1
        if enter is not None:
            enter(metadata)
        if leave is not None:
            leave(metadata)


class StubDriver:
    """The part of Triton's driver interface that compiling and launching use."""

    utils, launcher_cls = StubUtils(), StubLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def replace_device() -> None:
    """Make Triton compile for an H100 and launch nothing, and make impl="triton" accept tensors on the CPU."""
    driver.set_active(StubDriver())  # type: ignore[arg-type]
    for name in ("info_nce", "spectral_norm", "spectral_norm_autograd"):
        module: Any = sys.modules[f"dcvae_kernels.{name}"]
        module.obstacle_to_triton = lambda device: None
    for name, value in (("_multiprocessors", MULTIPROCESSORS), ("_capability", CAPABILITY)):
        setattr(triton_info_nce, name, lambda device, value=value: value)


def info_nce_calls() -> dict[str, Callable[[], Any]]:
    """Return the `passes` with a frozen queue."""
    q = torch.randn(SCALES, BATCH, DIM, requires_grad=True)
    k, queue = torch.randn(SCALES, BATCH, DIM), torch.randn(SCALES, KEYS, DIM)
    grad_output = torch.ones(())

    def forward() -> Tensor:
        return dcvae_kernels.info_nce(q, k, queue, temperature=0.07, impl="triton")

    return passes(forward, [q], grad_output)


def passes(forward: Callable[[], Any], inputs: Sequence[Tensor], grad_output: Any) -> dict[str, Callable[[], Any]]:
    """Return the forward pass without and with gradients, and the forward and backward pass."""

    def no_grad() -> Any:
        with torch.no_grad():
            return forward()

    return {
        "forward without gradient": no_grad,
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(forward(), inputs, grad_output),
    }


def normalized_network() -> tuple[nn.Module, list[Tensor]]:
    """Return the module and the weights before normalization."""
    convolutions, linear = [nn.Conv2d(8, 8, 3) for _ in range(CONVOLUTIONS)], [nn.Linear(8, 8) for _ in range(LINEAR)]
    net = dcvae_kernels.spectral_norm(Weights(*convolutions, *linear), impl="triton")
    return net, [p for name, p in net.named_parameters() if name.endswith("original")]


def spectral_norm_calls() -> dict[str, Callable[[], Any]]:
    """Return the `passes` of an update of all layers, in training mode."""
    net, weights = normalized_network()
    return passes(net, weights, [torch.randn_like(weight) for weight in weights])


def compiled_for_unaligned_gradients() -> int:
    """Return how many kernels are compiled for gradients whose addresses are not multiples of 16, after aligned ones.

    Triton compiles different code for such integers, also if they are elements of a tuple.
    """
    net, weights = normalized_network()
    loaded = []
    for offset in (0, 1):
        for cache in (launch._COMPILED, triton_spectral_norm._LAYOUTS, triton_spectral_norm._PLANS):
            cache.clear()  # so that Triton inspects the arguments again
        grad_outputs = [torch.randn(x.numel() + 1)[offset:][: x.numel()].view_as(x) for x in weights]
        torch.autograd.grad(net(), weights, grad_outputs)
        loaded.append(StubUtils.loaded)
    return loaded[1] - loaded[0]


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Return the minimum and the median time of a call."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return {"min": round(min(times), 1), "median": round(statistics.median(times), 1)}


def function_calls(call: Callable[[], Any]) -> dict[str, Any]:
    """Count the function calls of a call, without the functions of this file.

    A Python function is attributed to dcvae_kernels or to torch, whichever is nearest in the call stack. The calls of
    Triton and of the standard library by dcvae_kernels are therefore calls of dcvae_kernels. Those of torch depend on
    its version.

    Returns:
        dcvae_kernels, torch: number of calls of Python functions; the resumption of a generator is a call, too.
        builtins: number of calls of functions written in C.
        functions: number of calls by function, for dcvae_kernels.
    """
    counts, functions = Counter(dcvae_kernels=0, torch=0, builtins=0), Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_filename == __file__:
            return
        if event == "c_call":
            counts["builtins"] += 1
        elif event == "call":
            caller = package(frame)
            counts[caller] += 1
            if caller == "dcvae_kernels":
                functions[f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counts | {"functions": dict(functions.most_common())}


def package(frame: Any) -> str:
    """Return "dcvae_kernels" or "torch", whichever is nearest in the call stack."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name in ("dcvae_kernels", "torch"):
            return name
        frame = frame.f_back
    raise AssertionError("neither dcvae_kernels nor torch is in the call stack")


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the number of launches, and the names of the kernels that a launch hook sees, such as that of Proton."""
    names = []

    def enter(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    before = StubLauncher.launches
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    return {"number": StubLauncher.launches - before, "hooked": names}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the results are uninitialized memory, and denormal numbers are slow
    replace_device()
    gc.disable()  # a collection can call Python functions and takes time
    costs = {}
    for op, calls in {"info_nce": info_nce_calls(), "spectral_norm": spectral_norm_calls()}.items():
        for name, call in calls.items():
            first = launches(call)
            for _ in range(WARM_UP):
                call()
            costs[f"{op}: {name}"] = {
                "microseconds": microseconds(call),
                "calls": function_calls(call),
                "first launches": first,
                "launches": launches(call),
            }
    print(
        json.dumps({"costs": costs, "compiled for unaligned gradients": compiled_for_unaligned_gradients()}, indent=1)
    )


if __name__ == "__main__":
    main()
