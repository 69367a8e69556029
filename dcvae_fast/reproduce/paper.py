"""The paper's tables and figures.

Tables have the paper's own and its quoted numbers, and the measurements that reproduce them. Columns are metrics and
rows are methods. A row that can be reproduced names its recipes. Figures have the layout of their images.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dcvae_fast.evaluation.measurement import Subject


class Key(NamedTuple):
    """Key of a measurement within a run."""

    metric: str
    subject: Subject
    protocol: str


@dataclass(frozen=True)
class Column:
    """Metric of a table.

    Attributes:
        heading: name, unit, and an arrow towards better values
        metric, subject, protocol: key of the `Measurement`; `subject` is None if the rows set it
        note: reason for the metric, if the paper leaves it open
    """

    heading: str
    metric: str
    subject: Subject | None = None
    protocol: str = "paper"
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """Method of a table.

    Attributes:
        method: name in the paper
        paper: the paper's numbers as printed, one per column; "" for none
        runs: recipes of the measured runs, one per column; "" for none; empty for methods that the paper quotes
        subject: subject of the measurements, if the columns do not set it
        protocol: protocol of the measurements instead of the columns'
    """

    method: str
    paper: tuple[str, ...]
    runs: tuple[str, ...] = ()
    subject: Subject | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class Table:
    """Table of the paper, or Figure 7.

    Attributes:
        name: argument of `dcvae reproduce`
        title: heading, with the data set
        columns, rows: each row has one number per column
        note: remark on the whole table
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str | None = None

    @property
    def column_notes(self) -> list[str]:
        """Notes of the columns, without duplicates."""
        return list(dict.fromkeys(column.note for column in self.columns if column.note))

    def needed(self) -> dict[str, list[Key]]:
        """Return the measurements that the table needs, by run."""
        keys: dict[str, dict[Key, None]] = {}
        for row in self.rows:
            for column, run in enumerate(row.runs):
                if run:
                    keys.setdefault(run, {})[self.key(row, column)] = None
        return {run: list(run_keys) for run, run_keys in keys.items()}

    def key(self, row: Row, column: int) -> Key:
        metric = self.columns[column]
        subject = metric.subject or row.subject
        assert subject is not None, f"{self.name}: neither {metric.heading} nor {row.method} sets `subject`"
        return Key(metric.metric, subject, row.protocol or metric.protocol)


# Where the paper states no unit, its value is repeated in each column that it could belong to.
PIXEL_UNIT = (
    "The paper states no unit. Its values in this table fit both the sum of squared errors on [0, 1], averaged over"
    " images, and the RMSE on 0–255, and are shown for both. Its values in Table 8 fit the MSE on [-1, 1]."
)
PIXEL_UNIT_8 = (
    "The paper states no unit. Its values in this table fit the MSE on [-1, 1] and are shown for it. Its values in"
    " Table 1 fit the other two units."
)
PERCEPTUAL_SCALE = (
    "Mean squared difference of VGG16's relu4_3 features. The paper does not state how images are scaled; its values"
    " are shown for both ImageNet scaling (mean and standard deviation) and Caffe scaling (0–255 minus the mean)."
)
PERCEPTUAL = (
    Column("perceptual, ImageNet scaling ↓", "perceptual_imagenet", "reconstructions", note=PERCEPTUAL_SCALE),
    Column("perceptual, Caffe scaling ↓", "perceptual_caffe", "reconstructions", note=PERCEPTUAL_SCALE),
)
ONCE = (
    "Each test image at most once, decoded from the posterior mean. These are fewer than the paper's 50,000"
    " reconstructions. FID of fewer images is higher even if they are perfect, so no number of the paper is comparable."
)
RECONSTRUCTION_ONCE = "reconstruction, each test image once"
SQUARES, RMSE, MSE = "pixel, sum of squares on [0, 1] ↓", "pixel, RMSE on 0–255 ↓", "pixel, MSE on [-1, 1] ↓"


def _pixel(note: str) -> tuple[Column, ...]:
    units = ((SQUARES, "pixel_squares"), (RMSE, "pixel_rmse"), (MSE, "pixel_mse"))
    return tuple(Column(heading, metric, "reconstructions", note=note) for heading, metric in units)


def _once(heading: str, metric: str, note: str = ONCE) -> Column:
    return Column(heading, metric, "reconstructions", "once", note)


def _ablation(method: str, run: str, fid_is: str, pixel: str, perceptual: str) -> Row:
    paper = (*fid_is.split(), "", "", pixel, pixel, "", perceptual, perceptual)
    return Row(method, paper, (f"table1/{run}",) * len(paper))


