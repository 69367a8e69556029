"""Interface of info_nce: derivatives, gradient scaling, host synchronisation, the module, errors."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap

from checks import Implementation, leaves, randn, run_ranks
from dcvae_kernels import InfoNCE, KeyQueue, chunked, info_nce, info_nce_autograd
from dcvae_kernels.arguments import Inputs, Settings

# Differentiation ------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "queue": {"queue": (4, 5)},
    "queue of two scales": {"queue": (2, 4, 5)},
    "valid": {"queue": (4, 5), "valid": 2},
    "ids": {"queue": (4, 5), "query_ids": torch.tensor([1, 2, 3]), "negative_ids": torch.tensor([2, 2, 1, 0])},
    "all excluded": {"queue": (4, 5), "query_ids": torch.ones(3).long(), "negative_ids": torch.ones(4).long()},
    "empty queue": {"queue": (0, 5)},
    "in-batch": {},
    "symmetric": {"symmetric": True, "query_ids": torch.tensor([1, 2, 1])},
    "unnormalised": {"queue": (4, 5), "normalize": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_gradgradcheck(form: str):
    options = dict(FORMS[form])
    shape = options.pop("queue", None)
    scales = shape[:-2] if shape else ()
    inputs = [randn(*scales, 3, 5, dtype=torch.float64), randn(*scales, 3, 5, seed=1, dtype=torch.float64)]
    if shape:
        inputs.append(randn(*shape, seed=2, dtype=torch.float64))
    inputs = leaves(*inputs, torch.tensor(0.4, dtype=torch.float64))

    def loss(*args: Tensor) -> Tensor:
        q, k, *queue, temperature = args
        return info_nce(q, k, queue[0] if queue else None, temperature=temperature, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("form", ["head", "in-batch", "queue", "temperature"])
def test_inputs_that_depend_on_each_other(on: Implementation, form: str):
    """create_graph does not change gradients, and second derivatives match finite differences."""
    (z,) = leaves(on.randn(4, 3, dtype=on.widest))
    head, k = on.randn(3, 3, seed=1, dtype=on.widest), on.randn(4, 3, seed=2, dtype=on.widest)
    calls: dict[str, Any] = {
        "head": lambda z: on.info_nce(z @ head, z, temperature=0.5),
        "in-batch": lambda z: on.info_nce(z, z * 1.0, temperature=0.5),
        "queue": lambda z: on.info_nce(k, z, z, temperature=0.5),
        "temperature": lambda z: on.info_nce(z, k, temperature=z.square().mean()),
    }
    (plain,) = torch.autograd.grad(calls[form](z), z)
    (graph,) = torch.autograd.grad(calls[form](z), z, create_graph=True)
    torch.testing.assert_close(graph, plain)
    if on.widest == torch.float64:
        direction, step = on.randn(4, 3, seed=3, dtype=on.widest), 1e-6
        (second,) = torch.autograd.grad((graph * direction).sum(), z)
        above, below = (torch.autograd.grad(calls[form](x := z + sign * step * direction), x)[0] for sign in (1, -1))
        torch.testing.assert_close(second, (above - below) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["queue", "in-batch", "symmetric"])
def test_batched_gradients(on: Implementation, form: str):
    q, k, queue = leaves(*(on.randn(4, 5, seed=i) for i in range(3)))
    loss = on.info_nce(q, k, queue if form == "queue" else None, symmetric=form == "symmetric", reduction="none")
    gradients = [torch.autograd.grad(loss, (q, k), row, retain_graph=True) for row in torch.eye(4)]
    batched = torch.autograd.grad(loss, (q, k), torch.eye(4), is_grads_batched=True)
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*gradients, strict=True))))


def test_computes_only_requested_outputs(monkeypatch: pytest.MonkeyPatch):
    q, k, queue = leaves(randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2))
    masks = []
    forward = info_nce_autograd.forward
    monkeypatch.setattr(info_nce_autograd, "forward", lambda *args: (masks.append(args[-1]), forward(*args))[1])
    with torch.no_grad():
        info_nce(q, k, queue)
    with torch.inference_mode():
        info_nce(q, k)
    info_nce(q, k.detach(), queue.detach())
    assert masks == [[False] * 5, [False] * 5, [True, False, False, False, False]]


def test_frozen_keys_can_change_before_the_backward_pass():
    q, k, queue = randn(3, 8).requires_grad_(), randn(3, 8, seed=1), randn(5, 8, seed=2)
    ids, queue_ids = torch.arange(3), torch.arange(5)
    loss = info_nce(q, k, queue, query_ids=ids, negative_ids=queue_ids)
    (expected,) = torch.autograd.grad(loss, q, retain_graph=True)
    for x in (k, queue, ids, queue_ids):
        x.zero_()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


def test_compiles_with_repeated_tensors():
    z, queue, ids = randn(4, 8).requires_grad_(), randn(4, 8, seed=1), torch.arange(4)

    def losses() -> Tensor:
        simclr = info_nce(z, z.flip(0), query_ids=ids)
        return simclr + info_nce(z, z) + info_nce(z, z, z) + info_nce(z, z, queue, query_ids=ids, negative_ids=ids)

    compiled, eager = torch.compile(losses, backend="aot_eager", fullgraph=True)(), losses()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, z), torch.autograd.grad(eager, z))


def test_gradients_only_of_inputs_that_require_them():
    q, k, queue = randn(3, 8).requires_grad_(), randn(3, 8, seed=1), randn(5, 8, seed=2)
    info_nce(q, k, queue).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    assert not info_nce(q.detach(), k, queue).requires_grad


def test_functional_transforms(on: Implementation):
    q, k, queue = leaves(on.randn(3, 8), on.randn(3, 8, seed=1), on.randn(5, 8, seed=2))
    function = on.info_nce
    torch.testing.assert_close(grad(function)(q, k, queue), torch.autograd.grad(info_nce(q, k, queue), q)[0])
    batch = torch.stack([q, 2 * k])
    losses = torch.stack([info_nce(x, k, queue) for x in batch])
    torch.testing.assert_close(vmap(function, in_dims=(0, None, None))(batch, k, queue), losses)
    tangent = on.randn(3, 8, seed=3)
    slope = jvp(lambda x: function(x, k, queue), (q,), (tangent,))[1]
    torch.testing.assert_close(slope, (torch.autograd.grad(info_nce(q, k, queue), q)[0] * tangent).sum())


def test_second_derivatives_reject_a_modified_queue():
    q, k, queue = randn(3, 8).requires_grad_(), randn(3, 8, seed=1), KeyQueue(5, 8, seed=0)
    loss = info_nce(q, k, queue.keys)
    queue.enqueue(k)
    with pytest.raises(RuntimeError, match="the queue was modified after the forward pass"):
        torch.autograd.grad(loss, q, create_graph=True)


# Training -------------------------------------------------------------------------------------------------------------


def test_gradient_scaling(on: Implementation):
    """GradScaler recovers float16 gradients that would underflow, and detects an overflow."""
    q, k, queue = (on.randn(*s, seed=i, dtype=torch.float16) for i, s in enumerate([(64, 8), (64, 8), (9, 8)]))
    parameter = (10_000 * q.float()).requires_grad_()  # a long vector has a short gradient
    optimizer = torch.optim.SGD([parameter], lr=1e6)
    exact_q = parameter.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(info_nce(exact_q, k.double(), queue.double(), temperature=1.0), exact_q)

    for scale, accurate in ((1.0, False), (2.0**16, True), (2.0**50, False)):
        before = parameter.detach().clone()
        parameter.grad = None
        scaler = torch.amp.GradScaler(on.device, init_scale=scale)
        scaler.scale(on.info_nce(parameter.half(), k, queue, temperature=1.0)).backward()
        scaler.unscale_(optimizer)
        assert parameter.grad is not None
        assert ((parameter.grad - exact).norm() < 1e-2 * exact.norm()) == accurate
        scaler.step(optimizer)
        if scale > 1:
            assert torch.equal(before, parameter) == (not accurate)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_data_parallel(tmp_path: Path):
    run_ranks(Path(__file__).parent / "data_parallel.py", 2, tmp_path)


# Host synchronisation -------------------------------------------------------------------------------------------------


def test_no_host_synchronisation():
    """Fake tensors have no values, so any operation that would synchronise raises."""
    with FakeTensorMode():
        q, queue, ids = torch.empty(2, 5, 8, requires_grad=True), torch.empty(2, 9, 8), torch.empty(9).long()
        scalars: dict[str, Any] = {"temperature": torch.tensor(0.1), "valid": torch.empty(()).long()}
        loss, _ = info_nce(q, q, queue, query_ids=ids[:5], negative_ids=ids, return_stats=True, **scalars)
        loss.backward()
        info_nce(q, q, symmetric=True, query_ids=ids[:5]).backward()


def test_no_host_synchronisation_in_chunked():
    """Call the implementation itself, because info_nce uses the reference for fake tensors."""
    with FakeTensorMode():
        q, queue, ids = torch.empty(2, 5, 8), torch.empty(2, 9, 8), torch.empty(9).long()
        inputs = Inputs(q, torch.tensor(0.1), q, queue, torch.empty(()).long(), ids[:5], ids)
        settings = Settings(1.0, normalize=True, symmetric=False, reduction="mean", implementation="torch")
        state = chunked.forward(inputs, settings, [True] * 5)[-1]
        assert state is not None
        chunked.backward_sweep(inputs, settings, torch.tensor(1.0), state, True, True, True)


def test_meta_tensors():
    q = torch.empty(2, 5, 8, device="meta")
    assert info_nce(q, q, q, reduction="none").shape == (2, 5)


# The module -----------------------------------------------------------------------------------------------------------


def test_module_applies_its_settings():
    q, k, queue = randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2)
    settings: dict[str, Any] = {"temperature": 0.2, "normalize": False, "reduction": "none"}
    module = InfoNCE(**settings)
    assert not list(module.parameters()) and not module.state_dict()
    assert torch.equal(module(q, k, queue, valid=3), info_nce(q, k, queue, valid=3, **settings))
    loss, stats = InfoNCE(symmetric=True)(q, k, query_ids=torch.tensor([1, 1, 2]), return_stats=True)
    assert torch.equal(loss, info_nce(q, k, query_ids=torch.tensor([1, 1, 2]), symmetric=True))
    assert stats.rank.shape == (3,)
    with pytest.raises(TypeError, match="temperatur"):
        module(q, k, temperatur=1)


def test_learnable_temperature():
    q, k, queue = randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2)
    module = InfoNCE(temperature=0.2, learnable=True)
    assert module.logit_scale is not None
    assert module.logit_scale.item() == pytest.approx(math.log(5))
    loss = module(q, k, queue)
    torch.testing.assert_close(loss, info_nce(q, k, queue, temperature=0.2))
    loss.backward()
    temperature = torch.tensor(0.2, requires_grad=True)
    info_nce(q, k, queue, temperature=temperature).backward()
    assert module.logit_scale.grad is not None and temperature.grad is not None
    torch.testing.assert_close(module.logit_scale.grad, -0.2 * temperature.grad)  # τ = e^{-logit_scale}

    twin = InfoNCE(learnable=True)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(q, k, queue), loss) and torch.equal(copy.deepcopy(module)(q, k, queue), loss)
    assert isinstance(module, nn.Module) and "learnable=True" in repr(module)


# Errors ---------------------------------------------------------------------------------------------------------------

WIDE = torch.zeros(2, 4097)
Q, QUEUE, IDS = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor; it is a list"),
        ({"q": Q.long()}, TypeError, "q must be float16.*int64"),
        ({"k": Q.to(torch.complex64)}, TypeError, "k must be float16.*complex64"),
        ({"queue": KeyQueue(9, 8)}, TypeError, "queue must be a tensor; it is a KeyQueue"),
        ({"k": Q.to("meta")}, ValueError, "k must be on q's device, cpu; it is on meta"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, D\] or \[S, B, D\] with D > 0; it is \[8\]"),
        ({"q": Q[:, :0], "k": Q[:, :0]}, ValueError, r"with D > 0; it is \[4, 0\]"),
        ({"k": Q[:3]}, ValueError, r"k must have q's shape, \[4, 8\]; it is \[3, 8\]"),
        ({"queue": QUEUE[:, :5]}, ValueError, r"queue must be \[K, 8\] for q of \[4, 8\]; it is \[9, 5\]"),
        ({"queue": QUEUE[0]}, ValueError, r"queue must be \[K, 8\].*it is \[8\]"),
        ({"queue": QUEUE.expand(2, 9, 8)}, ValueError, r"queue must be \[K, 8\].*it is \[2, 9, 8\]"),
        (
            {"q": Q.expand(2, 4, 8), "k": Q.expand(2, 4, 8)},
            ValueError,
            r"\[2, K, 8\] for q of \[2, 4, 8\]; it is \[9, 8\]",
        ),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, .* it is 0"),
        ({"temperature": -1.0}, ValueError, "temperature .* -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature .* nan"),
        ({"temperature": float("inf")}, ValueError, "temperature .* inf"),
        ({"temperature": 1e-40}, ValueError, "temperature .* its inverse; it is 1e-40"),
        ({"temperature": True}, TypeError, "temperature must be a number or a 0-d tensor; it is a bool"),
        ({"valid": True}, TypeError, "valid must be an int or a 0-d integer tensor; it is a bool"),
        ({"queue": QUEUE.to_sparse()}, TypeError, "queue must be a dense tensor; it is torch.sparse_coo"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number or a 0-d tensor; it is a str"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature must be a 0-d tensor; it is \[1\]"),
        ({"temperature": torch.tensor(1)}, TypeError, "temperature must be a floating-point tensor; it is torch.int64"),
        ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be on q's device"),
        ({"reduction": "avg"}, ValueError, "reduction must be .*'avg'"),
        ({"impl": "cuda"}, ValueError, 'impl must be "auto", "triton" or "torch"; it is .cuda.'),
        (
            {"impl": "triton", "k": Q.double()},
            TypeError,
            'impl="triton" cannot be used: it computes in float32.*use impl="torch"',
        ),
        ({"impl": "triton", "q": WIDE, "k": WIDE, "queue": WIDE}, ValueError, r"D up to 4096; q is \[2, 4097\]"),
        ({"valid": 10}, ValueError, "valid must be from 0 to the queue's 9 slots; it is 10"),
        ({"valid": -1}, ValueError, "valid .* -1"),
        ({"valid": 1.0}, TypeError, "valid must be an int or a 0-d integer tensor; it is a float"),
        ({"valid": torch.tensor(1.0)}, TypeError, "valid must be an integer tensor; it is torch.float32"),
        ({"valid": torch.tensor(True)}, TypeError, "valid must be an integer tensor; it is torch.bool"),
        ({"valid": torch.tensor([1])}, ValueError, r"valid must be a 0-d tensor; it is \[1\]"),
        ({"valid": 1, "queue": None}, ValueError, "valid counts the filled slots of a queue, but queue is None"),
        ({"query_ids": IDS}, ValueError, "query_ids is given without negative_ids"),
        ({"negative_ids": IDS, "queue": None}, ValueError, "negative_ids is given without query_ids"),
        ({"query_ids": IDS, "negative_ids": IDS}, ValueError, r"negative_ids must be \[9\]; it is \[4\]"),
        ({"query_ids": IDS[:3], "queue": None}, ValueError, r"query_ids must be \[4\]; it is \[3\]"),
        ({"query_ids": IDS.int(), "queue": None}, TypeError, "query_ids must be an int64 tensor; it is torch.int32"),
        ({"query_ids": [1], "queue": None}, TypeError, "query_ids must be an int64 tensor; it is list"),
        ({"query_ids": IDS.to("meta"), "queue": None}, ValueError, "query_ids must be on q's device"),
        ({"symmetric": True}, ValueError, "symmetric compares q and k within the batch"),
    ],
)
def test_errors_name_the_argument_and_its_value(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        info_nce(**dict[str, Any](q=Q, k=Q, queue=QUEUE) | arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"temperature": 0.0}, ValueError),
        ({"impl": "cuda"}, ValueError),
        ({"temperature": torch.ones(())}, TypeError),
    ],
)
def test_module_checks_its_settings_when_created(arguments: dict[str, Any], error: type[Exception]):
    with pytest.raises(error, match=next(iter(arguments))):
        InfoNCE(**arguments)
