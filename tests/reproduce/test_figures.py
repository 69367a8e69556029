"""Figures of images: the runs' images at their places, the page, and the command line."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dcvae_fast import DCVAE
from dcvae_fast.cli import main
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, to_dict
from dcvae_fast.evaluation.images import Noise
from dcvae_fast.images import to_bytes
from dcvae_fast.recipes import recipe_config
from dcvae_fast.reproduce import FIGURES, figures, runs, trainings
from dcvae_fast.run_folder import CONFIG_FILE
from dcvae_fast.training import loop
from dcvae_fast.training.loop import Outcome
from dcvae_pipelines import load_dataset
from dcvae_pipelines.atomic import atomic_write
from dcvae_pipelines.pixels import normalize

DIGITS = (
    "--train.device cpu --model.decoder_width 4 --model.encoder_width 4 --model.discriminator_width 4"
    " --train.batch 8 --train.sampled_batch 8 --log.held_out 0 --contrast.negatives 20"
    " --data.name digits --model.image_channels 1 --budget 12"  # in batches of 8: 16 images are shown
).split()
METHODS = ("vae", "vae-gan", "vae-contrastive", "dc-vae")


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def enlarged(image: Tensor, factor: int) -> np.ndarray:
    """Convert an image [1, R, R] in [-1, 1] to RGB pixels, each repeated `factor` times in both directions."""
    pixels = to_bytes(image).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels.repeat(factor, 0).repeat(factor, 1)


def locate(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Return row and column of the only place in a picture with exactly these pixels."""
    height, width = tile.shape[:2]
    rows, columns = picture.shape[0] - height + 1, picture.shape[1] - width + 1
    matches = np.ones((rows, columns), dtype=bool)
    for y in range(2, height, 15):
        for x in range(2, width, 15):
            matches &= picture[y : y + rows, x : x + columns, 0] == tile[y, x, 0]
    places = [(y, x) for y, x in np.argwhere(matches) if (picture[y : y + height, x : x + width] == tile).all()]
    assert len(places) == 1
    return places[0]


