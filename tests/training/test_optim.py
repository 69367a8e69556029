"""All available implementations of Adam against torch's unfused one, and moments moved between optimizers."""

import shutil
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dcvae_fast.config import OptimConfig
from dcvae_fast.errors import ConfigError
from dcvae_fast.training.optim import adam, choose, read_moments, write_moments

CPU = torch.device("cpu")


def implementations() -> list:
    """Return the implementations that can be imported and compiled."""
    available: list = ["torch"]
    if torch.cuda.is_available():
        try:
            import apex.optimizers  # type: ignore[import-not-found] # noqa: F401

            available.append("apex")
        except ImportError:
            pass
    if shutil.which("g++") is not None:
        available.append(pytest.param("deepspeed", marks=pytest.mark.slow))  # compiles when first used
    return available


def parameters(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5,), (2, 3, 3, 3))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def gradients(step: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(p.shape, generator=generator).to(device) * 10.0 ** (-i) for i, p in enumerate(parameters(CPU))]


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.5, 0.99)])
def test_hundred_steps_match_unfused_adam(implementation: str, betas: tuple[float, float]):
    """With equalised learning rates; after 50 steps the moments move to a new optimizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = OptimConfig(lr=1e-2, betas=betas, implementation=implementation)  # type: ignore[arg-type]
    params, expected = parameters(device), parameters(device)
    c = (0.25, 1.0, 0.25)
    scales = {params[0]: c[0], params[2]: c[2]}
    groups = [{"params": [p], "lr": 1e-2 * x, "eps": 1e-8 / x} for p, x in zip(expected, c, strict=True)]
    reference = torch.optim.Adam(groups, betas=betas, fused=False, foreach=False)
    optimizer = adam(params, config, scales=scales)
    for step in range(100):
        for p, q, gradient in zip(params, expected, gradients(step, device), strict=True):
            p.grad, q.grad = gradient.clone(), gradient
        optimizer.step()
        reference.step()
        if step == 49:
            old, optimizer = optimizer, adam(params, config, scales=scales)
            for before, after in zip(old.param_groups, optimizer.param_groups, strict=True):
                for p in before["params"]:
                    moments = read_moments(old, before, p)
                    assert moments.step == 50
                    write_moments(optimizer, after, p, moments)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    (group,) = [group for group in optimizer.param_groups if len(group["params"]) == 2]
    moments = read_moments(optimizer, group, params[2])
    assert moments.step == 100
    torch.testing.assert_close(moments.exp_avg_sq, reference.state[expected[2]]["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_auto_selects_nvidias_apex_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # another project of that name
    assert choose("auto", cuda) == choose("auto", CPU) == "torch"
    with pytest.raises(ConfigError, match="not the package called apex"):
        adam(parameters(CPU), OptimConfig(implementation="apex"))
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = torch.optim.Adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert choose("auto", cuda) == "apex" and choose("auto", CPU) == "torch"
    assert choose("torch", cuda) == "torch"
