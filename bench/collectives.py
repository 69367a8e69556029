"""Counts the collectives of a training iteration, and works out from them what more GPUs would give.

    torchrun --nproc_per_node 2 -- bench/collectives.py --out bench/results/cpu/collectives.json
    python bench/collectives.py --table bench/results/cpu/collectives.json

The first takes minutes, on CPUs, through gloo. Counted is what training hands to torch.distributed, by itself and
through DeepSpeed: the same calls, of the same sizes, that NCCL would get. What their bytes are:

    all_reduce, reduce, broadcast: those of the tensor
    all_gather, reduce_scatter: those of the parts of all ranks together

These are payloads. What crosses the wires is up to the algorithm; see `seconds`. Those of gradients, weights and batch
statistics depend on the networks alone, so the images that are shown are few; those of the keys grow with the batch.
"""

import argparse
import gc
import inspect
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import records
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config
from dcvae_fast.distributed import Ranks, exit_process, init_distributed
from dcvae_fast.models.layers import SumOverRanks
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.plan import stage_costs, stage_ranges
from dcvae_fast.training.schedule import stages
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch

ENGINES = ("torch", "0", "1", "2")  # torch's own, and DeepSpeed by ZeRO stage
RECIPES = ("celebahq512", "cifar10")
BATCH, LARGE_BATCH, LARGE = 2, 1, 256  # images on each rank: below, and from this resolution on
MESSAGES = 500

KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
}
GRADIENTS, WEIGHTS, KEYS, STATISTICS, MESSAGE = "gradients", "weights", "keys", "batch norm", "message"


def _code(function: Any) -> CodeType:
    return inspect.unwrap(function).__code__


PURPOSES = {
    _code(Engine.step): GRADIENTS,
    _code(TrainStep._enqueue): KEYS,
    _code(SumOverRanks.forward): STATISTICS,
    _code(SumOverRanks.backward): STATISTICS,
    _code(Ranks.all_reduce_max): MESSAGE,
}


class Counter(TorchDispatchMode):
    """Inside, counts operators, and collectives by purpose and kind: [calls, bytes]."""

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.collectives: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = str(func).split(".")[1].rstrip("_")
            kind = KINDS.get(name, name)
            total = self.collectives[_purpose(kind), kind]
            total[0] += 1
            # Of a gather's and a scatter's two tensors, or lists of them, one is the whole.
            total[1] += max(_nbytes(tree_iter(argument)) for argument in args)
        else:
            self.operators += 1
        return func(*args, **(kwargs or {}))


def _purpose(kind: str) -> str:
    """Of the collective that is being called: the innermost function on the way here that has one."""
    frame = inspect.currentframe()
    while frame is not None:
        if (purpose := PURPOSES.get(frame.f_code)) is not None:
            return WEIGHTS if purpose == GRADIENTS and kind == "all_gather" else purpose
        frame = frame.f_back
    return "other"


def _nbytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def held_bytes() -> int:
    """Of all tensors on this rank that Python holds, their storages once each."""
    gc.collect()
    storages = (x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor) and not x.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def small(config: Config, engine: str) -> Config:
    """The recipe with few images, and this engine."""
    batches = {resolution: _batch(resolution) for resolution in config.growth.batch}
    sampled = config.train.sampled_batch and BATCH
    train = replace(
        config.train,
        batch=BATCH,
        sampled_batch=sampled,
        batch_per_rank=True,
        engine="torch" if engine == "torch" else "deepspeed",
        zero=None if engine == "torch" else int(engine),
    )
    return replace(config, growth=replace(config.growth, batch=batches), train=train)


def _batch(resolution: int) -> int:
    return BATCH if resolution < LARGE else LARGE_BATCH


def count(recipe: str, config: Config, engine: str, ranks: Ranks) -> list[dict[str, Any]]:
    """Rows of the result: an iteration at each resolution, all its layers faded in, on average over a period."""
    config = small(config, engine)
    step = TrainStep(config, ranks=ranks)
    rows = []
    for stage in stages(config):
        if stage.fades:
            continue
        step.images = stage.begin
        step.grow(step.schedule)
        period = config.train.n_critic if config.loss.has_gan else 1
        for _ in range(period):  # builds the engine's units
            step(_images(step))
        with Counter() as counter:
            for _ in range(period):
                ranks.all_reduce_max(0)  # as the loop does
                step(_images(step))
        row = {
            "recipe": recipe,
            "resolution": stage.resolution,
            "engine": engine,
            "batch": step.schedule.batch * ranks.world_size,
            "iterations": period,
            "operators": counter.operators / period,
            "collectives": [
                {"purpose": purpose, "kind": kind, "calls": calls / period, "bytes": size / period}
                for (purpose, kind), (calls, size) in sorted(counter.collectives.items())
            ],
            "held_bytes": held_bytes(),
            "parameters": sum(parameter.numel() for parameter in step.engine.moments()),
        }
        rows.append(row)
        if ranks.is_first:
            print(recipe, stage.resolution, engine, row["collectives"], flush=True)
    step.engine.reset(step.schedule.lr, step.schedule.batch)  # DeepSpeed's hooks would keep all that this engine held
    return rows


