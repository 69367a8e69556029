"""Train as one of several ranks, with one engine after the other: `ranks_worker.py FOLDER ENGINES`.

ENGINES `torch,1` is torch, then DeepSpeed with ZeRO stage 1. FOLDER has the states of one process without DeepSpeed on
the same images. test_ranks.py starts this script with a launcher's environment.
"""

import gc
import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcvae_fast.config import (
    Config,
    ContrastConfig,
    DataConfig,
    GrowthConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from dcvae_fast.distributed import Ranks, exit_process, init_distributed
from dcvae_fast.training.deepspeed_engine import UnitEngine
from dcvae_fast.training.optim import Moments
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch

State = dict[str, Any]

HALF, ITERATIONS = 5, 10
# With the default ε, Adam makes full steps from gradients that are rounding errors, and does not notice gradients that
# are wrong by a factor. With a larger ε, steps are proportional to gradients.
SMOOTH = OptimConfig(eps=1e-2)
# Updates the autoencoder in every second iteration, with local patches from the fifth on. Both queues wrap around.
FIXED = Config(
    model=ModelConfig(latent_dim=4, image_channels=1, decoder_width=4, encoder_width=4, discriminator_width=4),
    contrast=ContrastConfig(negatives=20, local_start_images=24),
    optim=SMOOTH,
    train=TrainConfig(batch=8, sampled_batch=12, n_critic=2),
)
# 4×4 for two iterations, 8×8 fading for four and stable for two, then 16×16, whose fade ends after the last iteration.
GROWING = Config(
    data=DataConfig(name="folder"),
    model=ModelConfig("progressive", 16, latent_dim=6, base_channels=64, max_channels=8, contrast_dim=5),
    growth=GrowthConfig(fade_images=32, stable_images=16, batch={4: 8, 8: 8, 16: 8}, stddev_group=4),
    loss=LossConfig(adversarial="wgan_gp"),
    contrast=ContrastConfig(negatives=10, layers=("low", "final"), momentum=0.9),
    optim=SMOOTH,
    train=TrainConfig(sampled_batch=None, n_critic=1, ema_decay=0.9),
)
CASES = {"fixed": FIXED, "growing": GROWING}


def batch_of(step: TrainStep, number: int, refill: bool = False) -> Batch:
    """Return this rank's share of the images of an iteration."""
    n = step.schedule.batch * step.ranks.world_size
    generator = torch.Generator().manual_seed(2 * number + refill)
    shape = (n, step.config.model.image_channels, step.resolution, step.resolution)
    images = torch.rand(shape, generator=generator) * 2 - 1
    ids = torch.arange(n) + n * number
    return Batch(step.ranks.shard(images).clone(), step.ranks.shard(ids).clone())


def advance(step: TrainStep, until: int) -> None:
    while step.iterations < until:
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
            step.refill(batch_of(step, step.iterations + i, refill=True) for i in range(3))
        step(batch_of(step, step.iterations))


def record(config: Config) -> list[State]:
    """Return the states of one process without DeepSpeed, before training and after each iteration."""
    step, states = TrainStep(config), []
    with torch.no_grad():
        # At 32×32 initial log-variances are between -40 and 30; the gradient of their exp would dominate all others.
        for name, parameter in step.networks.encoder.named_parameters():
            if name.endswith("bias"):
                parameter *= 0.01
    for iterations in range(ITERATIONS + 1):
        advance(step, iterations)
        states.append(deepcopy(step.state_dict()))
    return states


def tensors(state: State) -> dict[str, torch.Tensor]:
    """Return all tensors that an iteration changes: networks, EMAs, batch statistics, queues and Adam's moments."""
    moments = state["optimizers"]["moments"]
    flat = {f"{name}/{kind}": torch.as_tensor(x) for name, values in moments.items() for kind, x in values.items()}
    return {**state["networks"], **flat}


def assert_close(state: State, expected_state: State) -> None:
    actual, expected = tensors(state), tensors(expected_state)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        # The smallest elements of moments are differences of much larger numbers.
        atol = 1e-4 * x.abs().max().item() + 2e-5 if "/exp_avg" in name else 5e-7
        torch.testing.assert_close(actual[name], x, rtol=2e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def adopt(step: TrainStep, state: State) -> None:
    """Load the state of another training after the same number of iterations, and keep the existing optimizers."""
    step.networks.load_state_dict(state["networks"])
    if not isinstance(step.engine, UnitEngine):
        step.engine.load_state_dict(state["optimizers"])
        return
    moments = {name: Moments(**values) for name, values in state["optimizers"]["moments"].items()}
    names = {parameter: name for name, parameter in step.networks.named_parameters()}
    for unit in step.engine.optimizer.units:
        unit._load([moments[names[parameter]] for parameter in unit.parameters])  # type: ignore[attr-defined]
        optimizer = unit._optimizer  # type: ignore[attr-defined]
        if hasattr(optimizer, "refresh_fp32_params"):  # ZeRO has copies of the weights
            optimizer.refresh_fp32_params()


def follow(step: TrainStep, states: list[State], until: int = ITERATIONS) -> State:
    """Run each iteration from its recorded initial state, compare with the recorded result, and return the last state.

    Without loading the recorded states the trainings would diverge, because adversarial training amplifies rounding
    errors.
    """
    while True:
        advance(step, step.iterations + 1)
        state = step.state_dict()
        assert_close(state, states[step.iterations])
        check_equal_on_all_ranks(step, state)
        if step.iterations == until:
            return state
        adopt(step, states[step.iterations])


def check_equal_on_all_ranks(step: TrainStep, state: State) -> None:
    """Check that the state is bitwise equal on all ranks."""
    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in tensors(state).values())).digest()
    assert step.ranks.all_gather_object(digest) == [digest] * step.ranks.world_size