TABLE1 = Table(
    "table1",
    "Table 1: ablation, CIFAR-10 at 32×32",
    (
        Column("FID of samples ↓", "fid", "samples"),
        Column("IS of samples ↑", "is", "samples"),
        Column("FID of reconstructions ↓", "fid", "reconstructions"),
        Column("IS of reconstructions ↑", "is", "reconstructions"),
        _once("FID of reconstructions, each test image once ↓", "fid"),
        _once("IS of reconstructions, each test image once ↑", "is"),
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

# By table: with the row of the authors' public code, for which the paper has no numbers.
WITH_OFFICIAL = {
    "table1": replace(
        TABLE1,
        rows=(
            *TABLE1.rows,
            Row(
                "DC-VAE, authors' code",
                ("",) * 11,
                (*("table1/official",) * 4, "", "", *("table1/official",) * 5),
                protocol="official",
            ),
        ),
        note="DC-VAE, authors' code: trained by recipe cifar10-official, which has the settings of the authors' public"
        " code where they differ from the paper, such as contrastive layers b1 and final, and 8,192 negatives; measured"
        " by protocol official: samples from clamped latents, 50,048 images, all reconstructions (also for pixel and"
        " perceptual) from draws from the posterior, pixels rounded down. The authors measure FID only, with another"
        " Inception network and stored statistics of real images, so their FID is not exactly comparable.",
    ),
}

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
        Row(f"DC-VAE {RECONSTRUCTION_ONCE}", ("",) * 4, _CIFAR10_AND_STL10, "reconstructions", "once"),
    ),
    note=f"CIFAR-10 uses the runs of Table 1. DC-VAE {RECONSTRUCTION_ONCE}: {ONCE}",
)

TABLE3 = Table(
    "table3",
    "Table 3: LSUN bedroom at 128×128",
    (
        Column("FID of samples ↓", "fid", "samples"),
        Column("FID of reconstructions ↓", "fid", "reconstructions"),
        _once("FID of reconstructions, each validation image once ↓", "fid", ONCE.replace("test", "validation", 1)),
    ),
    (
        Row("Progressive GAN, 256×256", ("8.3", "", "")),
        Row("SNGAN", ("16.0", "", "")),
        Row("SSGAN", ("13.3", "", "")),
        Row("StyleALAE, 256×256", ("17.13", "15.92", "")),
        Row("DC-VAE", ("14.3", "10.57", ""), ("table3/dc-vae",) * 3),
    ),
    note="The second column reconstructs images of the published training split that are held out from training:"
    " 50,000, or 1 in 60 of a subset. The third reconstructs the published validation images, of which LSUN has 300."
    " A single folder without bedroom_train and bedroom_val is split like folder; both columns then use its test"
    " split.",
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
        Row(f"DC-VAE {RECONSTRUCTION_ONCE}", ("",), ("table5/dc-vae",), "reconstructions", "once"),
        Row("DC-VAE sampling", ("19.9",), ("table5/dc-vae",), "samples"),
    ),
    note=f"DC-VAE {RECONSTRUCTION_ONCE}: {ONCE}",
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
    note="± is the half-width of a 95 % confidence interval over 5 trials.",
)

TABLE7 = Table(
    "table7",
    "Table 7: perceptual path length, CelebA-HQ at 512×512",
    (Column("PPL, full ↓", "ppl", "samples"),),
    (
        Row("StyleALAE (StyleGAN)", ("33.29",)),
        Row("ProGAN", ("40.71",)),
        Row("DC-VAE (ProGAN)", ("24.66",), ("table8/dc-vae",)),
    ),
    note="Uses the run of Table 8. The paper does not state the resolution.",
)

TABLE8 = Table(
    "table8",
    "Table 8: reconstruction of held-out images, CelebA-HQ at 512×512",
    (*_pixel(PIXEL_UNIT_8), *PERCEPTUAL),
    (
        Row("StyleALAE (StyleGAN)", ("", "", "0.117", "40.40", "40.40")),
        Row("DC-VAE (ProGAN)", ("", "", "0.072", "38.63", "38.63"), ("table8/dc-vae",) * 5),
    ),
)

NEGATIVES = (128, 256, 512, 1024, 8096)

FIGURE7 = Table(
    "figure7",
    "Figure 7: pixel error on CIFAR-10 test images after 50 epochs, by number of negatives K",
    _pixel("The paper plots curves on an axis from 2.0 to 5.0 without a unit, and gives no numbers."),
    tuple(Row(f"DC-VAE, K = {k}", ("", "", ""), (f"figure7/k{k}",) * 3) for k in NEGATIVES),
    note="The paper's finding is that more negatives give a lower error.",
)

TABLES = {table.name: table for table in (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, TABLE7, TABLE8, FIGURE7)}


