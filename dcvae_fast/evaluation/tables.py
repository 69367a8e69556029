"""The paper's tables: what it reports and what it quotes, as printed, and which of our numbers stand beside. Pure.

A column is a metric, a row a method; a row of the paper's own names the run, or runs, that reproduce it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dcvae_fast.evaluation.measurement import Measurement, Subject

NONE = "–"


class Key(NamedTuple):
    """Which measurement of a run."""

    metric: str
    of: Subject
    protocol: str


@dataclass(frozen=True)
class Column:
    """A metric.

    Attributes:
        heading: with its unit, and an arrow to where it is better
        metric, of, protocol: of the `Measurement` that stands in it; `of` is None where rows say it
        note: why this one, where the paper leaves it open
    """

    heading: str
    metric: str
    of: Subject | None = None
    protocol: str = "paper"
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        method: as the paper names it
        paper: as it prints its numbers, one a column; "" for none
        runs: names of the runs that are measured, one a column; "" for none, and none at all where it only quotes
        of: what is measured, where columns leave it open
    """

    method: str
    paper: tuple[str, ...]
    runs: tuple[str, ...] = ()
    of: Subject | None = None


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        name: of the command's argument
        title: with the data set
        columns, rows: of each row as many numbers as columns
        note: what there is to know of all of it
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str | None = None

    def needed(self) -> dict[str, list[Key]]:
        """What is measured of each run."""
        found: dict[str, dict[Key, None]] = {}
        for row in self.rows:
            for column, run in enumerate(row.runs):
                if run:
                    found.setdefault(run, {})[self.key(row, column)] = None
        return {run: list(keys) for run, keys in found.items()}

    def key(self, row: Row, column: int) -> Key:
        metric = self.columns[column]
        of = metric.of or row.of
        assert of is not None, f"{self.name}: {row.method} does not say of what {metric.heading} is"
        return Key(metric.metric, of, metric.protocol)


