"""Multi-scale instance contrast against cross-entropy written out."""

import pytest
import torch
import torch.nn.functional as F

from dcvae_fast.config import ContrastConfig
from dcvae_fast.contrast import InstanceContrast, Keys
from dcvae_fast.models import progressive
from dcvae_fast.models.autogan import Discriminator
from dcvae_fast.models.layers import Critique
from dcvae_fast.models.progressive import Widths, act

WIDTH, D = 6, 5


def make(**settings) -> tuple[Discriminator, InstanceContrast]:
    torch.manual_seed(0)
    discriminator = Discriminator(WIDTH, 1, D)
    config = ContrastConfig(**{"negatives": 12, **settings})
    return discriminator, InstanceContrast(discriminator, config, D, WIDTH, seed=1)


class FixedEmbeddings(Discriminator):
    """Discriminator that returns fixed embeddings [S, B, D]."""

    def __init__(self, embeddings: torch.Tensor):
        super().__init__(WIDTH, 1, D)
        self.embeddings = embeddings

    def embed(self, critique: Critique, layers: object) -> torch.Tensor:
        return self.embeddings


def loss_of(contrast: InstanceContrast, q: torch.Tensor, k: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return contrast.loss(FixedEmbeddings(q), torch.zeros(q.shape[1], 1, 32, 32), Keys(k), ids)[0]


def cross_entropy(q, k, negatives, temperature=0.07):
    """The authors' loss: [B, D], [B, D], [K, D]."""
    q, k, negatives = (F.normalize(x, dim=1) for x in (q, k, negatives))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)), logits


@pytest.mark.parametrize("layers", [("b2", "final"), ("b1", "final"), ("final",), ("b1", "b2", "b3", "b4")])
def test_loss_is_the_mean_of_cross_entropies(layers):
    discriminator, contrast = make(layers=layers, queue_start="noise")
    torch.manual_seed(1)
    images, rec = torch.rand(2, 4, 1, 32, 32)
    contrast.eval()
    discriminator.eval()
    loss, metrics = contrast.loss(discriminator, rec, contrast.keys(images), torch.arange(4))
    queries, keys = discriminator.embed(discriminator(rec), layers), discriminator.embed(discriminator(images), layers)
    micro_batched = contrast.keys(images, micro_batch=3).embeddings
    torch.testing.assert_close(micro_batched, keys, rtol=1e-4, atol=1e-5)  # C′ is initialised with C
    pairs = [cross_entropy(queries[s], keys[s], contrast.queue.keys[s]) for s in range(len(layers))]
    torch.testing.assert_close(loss, torch.stack([cross_entropies for cross_entropies, _ in pairs]).mean())
    for layer, (_, logits) in zip(layers, pairs, strict=True):
        top1 = (logits.argmax(1) == 0).float().mean()
        torch.testing.assert_close(metrics[f"contrast/top1_{layer}"], top1)
        top5 = (logits.topk(5).indices == 0).any(1).float().mean()
        torch.testing.assert_close(metrics[f"contrast/top5_{layer}"], top5)


def test_empty_slots_of_the_queue_are_ignored():
    _, contrast = make(layers=("final",))
    torch.manual_seed(1)
    q, k, older = torch.randn(3, 1, 4, D)
    assert loss_of(contrast, q, k, torch.arange(4)).item() == 0
    contrast.enqueue(Keys(older), torch.arange(10, 14))
    torch.testing.assert_close(loss_of(contrast, q, k, torch.arange(4)), cross_entropy(q[0], k[0], older[0])[0])


def test_earlier_keys_of_the_same_image_are_not_negatives_by_default():
    torch.manual_seed(1)
    q, k, older = torch.randn(3, 1, 1, D)
    other = torch.randn(1, 1, D)
    for exclude in (True, False):
        _, contrast = make(layers=("final",), exclude_same_image=exclude)
        contrast.enqueue(Keys(torch.cat([older, other], dim=1)), torch.tensor([7, 8]))
        negatives = other[0] if exclude else torch.cat([older, other], dim=1)[0]
        torch.testing.assert_close(loss_of(contrast, q, k, torch.tensor([7])), cross_entropy(q[0], k[0], negatives)[0])


