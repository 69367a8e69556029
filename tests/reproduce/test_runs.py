"""`dcvae reproduce` from the command line, with narrow networks and few images."""

import gzip
import json
import logging
import re
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dcvae_fast.cli import main
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config
from dcvae_fast.errors import UserError
from dcvae_fast.evaluation import Measurement, Splits, probe
from dcvae_fast.evaluation.protocol import data_of
from dcvae_fast.recipes import RECIPES, recipe_config
from dcvae_fast.reproduce import FIGURES, TABLES, WITH_OFFICIAL, report, runs, trainings
from dcvae_fast.reproduce.paper import Key
from dcvae_fast.run_folder import images_shown, read_metrics
from dcvae_fast.training.loop import Outcome
from dcvae_fast.training.plan import stage_ranges
from dcvae_fast.training.schedule import stages
from dcvae_pipelines import DataError, ImageSet
from image_files import write_noise

NARROW = (
    "--train.device cpu --model.decoder_width 4 --model.encoder_width 4 --model.discriminator_width 4"
    " --train.batch 8 --train.sampled_batch 8 --log.held_out 0"
).split()
DIGITS = [*NARROW, "--data.name", "digits", "--model.image_channels", "1"]
CHANGED = (
    "changed: model.decoder_width 4, model.encoder_width 4, model.discriminator_width 4, train.batch 8,"
    " train.sampled_batch 8"
)
FID = Measurement(
    metric="fid",
    subject="reconstructions",
    protocol="paper",
    value=1.0,
    count=300,
    seed=0,
)


def configure(argv: Any) -> Config:
    return parse_config(argv).config


def lines_with_numbers(page: str) -> list[str]:
    """Return the lines of a page with our numbers."""
    return [line for line in page.splitlines() if re.search(r"\| ours +\|", line)]


# --- plans ---