def digits(count: int) -> Tensor:
    """Evenly spaced test images, [count, 1, 32, 32] in [-1, 1]."""
    images = load_dataset("digits", split="test").images
    return normalize(images[torch.arange(count) * len(images) // count])


@pytest.fixture(scope="module")
def figure3(tmp_path_factory) -> Path:
    """The folder of figure3 after its runs have been trained on 8 images."""
    out = tmp_path_factory.mktemp("figure3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_grids", lambda step, log, images: None)
        assert main(["reproduce", "figure3", *DIGITS, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(figure3, tmp_path) -> Path:
    """A copy of `figure3` without picture and page."""
    return Path(shutil.copytree(figure3 / "table1", tmp_path / "table1")).parent


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Record the runs that are trained."""
    names: list[str] = []
    train = runs.train

    def record(config: Config, folder: Path) -> Outcome:
        outcome = train(config, folder)
        if outcome.trained:
            names.append(folder.name)
        return outcome

    monkeypatch.setattr(runs, "train", record)
    return names


# --- runs ---


def test_figure_3_shows_the_same_images_through_the_four_runs_of_table_1(figure3):
    picture, page = read_picture(figure3 / "figure3.png"), (figure3 / "figure3.md").read_text()
    inputs = digits(8)
    columns = [inputs]
    for method in METHODS:
        columns.append(DCVAE.from_pretrained(figure3 / "table1" / method).reconstruct(inputs))
    places = [locate(picture, enlarged(column[0], 5)) for column in columns]
    (top,) = {y for y, _ in places}
    distances = np.diff([x for _, x in places])
    assert len(set(distances)) == 1 and 162 < distances[0] < 180
    for column, (_, x) in zip(columns, places, strict=True):
        assert len(torch.unique(to_bytes(column), dim=0)) == 8  # a wrong order would be seen
        for row, image in enumerate(column):
            y = top + 162 * row
            assert (picture[y : y + 160, x : x + 160] == enlarged(image, 5)).all()

    assert page.startswith("# Figures 3 and 9: ") and "](figure3.png)" in page
    remarks = ("shortened: 16 of 40,000,000 images; changed: data.name digits", "train.sampled_batch 8")
    lines = [line for line in page.splitlines() if line.startswith("| table1/")]
    assert [line.split()[1] for line in lines] == [f"table1/{method}" for method in METHODS]
    for line in lines:
        assert all(remark in line and remark in page.splitlines()[0] for remark in remarks)
        assert "measured on" not in line
        assert "8 of 360 test images of digits, evenly spaced; reconstructions from the posterior mean |" in line
        assert line.split("|")[2].strip() == "16"


def test_repeating_figure_3_trains_nothing_and_table_1_has_the_same_runs(figure3, copied, trained, capsys):
    assert main(["reproduce", "figure3", *DIGITS, "--out", str(copied)]) == 0
    assert trained == []
    for name in ("figure3.png", "figure3.md"):
        assert (copied / name).read_bytes() == (figure3 / name).read_bytes()
    capsys.readouterr()
    assert main(["reproduce", "table1", *DIGITS, "--out", str(copied), "--dry-run"]) == 0
    plan = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[3:7]]
    assert plan == [[f"table1/{method}", "cifar10", "12", "16"] for method in METHODS]


@pytest.mark.usefixtures("quick_ends")
def test_draws_and_samples_follow_the_settings_of_the_model(tmp_path):
    settings = ["--model.reconstruct_from", "sample", "--model.sample_clamp", "0.5"]
    assert main(["reproduce", "figure10", *DIGITS, *settings, "--out", str(tmp_path)]) == 0
    picture, page = read_picture(tmp_path / "figure10.png"), (tmp_path / "figure10.md").read_text()
    model, inputs = DCVAE.from_pretrained(tmp_path / "table2" / "dc-vae"), digits(20)
    with torch.no_grad():
        reconstructions = model.decode(model.encode(inputs).at(Noise(128, 0).take(20)))
        samples = model.decode(Noise(128, 0).take(40).clamp(-0.5, 0.5))
    bottom = 0
    for images in (inputs, reconstructions, samples):
        top, left = locate(picture, enlarged(images[0], 4))
        assert top >= bottom
        for number, image in enumerate(images):
            y, x = top + 130 * (number // 10), left + 130 * (number % 10)
            assert (picture[y : y + 128, x : x + 128] == enlarged(image, 4)).all()
        bottom = top + 130 * len(images) // 10
    assert (
        "20 of 360 test images of digits, evenly spaced; reconstructions from draws of the posterior, seed 0;"
        " 40 samples of N(0, I), clamped to [-0.5, 0.5], seed 0"
    ) in page


def test_a_diverged_run_is_grey_and_the_others_are_drawn(copied, monkeypatch, capsys):
    train = runs.train

    def diverge(config: Config, folder: Path) -> Outcome:
        outcome = train(config, folder)
        if folder.name == "vae":
            raise runs.DivergedError("a loss became nan.")
        return outcome

    monkeypatch.setattr(runs, "train", diverge)
    monkeypatch.setattr(loop, "write_grids", lambda step, log, images: None)
    shutil.rmtree(copied / "table1" / "vae")
    assert main(["reproduce", "figure3", *DIGITS, "--out", str(copied)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == ("dcvae: error: figure3 lacks the images of table1/vae, all others were drawn: a loss became nan.")
    picture, page = read_picture(copied / "figure3.png"), (copied / "figure3.md").read_text()
    top, left = locate(picture, enlarged(digits(8)[0], 5))
    _, right = locate(
        picture, enlarged(DCVAE.from_pretrained(copied / "table1" / "vae-gan").reconstruct(digits(8))[0], 5)
    )
    middle = (left + right) // 2
    assert (picture[top : top + 160, middle : middle + 160] == 217).all()  # 0.7 in [-1, 1]
    assert "\n\nGrey images of table1/vae: a loss became nan.\n" in page and page.count("Grey") == 1
    assert "table1/vae: images are missing (grey)" in page.splitlines()[0]
    (line,) = (line for line in page.splitlines() if line.startswith("| table1/vae "))
    assert line.split("|")[2].strip() == "16"  # shown before it diverged


def test_a_stopped_run_leaves_a_figure_of_the_finished_runs(copied, monkeypatch):
    train = runs.train

    def stop(config: Config, folder: Path) -> Outcome:
        return Outcome(4, trained=True, signal=2) if folder.name == "vae-gan" else train(config, folder)

    monkeypatch.setattr(runs, "train", stop)
    assert main(["reproduce", "figure3", *DIGITS, "--out", str(copied)]) == 128 + 2
    page = (copied / "figure3.md").read_text()
    assert [f"Grey images of table1/{method}: not trained yet" in page for method in METHODS] == [False] + [True] * 3


def configure(argv: Any) -> Config:
    return parse_config(argv).config


def test_runs_keep_their_folders_so_that_a_figure_can_show_two_data_sets(tmp_path):
    import yaml

    for run, name in (("table3/dc-vae", "lsun_bedroom"), ("table8/dc-vae", "shards")):
        (tmp_path / run).mkdir(parents=True)
        config = to_dict(recipe_config(run))
        config["data"] |= {"name": name, "root": f"/data/{name}"}
        atomic_write(tmp_path / run / CONFIG_FILE, yaml.safe_dump(config))

    def data(*settings: str) -> list[tuple[str, str | None]]:
        runs_of_figure = trainings(FIGURES["figure1"], tmp_path, settings, None, configure)
        return [(run.config.data.name, run.config.data.root) for run in runs_of_figure]

    assert data() == [("lsun_bedroom", "/data/lsun_bedroom"), ("shards", "/data/shards")]
    assert data("--data.root", "/elsewhere") == [("lsun_bedroom", "/elsewhere"), ("shards", "/elsewhere")]
    assert data("--data.name", "folder") == [("folder", "/data/lsun_bedroom"), ("folder", "/data/shards")]
    figures._check_folders(FIGURES["figure1"], trainings(FIGURES["figure1"], tmp_path, [], None, configure))
    _, faces = trainings(FIGURES["figure1"], tmp_path, [], None, configure)
    assert faces.changed == ("data.name shards",)


# --- pictures ---


def solid(count: int, red: int) -> Tensor:
    """Images [count, 3, 4, 4] of one colour each; green counts the images."""
    colours = torch.tensor([[red, 2 * number, 0] for number in range(count)], dtype=torch.uint8)
    return normalize(colours.reshape(count, 3, 1, 1).expand(-1, -1, 4, 4))


def boxes(picture: np.ndarray, red: int, count: int) -> list[tuple[int, int, int, int]]:
    """Return left, top, width and height of each of `solid`'s images, rounded to 2 pixels."""
    coarse = picture[::2, ::2]
    mask = (coarse[..., 0] == red) & (coarse[..., 2] == 0)
    result = []
    for number in range(count):
        y, x = np.nonzero(mask & (coarse[..., 1] == 2 * number))
        assert len(x) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)  # a full rectangle
        result.append((2 * x.min(), 2 * y.min(), 2 * (x.max() - x.min() + 1), 2 * (y.max() - y.min() + 1)))
    return result


@pytest.mark.parametrize("name", FIGURES)
def test_images_of_a_figure_are_in_rows_of_equal_squares(name):
    figure, images = FIGURES[name], {}
    reds = iter(range(100, 200))
    colours: dict[str, tuple[int, int, int]] = {}
    counts = figures._counts(figure)
    for run, (test_images, samples) in counts.items():
        colours[run] = (next(reds), next(reds), next(reds))
        inputs, reconstructions, sampled = map(solid, (test_images, test_images, samples), colours[run])
        remarks = ("changed: " + "a long name " * 40,)
        images[run] = figures.RunImages(inputs, reconstructions, sampled, 8, "", remarks, None)
    drawn = np.asarray(figures.draw(figure, images))
    for edge in (drawn[:4], drawn[-4:], drawn[:, :4], drawn[:, -2:]):
        assert (edge == 255).all()  # no text is cut off

    def check(panel: figures.Panel, kind: int, stride: int) -> tuple[int, int]:
        """Check the grid of one kind of images; return the left and upper edge."""
        squares = boxes(drawn, colours[panel.run][kind], panel.count)
        left, top = squares[0][:2]
        for number, (x, y, width, height) in enumerate(squares):
            assert abs(width - panel.size) <= 2 and abs(height - panel.size) <= 2
            assert abs(x - left - stride * (number % panel.columns)) <= 2
            assert abs(y - top - (panel.size + 2) * (number // panel.columns)) <= 2
        return left, top

    def check_middle(text: np.ndarray, axis: int, expected: float) -> None:
        """Check that a part of the figure has text, in the middle along an axis."""
        dark = np.nonzero((text < 128).any(axis=(1 - axis, 2)))[0]
        assert abs((dark.min() + dark.max()) / 2 - expected) < 10

    above, line = 0, max(20, drawn.shape[1] // 45)
    for row in figure.panels:
        tops, before = set(), 0
        for panel in row:
            if panel.kind == "pairs":
                stride = 2 * panel.size + 4 + panel.size // 16
                left, top = check(panel, 0, stride)
                right, right_top = check(panel, 1, stride)
                assert abs(right - left - panel.size - 2) <= 2 and right_top == top
            else:
                kind = ("inputs", "reconstructions", "samples").index(panel.kind)
                stride = panel.size + 2
                left, top = check(panel, kind, stride)
            columns = panel.columns * (2 if panel.kind == "pairs" else 1)
            width = panel.columns * stride
            for number in range(len(panel.headings)):
                start, end = (left + width * edge // len(panel.headings) for edge in (number, number + 1))
                images_of_heading = columns // len(panel.headings)
                middle = (images_of_heading * (panel.size + 2) - 2) / 2
                check_middle(drawn[top - line : top - 3, start:end], 1, middle)
            if panel.label:
                height = panel.rows * (panel.size + 2) - 2
                check_middle(drawn[top : top + height, left - line : left - 3], 0, height / 2)
            assert left > before
            before = left + panel.columns * panel.size
            tops.add(top)
        (top,) = tops
        assert top > above
        above = top + row[0].rows * row[0].size


def test_images_larger_than_their_panel_keep_their_pixels():
    images = normalize(
        torch.randint(256, (1, 3, 72, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    panel = figures.Panel("table1/vae", "inputs", 1, 1, 32)
    grid = figures._grid(panel, figures.RunImages(images, images, images, 8, "", (), None))
    locate(np.asarray(grid), to_bytes(images[0]).permute(1, 2, 0).numpy())


def test_a_small_test_split_shortens_the_figure():
    figure = FIGURES["figure8"]
    images = [
        figures.RunImages(solid(count, 100), solid(count, 101), solid(0, 102), 8, "", (), None) for count in (18, 4)
    ]
    full, small = (np.asarray(figures.draw(figure, {"table8/dc-vae": run})) for run in images)
    assert full.shape[1] == small.shape[1] and full.shape[0] - small.shape[0] == 4 * 514
    inputs, reconstructions = boxes(small, 100, 4), boxes(small, 101, 4)
    assert [y for _, y, _, _ in inputs] == [inputs[0][1]] * 3 + [inputs[3][1]]
    assert all(y == other for (_, y, _, _), (_, other, _, _) in zip(inputs, reconstructions, strict=True))


def test_remarks_name_their_runs_unless_they_apply_to_all():
    empty = solid(0, 100)
    images = {
        "a": figures.RunImages(empty, empty, empty, 8, "", ("shortened", "changed"), None),
        "b": figures.RunImages(empty, empty, empty, 8, "", ("changed",), "nan"),
    }
    assert figures._remarks(images) == ["a: shortened", "changed", "b: images are missing (grey)"]


# --- mistakes ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["figure9"],
            "'figure9' is not a table or figure that can be reproduced; choose from table1, table2, table3, table4,"
            " table5, table6, table7, table8, figure1, figure3, figure4, figure7, figure8, figure10, figure14.",
        ),
        (["figure3", "-n", "100"], "--images is an option for tables; figure3 shows images and measures nothing."),
        (["figure3", "--weights", "{tmp}"], "--weights is an option for tables; figure3 shows images"),
        (["figure3", "--cache", "{tmp}/cache"], "--cache is an option for tables; figure3 shows images"),
        (
            ["figure3", "--loss.objective=vae"],
            "--loss.objective cannot be changed here; it defines the runs of figure3",
        ),
        (["figure8"], "celebahq: data.root is not set"),
        *(
            (
                ["figure1", *root],
                "figure1 needs lsun_bedroom and celebahq in different folders, but --data.root sets one folder. First"
                " run `dcvae reproduce figure14 --data.root DIR` and `dcvae reproduce figure4 --data.root DIR` with"
                " the same other options, then figure1 without --data.root",
            )
            for root in ([], ["--data.root", "{tmp}"])
        ),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_1(argv, message, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [argument.format(tmp=tmp_path) for argument in argv]
    assert main(["reproduce", *argv, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dcvae: error: ") and error.count("\n") == 1 and message in error
    assert not out.exists()


def test_a_plan_of_a_figure_counts_no_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "training_flops", lambda config, shown: 3.2e15)
    assert main(["reproduce", "figure1", "--dry-run", "--budget", "100000", "--out", str(tmp_path / "out")]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()[2:]
    assert heading.split("  ")[0] == "run" and "numbers" not in heading
    assert [line.split()[:5] for line in lines[:2]] == [
        ["table3/dc-vae", "lsun128", "100,000", "0", "3.20"],
        ["table8/dc-vae", "celebahq512", "100,000", "0", "3.20"],
    ]
    assert not (tmp_path / "out").exists()