class Panel(NamedTuple):
    """Grid of images of one run, filled row by row.

    Attributes:
        run: recipe of the run
        kind: inputs (test images), reconstructions, samples, or pairs (an input, its reconstruction to the right)
        rows, columns: number of images, or of pairs
        size: height and width of an image in the figure, in pixels
        headings: texts above the panel, evenly distributed over its width
        label: text to the left of the panel
    """

    run: str
    kind: Literal["inputs", "reconstructions", "samples", "pairs"]
    rows: int
    columns: int
    size: int
    headings: tuple[str, ...] = ()
    label: str = ""

    @property
    def count(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Figure:
    """Figure of the paper that consists of images.

    Attributes:
        name: argument of `dcvae reproduce`
        title: heading, with the data set
        caption: description of the layout
        panels: from top to bottom, each row from left to right
        note: remark on the whole figure
    """

    name: str
    title: str
    caption: str
    panels: tuple[tuple[Panel, ...], ...]
    note: str | None = None

    def needed(self) -> dict[str, list[Key]]:
        """Return the runs of the figure. They need no measurements."""
        return {panel.run: [] for row in self.panels for panel in row}


BEDROOM, FACES, STL10 = "table3/dc-vae", "table8/dc-vae", "table2/dc-vae"

FIGURE1 = Figure(
    "figure1",
    "Figure 1: LSUN bedroom at 128×128 and CelebA-HQ at 512×512",
    "(a) Test images above their reconstructions, in the same order; (b) samples. Left: LSUN bedroom. Right:"
    " CelebA-HQ.",
    (
        (
            Panel(BEDROOM, "inputs", 2, 4, 256, ("LSUN bedroom",), "(a) inputs"),
            Panel(FACES, "inputs", 1, 2, 512, ("CelebA-HQ",)),
        ),
        (
            Panel(BEDROOM, "reconstructions", 2, 4, 256, label="(a) reconstructions"),
            Panel(FACES, "reconstructions", 1, 2, 512),
        ),
        (Panel(BEDROOM, "samples", 4, 4, 256, label="(b) samples"), Panel(FACES, "samples", 2, 2, 512)),
    ),
    note="Uses the runs of Tables 3 and 8.",
)

FIGURE3 = Figure(
    "figure3",
    "Figures 3 and 9: reconstructions of the ablation, CIFAR-10 at 32×32",
    "Each row shows a test image and its reconstructions by the four methods of Table 1.",
    (
        (
            Panel("table1/vae", "inputs", 8, 1, 160, ("input",)),
            Panel("table1/vae", "reconstructions", 8, 1, 160, ("VAE",)),
            Panel("table1/vae-gan", "reconstructions", 8, 1, 160, ("VAE/GAN",)),
            Panel("table1/vae-contrastive", "reconstructions", 8, 1, 160, ("VAE-Contrastive",)),
            Panel("table1/dc-vae", "reconstructions", 8, 1, 160, ("DC-VAE",)),
        ),
    ),
    note="Uses the runs of Table 1.",
)

FIGURE4 = Figure(
    "figure4",
    "Figure 4: reconstructions, CelebA-HQ at 512×512",
    "Test images above their reconstructions.",
    (
        (Panel(FACES, "inputs", 1, 4, 512, label="input"),),
        (Panel(FACES, "reconstructions", 1, 4, 512, label="DC-VAE"),),
    ),
    note="The paper's row of IntroVAE at 1024×1024 is quoted from the paper of that method, and not shown here. Uses"
    " the run of Table 8.",
)

FIGURE8 = Figure(
    "figure8",
    "Figure 8: more reconstructions, CelebA-HQ at 512×512",
    "Test images with their reconstructions to the right.",
    ((Panel(FACES, "pairs", 6, 3, 512, ("input", "reconstruction") * 3),),),
    note="Uses the run of Table 8.",
)

FIGURE10 = Figure(
    "figure10",
    "Figure 10: STL-10 at 32×32",
    "(a) Two rows of test images above two rows of their reconstructions, in the same order; (b) samples.",
    (
        (Panel(STL10, "inputs", 2, 10, 128, label="(a) inputs"),),
        (Panel(STL10, "reconstructions", 2, 10, 128, label="(a) reconstructions"),),
        (Panel(STL10, "samples", 4, 10, 128, label="(b) samples"),),
    ),
    note="Uses the run of Table 2.",
)

FIGURE14 = Figure(
    "figure14",
    "Figure 14: more reconstructions, LSUN bedroom at 128×128",
    "Test images with their reconstructions to the right.",
    ((Panel(BEDROOM, "pairs", 8, 4, 256, ("input", "reconstruction") * 4),),),
    note="Uses the run of Table 3.",
)

FIGURES = {figure.name: figure for figure in (FIGURE1, FIGURE3, FIGURE4, FIGURE8, FIGURE10, FIGURE14)}
