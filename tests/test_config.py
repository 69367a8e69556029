"""Recipes, overrides, and settings that can change when a run is resumed."""

import pytest

from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, ModelConfig, changes, to_dict
from dcvae_fast.errors import ConfigError
from dcvae_fast.recipes import known_recipes, recipe_config, recipe_names


def parsed(*argv: str) -> Config:
    return parse_config(argv)[0]


def test_defaults_are_the_papers():
    config = parsed("--recipe", "cifar10")
    assert config == Config()
    assert (config.contrast.negatives, config.contrast.layers, config.contrast.temperature) == (
        8096,
        ("b2", "final"),
        0.07,
    )
    assert (config.optim.lr, config.optim.betas) == (2e-4, (0.0, 0.9))
    assert (config.train.batch, config.train.sampled_batch, config.train.n_critic) == (64, 128, 5)
    assert config.train.images == 800 * 50_000
    assert config.loss.kl_weight == 1e-6 * 64
    assert (config.contrast.queue_start, config.model.sample_clamp) == ("empty", None)


def test_settings_of_the_official_recipe():
    ours, official = to_dict(Config()), to_dict(parsed("--recipe", "cifar10-official"))
    changed = {
        f"{section}.{name}": official[section][name]
        for section in ours
        for name in ours[section]
        if ours[section][name] != official[section][name]
    }
    assert changed == {
        "data.drop_last": True,
        "model.sample_clamp": 1.0,
        "model.reconstruct_from": "sample",
        "contrast.layers": ["b1", "final"],
        "contrast.negatives": 8192,
        "contrast.queue_start": "noise",
        "contrast.exclude_same_image": False,
        "loss.passes": "separate",
        "train.initialization": "official",
        "train.images": 800 * 781 * 64,
        "train.seed": 123,
    }


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_parses(recipe):
    config, folder, dry_run, profile = parse_config(["--recipe", recipe])
    assert config == recipe_config(recipe)
    assert str(folder) == f"runs/{recipe}"
    assert not dry_run and not profile
    assert config.model.image_channels == (1 if config.data.name in ("digits", "mnist") else 3)


def test_known_recipes_list_one_run_of_reproduce_as_an_example():
    assert known_recipes().startswith("celeba128, celeba128-port, celeba64, ") and known_recipes().count("/") == 1


