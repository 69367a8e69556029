import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcvae_pipelines import DataError, EncodedSet, ImageSet, decode_images
from dcvae_pipelines.encoded import Files
from image_files import encode


def files(folder: Path, contents: list[bytes]) -> EncodedSet:
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    return EncodedSet("files", Files(folder, [f"{i}.png" for i in range(len(contents))]), torch.arange(len(contents)))


def png(value: int) -> bytes:
    return encode(Image.new("L", (8, 8), value))


def test_progress_counts_images_that_are_left_out(tmp_path: Path):
    images, calls = files(tmp_path, [png(1), b"broken", png(3), png(4)]), []
    for count, total in ((3, 3), (9, 4)):
        calls.clear()
        decoded = decode_images(
            images, count, resolution=8, channels=1, on_corrupt="skip", progress=lambda *numbers: calls.append(numbers)
        )
        assert calls == [(done, total) for done in range(1, total + 1)]
        assert decoded.images[:, 0, 0, 0].tolist() == [1, 3, 4][: total - 1]


def test_progress_ends_at_a_corrupt_image(tmp_path: Path):
    images, calls = files(tmp_path, [png(1), b"broken", png(3)]), []
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        decode_images(images, 3, resolution=8, channels=1, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(1, 3)]


def test_decoded_images_report_no_progress():
    images = ImageSet("decoded", torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None)
    decoded = decode_images(images, 2, resolution=8, channels=1, progress=lambda done, total: pytest.fail("decoded"))
    assert len(decoded) == 2


def test_an_interrupt_does_not_wait_for_the_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, reads = files(tmp_path, [png(0)] * 300), []

    def read(self: Files, index: int) -> bytes:
        reads.append(index)
        time.sleep(0.02)
        return png(0)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Files, "read", read)
    with pytest.raises(KeyboardInterrupt):
        decode_images(images, 300, resolution=8, progress=interrupt)
    assert len(reads) < 300
