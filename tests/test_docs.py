"""Links lead somewhere, Python snippets run, and commands parse, in all Markdown files."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dcvae_fast import DCVAE, cli
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, ModelConfig, to_dict
from dcvae_fast.evaluation import METRICS
from dcvae_fast.renamed import SETTINGS
from dcvae_fast.reproduce import FIGURES, TABLES
from dcvae_kernels import InfoNCE
from dcvae_pipelines.prepare import KINDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels/README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def blocks(language: str) -> list[Any]:
    """Code blocks of a language, with page and line as their ids."""
    cases = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text[: match.start()].count("\n") + 1
                cases.append(pytest.param(match[2], id=f"{name(page)}:{line}"))
    return cases


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """The variables that snippets use without defining them, in an empty working folder with a saved model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DCVAE(ModelConfig(image_channels=1, latent_dim=4, decoder_width=8, encoder_width=8)).eval()
    model.save_pretrained("runs/digits")

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(shape), dim=-1).requires_grad_()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "torch": torch, "F": F, "nn": nn, "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "InfoNCE": InfoNCE, "model": model, "images": torch.rand(4, 1, 32, 32) * 2 - 1, "texts": torch.rand(4, 8),
        "q": unit(4, 128), "k": unit(4, 128).detach(), "queue": unit(64, 128).detach(), "pointer": 0,
        "ids": torch.arange(4), "a": unit(4, 16), "b": unit(4, 16), "logit_scale": torch.tensor(1 / 0.07).log(),
        "image_features": unit(4, 16), "text_features": unit(4, 16),
        "image_encoder": nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 16)), "text_encoder": nn.Linear(8, 16),
        "discriminator": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 1)),
    }  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.parametrize("code", blocks("python"))
def test_snippets_run(code, namespace):
    exec(compile(code, "snippet", "exec"), namespace)
    if "# before" in code and "queue = KeyQueue" not in code:  # both compute the same loss
        before, after = code.split("# after")
        losses = []
        for part in (before, after):
            exec(compile("#" + part, "snippet", "exec"), namespace)
            losses.append(namespace["loss"].detach())
        torch.testing.assert_close(*losses, atol=2e-5, rtol=0)


def commands(text: str) -> list[str]:
    """Return the lines of a block that run train.py or dcvae, with continuation lines joined."""
    joined = text.replace("\\\n", " ")
    return [
        line for line in joined.splitlines() if re.search(r"(^|-- |deepspeed.* )(python )?(train\.py|dcvae) ", line)
    ]


@pytest.mark.parametrize("text", blocks(""))
def test_commands_parse(text):
    for line in commands(text):
        words = shlex.split(line.replace("…", ""), comments=True)
        start = next(i for i, word in enumerate(words) if word in ("train.py", "dcvae"))
        arguments = words[start + 1 :]
        if words[start] == "dcvae" and arguments[0] != "train":
            parsed = cli._parse(arguments)
            assert getattr(parsed, "table", None) in (None, *TABLES, *FIGURES)
            if "metrics" in parsed:
                assert set(parsed.metrics.split(",")) <= set(METRICS)
            if "skip" in parsed:
                assert set(parsed.skip.split(",")) <= set(KINDS)
            parse_config(["--recipe", "cifar10", *parsed.settings])
            continue
        arguments = arguments[1:] if words[start] == "dcvae" else arguments
        if ">" in arguments:  # prints settings into a file, and a later line uses the file
            arguments = arguments[: arguments.index(">")]
        if "my.yaml" in arguments:
            arguments[arguments.index("my.yaml")] = "cifar10"
        if "--print_config" in arguments:
            arguments.remove("--print_config")
        parse_config(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_and_make_targets_exist(page):
    text, settings = page.read_text(encoding="utf-8"), to_dict(Config())
    sections = "|".join(settings)
    for section, option in re.findall(rf"`(?:--)?({sections})\.(\w+)(?: [^`]+)?`", text):
        is_file = option in ("md", "png", "py", "yaml")
        assert option in settings[section] or f"{section}.{option}" in SETTINGS or is_file, f"{section}.{option}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`\n?make ([\w-]+)", text)) <= set(targets)


def test_the_overview_is_drawn(namespace, monkeypatch):
    monkeypatch.setattr("sys.argv", ["overview.py", "runs/digits", "--columns", "4", "--out", "out.png"])
    runpy.run_path(str(ROOT / "examples/overview.py"), run_name="__main__")
    with Image.open("out.png") as image:
        width, height = image.size
    assert height > width > 4 * 32  # five rows of four images of 32×32


def test_documentation_quotes_committed_results():
    readme, ops, training = (
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "kernels/README.md", "docs/training.md")
    )

    def median(folder: str, row: str, peer: str, timing: str) -> float:
        rows = json.loads((ROOT / f"bench/results/{folder}.json").read_text(encoding="utf-8"))["rows"]
        (cells,) = (entry["cells"] for entry in rows if entry["name"] == row)
        return [cell for cell in cells if cell["peer"] == peer][-1][timing]["median_us"]

    ours, baseline = (median("nvidia-h100-80gb-hbm3/step", "cifar10-64", peer, "wall") for peer in ("ours", "baseline"))
    assert f"{64e6 / ours:,.0f}, {baseline / ours:.3g} times the plain PyTorch baseline" in readme
    hours = 40e6 / (64e6 / ours) / 3600
    assert f"take {hours:.1f} hours" in readme and f"\n{hours:.1f} hours for 40 M images" in training
    fused, other = (median("nvidia-h200/info_nce", "dcvae", peer, "graph") for peer in ("ours", "torch.compile"))
    assert f"take {fused:.0f} µs on an H200" in readme and f"torch.compile, takes {other:.0f} µs" in readme
    assert f"takes {fused:.1f} µs, forward and backward: {other / fused:.1f} times faster" in ops