def _images(step: TrainStep) -> Batch:
    n, size = step.schedule.batch, step.resolution
    ids = torch.arange(n) + step.images + step.ranks.rank * n
    return Batch(torch.rand(n, step.config.model.image_channels, size, size) * 2 - 1, ids)


def message_us(ranks: Ranks) -> float:
    """Median time of the loop's message, in µs."""
    times = []
    for _ in range(MESSAGES):
        began = time.perf_counter()
        ranks.all_reduce_max(0)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def costs(recipe: str, config: Config) -> list[dict[str, Any]]:
    """What `--dry-run` says of one process with the recipe's own batches: FLOPs of an iteration, and bytes."""
    found = zip(stage_ranges(config), stage_costs(TrainStep(config, "meta")), strict=True)
    return [
        {
            "recipe": recipe,
            "resolution": passage.stage.resolution,
            "batch": passage.batch,
            "per_rank": config.train.batch_per_rank,
            **cost._asdict(),
        }
        for passage, cost in found
        if not passage.stage.fades
    ]


# What the arithmetic assumes, in SI units.
NODE = 8  # GPUs
FLOPS = 150e12  # a second that a GPU achieves on what is counted
OPERATOR = 10e-6  # from Python to a GPU's queue
NEAR_BANDWIDTH, FAR_BANDWIDTH = 400e9, 50e9  # bytes a second and GPU: in a node, between nodes
LATENCY = {8: 30e-6, 64: 60e-6, 512: 100e-6}  # of a collective, by number of GPUs
HOP = 50e-6  # of gloo, from machine to machine

FACTORS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


def seconds(kind: str, calls: float, size: float, ranks: int) -> float:
    """Of collectives in a ring: latency, and f (N − 1) / N · bytes / bandwidth, where f is 2 for an all-reduce."""
    bandwidth = NEAR_BANDWIDTH if ranks <= NODE else FAR_BANDWIDTH
    return calls * LATENCY[ranks] + FACTORS[kind] * (ranks - 1) / ranks * size / bandwidth


class Expected(NamedTuple):
    """Of an iteration on N ranks, in seconds."""

    compute: float
    """of the GPU"""
    communication: float
    """of the GPU, none of it behind its computing"""
    host: float
    """Python's, at the same time as the GPU's; with the loop's message"""

    @property
    def total(self) -> float:
        return max(self.compute + self.communication, self.host)


def expected(row: dict[str, Any], cost: dict[str, Any], ranks: int) -> Expected:
    """From what was counted, and the FLOPs."""
    share = 1 if cost["per_rank"] else 1 / ranks
    communication = 0.0
    for each in row["collectives"]:
        if each["purpose"] == MESSAGE:
            continue
        size = each["bytes"]
        if each["purpose"] == KEYS:
            size *= cost["batch"] * share * ranks / row["batch"]
        communication += seconds(each["kind"], each["calls"], size, ranks)
    message = 2 * (ranks - 1) * HOP
    return Expected(cost["flops"] * share / FLOPS, communication, row["operators"] * OPERATOR + message)


def efficiency(row: dict[str, Any], alone: dict[str, Any], cost: dict[str, Any], ranks: int) -> float:
    """Images a second of N GPUs over N times those of one, which is torch's and has no collectives."""
    one = max(cost["flops"] / FLOPS, alone["operators"] * OPERATOR)
    speedup = one / expected(row, cost, ranks).total * (ranks if cost["per_rank"] else 1)
    return speedup / ranks


