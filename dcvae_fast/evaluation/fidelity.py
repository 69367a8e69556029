"""FID, Inception score, KID, precision and recall: torch-fidelity's networks and formulas, no other file imports it."""

import hashlib
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation.measurement import hash_weights
from dcvae_fast.evaluation.pretrained import Extractor, downloads_in, find_weights, read_weights
from dcvae_pipelines import EncodedSet, ImageSet
from dcvae_pipelines.atomic import atomic_write

INCEPTION, LPIPS = "inception-v3-compat", "lpips-vgg16"

FEATURE_METRICS = ("fid", "is", "kid", "prc")
COMPARING = ("fid", "kid", "prc")  # with real images
KID_SUBSET_SIZE = 1000
FEWEST = 10  # images: the Inception score is a mean over as many parts of them


def load_features(weights: Path | None = None) -> Extractor:
    """The Inception network that FID is defined by, with weights from this folder, or downloaded.

    Raises:
        EvaluationError: its weights cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = find_weights(URL_INCEPTION_V3, weights)
    read_weights(path)  # the library would run whatever else the file holds
    return registered_features(INCEPTION, feature_extractor_weights_path=str(path))


def registered_features(name: str, **settings: str) -> Extractor:
    """A network by its name in torch-fidelity's registry, made to give the features of all `FEATURE_METRICS`."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    network = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = sorted({layer_for(network, metric) for metric in FEATURE_METRICS})
    return Extractor(name, create_feature_extractor(name, layers, cuda=False, verbose=False, **settings))


def load_lpips(weights: Path | None = None) -> Extractor:
    """LPIPS on VGG16: two batches [B, 3, H, W] with values 0–255 → distances [B].

    Raises:
        EvaluationError: its weights cannot be had.
    """
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights

    paths = [find_weights(url, weights) for url in (URL_VGG16_LPIPS, VGG16_Weights.IMAGENET1K_V1.url)]
    for path in paths:
        read_weights(path)
    with downloads_in(paths[0].parent):
        return Extractor(LPIPS, SampleSimilarityLPIPS(LPIPS))


@torch.no_grad()
def features_of(
    batches: Iterable[Tensor], extractor: Extractor, layers: Container[str] | None = None
) -> dict[str, Tensor]:
    """Features of images uint8 [B, C, H, W], grey ones shown as RGB: of these layers, or all, [N, D] on the CPU."""
    network: Any = extractor.network
    device = next(network.parameters()).device
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        features = network(batch.to(device).expand(-1, 3, -1, -1))
        for layer, values in network.convert_features_tuple_to_dict(features).items():
            if layers is None or layer in layers:
                found.setdefault(layer, []).append(values.cpu())
    return {layer: torch.cat(values) for layer, values in found.items()}


def real_features(
    batches: Iterable[Tensor], extractor: Extractor, cache: Path | None, key: Callable[[], str]
) -> dict[str, Tensor]:
    """`features_of` the images to compare with: read from the folder `cache` if they are there under this key, else
    written there.

    Raises:
        OSError: the folder cannot be written.
    """
    layers = {layer_for(extractor.network, metric) for metric in COMPARING}
    if cache is None:
        return features_of(batches, extractor, layers)
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    name = hashlib.sha256(f"{key()} {extractor.name} {hash_weights(extractor.network)}".encode()).hexdigest()[:32]
    path = cache / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError):  # cut short or damaged: made again
            pass
    features = features_of(batches, extractor, layers)
    cache.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(features))
    return features


def content_key(images: ImageSet | EncodedSet, indices: Tensor, model: ModelConfig) -> str:
    """What tells these images, as a model of this configuration sees them, from all others: a hash of their bytes."""
    digest = hashlib.sha256(f"{images.name} {model.image_channels} {model.resolution}".encode())
    if isinstance(images, ImageSet):
        digest.update(str(list(images.images.shape[1:])).encode())
        for chosen in indices.split(10_000):
            digest.update(images.images[chosen].numpy().tobytes())
        return digest.hexdigest()
    with ThreadPoolExecutor() as pool:
        for one in pool.map(lambda index: hashlib.sha256(images.read(index)).digest(), indices.tolist()):
            digest.update(one)
    return digest.hexdigest()


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """Fréchet distance between Gaussians with the moments of features [N, D] and [M, D]; in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    moments = [fid_features_to_statistics(each.double()) for each in (features, real)]
    return fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]


def compare(
    metric: str, features: dict[str, Tensor], real: dict[str, Tensor], extractor: Extractor
) -> dict[str, tuple[float, float | None, str | None]]:
    """One of `FEATURE_METRICS` of features by layer: name → value, spread, what the spread is.

    The Inception score compares with nothing, and leaves `real` alone. KID's subsets have 1,000 images, or as many as
    there are.
    """
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    layer = layer_for(extractor.network, metric)
    mine = features[layer]
    if metric == "is":
        found = metric_isc.isc_features_to_metric(mine)
        spread = "standard deviation over 10 parts"
        return {"is": (found[metric_isc.KEY_METRIC_ISC_MEAN], found[metric_isc.KEY_METRIC_ISC_STD], spread)}
    theirs = real[layer]
    match metric:
        case "fid":
            return {"fid": (frechet_distance(mine, theirs), None, None)}
        case "kid":
            size = min(KID_SUBSET_SIZE, len(mine), len(theirs))
            found = metric_kid.kid_features_to_metric(mine, theirs, kid_subset_size=size, verbose=False)
            spread = f"standard deviation over 100 subsets of {size}"
            return {"kid": (found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD], spread)}
        case _:  # in parts, for all distances at once need 10 GB for 50,000 images
            device = next(extractor.network.parameters()).device
            found = metric_prc.prc_features_to_metric(
                mine.to(device), theirs.to(device), save_cpu_ram=True, prc_batch_size=2000, verbose=False
            )
            return {
                "precision": (found[metric_prc.KEY_METRIC_PRECISION], None, None),
                "recall": (found[metric_prc.KEY_METRIC_RECALL], None, None),
            }


def layer_for(network: Any, metric: str) -> str:
    """Which features of a network one of `FEATURE_METRICS` is computed from."""
    return network.get_default_feature_layer_for_metric("isc" if metric == "is" else metric)
