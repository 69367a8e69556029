"""Multi-scale instance contrast (Eq. 6, §4.2): each reconstruction must recognise its own image among K others."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from dcvae_fast.config import ContrastConfig
from dcvae_fast.models import autogan, progressive
from dcvae_fast.models.layers import Critique, update_average, widened
from dcvae_kernels import KeyQueue, info_nce

Discriminator = autogan.Discriminator | progressive.Discriminator


class InstanceContrast(nn.Module):
    """The momentum discriminator C′, which makes the keys, and the queues that hold older ones.

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
        """Contrasts these layers from now on, with a new queue: keys of another resolution do not compare."""
        self.layers = tuple(layers)
        queue = KeyQueue(self.config.negatives, self._dim, scales=len(layers), seed=self._seed)
        self.queue = queue.to(next(self.momentum.parameters()).device)

    def update(self, discriminator: Discriminator) -> None:
        """Move C′ towards C."""
        update_average(self.momentum, discriminator, self.config.momentum)

    def critique(self, discriminator: Discriminator, images: Tensor, local: bool = False) -> Critique:
        """Features of images [B, C, H, W], of all contrasted layers, those of local patches too if wanted; no more."""
        layers = (*self.layers, *self.config.local_layers) if local else self.layers
        return discriminator(images, stddev_parts=0, layers=tuple(dict.fromkeys(layers)), scored=False)

    @torch.no_grad()
    def keys(self, images: Tensor, local: bool = False) -> tuple[Tensor, Critique]:
        """Keys of images [B, C, H, W]: embeddings [S, B, D] of the contrasted layers, and C′'s features."""
        critique = self.critique(self.momentum, images, local)
        return self.embed(self.momentum, critique), critique

    def embed(self, discriminator: Discriminator, critique: Critique) -> Tensor:
        """Queries or keys [S, B, D] of the contrasted layers, in float32 at least."""
        return widened(discriminator.embed(critique, self.layers))

    def loss(self, queries: Tensor, keys: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE averaged over layers and batch; queries and keys [S, B, D], ids [B] of the images.

        Metrics: for each layer the share of queries whose own key is the best (top1) and among the best five (top5).
        """
        loss, stats = self._info_nce(queries, keys, self.queue, ids)
        metrics = {}
        for layer, rank in zip(self.layers, stats.rank, strict=True):
            metrics[f"contrast/top1_{layer}"] = (rank < 1).float().mean()
            metrics[f"contrast/top5_{layer}"] = (rank < 5).float().mean()
        return loss, metrics

    def local_patches(self, critique: Critique, location: Tensor) -> Tensor:
        """The channels [L, B, W] of L feature maps at one location, given as a number in [0, 1) of shape [1]."""
        patches = []
        for layer in self.config.local_layers:
            positions = critique.features[layer].flatten(2)
            index = (location * positions.shape[2]).long()
            patches.append(positions.index_select(2, index).squeeze(2))
        return torch.stack(patches)

    def local_loss(self, queries: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
        """InfoNCE between patches at one location, [L, B, W] each."""
        assert self.local_queue is not None
        return self._info_nce(queries, keys, self.local_queue, ids)[0]

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
