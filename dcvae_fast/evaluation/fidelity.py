"""FID, Inception score, KID, precision and recall from torch-fidelity, which only this file imports."""

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
COMPARISON_METRICS = ("fid", "kid", "prc")  # compare with real images
KID_SUBSET_SIZE = 1000
MIN_IMAGES = 10  # the Inception score is a mean over 10 parts of the images


def load_features(weights: Path | None = None) -> Extractor:
    """Load the Inception network that defines FID, with weights from a folder, or downloaded.

    Raises:
        EvaluationError: the weights are missing, damaged or cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = find_weights(URL_INCEPTION_V3, weights)
    read_weights(path)  # checked first, because the library would execute code in the file
    return registered_features(INCEPTION, feature_extractor_weights_path=str(path))


def registered_features(name: str, **settings: str) -> Extractor:
    """Create a network of torch-fidelity's registry that returns the features of all `FEATURE_METRICS`."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    network = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = sorted({layer_for(network, metric) for metric in FEATURE_METRICS})
    return Extractor(name, create_feature_extractor(name, layers, cuda=False, verbose=False, **settings))


def load_lpips(weights: Path | None = None) -> Extractor:
    """Load LPIPS on VGG16: two batches [B, 3, H, W] with values 0–255 → distances [B].

    Raises:
        EvaluationError: the weights are missing, damaged or cannot be downloaded.
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
    """Features [N, D] of images uint8 [B, C, H, W] by layer, on the CPU; grey images are repeated to RGB."""
    network: Any = extractor.network
    device = next(network.parameters()).device
    batches_by_layer: dict[str, list[Tensor]] = {}
    for batch in batches:
        features = network(batch.to(device).expand(-1, 3, -1, -1))
        for layer, values in network.convert_features_tuple_to_dict(features).items():
            if layers is None or layer in layers:
                batches_by_layer.setdefault(layer, []).append(values.cpu())
    return {layer: torch.cat(values) for layer, values in batches_by_layer.items()}


def real_features(
    batches: Iterable[Tensor], extractor: Extractor, cache: Path | None, key: Callable[[], str]
) -> dict[str, Tensor]:
    """Features of the real images for `COMPARISON_METRICS`, cached under this key if the folder `cache` is given.

    Raises:
        OSError: the folder cannot be written.
    """
    layers = {layer_for(extractor.network, metric) for metric in COMPARISON_METRICS}
    if cache is None:
        return features_of(batches, extractor, layers)
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    name = hashlib.sha256(f"{key()} {extractor.name} {hash_weights(extractor.network)}".encode()).hexdigest()[:32]
    path = cache / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError):  # damaged: computed again
            pass
    features = features_of(batches, extractor, layers)
    cache.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(features))
    return features


def content_key(images: ImageSet | EncodedSet, indices: Tensor, model: ModelConfig) -> str:
    """Hash of the bytes of these images, and of the size and channels in which this model sees them."""
    digest = hashlib.sha256(f"{images.name} {model.image_channels} {model.resolution}".encode())
    if isinstance(images, ImageSet):
        digest.update(str(list(images.images.shape[1:])).encode())
        for part in indices.split(10_000):
            digest.update(images.images[part].numpy().tobytes())
        return digest.hexdigest()
    with ThreadPoolExecutor() as pool:
        for file_digest in pool.map(lambda index: hashlib.sha256(images.read(index)).digest(), indices.tolist()):
            digest.update(file_digest)
    return digest.hexdigest()


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """Fréchet distance between Gaussians with the moments of features [N, D] and [M, D], in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    moments = [fid_features_to_statistics(x.double()) for x in (features, real)]
    return fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]


def compare(
    metric: str, features: dict[str, Tensor], real: dict[str, Tensor], extractor: Extractor
) -> dict[str, tuple[float, float | None, str | None]]:
    """Compute one of `FEATURE_METRICS` from features by layer: name → value, spread, meaning of the spread.

    The Inception score does not use `real`. KID's subsets have 1,000 images, or all images if there are fewer.
    """
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    layer = layer_for(extractor.network, metric)
    generated = features[layer]
    if metric == "is":
        result = metric_isc.isc_features_to_metric(generated)
        spread = "standard deviation over 10 parts"
        return {"is": (result[metric_isc.KEY_METRIC_ISC_MEAN], result[metric_isc.KEY_METRIC_ISC_STD], spread)}
    reference = real[layer]
    match metric:
        case "fid":
            return {"fid": (frechet_distance(generated, reference), None, None)}
        case "kid":
            size = min(KID_SUBSET_SIZE, len(generated), len(reference))
            result = metric_kid.kid_features_to_metric(generated, reference, kid_subset_size=size, verbose=False)
            spread = f"standard deviation over 100 subsets of {size}"
            return {"kid": (result[metric_kid.KEY_METRIC_KID_MEAN], result[metric_kid.KEY_METRIC_KID_STD], spread)}
        case _:  # in parts: all distances of 50,000 images together need 10 GB
            device = next(extractor.network.parameters()).device
            result = metric_prc.prc_features_to_metric(
                generated.to(device), reference.to(device), save_cpu_ram=True, prc_batch_size=2000, verbose=False
            )
            return {
                "precision": (result[metric_prc.KEY_METRIC_PRECISION], None, None),
                "recall": (result[metric_prc.KEY_METRIC_RECALL], None, None),
            }


def layer_for(network: Any, metric: str) -> str:
    """Return the layer of a network whose features one of `FEATURE_METRICS` is computed from."""
    return network.get_default_feature_layer_for_metric("isc" if metric == "is" else metric)
