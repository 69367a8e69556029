"""Package metadata. Tool settings and the build system are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "dcvae_fast/__init__.py").read_text(encoding="utf-8"), re.M)

# The two lower packages have their own folders, and are imported without the folder's name.
NESTED = {"dcvae_kernels": "kernels", "dcvae_pipelines": "pipelines"}


def nested_packages() -> list[str]:
    return [name for top, folder in NESTED.items() for name in find_packages(ROOT / folder, include=[top, f"{top}.*"])]


TORCHVISION = "torchvision>=0.26"  # the release for torch 2.11
TQDM = "tqdm>=4.66"

setup(
    name="dcvae_fast",
    version=VERSION,
    description="DC-VAE, the dual contradistinctive generative autoencoder: training and trained models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The dcvae_fast authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(ROOT, include=["dcvae_fast", "dcvae_fast.*"]) + nested_packages(),
    package_dir={name: f"{folder}/{name}" for name, folder in NESTED.items()},
    package_data={"": ["py.typed"]},
    # The ops (dcvae_kernels) need only these.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "train": [
            "deepspeed>=0.19.8",
            "filelock>=4.0",
            "huggingface_hub>=1.0",
            "jsonargparse[signatures]>=4.49",
            "lmdb>=1.6",
            "numpy>=2.0",
            "nvidia-dali-cuda130>=2.0; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
            "Pillow>=11.0",
            "PyYAML>=6.0.1",
            "safetensors>=0.6",
            "scikit-learn>=1.6",
            "tensorboard>=2.19",
            TORCHVISION,
            TQDM,
        ],
        "eval": [
            "matplotlib>=3.10",
            "safetensors>=0.6",
            "scipy>=1.14",
            "torch-fidelity>=0.4",
            TORCHVISION,
            TQDM,
        ],
        "bench": [  # implementations that bench/ compares with
            "inf_cl>=1.2.1",
            "info-nce-pytorch>=0.1.4",
            "liger-kernel>=0.8",
            "lightly>=1.6",
            "pytest>=9.0",
            "pytest-benchmark>=5.1",
        ],
        "dev": [
            "pre-commit>=4.0",
            "pyright[nodejs]>=1.1.410",  # includes Node.js, so that nothing is downloaded later
            "pytest>=9.0",
            "pytest-benchmark>=5.1",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
        ],
    },
    entry_points={"console_scripts": ["dcvae = dcvae_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
