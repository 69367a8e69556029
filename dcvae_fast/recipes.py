"""All experiments of the paper and two small ones, in one table with one row per experiment. Imports no torch.

A row lists the settings that differ from the base recipe or, without a base, from the defaults in `config.py`. To write
a recipe, start from the output of `dcvae train --recipe NAME --print_config`, and train with `--recipe my.yaml`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError
from dcvae_fast.renamed import rename_settings


class Recipe(NamedTuple):
    """An experiment.

    Attributes:
        base: name of the base recipe; None for the defaults
        settings: settings that differ from the base, by `section.name`
    """

    base: str | None
    settings: dict[str, Any]


# fmt: off

# Progressive networks. The paper's experiments grow as Progressive GAN with its preset v1 (preset-v1-1gpu in its
# config.py): 800,000 images to fade in each resolution and 800,000 to stabilise it, 19 million in all, the rest of them
# at the last resolution; the batch per GPU is 16, 14 at 256×256 and 6 at 512×512; the minibatch standard deviation is
# computed over the whole batch. Preset v2 has shorter stages with other batches; see docs/training.md.
_PROGRESSIVE = {
    "model.architecture": "progressive",
    "loss.adversarial": "wgan_gp",
    "contrast.layers": ("low", "final"),
    "optim.lr": 1e-3, "optim.betas": (0.0, 0.99),
    "train.sampled_batch": None, "train.n_critic": 1,
}
_LARGE = {
    **_PROGRESSIVE,
    "model.latent_dim": 512,
    "train.batch_per_rank": True, "train.precision": "bfloat16",
    "log.every": 32_000, "log.grids_every": 150_000, "log.checkpoint_every": 150_000,
}
# 50 epochs, with a point of the curve after each.
_FIGURE7 = {"train.images": 2_500_000, "log.held_out": 10_000, "log.metrics_every": 50_000}

RECIPES = {
    # CIFAR-10 at 32×32 (Tables 1 and 2): 800 epochs. All other settings have their defaults: the paper's values, and
    # those of the authors' code where the paper leaves a setting open. Where they contradict each other, the number of
    # negatives and the contrasted layers follow the paper; the batch (64 real images and 128 samples; the paper: 128),
    # the hinge loss (the paper: log loss) and separate optimisation steps (the paper: one sum) follow the code.
    "cifar10":                Recipe(None,          {"data.name": "cifar10", "train.images": 40_000_000}),
    # Local patch contrast (§4.2) in the second half; the paper does not say when it starts.
    "cifar10-patch":          Recipe("cifar10",     {"contrast.local_start_images": 20_000_000}),
    # STL-10 resized to 32×32, labelled and unlabelled (Table 2): settings and number of images as for CIFAR-10.
    "stl10":                  Recipe("cifar10",     {"data.name": "stl10"}),
    # MNIST padded to 32×32 (Table 6), 100 epochs. The paper's latent dimensions are 16, 32 and 64.
    "mnist":                  Recipe(None,          {"data.name": "mnist", "train.images": 6_000_000,
                                                     "model.image_channels": 1, "model.latent_dim": 16}),
    # The authors' public code, also where it differs from the paper: 800 epochs of 781 batches. Given the same weights
    # and noise, it computes the same, up to rounding, with these exceptions: a seed gives other random numbers;
    # spectral norm updates u before v, the authors' version of torch v before u; GPUs that have TF32 use it in
    # convolutions; several GPUs share BatchNorm's statistics; gradients that the code discards are not computed.
    "cifar10-official":       Recipe("cifar10",     {"data.drop_last": True, "train.images": 39_987_200,
                                                     "model.sample_clamp": 1.0, "model.reconstruct_from": "sample",
                                                     "contrast.layers": ("b1", "final"), "contrast.negatives": 8192,
                                                     "contrast.queue_start": "noise",
                                                     "contrast.exclude_same_image": False,
                                                     "loss.passes": "separate", "train.initialization": "official",
                                                     "train.seed": 123}),

    # CelebA: the 128×128 pixels around the face (Table 5), or these resized to 64×64.
    "celeba128":              Recipe(None, _LARGE | {"data.name": "celeba", "data.mirror": True,
                                                     "model.resolution": 128, "train.images": 19_000_000}),
    "celeba64":               Recipe("celeba128",   {"model.resolution":  64}),
    # LSUN bedroom at 128×128 (Table 3); bedrooms are not mirrored.
    "lsun128":                Recipe("celeba128",   {"data.name": "lsun_bedroom", "data.mirror": False}),
    # The same with the networks and schedule of the PyTorch port that the authors credit: batches of 16; 100,000
    # iterations at 4×4, then for each resolution 50,000 to fade in and 50,000 to stabilise; Adam is never reset; real
    # images do not fade in and are not mirrored. The port's label embedding, one constant, is left out.
    "celeba128-port":         Recipe("celeba128",   {"data.mirror": False, "model.variant": "port",
                                                     "growth.first_images": 1_600_000, "growth.reset_adam": False,
                                                     "growth.blend_real": False, "train.images": 9_600_000}),
    "lsun128-port":           Recipe("celeba128-port", {"data.name": "lsun_bedroom"}),
    # CelebA-HQ at 256×256 (Table 4), and at 512×512 (Tables 7 and 8; Figures 1, 4 to 6, 8 and 11 to 13).
    "celebahq256":            Recipe("celeba128",   {"data.name": "celebahq",
                                                     "model.resolution": 256,
                                                     "log.every": 14_000, "log.checkpoint_every": 60_000}),
    "celebahq512":            Recipe("celebahq256", {"model.resolution": 512, "log.every":  9_000}),

    # Runs of `dcvae reproduce`.
    "table1/vae":             Recipe("cifar10",     {"loss.objective": "vae"}),
    "table1/vae-gan":         Recipe("cifar10",     {"loss.objective": "vae_gan"}),
    "table1/vae-contrastive": Recipe("cifar10",     {"loss.objective": "vae_contrastive"}),
    "table1/dc-vae":          Recipe("cifar10",     {"loss.objective": "dc_vae"}),
    "table1/official":        Recipe("cifar10-official", {}),
    "table2/dc-vae":          Recipe("stl10",       {}),
    "table3/dc-vae":          Recipe("lsun128",     {}),
    "table4/dc-vae":          Recipe("celebahq256", {}),
    "table5/dc-vae":          Recipe("celeba128",   {}),
    "table6/z16":             Recipe("mnist",       {"model.latent_dim": 16}),
    "table6/z32":             Recipe("mnist",       {"model.latent_dim": 32}),
    "table6/z64":             Recipe("mnist",       {"model.latent_dim": 64}),
    "table8/dc-vae":          Recipe("celebahq512", {}),
    "figure7/k128":           Recipe("cifar10",     {"contrast.negatives":  128} | _FIGURE7),
    "figure7/k256":           Recipe("cifar10",     {"contrast.negatives":  256} | _FIGURE7),
    "figure7/k512":           Recipe("cifar10",     {"contrast.negatives":  512} | _FIGURE7),
    "figure7/k1024":          Recipe("cifar10",     {"contrast.negatives": 1024} | _FIGURE7),
    "figure7/k8096":          Recipe("cifar10",     {"contrast.negatives": 8096} | _FIGURE7),

    # scikit-learn's 1,797 digits with narrow networks: trains in minutes on two CPU cores, without a download. One
    # discriminator step per autoencoder step, small batches and a larger KL weight compensate for the few images. A
    # short queue avoids stale keys while the networks change fast.
    "digits": Recipe(None, {
        "data.name": "digits",
        "model.image_channels": 1, "model.latent_dim": 16,
        "model.decoder_width": 16, "model.encoder_width": 24, "model.discriminator_width": 16,
        "loss.kl_weight": 1e-3,
        "contrast.negatives": 512, "contrast.layers": ("b1",),
        "optim.lr": 1e-3,
        "train.images": 28_000, "train.batch": 16, "train.sampled_batch": 8, "train.n_critic": 1,
        "train.ema_decay": 0.99,
        "log.every": 2_800, "log.grids_every": 14_000, "log.checkpoint_every": 5_600,
    }),
    # Any folder of images, such as faces, with narrow networks that grow from 4×4 to 32×32: trains in minutes on two
    # CPU cores. `--data.root DIR` sets the folder.
    "faces-small": Recipe(None, _PROGRESSIVE | {
        "data.name": "folder", "data.mirror": True, "data.resident": True,
        "model.resolution": 32, "model.latent_dim": 32, "model.base_channels": 512, "model.max_channels": 32,
        "growth.fade_images": 1_600, "growth.stable_images": 1_600, "growth.batch": {4: 16, 8: 16, 16: 16, 32: 16},
        "loss.kl_weight": 1e-3,
        "contrast.negatives": 512,
        "train.images": 16_000, "train.ema_decay": 0.99,
        "log.every": 800, "log.grids_every": 1_600, "log.checkpoint_every": 3_200,
    }),
}
# fmt: on


def recipe_names() -> list[str]:
    """Return the sorted names of all recipes of the table."""
    return sorted(RECIPES)


def known_recipes() -> str:
    """Describe the available recipes in words, with one example for the runs of `dcvae reproduce`."""
    names = ", ".join(name for name in recipe_names() if "/" not in name)
    return f"{names}, the runs of dcvae reproduce such as table1/vae-gan, or the path of a .yaml file"


def recipe_config(name: str) -> Config:
    """Return the configuration of a recipe of the table."""
    default = Config()
    sections = {name: replace(getattr(default, name), **values) for name, values in _by_section(name).items()}
    return replace(default, **sections)


def recipe_argument(name: str) -> str:
    """Return the argument for jsonargparse's `ActionConfigFile`: path of a YAML file, or a recipe's settings as JSON.

    Args:
        name: recipe of the table, or path that ends in .yaml or .yml.

    Raises:
        ConfigError: the recipe is unknown (the message lists the recipes), or the file does not exist.
    """
    if name in RECIPES:
        return json.dumps(_by_section(name))
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--recipe {name}: no such recipe; choose from {known_recipes()}.")
    if not Path(name).is_file():
        raise ConfigError(f"--recipe {name}: no such file.")
    return _with_current_names(Path(name)) or name


def _with_current_names(path: Path) -> str | None:
    """Return the settings of a YAML file as JSON with their current names; None if the file uses no old names."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # jsonargparse reads the file again and reports the error
        return None
    if not isinstance(settings, dict) or (renamed := rename_settings(settings)) == settings:
        return None
    return json.dumps(renamed, default=str)  # YAML reads 2024-01-01 as a date


def _by_section(name: str) -> dict[str, dict[str, Any]]:
    """Return the settings of a recipe, including those of its base recipes, by section."""
    base, settings = RECIPES[name]
    sections = {} if base is None else _by_section(base)
    for setting, value in settings.items():
        section, option = setting.split(".")
        sections.setdefault(section, {})[option] = value
    return sections
