"""Import cost: importing a package must not load modules that only some users need."""

import subprocess
import sys

import pytest

HEAVY = ["deepspeed", "nvidia.dali", "torchvision", "torch_fidelity", "sklearn", "PIL", "jsonargparse", "tensorboard"]
# Modules that `dcvae sample`, `evaluate` and `export` need.
WITHOUT_TRAINING = ["commands.latent", "distributed", "evaluation.latent", "images", "models.dcvae", "run_folder"]
HEAVY += ["torch._dynamo"]  # takes seconds to import; needed only for torch.compile


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("dcvae_kernels", [*HEAVY, "dcvae_fast", "dcvae_pipelines", "yaml", "safetensors", "huggingface_hub"]),
        ("dcvae_fast", ["torch", "tqdm", *HEAVY]),
        ("dcvae_fast.models.dcvae", [*HEAVY, "huggingface_hub"]),
        (", ".join(f"dcvae_fast.{module}" for module in WITHOUT_TRAINING), ["dcvae_fast.training"]),
    ],
)
def test_import_is_light(package, forbidden):
    code = f"import sys, {package}; print([name for name in {forbidden} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