@dataclass(frozen=True)
class Result:
    """What has come of a run so far.

    Attributes:
        remarks: in what it departs from the paper's
        measured: its numbers
        missing: why there is no number
        model: what was measured, as `describe` has it
    """

    remarks: tuple[str, ...] = ()
    measured: Mapping[Key, Measurement] = field(default_factory=dict)
    missing: Mapping[Key, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


# Several of our columns stand beside one of the paper's where it states no unit.
PIXEL_UNIT = (
    "The paper states no unit. Its values here fit an image's sum of squares on [0, 1], the mean over images, and as"
    " well the root of the mean square on 0–255, and stand beside both; the mean square on [-1, 1] fits Table 8."
)
PIXEL_UNIT_8 = (
    "The paper states no unit. Its values here fit the mean square on [-1, 1], and stand beside it; the others are what"
    " Table 1 fits."
)
PERCEPTUAL_SCALE = (
    "Mean square of the difference of VGG16's relu4_3. The paper does not say how images are scaled for it: its values"
    " stand beside both, ImageNet's mean and standard deviation, and Caffe's 0–255 less the mean."
)
PERCEPTUAL = (
    Column("perceptual, ImageNet scaling ↓", "perceptual_imagenet", "reconstructions", note=PERCEPTUAL_SCALE),
    Column("perceptual, Caffe scaling ↓", "perceptual_caffe", "reconstructions", note=PERCEPTUAL_SCALE),
)
SQUARES, RMSE, MSE = "pixel, sum of squares on [0, 1] ↓", "pixel, RMSE on 0–255 ↓", "pixel, MSE on [-1, 1] ↓"


def _pixel(note: str) -> tuple[Column, ...]:
    units = ((SQUARES, "pixel_squares"), (RMSE, "pixel_rmse"), (MSE, "pixel_mse"))
    return tuple(Column(heading, metric, "reconstructions", note=note) for heading, metric in units)


def _ablation(method: str, run: str, fid_is: str, pixel: str, perceptual: str) -> Row:
    return Row(method, (*fid_is.split(), pixel, pixel, "", perceptual, perceptual), (f"table1/{run}",) * 9)


TABLE1 = Table(
    "table1",
    "Table 1: ablation, CIFAR-10 at 32×32",
    (
        Column("FID of samples ↓", "fid", "samples"),
        Column("IS of samples ↑", "is", "samples"),
        Column("FID of reconstructions ↓", "fid", "reconstructions"),
        Column("IS of reconstructions ↑", "is", "reconstructions"),
        *_pixel(PIXEL_UNIT),
        *PERCEPTUAL,
    ),
    (
        _ablation("VAE", "vae", "115.8 3.8 108.4 4.3", "21.8", "65.8"),
        _ablation("VAE/GAN", "vae-gan", "39.8 7.4 29.0 7.6", "62.7", "57.2"),
        _ablation("VAE-Contrastive", "vae-contrastive", "240.4 1.8 242 1.9", "53.6", "104.2"),
        _ablation("DC-VAE", "dc-vae", "17.9 8.2 21.4 7.9", "45.9", "52.9"),
    ),
)

_CIFAR10_AND_STL10 = ("table1/dc-vae", "table1/dc-vae", "table2/dc-vae", "table2/dc-vae")

TABLE2 = Table(
    "table2",
    "Table 2: CIFAR-10 and STL-10 at 32×32",
    (
        Column("CIFAR-10 IS ↑", "is"),
        Column("CIFAR-10 FID ↓", "fid"),
        Column("STL-10 IS ↑", "is"),
        Column("STL-10 FID ↓", "fid"),
    ),
    (
        Row("DCGAN", ("6.6", "", "", "")),
        Row("ProbGAN", ("7.8", "24.6", "8.9", "46.7")),
        Row("WGAN-GP ResNet", ("7.9", "", "", "")),
        Row("RaGAN", ("", "23.5", "", "")),
        Row("SN-GAN", ("8.2", "21.7", "9.1", "40.1")),
        Row("MGAN", ("8.3", "26.7", "", "")),
        Row("Progressive GAN", ("8.8", "", "", "")),
        Row("Improving MMD GAN", ("8.3", "16.2", "9.3", "37.6")),
        Row("PULSGAN", ("", "22.3", "", "")),
        Row("AutoGAN", ("8.6", "12.4", "9.2", "31.0")),
        Row("VAE", ("3.8", "115.8", "", ""), ("table1/vae", "table1/vae", "", ""), "samples"),
        Row("VAE/GAN", ("7.4", "39.8", "", ""), ("table1/vae-gan", "table1/vae-gan", "", ""), "samples"),
        Row("VEEGAN", ("", "95.2", "", "")),
        Row("WAE-GAN", ("", "93.1", "", "")),
        Row("NVAE sampling", ("", "50.8", "", "")),
        Row("NVAE reconstruction", ("", "2.67", "", "")),
        Row("DC-VAE sampling", ("8.2", "17.9", "8.1", "41.9"), _CIFAR10_AND_STL10, "samples"),
        Row("DC-VAE reconstruction", ("7.9", "21.4", "8.4", "43.6"), _CIFAR10_AND_STL10, "reconstructions"),
    ),
    note="The runs on CIFAR-10 are those of Table 1.",
)

TABLE3 = Table(
    "table3",
    "Table 3: LSUN bedroom at 128×128",
    (
        Column("FID of samples ↓", "fid", "samples"),
        Column("FID of reconstructions ↓", "fid", "reconstructions"),
    ),
    (
        Row("Progressive GAN, 256×256", ("8.3", "")),
        Row("SNGAN", ("16.0", "")),
        Row("SSGAN", ("13.3", "")),
        Row("StyleALAE, 256×256", ("17.13", "15.92")),
        Row("DC-VAE", ("14.3", "10.57"), ("table3/dc-vae",) * 2),
    ),
)

TABLE4 = Table(
    "table4",
    "Table 4: CelebA-HQ at 256×256",
    (Column("FID of samples ↓", "fid", "samples"),),
    (
        Row("StyleALAE", ("19.21",)),
        Row("NVAE", ("40.26",)),
        Row("NCP-VAE", ("24.69",)),
        Row("DC-VAE", ("15.81",), ("table4/dc-vae",)),
    ),
)

TABLE5 = Table(
    "table5",
    "Table 5: CelebA at 128×128",
    (Column("FID ↓", "fid"),),
    (
        Row("PresGAN, 64×64", ("29.1",)),
        Row("LSGAN", ("53.9",)),
        Row("COCO-GAN", ("5.7",)),
        Row("ProGAN", ("7.30",)),
        Row("VEE-GAN", ("46.2",)),
        Row("WAE-GAN, 64×64", ("42",)),
        Row("DC-VAE reconstruction", ("14.3",), ("table5/dc-vae",), "reconstructions"),
        Row("DC-VAE sampling", ("19.9",), ("table5/dc-vae",), "samples"),
    ),
)

TABLE6 = Table(
    "table6",
    "Table 6: error of a linear classifier on latents, MNIST",
    tuple(Column(f"Z = {size}, % ↓", "probe_error", "latents") for size in (16, 32, 64)),
    (
        Row("VAE", ("2.92±0.12", "3.05±0.42", "2.98±0.14")),
        Row("β-VAE, β=2", ("4.69±0.18", "5.26±0.22", "5.40±0.33")),
        Row("FactorVAE, γ=5", ("6.07±0.05", "6.18±0.20", "6.35±0.48")),
        Row("β-TCVAE, α=1, β=5, γ=1", ("1.62±0.07", "1.24±0.05", "1.32±0.09")),
        Row("Guided-VAE", ("1.85±0.08", "1.60±0.08", "1.49±0.06")),
        Row("Guided-β-TCVAE", ("1.47±0.12", "1.10±0.03", "1.31±0.06")),
        Row("DC-VAE", ("1.30±0.035", "1.27±0.037", "1.29±0.034"), ("table6/z16", "table6/z32", "table6/z64")),
    ),
    note="± is half of a 95 % confidence interval over 5 trials.",
)

TABLE7 = Table(
    "table7",
    "Table 7: perceptual path length, CelebA-HQ at 512×512",
    (Column("PPL, full ↓", "ppl", "samples"),),
    (
        Row("StyleALAE, of StyleGAN", ("33.29",)),
        Row("ProGAN", ("40.71",)),
        Row("DC-VAE, of ProGAN", ("24.66",), ("table8/dc-vae",)),
    ),
    note="The run is that of Table 8. The paper does not state the resolution.",
)

TABLE8 = Table(
    "table8",
    "Table 8: reconstruction of held-out images, CelebA-HQ at 512×512",
    (*_pixel(PIXEL_UNIT_8), *PERCEPTUAL),
    (
        Row("StyleALAE, of StyleGAN", ("", "", "0.117", "40.40", "40.40")),
        Row("DC-VAE, of ProGAN", ("", "", "0.072", "38.63", "38.63"), ("table8/dc-vae",) * 5),
    ),
)

NEGATIVES = (128, 256, 512, 1024, 8096)
FIGURE7_EPOCHS = 50

FIGURE7 = Table(
    "figure7",
    f"Figure 7: pixel error by negatives K, CIFAR-10's test images, after {FIGURE7_EPOCHS} epochs",
    _pixel("The paper draws curves, on an axis from 2.0 to 5.0 without a unit, and prints no numbers."),
    tuple(Row(f"DC-VAE, K = {k}", ("", "", ""), (f"figure7/k{k}",) * 3) for k in NEGATIVES),
    note="The paper's finding is that more negatives reconstruct better.",
)

TABLES = {table.name: table for table in (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, TABLE7, TABLE8, FIGURE7)}


def markdown(table: Table, results: Mapping[str, Result]) -> str:
    """A heading, the table, notes, and why numbers are missing. Every line with a number of ours carries its remarks.

    Args:
        results: of runs, by name; a run without one has not been made yet.
    """
    notes = list(dict.fromkeys(column.note for column in table.columns if column.note))
    headings = [
        column.heading + (f" [{notes.index(column.note) + 1}]" if column.note else "") for column in table.columns
    ]
    lines = [["method", "from", *headings, "remarks"]]
    missing: dict[str, list[str]] = {}
    for row in table.rows:
        if any(row.paper):
            lines.append([row.method, "paper" if row.runs else "quoted", *(_printed(x) for x in row.paper), ""])
        if not row.runs:
            continue
        ours = []
        for column, run in enumerate(row.runs):
            found = _found(table.key(row, column), results.get(run)) if run else ""
            if run and isinstance(found, str):
                missing.setdefault(found, []).append(f"{row.method}, {table.columns[column].heading}")
                found = NONE
            ours.append(found if isinstance(found, str) else _value(found))
        lines.append([row.method, "ours", *ours, "; ".join(_remarks(row, results))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    page = [_title(table, results), ""]
    for line in (lines[0], rule, *lines[1:]):
        page.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    below = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    below += [table.note] if table.note else []
    below += [f"{NONE} {'; '.join(cells)}: {why}" for why, cells in missing.items()]
    return "\n".join([*page, *(line for paragraph in below for line in ("", paragraph))]) + "\n"


def as_json(table: Table, results: Mapping[str, Result]) -> dict[str, Any]:
    """The same as plain values: each of our numbers with its measurement, its run and its remarks."""
    rows = []
    for row in table.rows:
        cells = []
        for number, (column, printed) in enumerate(zip(table.columns, row.paper, strict=True)):
            cell: dict[str, Any] = {"column": column.heading, "paper": printed or None}
            if row.runs and (run := row.runs[number]):
                found = _found(table.key(row, number), results.get(run))
                given = {"missing": found} if isinstance(found, str) else {"ours": asdict(found)}
                remarks = list(results[run].remarks) if run in results else []
                cell |= {"run": run, "remarks": remarks, **given}
            cells.append(cell)
        rows.append({"method": row.method, "quoted": not row.runs, "cells": cells})
    notes = list(dict.fromkeys(column.note for column in table.columns if column.note))
    return {
        "table": table.name,
        "title": _title(table, results).removeprefix("# "),
        "rows": rows,
        "notes": [*notes, *filter(None, [table.note])],
        "runs": {run: {"remarks": list(result.remarks), **result.model} for run, result in results.items()},
    }


def _title(table: Table, results: Mapping[str, Result]) -> str:
    remarks = list(dict.fromkeys(remark for run in table.needed() if run in results for remark in results[run].remarks))
    return f"# {table.title}" + (f" ({'; '.join(remarks)})" if remarks else "")


def _remarks(row: Row, results: Mapping[str, Result]) -> list[str]:
    """Those of all its runs, each once."""
    return list(dict.fromkeys(x for run in row.runs if run in results for x in results[run].remarks))


def _found(key: Key, result: Result | None) -> Measurement | str:
    """The measurement, or why there is none."""
    if result is None:
        return "not trained yet"
    return result.measured.get(key) or result.missing.get(key, "not measured yet")


def _printed(number: str) -> str:
    return number.replace("±", " ± ")


def _value(one: Measurement) -> str:
    """Four digits; the spread only of probes, as the paper has it."""
    return f"{one.value:.4g}" + (f" ± {one.spread:.2g}" if one.metric == "probe_error" and one.spread else "")