@pytest.mark.parametrize("name", TABLES)
def test_dry_run_plans_every_table_without_data_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "training_flops", lambda config, shown: 3.2e15 * 360)  # checked in test_plan.py
    assert main(["reproduce", name, "--dry-run", "--budget", "100000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list(TABLES[name].needed())
    assert [line.split()[0] for line in lines[3 : 3 + len(names)]] == names
    for run, line in zip([*names, "total"], lines[3:], strict=False):
        assert re.search(r"shortened: 100,000 of [\d,]+,000 images", line), run
        assert f"{1152.0 * (len(names) if run == 'total' else 1):,.2f}" in line
    assert lines[-1] == "GPU-hours: training at an assumed 220 TFLOP/s, without measuring."
    assert list(tmp_path.iterdir()) == []


def test_dry_run_plans_the_authors_code_if_asked_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "training_flops", lambda config, shown: 1e15)
    assert main(["reproduce", "table1", "--official", "--dry-run"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()[3:8]]
    assert [line[0] for line in words] == [*TABLES["table1"].needed(), "table1/official"]
    assert words[-1][1:7] == ["cifar10-official", "39,987,200", "0", "0", "of", "9"]


def test_runs_have_the_settings_of_the_paper():
    tables = [*TABLES.values(), *WITH_OFFICIAL.values()]
    by_name = {run.name: run for table in tables for run in trainings(table, Path(), [], None, configure)}
    assert sorted(by_name) == sorted(name for name in RECIPES if "/" in name)
    assert by_name["table1/official"].config == recipe_config("cifar10-official")
    objectives = [
        by_name[f"table1/{run}"].config.loss.objective for run in ("vae", "vae-gan", "vae-contrastive", "dc-vae")
    ]
    assert objectives == ["vae", "vae_gan", "vae_contrastive", "dc_vae"]
    assert [by_name[f"table6/z{size}"].config.model.latent_dim for size in (16, 32, 64)] == [16, 32, 64]
    k = [by_name[f"figure7/k{k}"].config for k in (128, 256, 512, 1024, 8096)]
    assert [config.contrast.negatives for config in k] == [128, 256, 512, 1024, 8096]
    assert {(config.train.images, config.log.metrics_every) for config in k} == {(2_500_000, 50_000)}
    expected = {"table2": ("stl10", 32), "table3": ("lsun_bedroom", 128), "table4": ("celebahq", 256)}
    expected |= {"table5": ("celeba", 128), "table8": ("celebahq", 512)}
    for table, (data, resolution) in expected.items():
        config = by_name[f"{table}/dc-vae"].config
        assert (config.data.name, config.model.resolution, config.model.grows) == (data, resolution, resolution > 32)
    assert all(not run.changed and not run.remarks(run.full, 50_000) for run in by_name.values())
    assert by_name["table8/dc-vae"].remarks(19_000_000, 100) == ("measured on 100 images, not 50,000",)
    assert by_name["table6/z16"].remarks(6_000_000, 100) == ()  # a probe uses all images


def test_a_budget_shortens_growth_in_proportion():
    (run,) = trainings(TABLES["table8"], Path("runs"), [], 38_000, configure)
    assert run.folder == Path("runs/table8/dc-vae")
    assert (run.config.growth.fade_images, run.config.growth.stable_images) == (1600, 1600)
    assert [stretch.stage.resolution for stretch in stage_ranges(run.config)] == [
        s.resolution for s in stages(run.config)
    ]
    assert stage_ranges(run.config)[-1].first == 22_402  # 11.2 of 19 million, in whole batches
    assert run.remarks(38_000, 50_000) == ("shortened: 38,000 of 19,000,000 images, growth in proportion",)
    (full_length,) = trainings(TABLES["table8"], Path(), [], 10**9, configure)
    assert full_length.config.train.images == full_length.full and full_length.config.growth.fade_images == 800_000
    # The smallest budget leaves one batch to each stage. The port trains the first resolution for longer.
    port = ["--model.variant", "port", "--growth.first_images", "1600000"]
    (smallest,) = trainings(TABLES["table5"], Path(), port, 380, configure)
    assert [stretch.iterations for stretch in stage_ranges(smallest.config)][:-1] == [2, *[1] * 9]
    with pytest.raises(UserError, match="it must be at least 380"):
        trainings(TABLES["table5"], Path(), port, 379, configure)


def test_figure_7_keeps_fifty_points_of_a_shorter_curve():
    shortened = trainings(TABLES["figure7"], Path(), [], 20_000, configure)
    assert {run.config.log.metrics_every for run in shortened} == {400}


# --- runs ---


@pytest.fixture
def messages(caplog) -> Callable[[], list[str]]:
    """Messages that `reproduce` has logged so far."""
    caplog.set_level(logging.INFO, runs.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == runs.__name__]


@pytest.fixture
def counted(monkeypatch, quick_ends) -> dict[str, list[Any]]:
    """Record the trained runs and the measured metrics."""
    done: dict[str, list[Any]] = {"trained": [], "measured": []}
    train, evaluate = runs.train, runs.evaluate

    def count_train(config, folder):
        outcome = train(config, folder)
        if outcome.trained:
            done["trained"].append(str(folder)[-3:])
        return outcome

    def count_evaluate(model, data, metrics, **options):
        done["measured"].append(metrics)
        return evaluate(model, data, metrics, **options)

    monkeypatch.setattr(runs, "train", count_train)
    monkeypatch.setattr(runs, "evaluate", count_evaluate)
    return done


def test_repeating_a_command_repeats_no_work(tmp_path, counted, monkeypatch, capsys, messages):
    command = ["reproduce", "table6", *DIGITS, "--out", str(tmp_path)]
    assert main([*command, "--budget", "16"]) == 0
    assert counted == {"trained": ["z16", "z32", "z64"], "measured": [("probe",)] * 3}
    page, content = (tmp_path / "table6.md").read_text(), (tmp_path / "table6.json").read_text()
    *progress, printed, last = messages()
    assert printed == "\n" + page and last.startswith(f"{tmp_path / 'table6.md'}; ")
    assert [line.split(";")[0] for line in progress[:2]] == ["table6/z16: 16 images", "table6/z16: 1 of 1 numbers"]
    assert len(progress) == 6
    assert [line for line in (*progress, last) if "shortened: 16 of 6,000,000 images" not in line] == []
    for done in counted.values():
        done.clear()
    assert main([*command, "--budget", "16"]) == 0
    assert counted == {"trained": [], "measured": []}
    assert (tmp_path / "table6.md").read_text() == page and (tmp_path / "table6.json").read_text() == content

    capsys.readouterr()
    monkeypatch.setattr(runs, "training_flops", lambda config, shown: 1e15 * (config.train.images - shown))
    assert main([*command, "--budget", "24", "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert (
        line.split()[:8] == ["table6/z16", "mnist", "24", "16", "0", "of", "1", "8.00"] and "data.name digits" in line
    )

    # A larger budget continues training, and the new weights are measured; a smaller budget changes nothing.
    assert main([*command, "--budget", "24"]) == 0
    assert "from 16 to 24 images" in capsys.readouterr().out
    assert counted == {"trained": ["z16", "z32", "z64"], "measured": [("probe",)] * 3}
    assert main([*command, "--budget", "16"]) == 0
    assert len(counted["trained"]) == 3
    (line,) = lines_with_numbers((tmp_path / "table6.md").read_text())
    assert "shortened: 24 of 6,000,000 images" in line


def test_a_stopped_run_resumes(tmp_path, counted, monkeypatch, messages):
    command = ["reproduce", "table6", *DIGITS, "--out", str(tmp_path), "--budget", "16"]
    train = runs.train

    def stop(config, folder):
        return Outcome(8, trained=True, signal=15) if folder.name == "z32" else train(config, folder)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", stop)
        assert main(command) == 128 + 15
    assert messages()[-1].startswith(
        "table6/z32: stopped after 8 of 16 images, run the same command to resume; shortened: "
    )
    page = (tmp_path / "table6.md").read_text()
    assert "– DC-VAE, Z = 32, % ↓; DC-VAE, Z = 64, % ↓: not trained yet" in page
    assert main(command) == 0
    assert counted == {"trained": ["z16", "z32", "z64"], "measured": [("probe",)] * 3}


@pytest.mark.usefixtures("quick_ends")
def test_a_diverged_run_is_reported_and_the_others_continue(tmp_path, monkeypatch, capsys):
    train = runs.train

    def diverge(config, folder):
        if folder.name == "z32":
            raise runs.DivergedError("a loss became nan.")
        return train(config, folder)

    monkeypatch.setattr(runs, "train", diverge)
    assert main(["reproduce", "table6", *DIGITS, "--out", str(tmp_path), "--budget", "16"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "dcvae: error: 1 numbers of table6 are missing, all others were saved: a loss became nan."
    cells = json.loads((tmp_path / "table6.json").read_text())["rows"][-1]["cells"]
    assert [sorted(cell.keys() & {"ours", "missing"}) for cell in cells] == [["ours"], ["missing"], ["ours"]]


def test_missing_weights_leave_a_dash_a_reason_and_an_exit_code(tmp_path, capsys, request, messages):
    (tmp_path / "weights").mkdir()
    out = tmp_path / "out"
    command = ["reproduce", "table1", *DIGITS, "--contrast.negatives", "20", "--budget", "8", "--out", str(out)]
    command += ["--weights", str(tmp_path / "weights"), "--cache", str(tmp_path / "cache"), "--images", "50"]
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "dcvae: error: 32 numbers of table1 are missing, all others were saved: --weights: looked for"
    )
    page = (out / "table1.md").read_text()
    assert "\n" + page in messages() and page.count("\n– ") == 2
    remarks = ["shortened: 8 of 40,000,000 images", "changed: data.name digits", "measured on 50 images, not 50,000"]
    rows = lines_with_numbers(page)
    assert len(rows) == 4 and all(remark in row for row in rows for remark in remarks)
    assert all(remark in page.splitlines()[0] for remark in remarks)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:8] == ["–"] * 6 and cells[11:13] == ["–"] * 2 and "–" not in cells[8:11]
        squares, rmse, mse = map(float, cells[8:11])
        assert squares == pytest.approx(mse / 4 * 32**2, rel=1e-3) and rmse == pytest.approx(mse**0.5 * 127.5, rel=1e-3)
    content = json.loads((out / "table1.json").read_text())
    for row in content["rows"]:
        for cell in row["cells"]:
            assert all(any(remark in text for text in cell["remarks"]) for remark in remarks)
            assert ("missing" in cell) == cell["column"].startswith(("FID", "IS", "perceptual"))

    # With Inception available, only the missing numbers are measured.
    request.getfixturevalue("rows")
    assert main(command) == 1
    assert "8 numbers of table1 are missing" in capsys.readouterr().err.splitlines()[-1]
    cells = [cell.strip() for cell in lines_with_numbers((out / "table1.md").read_text())[0].strip("|").split("|")]
    assert all(float(cell) > 0 for cell in cells[2:11]) and cells[11:13] == ["–"] * 2
    stored = json.loads((out / "table1" / "vae" / "evaluation.json").read_text())
    assert stored["images"] == 8 and len(stored["measurements"]) == 9


def test_figure_7_draws_a_curve_for_each_k_and_fewer_images_are_measured_again(tmp_path, counted, monkeypatch):
    drawn = {}
    plot = report.plot_curves

    def keep(path, curves, title):
        drawn.update(curves=curves, title=title)
        plot(path, curves, title=title)

    monkeypatch.setattr(report, "plot_curves", keep)
    held_out = ["--log.held_out", "16", "--log.metrics_every", "9"]
    command = ["reproduce", "figure7", *DIGITS, *held_out, "--budget", "24", "--out", str(tmp_path), "--images"]
    assert main([*command, "50"]) == 0
    assert [curve.label for curve in drawn["curves"]] == ["K = 128", "K = 256", "K = 512", "K = 1,024", "K = 8,096"]
    for curve in drawn["curves"]:
        assert curve.epochs == [images / 1437 for images in (16, 24)] and all(0 < error < 4 for error in curve.errors)
        assert curve.images == 16
    assert "shortened: 24 of 2,500,000 images" in drawn["title"] and "data.name digits" in drawn["title"]
    with Image.open(tmp_path / "figure7.png") as image:
        assert image.width > 1000 and image.height > 600

    assert main([*command, "40"]) == 0
    assert len(counted["trained"]) == 5 and counted["measured"] == [("pixel",)] * 10
    stored = json.loads((tmp_path / "figure7" / "k128" / "evaluation.json").read_text())
    assert {entry["count"] for entry in stored["measurements"]} == {40}


@pytest.mark.parametrize(
    ("metric", "subject", "stored", "kept"),
    [
        ("fid", "samples", {}, True),
        ("fid", "samples", {"data": "digits: 37 training images"}, False),
        ("fid", "samples", {"seed": 7}, False),
        ("fid", "samples", {"count": 9}, False),
        ("is", "samples", {}, True),
        ("is", "reconstructions", {}, True),
        ("fid", "reconstructions", {"count": 4}, False),  # each test image once, as in earlier versions
        ("fid", "reconstructions", {"protocol": "once", "count": 4}, True),
        ("fid", "reconstructions", {"protocol": "once", "count": 10}, False),
        ("fid", "samples", {"protocol": "official", "count": 64}, True),
        ("pixel_mse", "reconstructions", {"count": 4}, True),
        ("is", "reconstructions", {"data": "faces: 10 test images"}, False),
        ("probe_error", "latents", {"count": 3}, True),  # only those with labels
        ("probe_error", "latents", {"data": "digits: 10 test images, 5 training images"}, False),
        ("ppl", "samples", {"count": 20}, True),
    ],
)
def test_numbers_of_other_images_are_measured_again(metric: Any, subject: Any, stored: dict[str, Any], kept: bool):
    pixels = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    data = Splits(ImageSet("digits", pixels, None), ImageSet("digits", pixels[:4], None))
    measurement = replace(FID, metric=metric, subject=subject, count=10, data=data_of(metric, subject, "paper", data))
    assert runs._is_current(replace(measurement, **stored), data, 10) is kept


def test_numbers_by_the_earlier_definition_of_the_protocol_are_measured_again(tmp_path):
    metrics = [
        ("fid", "reconstructions"),
        ("is", "reconstructions"),
        ("pixel_mse", "reconstructions"),
        ("fid", "samples"),
    ]
    entries = [asdict(replace(FID, metric=metric, subject=subject)) for metric, subject in metrics]
    for current in (True, False):
        for entry in entries:
            if not current:  # earlier versions did not store notes
                del entry["note"]
        content = {"weights": "w", "measurements": entries}
        (tmp_path / "evaluation.json").write_text(json.dumps(content))
        kept = [(key.metric, key.subject) for key in runs._stored(tmp_path)]
        assert kept == (metrics if current else metrics[2:])


def test_the_validation_images_of_lsun_are_opened_only_for_a_protocol_that_needs_them(tmp_path):
    write_noise(tmp_path / "bedroom_train", 120, 8, 8, 3)
    settings = ["--data.root", str(tmp_path)]
    (run,) = trainings(FIGURES["figure14"], Path(), settings, None, configure)
    (data,) = runs.open_splits([run]).values()
    assert (len(data.test), data.published) == (2, None)
    (run,) = trainings(TABLES["table3"], Path(), settings, None, configure)
    with pytest.raises(DataError, match="bedroom_val, which is not a folder"):
        runs.open_splits([run])
    (run,) = trainings(TABLES["table3"], Path(), ["--data.root", str(tmp_path / "bedroom_train")], None, configure)
    (data,) = runs.open_splits([run]).values()  # a single folder
    assert (len(data.test), data.published) == (6, None)
    assert data_of("fid", "reconstructions", "once", data) == "lsun_bedroom: 6 test images, 114 training images"


def test_a_run_with_a_strange_folder_is_configured(tmp_path):
    (tmp_path / "table3" / "dc-vae").mkdir(parents=True)
    for root in (5, "-x"):
        (tmp_path / "table3" / "dc-vae" / "config.yaml").write_text(json.dumps({"data": {"root": root}}))
        (run,) = trainings(TABLES["table3"], tmp_path, [], None, configure)
        assert run.config.data.root == str(root)


def test_table_3_reconstructs_held_out_images_and_the_published_ones(tmp_path):
    for folder, count in (("bedroom_train", 120), ("bedroom_val", 11)):
        write_noise(tmp_path / folder, count, 8, 8, 3)
    (run,) = trainings(TABLES["table3"], Path(), ["--data.root", str(tmp_path)], None, configure)
    (data,) = runs.open_splits([run]).values()
    assert data.published is not None
    assert (len(data.train), len(data.test), len(data.published)) == (118, 2, 11)
    used = [data_of(*key, data) for key in run.needed if key.subject == "reconstructions"]
    assert used == [f"lsun_bedroom: {images} images, 118 training images" for images in ("2 test", "11 validation")]


def test_fid_of_fewer_images_than_asked_for_gets_a_remark():
    many, pixels = replace(FID, subject="samples", count=50_000), replace(FID, metric="pixel_mse")
    once = replace(FID, protocol="once", count=200)  # in columns without a number of the paper
    measurements = {Key(m.metric, m.subject, m.protocol): m for m in (FID, many, pixels, once)}
    assert runs._too_few(measurements, 50_000) == ("FID and IS of reconstructions on 300 images, not 50,000",)
    assert runs._too_few(measurements, 300) == ()  # all have the remark "measured on 300 images"


def test_truncated_files_and_files_of_other_versions(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"images": 8}\n[]\n{"loss": 1}\n{"images": 16}\n{"ima')
    assert read_metrics(tmp_path) == [{"images": 8}, {"images": 16}]
    entries = {"weights": "w", "measurements": [{"metric": "fid", "of": "samples", "protocol": "paper", "value": 1.0}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(entries))
    assert runs._stored(tmp_path) == {}
    pixels = replace(FID, metric="pixel_mse")
    before = {name: value for name, value in asdict(pixels).items() if name != "note"}  # as before notes were stored
    (tmp_path / "evaluation.json").write_text(json.dumps({"weights": "w", "measurements": [before]}))
    assert runs._stored(tmp_path) == {Key("pixel_mse", "reconstructions", "paper"): pixels}


# --- mistakes ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table9"], "'table9' is not a table or figure that can be reproduced; choose from table1, table2"),
        (["table3", "--official"], "--official is given with table3; only table1 has a row of the authors' code"),
        (["figure7", "--official", "--dry-run"], "--official is given with figure7; only table1"),
        (["figure3", "--official"], "--official is given with figure3; only table1"),
        (["table6", "--budget", "0"], "--budget is 0; it must be at least 1"),
        (["table1", "--loss.objectiv", "vae"], "--loss.objectiv"),
        (["table6", "--train.images", "5"], "use --budget IMAGES to shorten every run"),
        (
            ["figure7", "--contrast.negatives=5"],
            "--contrast.negatives cannot be changed here; it defines the runs of figure7",
        ),
        (
            ["table1", "--loss.objective", "vae"],
            "--loss.objective cannot be changed here; it defines the runs of table1",
        ),
        (["table6", "--run", "x"], "--run is neither an option of reproduce nor a setting of dcvae train"),
        (["table6", "--optim.rate", "1"], "--optim.rate"),
        (["table6", "--weights", "{tmp}/nowhere"], "--weights {tmp}/nowhere is not a folder"),
        (["table6", "--images", "9"], "--images is 9; it must be at least 10"),
        (["table6"], "data.root is not set"),
        (["table2", "--data.root", "{tmp}/nowhere"], "cifar10: missing in {tmp}/nowhere"),
        (["table8", "--budget", "100"], "--budget is 100; to grow to 512, it must be at least 380"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_1(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *(argument.format(tmp=tmp_path) for argument in argv)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dcvae: error: ") and error.count("\n") == 1
    assert message.format(tmp=tmp_path) in error
    assert list(tmp_path.iterdir()) == []


# --- real digits ---


@pytest.mark.usefixtures("quick_ends")
def test_table_6_on_real_digits(real_data, tmp_path, monkeypatch):
    """Narrow networks trained briefly on a part of MNIST, with remarks on the differences from the paper."""
    monkeypatch.setattr(probe, "STEPS", 100)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 2000), ("t10k", 1000)):
        for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            content = gzip.decompress((real_data / "mnist" / f"{stem}-{kind}-ubyte.gz").read_bytes())
            subset = content[:4] + struct.pack(">I", count) + content[8 : header + count * size]
            (raw / f"{stem}-{kind}-ubyte").write_bytes(subset)
    command = ["reproduce", "table6", *NARROW, "--data.root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*command, "--budget", "160"]) == 0
    content = json.loads((tmp_path / "out" / "table6.json").read_text())
    for cell, paper in zip(content["rows"][-1]["cells"], ("1.30±0.035", "1.27±0.037", "1.29±0.034"), strict=True):
        assert cell["paper"] == paper and cell["remarks"] == ["shortened: 160 of 6,000,000 images", CHANGED]
        assert 5 < cell["ours"]["value"] < 75 and cell["ours"]["count"] == 1000  # chance is 90 %
        assert 0 < cell["ours"]["spread"] < 5
    assert images_shown(tmp_path / "out" / "table6" / "z64") == 160
