"""Arguments of InfoNCE, as `dcvae_kernels.info_nce` passes them to the implementations."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Tensor arguments of `dcvae_kernels.info_nce`. The first four can require gradients.

    Attributes:
        q: queries, [S, B, D] or [B, D].
        temperature: τ, 0-d; None if τ is a Python number (`Settings.tau`).
        k: the positive key of each query, shaped like q.
        queue: negatives, [S, K, D] or [K, D]; None if the other rows of k are the negatives.
        valid: number of filled queue slots, 0-d.
        query_ids: int64 [B].
        negative_ids: int64 [K], or [B] without a queue.
    """

    q: Tensor
    temperature: Tensor | None
    k: Tensor
    queue: Tensor | None
    valid: Tensor | None
    query_ids: Tensor | None
    negative_ids: Tensor | None


class Settings(NamedTuple):
    """Non-tensor arguments of `dcvae_kernels.info_nce`.

    Attributes:
        tau: τ; ignored if `Inputs.temperature` is given.
        normalize, symmetric, reduction: as in `dcvae_kernels.info_nce`.
        implementation: "triton", "torch", or "reference" (`dcvae_kernels.reference`).
    """

    tau: float
    normalize: bool
    symmetric: bool
    reduction: str
    implementation: str


def loss_weight(reduction: str, queries: int) -> float:
    """Return the weight of one query's loss in the reduced loss."""
    return 1 / max(queries, 1) if reduction == "mean" else 1.0