def test_overrides(tmp_path):
    argv = "--recipe=mnist --optim.lr 1e-4 --train.images 12345 --optim.betas [0.5,0.99] --contrast.layers [b1,b4]"
    config, folder, dry_run, profile = parse_config(
        f"{argv} --data.root /somewhere --run elsewhere --dry-run --profile".split()
    )
    assert (config.optim.lr, config.optim.betas, config.train.images) == (1e-4, (0.5, 0.99), 12345)
    assert (config.contrast.layers, config.data.root) == (("b1", "b4"), "/somewhere")
    assert (str(folder), dry_run, profile) == ("elsewhere", True, True)
    own = tmp_path / "mine.yaml"
    own.write_text("data: {name: digits}\noptim: {lr: 5e-3}\n")
    config, folder, *_ = parse_config(["--recipe", str(own)])
    assert (config.data.name, config.optim.lr, str(folder)) == ("digits", 5e-3, "runs/mine")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--recipe", "cifar11"],
            "--recipe cifar11: no such recipe; choose from celeba128, ",
        ),
        ([], "--recipe is missing"),
        (["--recipe", "digits", "--optim.learning_rate", "1"], "--optim.learning_rate"),
        (["--recipe", "digits", "--optim.lr", "fast"], "optim.lr"),
        (["--recipe", "digits", "--optim.lr", "-1"], "optim.lr is -1.0; it must be above 0"),
        (["--recipe", "digits", "--loss.objective", "gan"], "loss.objective"),
        (["--recipe", "digits", "--contrast.layers", "[b2, b2]"], "contrast.layers"),
        (["--recipe", "digits", "--contrast.layers", "[]"], "contrast.layers"),
        (["--recipe", "digits", "--contrast.temperature", "0"], "contrast.temperature is 0.0"),
        (["--recipe", "digits", "--model.latent_dim", "0"], "model.latent_dim is 0"),
        (["--recipe", "digits", "--log.metrics_every", "0"], "log.metrics_every is 0; it must be null or at least 1"),
        (["--recipe", "digits", "--train.batch", "1"], "train.batch is 1; it must be at least 2"),
        (["--recipe", "digits", "--log.keep", "1"], "log.keep is 1; it must be at least 2"),
        (["--recipe", "digits", "--log.held_out", "-1"], "log.held_out is -1; it must be null, or 0 or more"),
        (["--recipe", "digits", "--train.sampled_batch", "0"], "it must be null or at least 1"),
        (["--recipe", "mnist", "--log.fid_images", "1"], "log.fid_images is 1; it must be 0 or at least 2"),
        (
            ["--recipe", "mnist", "--log.held_out", "0", "--log.fid_images", "9"],
            "log.fid_images is 9; it must be 0 if log.held_out is 0",
        ),
        (["--recipe", "digits", "--optim.betas", "[0.5, 1]"], "optim.betas[1] is 1.0; it must be in [0, 1)"),
        (["--recipe", "digits", "--growth.batch", "{16: 0}"], "growth.batch[16] is 0; it must be at least 1"),
        (
            ["--recipe", "celeba64", "--train.initialization", "official"],
            "train.initialization is 'official'; it must be xavier for progressive",
        ),
        (
            ["--recipe", "celeba64", "--contrast.local_start_images", "0"],
            "contrast.local_layers is ('b2',); it must be a subset of 8x8, 16x16, 32x32 for progressive at 64×64",
        ),
        (
            ["--recipe", "faces-small", "--contrast.local_start_images", "0", "--contrast.local_layers", "[32x32]"],
            "contrast.local_layers is ('32x32',); it must be a subset of 8x8, 16x16 for progressive at 32×32",
        ),
        (
            "--recipe=celeba64 --contrast.local_start_images=0 --contrast.local_layers=[8x8,32x32]"
            " --model.max_channels=1024".split(),
            "contrast.local_layers is ('8x8', '32x32'); it must be a list of feature maps with the same number of",
        ),
        (
            ["--recipe", "cifar10-patch", "--contrast.local_layers", "[8x8]"],
            "contrast.local_layers is ('8x8',); it must be a subset of b1, b2, b3, b4 for autogan at 32×32",
        ),
    ],
)
def test_errors_name_the_wrong_setting(argv, message):
    with pytest.raises(ConfigError) as error:
        parse_config(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_overrides_the_recipe_in_any_order():
    assert parsed("--optim.lr", "0.5", "--recipe", "digits").optim.lr == 0.5
    assert parsed("--optim.lr", "0.5", "--recipe=digits", "--data.mirror", "true").optim.lr == 0.5


@pytest.mark.parametrize("content", [b"model: 3\n", b"model: null\n", b"recipe: m.yaml\n", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_malformed_recipe_is_rejected(content, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="mine"):
        parse_config(["--recipe", str(tmp_path / "mine.yaml")])


def test_errors_name_the_wrong_setting_of_a_recipe(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("optim: {speed: 3}\n")
    with pytest.raises(ConfigError, match="speed"):
        parse_config(["--recipe", str(own)])
    own.write_text("optim: {lr: [}\n")
    with pytest.raises(ConfigError, match="mine"):
        parse_config(["--recipe", str(own)])


def test_print_config_prints_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--recipe", "cifar10-official", "--optim.lr", "1e-3", "--print_config"])
    assert end.value.code == 0
    import yaml

    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["contrast"]["negatives"] == 8192
    assert printed["optim"]["lr"] == 1e-3
    assert set(printed) >= set(to_dict(Config()))


def test_changes_lists_only_settings_that_affect_the_result():
    old, cifar10 = to_dict(Config()), ("--recipe", "cifar10")
    assert changes(old, parsed(*cifar10, "--train.images", "5", "--data.root", "x", "--log.every", "7")) == []
    differences = changes(old, parsed(*cifar10, "--optim.lr", "1e-3", "--train.seed", "4"))
    assert differences == [("optim.lr", 2e-4, 1e-3), ("train.seed", 0, 4)]
    old["growth"]["fade_images"] = 600_000
    assert changes(old, Config()) == []  # these networks do not grow
    growing = recipe_config("celeba64")
    assert ("growth.fade_images", 600_000, 800_000) in changes(old, growing)
    del old["model"]["latent_dim"]
    assert changes(old, Config()) == [("model.latent_dim", "not set", 128)]


def test_sections_are_checked_when_constructed_in_python():
    with pytest.raises(ConfigError, match=r"model\.sample_clamp is -1"):
        ModelConfig(sample_clamp=-1)
