import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import dcvae_pipelines.image
from dcvae_pipelines import DataError, load_image
from dcvae_pipelines.image import Header, read_header
from image_files import encode, png_of_16_bit_colours, turned


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def to_8_bits(image: Tensor) -> Tensor:
    return (image + 1) * 127.5


def test_an_image_of_the_right_size_is_read_exactly(tmp_path: Path):
    array = pixels(0, 32, 32, 3)
    image = load_image(save(array, tmp_path / "a.png"), channels=3, resolution=32)
    assert image.dtype == torch.float32 and image.shape == (3, 32, 32)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1)


def test_grey_becomes_rgb_and_rgb_becomes_grey(tmp_path: Path):
    grey = pixels(0, 16, 16)
    image = load_image(save(grey, tmp_path / "grey.png"), channels=3, resolution=16)
    assert torch.equal(to_8_bits(image).round(), torch.from_numpy(grey).float().expand(3, 16, 16))

    colour = pixels(1, 16, 16, 3)
    image = load_image(save(colour, tmp_path / "colour.png"), channels=1, resolution=16)
    luma = torch.from_numpy(colour).float() @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
    assert image.shape == (1, 16, 16)
    assert (to_8_bits(image)[0] - luma).abs().max() < 1


@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (17, 40)])
def test_images_are_cropped_to_the_centre_square(tmp_path: Path, height: int, width: int):
    array, side = pixels(0, height, width), min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = load_image(save(array, tmp_path / "a.png"), channels=1, resolution=side)
    assert torch.equal(
        to_8_bits(image).round()[0], torch.from_numpy(array[top : top + side, left : left + side]).float()
    )


def test_downscaling_is_antialiased_like_pillow(tmp_path: Path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing, all black or all white
    image = load_image(save(stripes, tmp_path / "stripes.png"), channels=1, resolution=32)
    assert (to_8_bits(image) - 127.5).abs().max() < 8

    array = pixels(0, 100, 100, 3)
    image = load_image(save(array, tmp_path / "noise.png"), channels=3, resolution=32)
    expected = np.array(Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC))
    assert (to_8_bits(image) - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() <= 1.01


def test_enlarging_stays_in_range(tmp_path: Path):
    digit = np.where(pixels(0, 28, 28) > 127, 255, 0).astype(np.uint8)
    image = load_image(save(digit, tmp_path / "digit.png"), channels=1, resolution=32)
    assert image.shape == (1, 32, 32)
    assert image.min() == -1 and image.max() == 1  # clamped: bicubic interpolation of steps overshoots


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, extension: str):
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = load_image(save(array, tmp_path / f"deep.{extension}"), channels=1, resolution=256)
    assert image[0, 0, 0] == -1 and image[0, -1, -1] == 1
    assert (to_8_bits(image)[0] - torch.from_numpy(array / 257)).abs().max() < 0.51
    assert load_image(tmp_path / f"deep.{extension}", channels=3, resolution=8).shape == (3, 8, 8)


def test_cmyk_palette_and_bilevel_images_are_converted(tmp_path: Path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan ink
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.tif")
    cyan = load_image(tmp_path / "cmyk.tif", channels=3, resolution=8)
    assert torch.equal(cyan, torch.tensor([-1.0, 1.0, 1.0])[:, None, None].expand(3, 8, 8))
    assert load_image(tmp_path / "cmyk.tif", channels=1, resolution=8).shape == (1, 8, 8)

    red = Image.new("RGB", (8, 8), (255, 0, 0)).quantize()
    red.save(tmp_path / "palette.gif")
    assert load_image(tmp_path / "palette.gif", channels=3, resolution=8)[:, 0, 0].tolist() == [1, -1, -1]

    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    assert (load_image(tmp_path / "bilevel.png", channels=1, resolution=8) == 1).all()


def test_transparency_is_dropped_silently(tmp_path: Path):
    array = pixels(0, 8, 8, 4)
    palette = Image.fromarray(array[..., :3]).quantize()
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(save(array, tmp_path / "alpha.png"), channels=3, resolution=8)
        from_palette = load_image(tmp_path / "palette.png", channels=3, resolution=8)
    assert torch.equal(to_8_bits(image).round(), torch.from_numpy(array[..., :3]).permute(2, 0, 1).float())
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1).float()
    assert torch.equal(to_8_bits(from_palette).round(), expected)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotated_images_are_turned_upright(tmp_path: Path, orientation: int, turns: int):
    array = pixels(0, 16, 24)
    image = load_image(save(array, tmp_path / "turned.png", exif=turned(orientation)), channels=1, resolution=16)
    upright = torch.from_numpy(array[:, 4:20].copy()).rot90(turns)
    assert torch.equal(to_8_bits(image).round()[0], upright.float())


