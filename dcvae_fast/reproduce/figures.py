"""Figures of images: the runs' inputs, reconstructions and samples, drawn as in the paper, and the page of a figure."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dcvae_fast.distributed import pick_device
from dcvae_fast.errors import DivergedError, EvaluationError, UserError
from dcvae_fast.evaluation import Splits
from dcvae_fast.evaluation.images import evenly_spaced, parts, reconstructions, samples
from dcvae_fast.evaluation.perceptual import inference_batch_size
from dcvae_fast.images import make_grid
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.reproduce.paper import FIGURES, Figure, Panel
from dcvae_fast.reproduce.runs import IMAGES, Training, open_splits, train_run
from dcvae_fast.run_folder import images_shown
from dcvae_pipelines.atomic import atomic_write, replacing
from dcvae_pipelines.pixels import normalize

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

logger = logging.getLogger(__name__)

# Seed of the samples, and of reconstructions from draws of the posterior.
SEED = 0

# Values in [-1, 1] of images that are missing because training failed, and of tiles without an image.
GREY, WHITE = 0.7, 1.0


class Counts(NamedTuple):
    """Number of images of a run in a figure."""

    test_images: int
    samples: int


@dataclass(frozen=True)
class RunImages:
    """Images of a run in a figure, float32 [N, C, R, R] in [-1, 1] on the CPU.

    Attributes:
        inputs: test images
        reconstructions: their reconstructions; grey if they are missing
        samples: images decoded from the prior; grey if they are missing
        shown: images shown in training
        selection: description of how the images were selected
        remarks: differences from the paper's run
        missing: reason why reconstructions and samples are missing, or None
    """

    inputs: Tensor
    reconstructions: Tensor
    samples: Tensor
    shown: int
    selection: str
    remarks: tuple[str, ...]
    missing: str | None


def reproduce_figure(figure: Figure, runs: Sequence[Training], out: Path) -> int:
    """Complete the training of a figure's runs; write OUT/FIGURE.png and its page OUT/FIGURE.md after each run.

    Args:
        runs: runs of the figure, from `trainings`.
        out: folder for picture and page.

    Returns:
        0, or 128 + the signal that stopped training.

    Raises:
        EvaluationError: the images of a run that diverged are missing; all others were drawn.
        UserError, DataError: as in `train`.
    """
    _load_font(16)  # fails before hours of training if a package is missing
    _check_folders(figure, runs)
    splits, counts = open_splits(runs), _counts(figure)
    images = {run.name: _inputs(run, splits[run.config.data], counts[run.name]) for run in runs}
    for run in runs:
        try:
            outcome = train_run(run)
        except DivergedError as error:
            images[run.name] = replace(images[run.name], shown=images_shown(run.folder), missing=str(error))
        else:
            if outcome.signal:
                return 128 + outcome.signal
            images[run.name] = _decode(run, splits[run.config.data], counts[run.name], images[run.name], outcome.images)
        _write(figure, images, out)
    logger.info("; ".join([f"{out / figure.name}.png and .md", *_remarks(images)]))
    if reasons := {name: result.missing for name, result in images.items() if result.missing}:
        raise EvaluationError(
            f"{figure.name} lacks the images of {', '.join(reasons)}, all others were drawn: "
            + " ".join(map(str, reasons.values()))
        )
    return 0


def _check_folders(figure: Figure, runs: Sequence[Training]) -> None:
    """Check that several data sets of image files have a folder each, because `data.root` is the same for all runs.

    Raises:
        UserError: they do not; the message names commands that set each run's folder.
    """
    roots = {run.config.data.name: run.config.data.root for run in runs}
    if len(roots) < 2 or len({root for root in roots.values() if root is not None}) == len(roots):
        return
    single = [next(other.name for other in FIGURES.values() if list(other.needed()) == [run.name]) for run in runs]
    commands = " and ".join(f"`dcvae reproduce {name} --data.root DIR`" for name in single)
    raise UserError(
        f"{figure.name} needs {' and '.join(roots)} in different folders, but --data.root sets one folder. First run"
        f" {commands} with the same other options, then {figure.name} without --data.root: each run keeps its folder,"
        " data.root in its config.yaml."
    )


def _counts(figure: Figure) -> dict[str, Counts]:
    """Return the number of images of each run."""
    counts = dict.fromkeys(figure.needed(), Counts(0, 0))
    for panel in (panel for row in figure.panels for panel in row):
        test_images, samples = counts[panel.run]
        if panel.kind == "samples":
            counts[panel.run] = Counts(test_images, max(samples, panel.count))
        else:
            counts[panel.run] = Counts(max(test_images, panel.count), samples)
    return counts


def _inputs(run: Training, data: Splits, counts: Counts) -> RunImages:
    """Return the test images of a run, evenly spaced over the split, and grey images in place of all others.

    Raises:
        DataError: see `parts`.
    """
    model = run.config.model
    selected = evenly_spaced(len(data.test), counts.test_images)
    inputs = torch.cat([normalize(part.images) for part in parts(data.test, selected, model, data.on_corrupt)])
    samples = torch.full((counts.samples, *inputs.shape[1:]), GREY)
    reconstructed = "the posterior mean" if _seed(run) is None else f"draws of the posterior, seed {SEED}"
    selection = (
        f"{len(inputs)} of {len(data.test):,} test images of {data.test.name}, evenly spaced; reconstructions from"
        f" {reconstructed}"
    )
    if counts.samples:
        clamped = (
            "" if model.sample_clamp is None else f", clamped to [-{model.sample_clamp:g}, {model.sample_clamp:g}]"
        )
        selection += f"; {counts.samples} samples of N(0, I){clamped}, seed {SEED}"
    remarks = run.remarks(run.config.train.images, IMAGES)
    grey = torch.full_like(inputs, GREY)
    return RunImages(inputs, grey, samples, images_shown(run.folder), selection, remarks, "not trained yet")


def _seed(run: Training) -> int | None:
    """Return the seed of reconstructions; None for reconstructions from the posterior mean."""
    return SEED if run.config.model.reconstruct_from == "sample" else None


def _decode(run: Training, data: Splits, counts: Counts, images: RunImages, shown: int) -> RunImages:
    """Return `images` with the reconstructions and samples of the trained model."""
    model = DCVAE.from_pretrained(run.folder, device=pick_device(run.config.train.device))
    batch = inference_batch_size(model.config.resolution)
    selected = evenly_spaced(len(data.test), counts.test_images)
    pairs = reconstructions(model, parts(data.test, selected, model.config, data.on_corrupt), batch, _seed(run))
    reconstructed = torch.cat([reconstruction.cpu() for _, reconstruction in pairs])
    sampled = [part.cpu() for part in samples(model, counts.samples, batch, SEED, model.config.sample_clamp)]
    return replace(
        images,
        reconstructions=reconstructed,
        samples=torch.cat(sampled) if sampled else images.samples,
        shown=shown,
        remarks=run.remarks(shown, IMAGES),
        missing=None,
    )


def _write(figure: Figure, images: Mapping[str, RunImages], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    picture = draw(figure, images)
    with replacing(out / f"{figure.name}.png") as file:
        picture.save(file, format="PNG")
    atomic_write(out / f"{figure.name}.md", markdown(figure, images))


def _remarks(images: Mapping[str, RunImages]) -> list[str]:
    """Return the remarks of all runs, without duplicates. A remark that is not on all runs names its runs."""
    runs: dict[str, list[str]] = {}
    for name, result in images.items():
        for remark in (*result.remarks, *(["images are missing (grey)"] if result.missing else [])):
            runs.setdefault(remark, []).append(name)
    return [remark if len(names) == len(images) else f"{', '.join(names)}: {remark}" for remark, names in runs.items()]


def markdown(figure: Figure, images: Mapping[str, RunImages]) -> str:
    """Return the page of a figure: picture, caption, and the training, images and remarks of each run."""
    remarks = _remarks(images)
    lines = [("run", "images shown in training", "images in the figure", "remarks")]
    lines += [(name, f"{run.shown:,}", run.selection, "; ".join(run.remarks)) for name, run in images.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    rows.insert(1, " | ".join("-" * width for width in widths))
    paragraphs = [
        f"# {figure.title}" + (f" ({'; '.join(remarks)})" if remarks else ""),
        f"![{figure.title}]({figure.name}.png)",
        figure.caption,
        "\n".join(f"| {row} |" for row in rows),
        *([figure.note] if figure.note else []),
        *(f"Grey images of {name}: {run.missing}" for name, run in images.items() if run.missing),
    ]
    return "\n\n".join(paragraphs) + "\n"


def draw(figure: Figure, images: Mapping[str, RunImages]) -> "Image":
    """Draw a figure: title, panels with headings and labels, and remarks below. Pixels are copied, not resampled.

    Args:
        images: by run.
    """
    from PIL import Image, ImageDraw

    grids = [[_grid(panel, images[panel.run]) for panel in row] for row in figure.panels]
    widths = [max(grid.width for grid in column) for column in zip(*grids, strict=True)]
    font = _choose_font(figure, grids)
    line, gap = int(1.5 * font.size), int(font.size / 2)  # height of a line of text; space between panels
    left = gap + line * any(panel.label for row in figure.panels for panel in row)
    width = left + sum(widths) + gap * len(widths)
    title = _wrap(figure.title, font, width - left - gap)
    remarks = [text for remark in _remarks(images) for text in _wrap(remark, font, width - left - gap)]
    headings = [line * any(panel.headings for panel in row) for row in figure.panels]
    heights = [max(grid.height for grid in row) + heading + gap for row, heading in zip(grids, headings, strict=True)]
    canvas = Image.new("RGB", (width, sum(heights) + line * (len(title) + len(remarks)) + 4 * gap), "white")
    pen = ImageDraw.Draw(canvas)

    y = gap
    for text in title:
        pen.text((width / 2, y + line / 2), text, "black", font, "mm")
        y += line
    y += gap
    for panels, row, heading, height in zip(figure.panels, grids, headings, heights, strict=True):
        x = left
        for panel, grid, column_width in zip(panels, row, widths, strict=True):
            for number, text in enumerate(panel.headings):
                centre = x + grid.width * (number + 0.5) / len(panel.headings)
                pen.text((centre, y + heading / 2), text, "black", font, "mm")
            canvas.paste(grid, (x, y + heading))
            if panel.label:
                label = Image.new("RGB", (grid.height, line), "white")
                ImageDraw.Draw(label).text((grid.height / 2, line / 2), panel.label, "black", font, "mm")
                canvas.paste(label.rotate(90, expand=True), (x - line, y + heading))
            x += column_width + gap
        y += height
    y += gap
    for text in remarks:
        pen.text((left, y + line / 2), text, "black", font, "lm")
        y += line
    return canvas


def _grid(panel: Panel, images: RunImages) -> "Image":
    """Arrange the images of a panel. If there are fewer images than tiles, the other tiles are white or left out."""
    from PIL import Image

    size = max(panel.size, images.inputs.shape[-1])
    if panel.kind == "pairs":
        inputs, outputs = (_enlarge(part[: panel.count], size) for part in (images.inputs, images.reconstructions))
        gap, margin = (inputs.new_full((*inputs.shape[:3], width), WHITE) for width in (2, size // 32))
        tiles = torch.cat([margin, inputs, gap, outputs, margin], dim=3)
    else:
        tiles = _enlarge(getattr(images, panel.kind)[: panel.count], size)
    blank = tiles.new_full((max(0, panel.columns - len(tiles)), *tiles.shape[1:]), WHITE)
    return Image.fromarray(make_grid(torch.cat([tiles, blank]), panel.columns).permute(1, 2, 0).numpy())


def _choose_font(figure: Figure, grids: Sequence[Sequence["Image"]]) -> "FreeTypeFont":
    """Choose the font in proportion to the width of the figure, but so small that headings and labels have room."""
    size = max(16, max(sum(grid.width for grid in row) for row in grids) // 60)
    texts = []  # and the space for each
    for panels, row in zip(figure.panels, grids, strict=True):
        for panel, grid in zip(panels, row, strict=True):
            texts += [(heading, 0.9 * grid.width / len(panel.headings)) for heading in panel.headings]
            texts.append((panel.label, grid.height))
    font = _load_font(size)
    scales = [space / font.getlength(text) for text, space in texts if text]
    return _load_font(int(size * min([1.0, *scales])))


def _enlarge(images: Tensor, size: int) -> Tensor:
    """Enlarge images [N, C, R, R] by the integer factor size // R, by repeating pixels."""
    factor = size // images.shape[-1]
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _wrap(text: str, font: "FreeTypeFont", width: float) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _load_font(size: int) -> "FreeTypeFont":
    """Load the font of matplotlib's plots; Pillow's own lacks characters such as ×."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
