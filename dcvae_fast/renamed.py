"""Old names of settings, networks and fields, and values of settings that earlier versions did not have, so that their
files still load. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from dcvae_fast.errors import ConfigError

SETTINGS = {"train.average": "train.ema_decay", "optim.fused": "optim.implementation"}
# Settings that earlier versions did not have, with the values that come closest to them: in growing networks, they did
# not restart Adam at the end of a fade, and had groups of 2 or 3 in batches that 4 does not divide.
ADDED = {
    "model.variant": "pggan",
    "growth.first_images": None,
    "growth.blend_real": True,
    "growth.reset_adam": True,
    "growth.stddev_group": 4,
    "loss.passes": "merged",
    "train.initialization": "xavier",
}
NETWORKS = {"decoder_average": "decoder_ema"}
MEASUREMENT_FIELDS = {"of": "subject", "spread_is": "spread_kind"}


def rename_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, as read from config.yaml or a YAML recipe, with the current names of settings.

    Values stored under a current name win over those under its old name.
    """
    config = {name: dict(values) if isinstance(values, dict) else values for name, values in config.items()}
    for old, new in SETTINGS.items():
        section, option = old.split(".")
        if old in config:  # YAML recipes may have dotted keys
            config.setdefault(new, config.pop(old))
        values = config.get(section)
        if isinstance(values, dict) and option in values:
            values.setdefault(new.partition(".")[2], values.pop(option))
    return config


def complete_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the current names of settings, and with added settings.

    Without the latter, a run of an earlier version could not be resumed, because its configuration would differ.
    """
    config = rename_settings(config)
    for setting, value in ADDED.items():
        section, option = setting.split(".")
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
