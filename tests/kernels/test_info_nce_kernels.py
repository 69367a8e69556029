"""Properties of the info_nce implementations other than their results: launches, memory, determinism, out-of-bounds
accesses, operators, and compiled resources of the Triton kernels on several GPU architectures."""

import textwrap
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dcvae_kernels
from checks import Implementation, compiled_ahead, device_kernels, leaves, poison_allocations, record_launches
from compile_ahead import repeats_rows
from dcvae_kernels import chunked, info_nce_autograd
from dcvae_kernels.arguments import Inputs, Settings
from sass import instructions_per_tile

triton_info_nce = pytest.importorskip("dcvae_kernels.triton.info_nce")

KERNELS = (
    "prepare_kernel",
    "sweep_kernel",
    "scores_kernel",
    "combine_kernel",
    "weights_kernel",
    "chunk_kernel",
    "project_kernel",
)


# Launches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("d", "dtype", "expected"),
    [
        (16, torch.float32, "sweep combine"),
        (64, torch.float32, "prepare sweep combine"),
        (16, torch.bfloat16, "prepare sweep combine"),
    ],
)
def test_frozen_keys_take_no_backward_launches(
    triton_on: Implementation, reduction: str, learned: bool, d: int, dtype: torch.dtype, expected: str
):
    (q,) = leaves(triton_on.randn(2, 9, d, dtype=dtype))
    k, queue = (triton_on.randn(2, n, d, seed=n, dtype=dtype) for n in (9, 40))
    temperature = torch.tensor(0.1, requires_grad=True) if learned else 0.1
    launches = []
    with record_launches(triton_info_nce, launches):
        loss, _ = triton_on.info_nce(q, k, queue, temperature=temperature, reduction=reduction, return_stats=True)
        loss.sum().backward()
    assert launches == [f"{name}_kernel" for name in expected.split()]
    assert q.grad is not None


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("queue", "sweep combine weights project"),
        ("in-batch", "sweep combine weights project"),
        ("symmetric", "prepare prepare scores combine prepare prepare prepare prepare chunk project project"),
    ],
)
def test_launches_if_keys_require_gradients(triton_on: Implementation, form: str, expected: str):
    q, k, queue = leaves(*(triton_on.randn(2, 9, 16, seed=i) for i in range(3)))
    launches = []
    with record_launches(triton_info_nce, launches):
        triton_on.info_nce(q, k, queue if form == "queue" else None, symmetric=form == "symmetric").backward()
    assert launches == [f"{name}_kernel" for name in expected.split()]


@pytest.mark.gpu
def test_only_our_kernels_and_the_scaling_are_launched(on_gpu: Implementation):
    (q,) = leaves(on_gpu.randn(2, 128, 16))
    k, queue = on_gpu.randn(2, 128, 16, seed=1), on_gpu.randn(2, 8096, 16, seed=2)
    grad_output = torch.ones(())

    def step() -> None:
        torch.autograd.grad(on_gpu.info_nce(q, k, queue), q, grad_output)

    step()
    kernels = device_kernels(step)
    assert len(kernels) == 3  # sweep, combine, and the multiplication by grad_output
    assert kernels[0].startswith("sweep_kernel") and kernels[1].startswith("combine_kernel")