def collect_garbage_early() -> None:
    """Collect garbage right after DeepSpeed creates an engine, when deleting an old engine could break the new one."""
    import deepspeed

    initialize = deepspeed.initialize

    @wraps(initialize)
    def initialize_and_collect(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        gc.collect()
        return result

    deepspeed.initialize = initialize_and_collect
    gc.freeze()  # excludes imported modules, so that collection is fast


def check_overflow(config: Config, ranks: Ranks) -> None:
    """Check that all ranks skip the step and halve the loss scale if float16 gradients overflow on one rank."""
    engine = TrainStep(replace(config, train=replace(config.train, precision="float16")), ranks=ranks).engine
    parameters, scale = engine.groups["heads"], engine.scaler.get_scale()
    before = [parameter.detach().clone() for parameter in parameters]

    def step(slope: float) -> list[bool]:
        sums = [(parameter * torch.ones_like(parameter)).sum() for parameter in parameters]
        engine.backward(slope * torch.stack(sums).sum(), ["heads"])
        engine.step()
        assert engine.scaler.get_scale() == scale / 2
        return [not torch.equal(x, y) for x, y in zip(parameters, before, strict=True)]

    assert not any(step(float("inf") if ranks.rank == ranks.world_size - 1 else 1.0))
    assert all(step(1.0))


class CollectiveCounter(TorchDispatchMode):
    """Record collectives by kind: the bytes of the tensor, or of the parts of all ranks together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: defaultdict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sizes[func._opname.strip("_")].append(max(nbytes(tree_leaves(argument)) for argument in args))
        return func(*args, **(kwargs or {}))


def nbytes(values: Iterable[Any]) -> int:
    return sum(x.nbytes for x in values if isinstance(x, torch.Tensor))


def check_collectives(step: TrainStep) -> None:
    """Check the collectives of two iterations of FIXED, one of which updates the autoencoder."""
    config, groups, world_size = step.config, step.engine.groups, step.ranks.world_size
    trunk, score = nbytes(groups["trunk"]), nbytes(groups["score"])
    heads = nbytes(step.networks.discriminator.heads["b2"].parameters())
    autoencoder = nbytes([*groups["encoder"], *groups["decoder"]])
    batch, width = step.schedule.batch * world_size, config.model.discriminator_width
    statistics = 4 * config.model.decoder_width
    for _ in range(config.train.n_critic):
        steps_autoencoder = step.iterations % config.train.n_critic == 0
        with CollectiveCounter() as counter:
            step.ranks.all_reduce_max(0)  # as the training loop does before each iteration
            step(batch_of(step, step.iterations))
        gradients, keys, passes = [(trunk, score)], [], 2
        if steps_autoencoder:
            gradients += [(autoencoder,), (autoencoder, trunk, heads)]
            keys = [4 * 2 * batch * config.model.contrast_dim, 4 * batch * width, 8 * batch]  # with patches; ids
            passes += 5  # of the decoder, backward ones included
        if isinstance(step.engine, UnitEngine):  # one all-reduce per unit, else one per optimizer step
            units = [unit for stepped in gradients for unit in stepped]
        else:
            units = [sum(stepped) for stepped in gradients]
        expected = {"allreduce": [*units, *[statistics] * 2 * passes, 8], "allgather": keys}
        if config.train.zero:  # weights, padded to two elements per rank
            expected["allgather_base"] = [-(-size // (8 * world_size)) * 8 * world_size for size in units]
        for kind in counter.sizes.keys() | expected.keys():
            assert sorted(counter.sizes[kind]) == sorted(expected.get(kind, [])), (kind, config.train.zero)


def main(folder: Path, engines: list[str]) -> None:
    """Train as one rank, and check that the states equal the recorded ones."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    ranks = init_distributed()
    for name, config in CASES.items():
        if name == "growing":
            collect_garbage_early()
        states = torch.load(folder / f"{name}.pt", weights_only=True)
        for engine in engines:
            settings = replace(config.train, zero=None if engine == "torch" else int(engine))
            step = TrainStep(replace(config, train=settings), ranks=ranks)
            step.load_state_dict(states[0])
            half_state = deepcopy(follow(step, states, HALF))
            adopt(step, states[HALF])
            follow(step, states)
            if name == "fixed" and ranks.world_size > 1:
                check_collectives(step)
            if engine == engines[-1]:  # one process resumes from the state of several, and several from that of one
                if ranks.is_first:
                    torch.save(half_state, folder / f"{name}-of-{ranks.world_size}.pt")
                step = TrainStep(replace(config, train=settings), ranks=ranks)
                step.load_state_dict(states[HALF])
                follow(step, states)
            if name == "fixed":
                check_overflow(step.config, ranks)
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
