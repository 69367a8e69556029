"""Optional dependencies, imported on first use: a run needs and loads only the packages that it uses."""

import importlib
from types import ModuleType

from dcvae_pipelines.source import DataError


def import_optional(module: str, package: str) -> ModuleType:
    """Import a module.

    Raises:
        DataError: the module cannot be imported; the message names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{package} is needed here and cannot be imported ({error}): pip install {package}") from error
