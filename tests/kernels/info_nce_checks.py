"""What tests of info_nce share: the implementations, inputs, and the loss written out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dcvae_kernels


@dataclass(frozen=True)
class Implementation:
    """One of info_nce's implementations on a device. On a CPU, "triton" is run by Triton's interpreter."""

    impl: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    @property
    def widest(self) -> torch.dtype:
        """The widest dtype that it takes."""
        return torch.float32 if self.impl == "triton" else torch.float64

    def info_nce(self, *args: Any, **options: Any) -> Any:
        return dcvae_kernels.info_nce(*args, **{"impl": self.impl} | options)

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(*shape, seed=seed, dtype=dtype).to(self.device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device and in every dtype, but for rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The loss as everyone writes it, in the inputs' own dtype; [B, D], [B, D], [K, D] -> [B]."""
    q, k, queue = (F.normalize(t, dim=-1) for t in (q, k, queue))
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")


def by_definition(q: Tensor, k: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """Eq. 6 in fp64, one query at a time; negatives[i] [K_i, D] are those of query i."""
    losses = []
    for query, key, others in zip(q.double(), k.double(), negatives, strict=True):
        positive = torch.cosine_similarity(query, key, dim=0) / temperature
        scores = torch.cosine_similarity(query[None], others.double(), dim=1) / temperature
        losses.append(torch.cat([positive[None], scores]).logsumexp(0) - positive)
    return torch.stack(losses)
