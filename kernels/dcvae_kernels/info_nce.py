"""InfoNCE with one positive per query; negatives come from a queue or from the other rows of the batch."""

import math
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from dcvae_kernels.arguments import Inputs, Settings
from dcvae_kernels.chunked import FIXED_MAXIMUM_BELOW
from dcvae_kernels.dispatch import PLAIN_TENSORS, Impl, check_impl, needs_reference, obstacle_to_triton
from dcvae_kernels.gather import gather, gather_ids
from dcvae_kernels.info_nce_autograd import FrozenPlan, FusedInfoNCE, frozen_loss, plan_frozen, reference_loss

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM, MAX_SCALES = 4096, 65535  # limits of the Triton kernels


class InfoNCEStats(NamedTuple):
    """Statistics from the forward pass, without gradient.

    Attributes:
        rank: int64 [B] or [S, B], number of negatives that score strictly higher than the positive. 0 is a correct
            retrieval, and `(rank < n).float().mean()` is top-n accuracy. Ties do not count, but scores that are equal
            up to rounding can be ordered either way. With `symmetric`, the ranks are those of q among k.
    """

    rank: Tensor


class _Options(TypedDict, total=False):
    temperature: float | Tensor
    normalize: bool
    reduction: Literal["mean", "sum", "none"]
    valid: int | Tensor | None
    query_ids: Tensor | None
    negative_ids: Tensor | None
    impl: Impl
    symmetric: bool
    group: "dist.ProcessGroup | None"


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def info_nce(
    q: Tensor, k: Tensor, queue: Tensor | None = None, *, return_stats: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, InfoNCEStats]: ...
