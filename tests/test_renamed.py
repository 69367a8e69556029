"""Files of earlier versions load under the current names; the command line requires the current names."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, GrowthConfig, to_dict
from dcvae_fast.errors import ConfigError, RunError
from dcvae_fast.evaluation.measurement import Measurement, read
from dcvae_fast.recipes import recipe_config
from dcvae_fast.renamed import ADDED, MEASUREMENT_FIELDS, NETWORKS, SETTINGS
from dcvae_fast.run_folder import load_checkpoint, load_weights, prepare_run


def old_config(current: Config | None = None) -> dict:
    """A configuration, by default the default one, as an earlier version wrote it."""
    config = to_dict(current or Config())
    for old, new in SETTINGS.items():
        section, option = new.split(".")
        config[section][old.partition(".")[2]] = config[section].pop(option)
    for name in ADDED:
        section, option = name.split(".")
        del config[section][option]
    return config


def test_every_current_name_is_a_setting():
    config = to_dict(Config())
    for name in (*SETTINGS.values(), *ADDED):
        section, option = name.split(".")
        assert option in config[section]


def test_a_run_folder_with_old_names_resumes(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stored = old_config()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    prepare_run(tmp_path, Config())
    stored["train"]["average"] = 0.5
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(RunError, match=r"train\.ema_decay: 0\.5 → 0\.999"):
        prepare_run(tmp_path, Config())


def test_growing_runs_without_a_group_of_the_standard_deviation_had_groups_of_4(tmp_path):
    current = recipe_config("faces-small")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old_config(current)))
    prepare_run(tmp_path, replace(current, growth=replace(current.growth, stddev_group=4)))
    with pytest.raises(RunError, match=r"growth\.stddev_group: 4 → 16\n"):
        prepare_run(tmp_path, current)


def test_a_checkpoint_with_old_names_is_loaded(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    weights = {"encoder.a": torch.zeros(2), "decoder_average.a": torch.ones(2), "decoder.a": torch.zeros(2)}
    step = {"images": 4, "networks": weights, "resolution": 32, "alpha": 1.0}
    state = {"format": 3, "config": old_config(), "step": step, "sources": [{}]}
    torch.save(state, tmp_path / "checkpoints" / f"{4:012d}.pt")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    earlier = replace(Config(), growth=GrowthConfig(stddev_group=4))
    assert loaded["config"] == to_dict(earlier)
    assert list(loaded["step"]["networks"]) == ["encoder.a", "decoder_ema.a", "decoder.a"]
    assert torch.equal(load_weights(tmp_path)[1]["decoder.a"], torch.ones(2))
    assert NETWORKS == {"decoder_average": "decoder_ema"}


@pytest.mark.parametrize("networks", [{}, {"networks": {"decoder_average.a": torch.ones(2)}}])
def test_a_checkpoint_of_another_format_is_rejected(tmp_path, networks):
    (tmp_path / "checkpoints").mkdir()
    state = {"format": 2, "config": old_config(), "step": networks, "sources": [{}]}
    torch.save(state, tmp_path / "checkpoints" / f"{4:012d}.pt")
    with pytest.raises(RunError, match=r"another version of dcvae_fast \(format 2; this version reads 3\)"):
        load_checkpoint(tmp_path)


def test_measurements_with_old_names_are_read(tmp_path):
    path = tmp_path / "evaluation.json"
    entry = {"metric": "fid", "of": "samples", "spread_is": "standard deviation", "protocol": "paper"}
    path.write_text(json.dumps({"weights": "w", "measurements": [entry]}))
    renamed = {"metric": "fid", "subject": "samples", "spread_kind": "standard deviation", "protocol": "paper"}
    assert read(path)["measurements"] == [renamed]
    assert set(MEASUREMENT_FIELDS.values()) <= set(Measurement.__dataclass_fields__)


@pytest.mark.parametrize(
    "text",
    [
        "train: {average: 0.5, images: 7}\noptim: {fused: torch}\ndata: {root: 2024-01-01}\n",
        "train.average: 0.5\ntrain.images: 7\noptim.fused: torch\ndata.root: 2024-01-01\n",
        "model: {latent_dim: 3}\ntrain: {average: 0.5, images: 7}\noptim: {fused: torch}\ndata: {root: 2024-01-01}\n",
        "train: {average: 0.9, ema_decay: 0.5, images: 7}\noptim: {implementation: torch}\ndata.root: 2024-01-01\n",
    ],
)
def test_a_recipe_file_with_old_names_is_read(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    config = parse_config(["--recipe", str(tmp_path / "mine.yaml")]).config
    assert (config.train.ema_decay, config.train.images, config.optim.implementation) == (0.5, 7, "torch")
    assert config.data.root == "2024-01-01"
    assert config.growth.stddev_group == 16  # a recipe has the defaults, not the values of earlier versions


def test_a_recipe_file_may_have_a_folder_like_an_impossible_date(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {root: 2024-13-01}\n")
    assert parse_config(["--recipe", str(tmp_path / "mine.yaml")]).config.data.root == "2024-13-01"


@pytest.mark.parametrize("arguments", [["--train.average", "0.9"], ["--train.average=0.9"]])
def test_an_old_name_on_the_command_line_is_rejected(arguments):
    with pytest.raises(ConfigError, match=r"--train\.average has been renamed; use --train\.ema_decay\."):
        parse_config(["--recipe", "digits", *arguments])
