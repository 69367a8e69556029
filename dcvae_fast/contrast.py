"""Multi-scale instance contrast (Eq. 6, §4.2): each reconstruction must recognise its own image among K others."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import ContrastConfig
from dcvae_fast.models import autogan, progressive
from dcvae_fast.models.layers import Critique, upcast, update_ema
from dcvae_kernels import KeyQueue, info_nce

Discriminator = autogan.Discriminator | progressive.Discriminator


class Keys(NamedTuple):
    """Momentum features of images: the positives of their reconstructions, and later negatives of others.

    Attributes:
        embeddings: [S, B, D], of S layers
        patches: [L, B, W], the channels of L feature maps at `location`; None without local patch contrast
        location: [1], where the local patches are, as a share of all positions
    """

    embeddings: Tensor
    patches: Tensor | None = None
    location: Tensor | None = None

    def part(self, cut: slice) -> "Keys":
        """Return the keys of some of the images."""
        return Keys(self.embeddings[:, cut], None if self.patches is None else self.patches[:, cut], self.location)


class InstanceContrast(nn.Module):
    """The momentum discriminator C′, which makes the keys, and the queues of older keys.

    A contrastive step calls `update`, `keys` and `loss`, then enqueues the keys.
    """

    def __init__(self, discriminator: Discriminator, config: ContrastConfig, contrast_dim: int, width: int, seed: int):
        super().__init__()
        self.config = config
        self.momentum = deepcopy(discriminator).requires_grad_(False)
        self._dim, self._seed = contrast_dim, seed if config.queue_start == "noise" else None
        self.restart(config.layers)
        self.local_queue = None
        if config.local_start_images is not None:
            self.local_queue = KeyQueue(config.negatives, width, scales=len(config.local_layers), seed=self._seed)

    def restart(self, layers: Sequence[str]) -> None:
        """Contrast these layers from now on, with a new queue: keys of another resolution do not compare."""
        self.layers = tuple(layers)
        queue = KeyQueue(self.config.negatives, self._dim, scales=len(layers), seed=self._seed)
        self.queue = queue.to(next(self.momentum.parameters()).device)

    def update(self, discriminator: Discriminator) -> None:
        """Move C′ towards C."""
        update_ema(self.momentum, discriminator, self.config.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor, location: Tensor | None = None, at_once: int | None = None) -> Keys:
        """Keys of images [B, C, H, W].

        Args:
            location: [1], in [0, 1), of local patches; None without them.
            at_once: images that pass through C′ at a time; None for all.
        """
        parts = [self._embed(self.momentum, part, location) for part in images.split(at_once or len(images))]
        embeddings = torch.cat([part for part, _ in parts], dim=1)
        patches = None if location is None else torch.cat([part for _, part in parts if part is not None], dim=1)
        return Keys(embeddings, patches, location)

    def enqueue(self, keys: Keys, ids: Tensor) -> None:
        """Replace the oldest keys in the queues by these, of images with ids [B]."""
        self.queue.enqueue(keys.embeddings, ids)
        if self.local_queue is not None and keys.patches is not None:
            self.local_queue.enqueue(keys.patches, ids)

    def loss(
        self, discriminator: Discriminator, rec: Tensor, keys: Keys, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE (Eq. 6) of reconstructions [B, C, H, W], averaged over layers and batch; plus that of local patches.

        Args:
            discriminator: C, which makes the queries.
            rec: the reconstructions.
            keys: of the images that they reconstruct.
            ids: [B], of these images.

        Returns:
            The loss, and metrics: per layer, the share of queries whose own key scores best (top1) and among the best
            five (top5).
        """
        queries, patches = self._embed(discriminator, rec, keys.location)
        loss, stats = self._info_nce(queries, keys.embeddings, self.queue, ids)
        metrics = {}
        for layer, rank in zip(self.layers, stats.rank, strict=True):
            metrics[f"contrast/top1_{layer}"] = (rank < 1).float().mean()
            metrics[f"contrast/top5_{layer}"] = (rank < 5).float().mean()
        if patches is not None and keys.patches is not None and self.local_queue is not None:
            local, _ = self._info_nce(patches, keys.patches, self.local_queue, ids)
            metrics["loss/contrast_local"] = local.detach()
            loss = loss + local
        return loss, metrics

    def _embed(
        self, discriminator: Discriminator, images: Tensor, location: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries or keys [S, B, D] of the contrasted layers, in float32 at least, and local patches [L, B, W]."""
        layers = self.layers if location is None else (*self.layers, *self.config.local_layers)
        critique = discriminator(images, stddev_parts=0, layers=tuple(dict.fromkeys(layers)), scored=False)
        embeddings = upcast(discriminator.embed(critique, self.layers))
        return embeddings, None if location is None else self._patches(critique, location)

    def _patches(self, critique: Critique, location: Tensor) -> Tensor:
        """The channels [L, B, W] of L feature maps at one location."""
        patches = []
        for layer in self.config.local_layers:
            positions = critique.features[layer].flatten(2)
            index = (location * positions.shape[2]).long()
            patches.append(positions.index_select(2, index).squeeze(2))
        return torch.stack(patches)

    def _info_nce(self, queries: Tensor, keys: Tensor, queue: KeyQueue, ids: Tensor):
        exclude = self.config.exclude_same_image
        return info_nce(
            queries,
            keys,
            queue.keys,
            temperature=self.config.temperature,
            valid=queue.valid,
            query_ids=ids if exclude else None,
            negative_ids=queue.ids if exclude else None,
            return_stats=True,
        )