# Memory ---------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.is_floating_point():  # the interpreter copies bytes
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("form", ["frozen", "queue", "in-batch", "symmetric"])
def test_logits_are_never_stored(on: Implementation, form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_info_nce, "CHUNK_BYTES", 1)  # the smallest chunk, one row of tiles
    b, k, d = (64, 2000, 4) if on.interpreted else (2048, 40_000, 8)
    if form in ("in-batch", "symmetric"):
        b = k = (1200 if form == "symmetric" else 200) if on.interpreted else 8192
    q, keys, queue = leaves(on.randn(b, d), on.randn(b, d, seed=1), on.randn(k, d, seed=2))
    with LargestTensor() as largest:
        if form in ("in-batch", "symmetric"):
            on.info_nce(q, keys, symmetric=form == "symmetric").backward()
        else:
            on.info_nce(q, keys, queue if form == "queue" else queue.detach()).backward()
    if on.impl == "torch":
        assert b * k > 4 * chunked.BLOCK_SCORES["cpu"]
        allowed = chunked.BLOCK_SCORES[on.device]
    else:
        splits = triton_info_nce.MAX_SPLITS
        sums = 2 * triton_info_nce._multiprocessors(q.device) * 128 * (d + 4) + splits * b
        planes, chunk, tiles = 3 * 64 * b, 128 * k, 3 * (b // 64 + 1) * b
        allowed = max(sums, planes, chunk, tiles) if form == "symmetric" else sums
    assert largest.elements <= max(allowed, b * d, k * d)
    assert largest.elements < b * k / 4


# Determinism, bounds --------------------------------------------------------------------------------------------------


def loss_rank_and_gradients(on: Implementation, q: Any, k: Any, queue: Any, **options: Any) -> list[Tensor]:
    """Return the loss, the rank and all gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, queue) if x is not None]
    loss, stats = on.info_nce(*inputs, return_stats=True, reduction="none", **options)
    grad_output = torch.linspace(-1, 2, loss.numel(), device=loss.device).view_as(loss)
    return [loss.detach(), stats.rank, *torch.autograd.grad(loss, inputs, grad_output)]


FORMS: dict[str, dict[str, Any]] = {"queue": {}, "in-batch": {}, "symmetric": {"symmetric": True}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 16), (torch.bfloat16, 128)])
def test_bitwise_reproducible(on: Implementation, form: str, dtype: torch.dtype, d: int):
    b, k, runs = (5, 70, 2) if on.interpreted else (129, 4000, 5)
    if on.device == "cuda":
        b, runs = 129 if form == "queue" else 2049, 50
    q, keys = on.randn(2, b, d, dtype=dtype), on.randn(2, b, d, seed=1, dtype=dtype)
    queue = on.randn(2, k, d, seed=2, dtype=dtype) if form == "queue" else None
    first = loss_rank_and_gradients(on, q, keys, queue, **FORMS[form])
    for _ in range(runs - 1):
        assert all(map(torch.equal, first, loss_rank_and_gradients(on, q, keys, queue, **FORMS[form])))


def surrounded(x: Tensor | None, by: float) -> Tensor | None:
    """Copy x into the middle of a larger buffer filled with `by`, so that its rows are not adjacent."""
    if x is None:
        return None
    padded = torch.full([n + 6 for n in x.shape], by, dtype=x.dtype, device=x.device)
    return padded[tuple(slice(3, 3 + n) for n in x.shape)].copy_(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("s", "b", "k", "d"), [(2, 1, 1, 1), (2, 9, 33, 48), (1, 65, 66, 15), (1, 3, 5, 513)])
def test_no_out_of_bounds_accesses(
    triton_on: Implementation, form: str, dtype: torch.dtype, s: int, b: int, k: int, d: int
):
    """Surround inputs with NaN, which would reach the loss, and allocated buffers with guard values.

    The expected values come from buffers with the same strides and alignment, because Triton compiles other kernels for
    other strides, which can add in another order.
    """
    inputs = [triton_on.randn(s, n, d, seed=i, dtype=dtype) for i, n in enumerate((b, b, k))]
    inputs = inputs if form == "queue" else [*inputs[:2], None]
    expected = loss_rank_and_gradients(triton_on, *(surrounded(x, by=0.0) for x in inputs), **FORMS[form])

    with poison_allocations() as intact:
        actual = loss_rank_and_gradients(triton_on, *(surrounded(x, by=torch.nan) for x in inputs), **FORMS[form])
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert intact()


# Operators ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["symmetric", "queue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_of_weights(
    triton_on: Implementation, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Compare gradients from chunks of 128 queries with those from one chunk."""
    d, n = (24, 136) if form == "symmetric" else (260, 40)
    q, k, queue = (triton_on.randn(2, rows, d, seed=i, dtype=dtype) for i, rows in enumerate((136, 136, n)))
    arguments = (q, k, queue if form == "queue" else None)
    expected = loss_rank_and_gradients(triton_on, *arguments, symmetric=form == "symmetric")
    monkeypatch.setattr(triton_info_nce, "CHUNK_BYTES", 1)
    actual = loss_rank_and_gradients(triton_on, *arguments, symmetric=form == "symmetric")
    for x, y in zip(actual, expected, strict=True):
        assert (x.double() - y.double()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * y.double().norm()


def test_too_many_pairs_are_rejected(triton_on: Implementation, monkeypatch: pytest.MonkeyPatch):
    """Without allocating them: queries and queue are views of one row."""
    q, queue = triton_on.randn(1, 300).expand(2**18, 300), triton_on.randn(1, 300).expand(2**19, 300)
    monkeypatch.setattr(triton_info_nce, "_pair", lambda *arguments: (None, None))
    with pytest.raises(ValueError, match=r"q \[1, 262144, 300\] and 524288 keys exceed the indices"):
        triton_on.info_nce(q, q, queue)


@pytest.mark.parametrize(("rows", "grad_output"), [(1e3, 1e6), (1e-3, 1e-4)])
def test_float16_gradients_of_any_magnitude(triton_on: Implementation, rows: float, grad_output: float):
    """Loss scaling multiplies grad_output, and weights of the stored matrix must not overflow or underflow."""
    q, k = leaves(*((triton_on.randn(40, 64, seed=i) * rows).half() for i in range(2)))
    exact = leaves(q, k, dtype=torch.float64)
    gradients = torch.autograd.grad(triton_on.info_nce(q, k, symmetric=True), (q, k), torch.tensor(grad_output))
    logits = torch.nn.functional.normalize(exact[0], dim=1) @ torch.nn.functional.normalize(exact[1], dim=1).T / 0.07
    target = torch.arange(len(q))
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    for x, y in zip(gradients, torch.autograd.grad(loss, exact, torch.tensor(grad_output).double()), strict=True):
        assert (x.double() - y).norm() <= 2e-3 * y.norm()


@pytest.mark.parametrize("d", [8, 300])
@pytest.mark.parametrize("symmetric", [False, True])
def test_operators(on: Implementation, symmetric: bool, d: int):
    q, k = on.randn(2, d, 5).mT, on.randn(5, 2, d, seed=1).transpose(0, 1)  # the outputs have other strides
    inputs = Inputs(q, torch.tensor(0.2), k, None, None, torch.arange(5), torch.arange(5) + 3)
    settings = Settings(1.0, normalize=True, symmetric=symmetric, reduction="mean", implementation=on.impl)
    with_state = symmetric or d < 100
    output_mask = [not symmetric, False, not symmetric, with_state, True]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(info_nce_autograd.forward_operator, (*inputs, *settings, output_mask), test_utils=checks)
    state = info_nce_autograd.forward(inputs, settings, output_mask)[-1]
    assert (state is not None) == with_state
    if with_state:
        arguments = (torch.tensor(2.0), state, symmetric, True, symmetric)
        torch.library.opcheck(info_nce_autograd.backward_operator, (*inputs, *settings, *arguments), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph(on_gpu: Implementation, form: str):
    """Replay with new queries in the same buffer; the graph also enqueues the keys."""
    q, k = leaves(on_gpu.randn(2, 128, 16), on_gpu.randn(2, 128, 16, seed=1))
    queue = dcvae_kernels.KeyQueue(8096, 16, scales=2, seed=0).cuda() if form == "queue" else None

    def step() -> tuple[Tensor, Tensor]:
        keys = {} if queue is None else {"queue": queue.keys, "valid": queue.valid}
        loss = on_gpu.info_nce(q, k, **keys, **FORMS[form])
        (gradient,) = torch.autograd.grad(loss, q)
        if queue is not None:
            queue.enqueue(k)
        return loss, gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    state = None if queue is None else {name: x.clone() for name, x in queue.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(on_gpu.randn(2, 128, 16, seed=5))
    if queue is not None and state is not None:
        queue.load_state_dict(state)
    expected = [x.clone() for x in step()]
    if queue is not None and state is not None:
        queue.load_state_dict(state)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


# Compiled ahead of time -----------------------------------------------------------------------------------------------

# Limits per program: (registers per thread, KiB of shared memory). The hardware limit is 255 registers; the limit of
# shared memory is 163 KiB on sm_80, and 227 KiB on sm_90 and sm_100.
BUDGETS = {
    "prepare_kernel": (64, 8),
    "sweep_kernel": (255, 200),
    "scores_kernel": (255, 150),
    "combine_kernel": (255, 16),
    "weights_kernel": (255, 200),
    "chunk_kernel": (255, 150),
    "project_kernel": (112, 16),
}
# Bytes of local memory per thread. On sm_90, tiles that spill some registers were nevertheless the fastest in the batch
# and with all options.
SPILLED, SPILLED_ON_SM_90 = 80, 192


@pytest.mark.parametrize(
    ("options", "dims"),
    [((), (16, 128)), pytest.param(("--all",), (16, 64, 128, 256, 512), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_compiled_resources(options: tuple[str, ...], dims: tuple[int, ...]):
    programs = compiled_ahead("info_nce", *options)
    assert {(x["kernel"], x["capability"]) for x in programs} == set(product(KERNELS, (80, 90, 100)))
    assert {(x["dtype"], x["D"]) for x in programs} == set(product(("float32", "bfloat16"), dims))
    for program in programs:
        registers, shared = BUDGETS[program["kernel"]]
        assert program["registers"] <= registers, program
        assert program["shared"] <= 1024 * shared, program
        assert program["spilled"] <= (SPILLED_ON_SM_90 if program["capability"] == 90 else SPILLED), program


def test_no_repeated_rows():
    assert not [program for program in compiled_ahead("info_nce") if program["repeated_rows"]]


# Instructions × lanes per pair of rows in the kernels that visit pairs, by row of bench/test_info_nce.py. Versions of
# Triton differ by up to 12 %.
PAIR_INSTRUCTIONS = {
    "dcvae": 20,
    "dcvae-b1024": 20,
    "large": 10.5,
    "clip": 25,
    "moco-fp32": 30,
    "moco-bf16": 10.5,
    "simclr-fp32": 32,
    "simclr-bf16": 12,
}
PAIR_KERNELS = ("sweep_kernel", "weights_kernel", "scores_kernel", "chunk_kernel")


@pytest.mark.parametrize("row", PAIR_INSTRUCTIONS)
def test_benchmark_rows_compiled_for_sm_90(row: str):
    programs = [x for x in compiled_ahead("info_nce", "--rows", "--json") if x["row"] == row]
    for x in programs:
        values = (x["registers"], x["shared"], x["pair_instructions"], x["tensor_cores"])
        print(row, x["kernel"], "registers {}, shared {}, instructions per pair {}, {}".format(*values))
    assert not [x for x in programs if x["spilled"] > SPILLED_ON_SM_90]
    programs = [x for x in programs if x["kernel"] in PAIR_KERNELS]
    assert programs
    assert not [x for x in programs if x["repeated_rows"]]
    assert not [x for x in programs if x["pair_instructions"] > 1.1 * PAIR_INSTRUCTIONS[row]]
    for program in programs:
        if program["dtype"] != "float32" and program["D"] >= 64:
            assert program["tensor_cores"] == "HGMMA", program


SASS = """
        /*0000*/                   MUFU.EX2 R1, R1 ;
.L_x_1:
        /*0010*/                   FMUL R2, R1, R1 ;
.L_x_0:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   SEL R2, RZ, R2, P2 ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R2, R2 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_instructions_of_the_main_loop():
    """The loop over D takes 4 steps, and the block that masks a tile does not count."""
    counts = instructions_per_tile(SASS, d_steps=4)
    assert counts == {"HGMMA.64x64x16.F32.BF16": 4, "BRA": 6, "FMUL": 1, "MUFU.EX2": 1}


def test_instructions_of_a_program_without_a_main_loop():
    listing = SASS.replace("@P2 BRA `(.L_x_1)", "NOP")
    counts = instructions_per_tile(listing, d_steps=4)
    assert counts == {"HGMMA.64x64x16.F32.BF16": 4, "BRA": 5, "NOP": 1, "FMUL": 1, "MUFU.EX2": 2, "EXIT": 1}


@pytest.mark.parametrize(("warps", "repeats"), [(4, False), (8, True)])
def test_warps_beyond_the_rows_of_a_product_repeat_them(warps: int, repeats: bool):
    ttgir = f"""
    #mma = #ttg.nvidia_mma<{{versionMajor = 3, warpsPerCTA = [{warps}, 1], instrShape = [16, 32, 16]}}>
    %y = tt.expand_dims %x : tensor<32xf32, #ttg.slice<{{dim = 0, parent = #mma}}>> -> tensor<1x32xf32, #mma>
    %z = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x16xbf16> * !ttg.memdesc<16x32xbf16> -> tensor<64x32xf32, #mma>
    """
    assert repeats_rows(textwrap.dedent(ttgir)) == repeats
