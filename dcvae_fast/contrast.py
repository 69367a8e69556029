"""Multi-scale instance contrast (Eq. 6, §4.2): each reconstruction must match its own image among K negatives."""

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
    """Momentum features of images: positives for their own reconstructions, later negatives for other ones.

    Attributes:
        embeddings: [S, B, D], for S layers
        patches: [L, B, W], the channels of L feature maps at `location`; None without local patch contrast
        location: [1], position of the local patches as a fraction of all positions
    """

    embeddings: Tensor
    patches: Tensor | None = None
    location: Tensor | None = None

    def select(self, rows: slice) -> "Keys":
        """Return the keys of a slice of the images."""
        return Keys(self.embeddings[:, rows], None if self.patches is None else self.patches[:, rows], self.location)


class InstanceContrast(nn.Module):
    """The momentum discriminator C′, which computes the keys, and the queues of earlier keys.

    A contrastive step calls `update`, `keys`, `loss` and `enqueue`, in this order.
    """

    def __init__(self, discriminator: Discriminator, config: ContrastConfig, contrast_dim: int, width: int, seed: int):
        super().__init__()
        self.config = config
        self.momentum = deepcopy(discriminator).requires_grad_(False)
        self._dim, self._width, self._seed = contrast_dim, width, seed if config.queue_start == "noise" else None
        self.restart(config.layers, config.local_layers)

    def restart(self, layers: Sequence[str], local_layers: Sequence[str]) -> None:
        """Contrast these layers, and local patches of these feature maps if local patch contrast is enabled.

        The queues start again, because keys of other resolutions are not comparable.
        """
        self.layers = tuple(layers)
        self.local_layers = () if self.config.local_start_images is None else tuple(local_layers)
        self.queue = self._new_queue(self._dim, len(self.layers))
        self.local_queue = self._new_queue(self._width, len(self.local_layers)) if self.local_layers else None

    def _new_queue(self, dim: int, scales: int) -> KeyQueue:
        parameter = next(self.momentum.parameters())
        queue = KeyQueue(self.config.negatives, dim, scales=scales, seed=self._seed)
        return queue.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))

    def update(self, discriminator: Discriminator) -> None:
        """Move C′ towards C."""
        update_ema(self.momentum, discriminator, self.config.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor, location: Tensor | None = None, micro_batch: int | None = None) -> Keys:
        """Compute the keys of images [B, C, H, W].

        Args:
            location: position of the local patches, [1] in [0, 1); None without local patches.
            micro_batch: images per forward pass through C′; None for all images in one pass.
        """
        features = [self._embed(self.momentum, part, location) for part in images.split(micro_batch or len(images))]
        embeddings = torch.cat([embedding for embedding, _ in features], dim=1)
        patches = None if location is None else torch.cat([patch for _, patch in features if patch is not None], dim=1)
        return Keys(embeddings, patches, location)

    def enqueue(self, keys: Keys, ids: Tensor) -> None:
        """Replace the oldest keys in the queues with the keys of images with ids [B]."""
        self.queue.enqueue(keys.embeddings, ids)
        if self.local_queue is not None and keys.patches is not None:
            self.local_queue.enqueue(keys.patches, ids)

    def loss(
        self, discriminator: Discriminator, rec: Tensor, keys: Keys, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE (Eq. 6) of reconstructions, averaged over layers and batch, plus InfoNCE of local patches.

        Args:
            discriminator: C, which computes the queries.
            rec: reconstructions [B, C, H, W].
            keys: keys of the original images.
            ids: ids of the original images, [B].

        Returns:
            The loss and metrics. The metrics are, per layer, the shares of queries whose positive has the highest
            similarity (top1) or one of the five highest (top5).
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
        """Return embeddings [S, B, D] of the contrasted layers, in float32 or float64, and local patches [L, B, W]."""
        layers = self.layers if location is None else (*self.layers, *self.local_layers)
        critique = discriminator(images, stddev_parts=0, layers=tuple(dict.fromkeys(layers)), scored=False)
        embeddings = upcast(discriminator.embed(critique, self.layers))
        return embeddings, None if location is None else self._patches(critique, location)

    def _patches(self, critique: Critique, location: Tensor) -> Tensor:
        """Return the channels [L, B, W] of L feature maps at one location."""
        patches = []
        for layer in self.local_layers:
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