def tables(document: dict[str, Any]) -> dict[str, str]:
    """Markdown, by name."""
    return {
        "counted": _counted(document),
        "expected": _expected(document),
        "memory": _memory(document),
    }


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(document: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by recipe and resolution, then by engine."""
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for row in document["rows"]:
        found[row["recipe"], row["resolution"]][row["engine"]] = row
    return found


def _title(engine: str) -> str:
    return "torch" if engine == "torch" else f"ZeRO {engine}"


def _total(row: dict[str, Any], *purposes: str) -> tuple[float, float]:
    """Calls and bytes."""
    chosen = [each for each in row["collectives"] if each["purpose"] in purposes]
    return sum(each["calls"] for each in chosen), sum(each["bytes"] for each in chosen)


def _counted(document: dict[str, Any]) -> str:
    rows = []
    for (recipe, resolution), by_engine in _cells(document).items():
        for engine, row in by_engine.items():
            cells = [f"{recipe}, {resolution}×{resolution}", _title(engine)]
            for purpose in (GRADIENTS, WEIGHTS, STATISTICS):
                calls, size = _total(row, purpose)
                cells.append(f"{calls:.4g} / {size / 2**20:.2f}" if calls else "–")
            calls, size = _total(row, KEYS)
            cells.append(f"{calls:.4g} / {size / row['batch']:.4g}")
            rows.append([*cells, f"{row['operators']:,.0f}"])
    per = "calls / MiB"
    headings = [f"gradients, {per}", f"weights, {per}", f"batch norm, {per}", "keys, calls / bytes an image"]
    return _table(["", "engine", *headings, "operators"], rows)


def _expected(document: dict[str, Any]) -> str:
    rows, shown = [], list(LATENCY)
    found = {(cost["recipe"], cost["resolution"]): cost for cost in document["costs"]}
    for (recipe, resolution), by_engine in _cells(document).items():
        cost = found[recipe, resolution]
        for engine, row in by_engine.items():
            if engine == "0":
                continue
            cells = [f"{recipe}, {resolution}×{resolution}", _title(engine)]
            cells += [f"{cost['flops'] / FLOPS * 1e3:.3g}", f"{row['operators'] * OPERATOR * 1e3:.3g}"]
            for ranks in shown:
                if not cost["per_rank"] and cost["batch"] < 2 * ranks:
                    cells.append("–")
                    continue
                time_of = expected(row, cost, ranks)
                share = efficiency(row, by_engine["torch"], cost, ranks)
                cells.append(f"{time_of.communication * 1e3:.3g} → {share:.0%}")
            rows.append(cells)
    headings = [f"{ranks} GPUs: communication, ms → efficiency" for ranks in shown]
    return _table(["", "engine", "FLOPs, ms", "host, ms", *headings], rows)


def _memory(document: dict[str, Any]) -> str:
    rows = []
    found = {(cost["recipe"], cost["resolution"]): cost for cost in document["costs"]}
    for (recipe, resolution), by_engine in _cells(document).items():
        cost, held = found[recipe, resolution], {}
        for engine in ENGINES:
            held[engine] = f"{by_engine[engine]['held_bytes'] / 2**20:,.0f}" if engine in by_engine else "–"
        moments = 8 * by_engine["torch"]["parameters"] / 2**20
        cells = [f"{recipe}, {resolution}×{resolution}", f"{by_engine['torch']['parameters'] / 1e6:.2f}"]
        cells += [f"{moments:.0f}", *(f"{moments / ranks:.1f}" for ranks in LATENCY)]
        rows.append([*cells, f"{cost['peak'] / 2**20:,.0f}", " / ".join(held.values())])
    moments = ["moments, MiB", *(f"cut up among {ranks}" for ranks in LATENCY)]
    measured = f"held between iterations, MiB, {' / '.join(map(_title, ENGINES))}, {document['ranks']} ranks"
    return _table(["", "parameters stepped, M", *moments, "activations and gradients, MiB", measured], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=RECIPES, help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"default: {','.join(ENGINES)}")
    parser.add_argument("--out", type=Path, help="the result, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing; print the tables of a result")
    options = parser.parse_args(arguments)
    if options.table is not None:
        print("\n".join(f"{name}:\n\n{text}" for name, text in tables(records.read(options.table)).items()))
        return
    configs = {Path(recipe).stem: parse_config(["--recipe", recipe])[0] for recipe in options.recipe}
    # Before the ranks meet: the costs are those of one process.
    planned = []
    if os.environ.get("RANK", "0") == "0":
        planned = [cost for recipe, config in configs.items() for cost in costs(recipe, config)]
    torch.manual_seed(0)
    ranks = init_distributed()
    rows = []
    for recipe, config in configs.items():
        for engine in options.engines.split(","):
            rows += count(recipe, config, engine, ranks)
    took = message_us(ranks)
    if ranks.is_first and options.out is not None:
        head = {"benchmark": "collectives", **records.environment(("deepspeed",)), "device": "cpu", "rehearsal": False}
        document = {**head, "ranks": ranks.world_size, "message_us": took, "rows": rows, "costs": planned}
        records.write(options.out, document)
    exit_process(0)


if __name__ == "__main__":
    sys.exit(main())
