"""Console output: messages through `logging`, and progress on a terminal or in a file."""

import io
import logging
import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from dcvae_fast import progress
from dcvae_fast.console import configure_logging
from dcvae_fast.progress import progress_bar, progress_bars

LOGGER = logging.getLogger("dcvae_fast.training.log")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def configured() -> None:
    configure_logging()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock; the entry is the time in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_messages_are_printed_once_and_other_packages_stay_quiet(capsys):
    for _ in range(2):
        configure_logging()
    LOGGER.info("16 images")
    logging.getLogger("elsewhere").info("nothing")
    assert capsys.readouterr().out == "16 images\n"


def test_configure_logging_keeps_the_level_of_other_ranks(monkeypatch):
    package = logging.getLogger("dcvae_fast")
    monkeypatch.setattr(package, "level", logging.WARNING)
    configure_logging()
    assert package.level == logging.WARNING


@pytest.mark.multiprocess
@pytest.mark.parametrize("bars", ["", "import tqdm"])
def test_warnings_go_to_stderr_with_their_level(bars):
    code = f"""
{bars}
import logging
from dcvae_fast.console import configure_logging
configure_logging()
logging.getLogger("dcvae_fast.training.log").info("16 images")
logging.getLogger("dcvae_fast.run").warning("a checkpoint is damaged")
logging.getLogger("dcvae_pipelines.loader").warning("left out: %s", "1.png")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "16 images\n"
    assert result.stderr == "WARNING: a checkpoint is damaged\nWARNING: left out: 1.png\n"


def test_a_line_every_tenth_with_the_remaining_time(now, capsys):
    with progress_bars() as report:
        for done in range(1, 101):
            now[0] += 2
            report("images", done, 100)
        report("images", 30, 30)  # another task with the same description
        report("samples", 3, 4)
        report("pixels", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 / 100 images, 0 s" and lines[5] == "50 / 100 images, 98 s, 100 s left"
    assert lines[10:] == ["100 / 100 images, 198 s", "30 / 30 images, 0 s", "3 / 4 samples, 0 s", "1 / 2 pixels, 0 s"]


def test_lines_can_be_disabled(capsys):
    with progress_bar("images", 10, lines=False) as update:
        update(10)
    assert capsys.readouterr().err == ""


def test_a_bar_starts_at_its_initial_count_and_survives_messages_and_an_interrupt():
    configure_logging()
    terminal = Terminal()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        with pytest.raises(KeyboardInterrupt), progress_bar("images", 100, initial=40) as update:
            update(20)
            LOGGER.info("loss 0.1")
            raise KeyboardInterrupt
        print("interrupted")
    parts = terminal.getvalue().replace("\n", "\r").split("\r")
    shown = [part.strip() for part in parts if part.strip()]
    assert shown[0].startswith("images:  40%") and shown[-2].startswith("images:  60%")
    assert "loss 0.1" in shown and shown[-1] == "interrupted"


@pytest.mark.multiprocess
def test_a_bar_is_shown_on_a_terminal_of_unknown_size():
    code = """
from dcvae_fast.console import configure_logging
from dcvae_fast.progress import progress_bar
configure_logging()
with progress_bar("images", 10) as update:
    update(10)
"""
    terminal, stderr = pty.openpty()  # its size is 0 rows and columns
    subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True)
    os.close(stderr)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "images: 100%" in shown and "10/10" in shown


def test_characters_that_a_stream_cannot_print_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(stream):
        LOGGER.info("Growing to 8×8")
    assert stream.buffer.getvalue() == rb"Growing to 8\xd78" + b"\n"


@pytest.mark.parametrize("streams", ["1>&-", "2>&-", "1>/dev/full", "2>/dev/full"])
@pytest.mark.multiprocess
def test_streams_that_cannot_be_written_do_not_stop_training(streams, tmp_path):
    code = f"""
import logging, pathlib
from dcvae_fast.console import configure_logging
from dcvae_fast.progress import progress_bar
configure_logging()
with progress_bar("images", 100) as update:
    for i in range(100):
        update(1)
        logging.getLogger("dcvae_fast.training.log").info("image %s", i)
pathlib.Path({str(tmp_path / "done")!r}).touch()
"""
    command = ["bash", "-c", f'"$0" -c "$1" {streams}', sys.executable, code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "done").exists() and "Traceback" not in result.stderr
    if streams.startswith("2"):
        assert "image 99" in result.stdout
    else:
        assert "100 / 100 images" in result.stderr
    lost = "WARNING: stdout cannot be written (No space left on device); its messages are lost"
    assert result.stderr.count("WARNING") == result.stderr.count(lost) == (1 if streams == "1>/dev/full" else 0)
