"""Old names of settings, networks and fields, so that files of earlier versions still load. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from dcvae_fast.errors import ConfigError

SETTINGS = {"train.average": "train.ema_decay", "optim.fused": "optim.implementation"}
# Values of settings that earlier versions did not have.
ADDED = {
    "model.variant": "pggan",
    "model.stddev_group": 4,
    "growth.first_images": None,
    "growth.blend_real": True,
    "growth.reset_adam": True,
}
NETWORKS = {"decoder_average": "decoder_ema"}
MEASUREMENT_FIELDS = {"of": "subject", "spread_is": "spread_kind"}


def rename_settings(config: dict[str, Any], stored: bool = True) -> dict[str, Any]:
    """Return a configuration with the current names of settings.

    Values stored under a current name win over those under its old name.

    Args:
        config: settings as read from config.yaml, a checkpoint or a YAML recipe.
        stored: whether a run stored them, so that settings which are missing are added with their earlier values; false
            for a recipe, where they have their defaults.
    """
    config = {name: dict(values) if isinstance(values, dict) else values for name, values in config.items()}
    for old, new in SETTINGS.items():
        section, option = old.split(".")
        if old in config:  # YAML recipes may have dotted keys
            config.setdefault(new, config.pop(old))
        values = config.get(section)
        if isinstance(values, dict) and option in values:
            values.setdefault(new.partition(".")[2], values.pop(option))
    for name, value in ADDED.items() if stored else ():
        section, option = name.split(".")
        if isinstance(values := config.get(section), dict):
            values.setdefault(option, value)
    return config


def rename_networks(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of `Networks` with the current names of the networks."""
    renamed = {}
    for key, value in state.items():
        network, dot, rest = key.partition(".")
        renamed[NETWORKS.get(network, network) + dot + rest] = value
    return renamed


def rename_measurement(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a stored `Measurement` with the current names of its fields."""
    return {MEASUREMENT_FIELDS.get(name, name): value for name, value in entry.items()}


def check_names(arguments: Iterable[str]) -> None:
    """Check that a command line uses the current names of settings.

    Raises:
        ConfigError: an old name is used; the message gives the current one.
    """
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name in SETTINGS:
            raise ConfigError(f"--{name} has been renamed; use --{SETTINGS[name]}.")