def test_momentum_network_is_an_ema_without_gradient():
    discriminator, contrast = make(momentum=0.9)
    before = [p.clone() for p in contrast.momentum.parameters()]
    with torch.no_grad():
        for p in discriminator.parameters():
            p.add_(1)
    contrast.update(discriminator)
    for was, now, current in zip(before, contrast.momentum.parameters(), discriminator.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * was + 0.1 * current)
        assert not now.requires_grad
    assert not contrast.keys(torch.rand(2, 1, 32, 32)).embeddings.requires_grad


def test_local_patches_are_one_location_of_the_feature_map():
    discriminator, contrast = make(local_layers=("b1", "b3"), local_start_images=0)
    contrast.eval()
    discriminator.eval()
    images = torch.rand(3, 1, 32, 32)
    features = discriminator(images).features
    for location, b1, b3 in ((0.999, (15, 15), (7, 7)), (70 / 256, (4, 6), (2, 1))):  # b1 has 256 positions, b3 64
        patches = contrast.keys(images, torch.tensor([location])).patches
        assert patches is not None
        torch.testing.assert_close(patches[0], features["b1"][:, :, *b1])
        torch.testing.assert_close(patches[1], features["b3"][:, :, *b3])


def test_local_patches_of_growing_networks():
    torch.manual_seed(0)
    discriminator = progressive.Discriminator(32, Widths(256, 8), 1, D)
    contrast = ContrastConfig(
        negatives=12, layers=("low", "final"), local_layers=("16x16", "8x8"), local_start_images=0
    )
    instance = InstanceContrast(discriminator, contrast, D, 8, seed=1)
    images = torch.rand(3, 1, 32, 32)
    location = torch.tensor([19 / 64])  # row 2, column 3 of 8×8; row 4, column 12 of 16×16
    patches = instance.keys(images, location).patches
    assert patches is not None and patches.shape == (2, 3, 8)
    trunk = discriminator.critic.trunk
    h32 = act(trunk.from_images["32"](images))
    h16 = trunk._block(h32, 32)
    torch.testing.assert_close(patches[0], h16[:, :, 4, 12])
    torch.testing.assert_close(patches[1], trunk._block(h16, 16)[:, :, 2, 3])
    with_low = discriminator(images, stddev_parts=0, layers=("low", "8x8"), scored=False).features
    assert list(with_low) == ["low", "8x8"]
    torch.testing.assert_close(with_low["low"], h16)


def test_the_loss_of_local_patches_is_added():
    discriminator, contrast = make(local_layers=("b1", "b3"), local_start_images=0)
    contrast.eval()
    discriminator.eval()
    older, images, rec = torch.rand(3, 4, 1, 32, 32)
    location = torch.tensor([0.4])
    old_keys, keys = contrast.keys(older, location), contrast.keys(images, location)
    contrast.enqueue(old_keys, torch.arange(10, 14))
    total, metrics = contrast.loss(discriminator, rec, keys, torch.arange(4))
    assert contrast.local_queue is not None and keys.patches is not None and old_keys.patches is not None
    assert contrast.local_queue.keys.shape == (2, 12, WIDTH)
    features = discriminator(rec).features
    queries = [features["b1"].flatten(2)[:, :, 102], features["b3"].flatten(2)[:, :, 25]]
    expected = [cross_entropy(queries[s], keys.patches[s], old_keys.patches[s])[0] for s in range(2)]
    torch.testing.assert_close(metrics["loss/contrast_local"], torch.stack(expected).mean())
    without, _ = contrast.loss(discriminator, rec, Keys(keys.embeddings), torch.arange(4))
    torch.testing.assert_close(total, without + metrics["loss/contrast_local"])
