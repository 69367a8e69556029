import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcvae_fast.cli import main
from dcvae_fast.training.profile import busy_seconds

TINY = ["--recipe", str(Path(__file__).parents[1] / "tiny.yaml")]


@pytest.mark.usefixtures("quick_ends")
def test_trace_and_table_of_two_autoencoder_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With an update in every second iteration, the profiler waits for 10 iterations and profiles 4."""
    assert main(["train", *TINY, "--run", str(tmp_path), "--train.images", "120", "--profile"]) == 0
    table = (tmp_path / "profile" / "top20.txt").read_text()
    assert table.startswith("4 iterations, 32 images, ") and table in capsys.readouterr().out
    rows = [line for line in table.splitlines() if "us " in line or "ms " in line]
    assert len(rows) == 20
    assert any("convolution" in row for row in rows)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("Optimizer.step#Adam")]
    # Each iteration has one optimizer step for the discriminator, every second one two more for the autoencoder.
    assert len(steps) == 4 + 2 * 2
    assert (tmp_path / "checkpoints" / "000000000120.pt").exists()


@pytest.mark.usefixtures("quick_ends")
def test_a_run_too_short_to_profile_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *TINY, "--run", str(tmp_path), "--train.images", "16", "--profile"]) == 0
    assert "Nothing was profiled: profiling needs 14 iterations." in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_busy_seconds_are_the_union_of_gpu_events():
    def event(start: float, end: float, device: Any = torch.autograd.DeviceType.CUDA, annotation: bool = False) -> Any:
        return SimpleNamespace(
            device_type=device, is_user_annotation=annotation, time_range=SimpleNamespace(start=start, end=end)
        )

    on_cpu = event(0, 1000, torch.autograd.DeviceType.CPU)
    events = [event(10, 20), event(15, 30), event(16, 18), event(40, 41), on_cpu, event(0, 99, annotation=True)]
    assert busy_seconds(SimpleNamespace(events=lambda: events)) == pytest.approx(21e-6)  # type: ignore[arg-type]