def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    impl: Impl = "auto",
    return_stats: bool = False,
    symmetric: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE, the instance-level loss of DC-VAE (Eq. 6, plus the temperature of the authors' code).

    For query i with positive key k_i and negatives n_j:

        loss_i = −log( e^{s⁺} / (e^{s⁺} + Σ_j e^{s_j}) ),   s⁺ = q_i·k_i/τ,   s_j = q_i·n_j/τ

    First and second derivatives exist in q, k, queue and a tensor temperature. Second derivatives, batched gradients
    (`is_grads_batched`), `torch.func` and tensor subclasses use the reference implementation, which stores the logits.
    Sums are in float32, or in float64 if an input is float64, also under autocast. A queue that requires no
    gradient can be overwritten before the backward pass. A query without negatives has loss 0 and gradient 0. NaN and
    infinity in the inputs propagate to the loss. The op does not synchronise with the device, and its results are
    bitwise reproducible.

    Args:
        q: queries [B, D], or [S, B, D] for S independent scales; float16, bfloat16, float32 or float64.
        k: positive key of each query, shaped like q.
        queue: negatives [K, D] or [S, K, D], shared by the batch; [1, K, D] also works with queries [B, D]. Without a
            queue, the negatives of a query are the keys of the other rows (SimCLR, CLIP).
        temperature: τ > 0, a number or a 0-d tensor. The value of a tensor is not checked.
        normalize: L2-normalise all vectors, so that similarities are cosines. Norms below 1e-12 are replaced by 1e-12,
            as in `F.normalize`.
        reduction: "mean" or "sum" over scales and queries, or "none". The mean over zero queries is 0.
        valid: number of filled queue slots, which come first; an int or a 0-d integer tensor, whose value is not
            checked. The contents of the other slots are ignored.
        query_ids, negative_ids: int64 [B] and [K], shared by the scales. A negative with the same id as the query is
            excluded. −1 means unknown and equals no id. Without a queue, negative_ids is [B] and defaults to query_ids.
        impl: "triton" requires an NVIDIA GPU of compute capability 8.0 or newer (or, for tests on a CPU,
            TRITON_INTERPRET=1 set before the import), D ≤ 4096 and no float64. "torch" is plain PyTorch, in blocks.
            "auto" uses "triton" on a GPU if possible, else "torch". Under torch.func transforms and for tensor
            subclasses, the reference implementation is used, which stores the logits [S, B, K].
        return_stats: also return `InfoNCEStats`.
        symmetric: CLIP's loss, the mean of the losses of q among k and of k among q. Cannot be used with a queue.
        group: ranks that share a batch. The negatives of a query are the keys of all other rows of all ranks, and
            query_ids are compared across ranks. Loss and stats cover the local queries. First and second derivatives
            are those of the sum of all ranks' losses, so the average that DistributedDataParallel computes is the
            gradient of the mean loss of the whole batch. All ranks must call this function and its backward pass with
            the same shapes, dtypes, options and inputs that require gradients. This is not checked, and ranks that
            differ can deadlock. Cannot be used with a queue or negative_ids.

    Returns:
        The loss, float32 or float64: 0-d, or [B] / [S, B] with reduction "none". With return_stats, (loss, stats).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape, device or value, or arguments that cannot be combined.
    """
    keys = (k, queue, valid, query_ids, negative_ids)
    call = None if group is not None or symmetric else _frozen_call(q, *keys, temperature, normalize, reduction, impl)
    if call is not None and (plan := _PLANS.get((call, bool(return_stats)))) is not None:
        loss, rank = frozen_loss(q, keys, temperature, plan)  # type: ignore[arg-type]
        return (loss, InfoNCEStats(rank)) if return_stats and rank is not None else loss
    if group is not None:
        _check_group(group, queue, negative_ids)
    if queue is None and negative_ids is None:
        negative_ids = query_ids
    _check_choices(temperature, reduction, impl)
    _check_vectors(q, k, queue)
    _check_valid(valid, queue, q.device)
    _check_ids(query_ids, negative_ids, q.shape[-2], q.shape[-2] if queue is None else queue.shape[-2], q.device)
    if isinstance(temperature, Tensor):
        _check_scalar("temperature", temperature, q.device, temperature.is_floating_point(), "a floating-point")
    if symmetric and queue is not None:
        raise ValueError("symmetric compares q and k within the batch: it cannot be used with a queue")
    if queue is not None and queue.ndim > q.ndim:
        queue = queue[0]
    if queue is not None and isinstance(valid, int):
        queue, valid = queue[..., :valid, :], None
        negative_ids = None if negative_ids is None else negative_ids[: queue.shape[-2]]
    implementation = _choose(impl, *((q, k) if queue is None else (q, k, queue)))
    inputs = Inputs(
        q=q,
        temperature=temperature if isinstance(temperature, Tensor) else None,
        k=k,
        queue=queue,
        valid=valid,  # type: ignore[arg-type] # not an int: that was applied to the queue above
        query_ids=query_ids,
        negative_ids=negative_ids,
    )
    tau = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    settings = Settings(tau, normalize, symmetric, reduction, implementation)
    if group is None or group.size() == 1:
        plan = None
        if call is not None and implementation == "triton":
            plan = _new_plan((call, bool(return_stats)), inputs, settings)
        if plan is None:
            loss, rank = _loss(inputs, settings, return_stats)
        else:  # by the same autograd function as later calls
            loss, rank = frozen_loss(q, keys, tau, plan)  # type: ignore[arg-type]
    else:  # the gathered keys are the queue, and ids exclude a query's own key from it
        local_ids, all_ids = gather_ids(query_ids, q.shape[-2], q.device, group)
        inputs = inputs._replace(queue=gather(k, group), query_ids=local_ids, negative_ids=all_ids)
        settings = settings._replace(symmetric=False)
        loss, rank = _loss(inputs, settings, return_stats)
        if symmetric:
            mirrored = inputs._replace(q=k, k=q, queue=gather(q, group))
            loss = (loss + _loss(mirrored, settings, with_rank=False)[0]) / 2
    return (loss, InfoNCEStats(rank)) if return_stats and isinstance(rank, Tensor) else loss


# Plans of the Triton kernels for calls with frozen keys, by all that plans and argument checks depend on. The GPU takes
# 10 µs for such a call; checking its arguments and planning its launches again would take the CPU longer.
_PLANS: dict[tuple[Any, ...], FrozenPlan] = {}
_MAX_PLANS = 256


def _frozen_call(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    valid: int | Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float | Tensor,
    normalize: bool,
    reduction: str,
    impl: str,
) -> tuple[Any, ...] | None:
    """Return the key in `_PLANS` of a call in which at most q requires a gradient; None for other calls."""
    if type(temperature) is not float or not 1e-37 < temperature < math.inf or q is None or k is None or queue is None:
        return None
    if not type(reduction) is type(impl) is str or type(normalize) is not bool:
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if forward_ad._current_level >= 0:  # tangents need FusedInfoNCE, which rejects them
        return None
    layouts: list[tuple[Any, ...] | None] = []
    tensors: tuple[Any, ...] = (q, k, queue, valid, query_ids, negative_ids)
    for x in tensors:
        if x is None:
            layouts.append(None)
        elif type(x) not in PLAIN_TENSORS or x.layout != torch.strided:
            return None
        else:
            layouts.append((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16))
    with_gradient = torch.is_grad_enabled()
    if with_gradient and (k.requires_grad or queue.requires_grad):
        return None
    fixed_maximum = 2 / temperature < FIXED_MAXIMUM_BELOW
    return with_gradient and q.requires_grad, *layouts, fixed_maximum, normalize, reduction, impl


def _new_plan(key: tuple[tuple[Any, ...], bool], inputs: Inputs, settings: Settings) -> FrozenPlan | None:
    """Make and keep a plan; None if rows do not fit into registers."""
    (with_dq, *_), with_rank = key
    plan = plan_frozen(inputs, settings, with_dq, with_rank)
    if plan is not None:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        _PLANS[key] = plan
    return plan


def _loss(inputs: Inputs, settings: Settings, with_rank: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss without communication and, on request, the rank."""
    if settings.implementation == "reference":
        return reference_loss(inputs, settings, with_rank)
    if torch.compiler.is_compiling():
        inputs = _without_duplicates(inputs)
    return FusedInfoNCE.apply(settings, with_rank, torch.is_grad_enabled(), *inputs)


def _without_duplicates(inputs: Inputs) -> Inputs:
    """Replace repeated tensors by aliases, because torch.compile rejects an operator with a repeated argument."""
    q, k, queue = inputs.q, inputs.k, inputs.queue
    return inputs._replace(
        k=_alias_if(k is q, k),
        queue=_alias_if(queue is q or queue is k, queue),
        negative_ids=_alias_if(inputs.negative_ids is inputs.query_ids, inputs.negative_ids),
    )


def _alias_if(condition: bool, x: Any) -> Any:
    return x.view_as(x) if condition and x is not None else x


def _choose(impl: str, *tensors: Tensor) -> str:
    """Return the implementation for these inputs: "triton", "torch" or "reference".

    Raises:
        TypeError, ValueError: "triton" was requested and does not support them.
    """
    q = tensors[0]
    obstacle = None if impl == "torch" else _obstacle_to_triton(*tensors)
    if impl == "triton" and obstacle is not None:
        error, reason = obstacle
        raise error(f'impl="triton" cannot be used: {reason}; use impl="torch"')
    if not torch.compiler.is_compiling() and needs_reference(*tensors):
        return "reference"
    if q.numel() == 0 or obstacle is not None:
        return "torch"
    if impl == "auto":
        impl = "triton" if q.is_cuda else "torch"
    return impl


def _obstacle_to_triton(*tensors: Tensor) -> tuple[type[Exception], str] | None:
    if any(x.dtype == torch.float64 for x in tensors):
        return TypeError, "it computes in float32, and one of the inputs is float64"
    if tensors[0].shape[-1] > MAX_DIM:
        return ValueError, f"it supports D up to {MAX_DIM}; q is {list(tensors[0].shape)}"
    if tensors[0].ndim == 3 and tensors[0].shape[0] > MAX_SCALES:
        return ValueError, f"it supports up to {MAX_SCALES} scales; q is {list(tensors[0].shape)}"
    obstacle = obstacle_to_triton(tensors[0].device)
    return None if obstacle is None else (ValueError, obstacle)


class InfoNCE(nn.Module):
    """Module form of `info_nce`, optionally with a learnable temperature.

    If learnable, the only parameter is `logit_scale` = ln(1/τ), as in CLIP. CLIP also clamps it after each step:
    `loss.logit_scale.data.clamp_(max=math.log(100))`.

    Args:
        temperature: τ, a number; the initial value if learnable.
        learnable: make the temperature a parameter.
        normalize, reduction, symmetric, impl: see `info_nce`.

    Raises:
        TypeError, ValueError: invalid settings, as in `info_nce`.
    """

    logit_scale: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        normalize: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        symmetric: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check_choices(temperature, reduction, impl)
        if isinstance(temperature, Tensor):
            raise TypeError("temperature must be a number here; learnable=True makes it a parameter")
        self._temperature = temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None
        self.normalize = normalize
        self.reduction: Literal["mean", "sum", "none"] = reduction
        self.symmetric = symmetric
        self.impl: Impl = impl

    @property
    def temperature(self) -> float | Tensor:
        """τ, a number, or if learnable e^{−logit_scale}, a differentiable 0-d tensor."""
        return self._temperature if self.logit_scale is None else self.logit_scale.neg().exp()

    def forward(self, q: Tensor, k: Tensor, queue: Tensor | None = None, **options: Any) -> Any:
        """Call `info_nce`; options are `valid`, `query_ids`, `negative_ids`, `return_stats` and `group`."""
        return info_nce(
            q,
            k,
            queue,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            symmetric=self.symmetric,
            impl=self.impl,
            **options,
        )

    def extra_repr(self) -> str:
        learnable = self.logit_scale is not None
        return (
            f"temperature={self._temperature}, learnable={learnable}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, symmetric={self.symmetric}, impl={self.impl!r}"
        )


# Argument checks. None reads the values of a tensor, which would synchronise with the device. -----------------------


def _check_choices(temperature: float | Tensor, reduction: str, impl: str) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (float, int, Tensor)):
        raise TypeError(f"temperature must be a number or a 0-d tensor; it is a {type(temperature).__name__}")
    if not isinstance(temperature, Tensor) and not 1e-37 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, and so must its inverse; it is {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; it is {reduction!r}')
    check_impl(impl)


def _check_group(group: Any, queue: Tensor | None, negative_ids: Tensor | None) -> None:
    if not dist.is_available():
        raise ValueError("group needs torch.distributed, which this build of PyTorch lacks")
    if not isinstance(group, dist.ProcessGroup):
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must contain this process; it does not")
        raise TypeError(f"group must be a torch.distributed.ProcessGroup; it is a {type(group).__name__}")
    if not dist.is_initialized():
        raise ValueError("group needs an initialized torch.distributed; call init_process_group first")
    if queue is not None:
        raise ValueError("group cannot be used with a queue: it gathers the negatives from all ranks")
    if negative_ids is not None:
        raise ValueError("negative_ids cannot be used with group, which compares the query_ids of all ranks")


def _check_vectors(q: Tensor, k: Tensor, queue: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k)) if queue is None else (("q", q), ("k", k), ("queue", queue)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; it is a {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; it is {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor; it is {x.layout}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}; it is on {x.device}")
    if q.ndim not in (2, 3) or q.shape[-1] == 0:
        raise ValueError(f"q must be [B, D] or [S, B, D] with D > 0; it is {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape, {list(q.shape)}; it is {list(k.shape)}")
    if queue is None:
        return
    scales = q.shape[:-2]
    same_scales = queue.ndim >= 2 and (queue.shape[:-2] == scales or (q.ndim == 2 and queue.shape[:-2] == (1,)))
    if not same_scales or queue.shape[-1] != q.shape[-1]:
        expected = ", ".join([*map(str, scales), "K", str(q.shape[-1])])
        raise ValueError(f"queue must be [{expected}] for q of {list(q.shape)}; it is {list(queue.shape)}")


def _check_valid(valid: int | Tensor | None, queue: Tensor | None, device: torch.device) -> None:
    if valid is None:
        return
    if queue is None:
        raise ValueError("valid counts the filled slots of a queue, but queue is None")
    if isinstance(valid, Tensor):
        integer = not (valid.is_floating_point() or valid.is_complex() or valid.dtype == torch.bool)
        _check_scalar("valid", valid, device, integer, "an integer")
    elif isinstance(valid, bool) or not isinstance(valid, int):
        raise TypeError(f"valid must be an int or a 0-d integer tensor; it is a {type(valid).__name__}")
    elif not 0 <= valid <= queue.shape[-2]:
        raise ValueError(f"valid must be from 0 to the queue's {queue.shape[-2]} slots; it is {valid}")


def _check_scalar(name: str, x: Tensor, device: torch.device, dtype_matches: bool, kind: str) -> None:
    if not dtype_matches:
        raise TypeError(f"{name} must be {kind} tensor; it is {x.dtype}")
    if x.ndim != 0:
        raise ValueError(f"{name} must be a 0-d tensor; it is {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on q's device, {device}; it is on {x.device}")


def _check_ids(
    query_ids: Tensor | None, negative_ids: Tensor | None, queries: int, negatives: int, device: torch.device
) -> None:
    if (query_ids is None) != (negative_ids is None):
        missing, present = ("query_ids", "negative_ids") if query_ids is None else ("negative_ids", "query_ids")
        raise ValueError(f"{present} is given without {missing}: pass both or neither")
    for name, ids, count in (("query_ids", query_ids, queries), ("negative_ids", negative_ids, negatives)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor; it is {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.ndim != 1 or ids.shape[0] != count:
            raise ValueError(f"{name} must be [{count}]; it is {list(ids.shape)}")
        if ids.device != device:
            raise ValueError(f"{name} must be on q's device, {device}; it is on {ids.device}")
