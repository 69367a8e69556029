import os
import subprocess
import sys

import pytest
import torch

from dcvae_pipelines import ResidentSource, Source


def test_importing_the_package_imports_torch_only():
    # torch is mocked, because importing it takes seconds, and its own imports must not count.
    program = """
import sys
from unittest.mock import MagicMock
sys.modules.update({"torch": MagicMock(), "torch.nn": MagicMock()})
before = set(sys.modules)
import dcvae_pipelines
print(*{name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["dcvae_pipelines"]


def test_resident_source_implements_source():
    source: Source = ResidentSource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), batch=1, seed=0)
    batch = next(iter(source))
    assert batch.images.shape == (1, 1, 4, 4) and batch.ids.shape == (1,)
    with pytest.raises(AttributeError):
        batch.ids = batch.images  # type: ignore[misc]
