"""Late imports: neither this package nor the ops beside it should load, or need, what a run does not use."""

import importlib
from types import ModuleType

from dcvae_pipelines.source import DataError


def import_optional(module: str, package: str) -> ModuleType:
    """
    Raises:
        DataError: it cannot be imported; the message names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{package} is needed here and cannot be imported ({error}): pip install {package}") from error
