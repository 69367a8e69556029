"""Print a hash of all weights, Adam moments and losses of short trainings, to compare two versions bit by bit:

    PYTHONPATH=tests/training python tests/training/fingerprint.py > before.txt    # then after.txt, and diff

The trainings cover all objectives, orders and penalties, growth, micro-batches, lower precision, and a resumed run.
"""

import hashlib
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from dcvae_fast.config import Config
from dcvae_fast.training.step import TrainStep
from test_graphs import CASES, GROWING, MICRO, advance


def with_train(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, **settings))


MORE_CASES = {
    "wgan_gp": (replace(CASES["sequential"][0], loss=replace(GROWING.loss)), 12),
    "vae_gan joint": (replace(CASES["vae_gan"][0], loss=replace(CASES["vae_gan"][0].loss, order="joint")), 12),
    "vae_gan growing": (replace(GROWING, loss=replace(GROWING.loss, objective="vae_gan", adversarial="log")), 44),
    "joint micro": (replace(MICRO, loss=replace(GROWING.loss, order="joint")), 44),
    "bfloat16": (with_train(CASES["local"][0], precision="bfloat16"), 26),
    "bfloat16 micro": (with_train(MICRO, precision="bfloat16"), 44),
    "bfloat16 r1": (with_train(CASES["r1"][0], precision="bfloat16"), 12),
    "float16": (with_train(GROWING, precision="float16"), 24),
    "batch of 3": (with_train(CASES["joint"][0], batch=3, n_critic=1), 6),
}


def fingerprint(state: Any, digest: Any) -> None:
    """Update the digest with all tensors and numbers of a nested state, sorted by name."""
    if isinstance(state, dict):
        for name in sorted(state, key=str):
            digest.update(str(name).encode())
            fingerprint(state[name], digest)
    elif isinstance(state, torch.Tensor):
        digest.update(state.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(state).encode())


def main() -> None:
    torch.set_num_threads(1)
    for name, (config, iterations) in (CASES | MORE_CASES).items():
        step, digest = TrainStep(config), hashlib.sha256()
        for i, metrics in enumerate(advance(step, iterations)):
            fingerprint(metrics, digest)
            if i == iterations // 2:
                middle_state = deepcopy(step.state_dict())
        fingerprint(step.state_dict()["networks"], digest)
        fingerprint(step.state_dict()["optimizers"]["moments"], digest)
        resumed = TrainStep(config)
        resumed.load_state_dict(middle_state)
        for metrics in advance(resumed, iterations - iterations // 2 - 1):
            fingerprint(metrics, digest)
        fingerprint(resumed.state_dict()["optimizers"]["moments"], digest)
        print(f"{name:16s} {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
