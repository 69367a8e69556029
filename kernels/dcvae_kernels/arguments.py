"""The arguments of InfoNCE as they travel from `dcvae_kernels.info_nce` to the implementations."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one loss, as in `dcvae_kernels.info_nce`. The first four may need gradients.

    Attributes:
        q: queries, [S, B, D] or [B, D].
        temperature: τ, 0-d; None if it is a Python number, `Settings.tau`.
        k: the positive key of each query, shaped like q.
        queue: negatives, [S, K, D] or [K, D]; None if the other rows of k are the negatives.
        valid: how many slots of the queue are filled, 0-d.
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
    """The options of one loss that are not tensors.

    Attributes:
        tau: τ; ignored if `Inputs.temperature` is given.
        normalize, symmetric, reduction: as in `dcvae_kernels.info_nce`.
        implementation: "triton", "torch", or "reference", the plain definition.
    """

    tau: float
    normalize: bool
    symmetric: bool
    reduction: str
    implementation: str


def loss_weight(reduction: str, queries: int) -> float:
    """Return the factor of each query's loss in the reduced loss."""
    return 1 / max(queries, 1) if reduction == "mean" else 1.0
