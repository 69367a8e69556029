"""One of several processes that train together; run as `ranks_worker.py FOLDER ENGINES`.

FOLDER holds what one process without DeepSpeed makes of the same images: see test_ranks.py.
"""

import hashlib
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from dcvae_fast.config import Config, ContrastConfig, DataConfig, GrowthConfig, LossConfig, ModelConfig, TrainConfig
from dcvae_fast.training.ranks import join, leave
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch

HALF, ITERATIONS = 10, 20
FIXED = Config(
    model=ModelConfig(latent_dim=4, image_channels=1, decoder_width=4, encoder_width=4, discriminator_width=4),
    contrast=ContrastConfig(negatives=20, local_start_images=40),
    train=TrainConfig(batch=8, sampled_batch=12, n_critic=2),
)
# 4×4 for two iterations, 8×8 fading and stable for four each, then 16×16, whose fade ends after the last iteration.
GROWING = Config(
    data=DataConfig(name="folder"),
    model=ModelConfig("progressive", 16, latent_dim=6, base_channels=64, max_channels=8, contrast_dim=5),
    growth=GrowthConfig(fade_images=96, stable_images=16, batch={4: 8, 8: 8, 16: 8}),
    loss=LossConfig(adversarial="wgan_gp"),
    contrast=ContrastConfig(negatives=10, layers=("low", "final"), momentum=0.9),
    train=TrainConfig(sampled_batch=None, n_critic=1, average=0.9),
)
CASES = {"fixed": FIXED, "growing": GROWING}


def batch_of(step: TrainStep, number: int, refill: bool = False) -> Batch:
    """This rank's share of the images of an iteration."""
    n = step.point.batch * step.ranks.count
    generator = torch.Generator().manual_seed(2 * number + refill)
    shape = (n, step.config.model.image_channels, step.resolution, step.resolution)
    images = torch.rand(shape, generator=generator) * 2 - 1
    ids = torch.arange(n) + n * number
    return Batch(step.ranks.own(images).clone(), step.ranks.own(ids).clone())


def advance(step: TrainStep, until: int) -> None:
    while step.iterations < until:
        if step.point.resolution != step.resolution:
            step.grow(step.point)
            step.refill(batch_of(step, step.iterations + i, refill=True) for i in range(3))
        step(batch_of(step, step.iterations))


def learned(step: TrainStep) -> dict[str, torch.Tensor]:
    """Everything that 20 iterations have made: networks, averages, batch statistics, queues, Adam's moments."""
    state = step.state_dict()
    moments = state["optimizers"]["moments"]
    flat = {f"{name}/{kind}": torch.as_tensor(x) for name, found in moments.items() for kind, x in found.items()}
    # Batch normalisation takes out this bias: its gradient is nothing but rounding, of which Adam makes whole steps.
    return {name: x for name, x in {**state["networks"], **flat}.items() if "cell3.conv2.bias" not in name}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        # A moment's smallest elements are differences of much larger ones.
        tolerance = 1e-3 * x.abs().max().item() if "/exp_avg" in name else 1e-6
        torch.testing.assert_close(
            found[name], x, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_same_everywhere(step: TrainStep) -> None:
    """Bit by bit, on all ranks."""
    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in learned(step).values())).digest()
    assert step.ranks.all(digest) == [digest] * step.ranks.count


def main(folder: Path, engines: list[str]) -> None:
    ranks = join()
    for name, config in CASES.items():
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        for engine in engines:
            train = replace(config.train, zero=None if engine == "torch" else int(engine))
            step = TrainStep(replace(config, train=train), ranks=ranks)
            advance(step, HALF)
            half = deepcopy(step.state_dict())
            advance(step, ITERATIONS)
            assert_same(learned(step), expected["learned"])
            check_same_everywhere(step)
            if engine == engines[-1]:  # one process goes on with what several did, and they with what it did
                if ranks.first:
                    torch.save(half, folder / f"{name}-of-{ranks.count}.pt")
                step = TrainStep(replace(config, train=train), ranks=ranks)
                step.load_state_dict(expected["half"])
                advance(step, ITERATIONS)
                assert_same(learned(step), expected["learned"])
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
