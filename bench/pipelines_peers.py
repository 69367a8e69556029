"""Who makes batches. Each function gives, for a row and its data set, shuffled and mirrored batches without end.

Images are converted to RGB and resized by the antialiased bicubic filter. The others are written as their own
documentation has it, with a process for each core. One endless epoch: on small data sets, which real ones are not,
processes would idle at the end of each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

import suite
from dcvae_pipelines import Batch, EncodedSet, ImageSet, make_source
from harness import DEVICE, ON_GPU, Unavailable
from pipelines_cases import CORES, Row, imported, torchvision_root

Images = ImageSet | EncodedSet


def ours(row: Row, images: Images) -> Iterator[Batch]:
    if isinstance(images, EncodedSet):
        imported("nvidia.dali", "nvidia-dali")
    source = make_source(
        images, resolution=row.resolution, batch=row.batch, seed=0, device=DEVICE, mirror=True, threads=CORES
    )
    return iter(source)


def dataloader(row: Row, images: Images) -> Iterator[Batch]:
    """Pillow and torchvision's transforms."""
    transforms = imported("torchvision.transforms", "torchvision")
    same = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    if isinstance(images, ImageSet):
        datasets = imported("torchvision.datasets", "torchvision")
        cifar10 = datasets.CIFAR10(torchvision_root(), transform=transforms.Compose(same))
        return _loaded(row, Numbered(partial(_image_of, cifar10), len(cifar10)))
    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose([transforms.Resize(row.resolution, bicubic), *same])
    return _loaded(row, Numbered(partial(_opened, _paths(images), transform), len(images)))


def torchvision_io(row: Row, images: Images) -> Iterator[Batch]:
    """torchvision's decoder, and its transforms of tensors."""
    v2 = imported("torchvision.transforms.v2", "torchvision")
    steps = [
        v2.Resize(row.resolution, v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    return _loaded(row, Numbered(partial(_decoded, _paths(images), v2.Compose(steps)), len(images)))


def torchvision_gpu(row: Row, images: Images) -> Iterator[Batch]:
    """Files read by processes, and decoded on the GPU by torchvision, batch by batch."""
    if not (ON_GPU or suite.REHEARSING):
        raise Unavailable("it decodes on a GPU")
    io = imported("torchvision.io", "torchvision")
    v2 = imported("torchvision.transforms.v2", "torchvision")
    resize = v2.Resize(row.resolution, v2.InterpolationMode.BICUBIC)
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    files = Numbered(partial(_read, _paths(images)), len(images))
    for encoded, ids in _loader(row, files, _listed):
        decoded = io.decode_jpeg(encoded, io.ImageReadMode.RGB, device=DEVICE)
        small = resize(torch.stack(decoded))  # all have one size
        mirrored = torch.rand(row.batch, 1, 1, 1, device=DEVICE) < 0.5
        yield Batch(normalize(torch.where(mirrored, small.flip(3), small)), ids.to(DEVICE, non_blocking=True))


@dataclass(frozen=True)
class Numbered(Dataset):
    """`image`, given a number below `count`; and that number."""

    image: Callable[[int], Tensor]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image(index), index


def _loaded(row: Row, dataset: Numbered) -> Iterator[Batch]:
    for images, ids in _loader(row, dataset, default_collate):
        yield Batch(images.to(DEVICE, non_blocking=True), ids.to(DEVICE, non_blocking=True))


def _loader(row: Row, dataset: Numbered, collate: Callable[[list[Any]], Any]) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=row.batch,
        sampler=RandomSampler(dataset, num_samples=10**12),
        num_workers=CORES,
        collate_fn=collate,
        pin_memory=ON_GPU,
        timeout=60,  # else a batch that a process fails to send is waited for in vain
        persistent_workers=True,
    )


# --- what the processes do ---


def _image_of(dataset: Any, index: int) -> Tensor:
    return dataset[index][0]


def _opened(paths: Sequence[str], transform: Callable[[Any], Tensor], index: int) -> Tensor:
    from PIL import Image

    with Image.open(paths[index]) as image:
        return transform(image.convert("RGB"))


def _decoded(paths: Sequence[str], transform: Callable[[Tensor], Tensor], index: int) -> Tensor:
    from torchvision import io

    return transform(io.decode_image(paths[index], io.ImageReadMode.RGB))


def _read(paths: Sequence[str], index: int) -> Tensor:
    from torchvision import io

    return io.read_file(paths[index]).clone()  # what is mapped from a file cannot be sent between processes


def _listed(samples: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    encoded, ids = zip(*samples, strict=True)
    return list(encoded), torch.tensor(ids)


def _paths(images: Images) -> list[str]:
    """
    Raises:
        Unavailable: they are not stored as files.
    """
    if isinstance(images, ImageSet):
        raise Unavailable("these images are no files to decode")
    return [images.image_name(index) for index in range(len(images))]


PEERS: dict[str, Callable[[Row, Images], Iterator[Batch]]] = {
    "ours": ours,
    "dataloader": dataloader,
    "torchvision.io": torchvision_io,
    "torchvision gpu": torchvision_gpu,
}