def test_unreadable_images_name_the_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.png: no such image file"):
        load_image(tmp_path / "absent.png", channels=3, resolution=32)

    content = save(pixels(0, 64, 64, 3), tmp_path / "a.png").read_bytes()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "broken.png").write_bytes(content[:40] + bytes(100) + content[140:])
    save(np.zeros((8, 8), np.float32), tmp_path / "floats.tif")
    for file in ("text.png", "truncated.png", "broken.png", "floats.tif", ""):
        with pytest.raises(DataError, match=f"{tmp_path / file}: cannot be read as an image"):
            load_image(tmp_path / file, channels=3, resolution=32)


def test_decompression_bombs_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(pixels(0, 64, 64), tmp_path / "bomb.png")
    monkeypatch.setattr(dcvae_pipelines.image, "MAX_PIXELS", 64 * 64)
    assert load_image(path, channels=1, resolution=32).shape == (1, 32, 32)
    monkeypatch.setattr(dcvae_pipelines.image, "MAX_PIXELS", 64 * 64 - 1)
    for read in (lambda: load_image(path, 1, 32), lambda: read_header(path.read_bytes(), str(path))):
        with pytest.raises(DataError, match=r"bomb\.png: .* its 64 × 64 pixels could be a decompression bomb"):
            read()


def test_a_real_face_is_read(real_data: Path):
    path = sorted((real_data / "faces1024").glob("*.jpg"))[0]
    image = load_image(path, channels=3, resolution=64)
    with Image.open(path) as file:
        expected = np.array(file.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    assert (to_8_bits(image) - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() <= 1.01


def test_other_channel_counts_are_rejected(tmp_path: Path):
    with pytest.raises(DataError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), not 4"):
        load_image(tmp_path / "any.png", channels=4, resolution=32)


# --- headers ---


def test_the_header_describes_the_image():
    def header(*args, **options) -> Header:
        return read_header(encode(*args, **options), "x")

    colour = pixels(0, 10, 30, 3)
    assert header(colour, "JPEG") == Header("JPEG", "RGB", 30, 10)
    assert header(colour, "PNG") == Header("PNG", "RGB", 30, 10)
    assert header(colour, "JPEG", exif=turned(1)) == Header("JPEG", "RGB", 30, 10)
    assert header(colour, "JPEG", exif=turned(3)) == Header("JPEG", "RGB", 30, 10, rotated=True)
    assert header(colour, "PNG", exif=turned(6)) == Header("PNG", "RGB", 10, 30, rotated=True)
    assert header(pixels(0, 4, 5), "PNG").mode == "L"
    deep = header(pixels(0, 4, 5).astype(np.uint16), "PNG")
    assert deep.mode == "I;16" and deep.deep
    assert read_header(png_of_16_bit_colours(np.full((1, 1, 3), 0x01FF)), "x") == Header("PNG", "RGB", 1, 1, deep=True)
    assert header(Image.fromarray(pixels(0, 4, 5, 4), "CMYK"), "JPEG").mode == "CMYK"
    frames = [Image.fromarray(pixels(i, 4, 5)) for i in range(2)]
    assert header(pixels(2, 4, 5), "GIF", save_all=True, append_images=frames).animated


def test_png_orientation_is_also_read_from_xmp():
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>', zip=True)
    content = encode(pixels(0, 10, 30, 3), "PNG", pnginfo=xmp)
    assert read_header(content, "x") == Header("PNG", "RGB", 10, 30, rotated=True)
    assert dcvae_pipelines.image.decode(content, "x", 3).size == (10, 30)


WITH_THUMBNAIL = turned(1).tobytes() + encode(pixels(1, 16, 16, 3), "JPEG")  # a thumbnail has its own end marker


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"exif": WITH_THUMBNAIL}])
def test_a_truncated_jpeg_is_named(options: dict):
    content = encode(pixels(0, 64, 64, 3), "JPEG", **{"exif": turned(1), **options})
    assert read_header(content + b"\0trailing bytes", "x").format == "JPEG"
    for end in (len(content) - 2, len(content) - 100, len(content) * 3 // 4):
        with pytest.raises(DataError, match=r"a\.jpg: cannot be read as an image: it is truncated"):
            read_header(content[:end], "a.jpg")


@pytest.mark.parametrize("content", [b"", b"hello" * 100, b"\xff\xd8\xff"])
def test_files_that_are_not_images_are_named(content: bytes):
    with pytest.raises(DataError, match=r"^a\.jpg: cannot be read as an image: unknown format$"):
        read_header(content, "a.jpg")
