"""Progress on stderr: a tqdm bar on a terminal; in a file or pipe, a line after every tenth of the work.

Nothing is shown if INFO messages of the package are disabled, as they are by default and on ranks > 0.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dcvae_fast.console import print_line

logger = logging.getLogger(__name__)


@contextmanager
def progress_bar(
    description: str, total: int, initial: int = 0, lines: bool = True
) -> Iterator[Callable[[int], object]]:
    """Context manager that shows the progress of a task and the remaining time.

    Messages can be logged inside the context: the handlers of `console.py` do not break the bar.

    Args:
        description: name of the counted items, such as "images".
        total: count at the end.
        initial: count at the start; the remaining time is estimated from the items after it.
        lines: whether to print lines if stderr is not a terminal.

    Yields:
        A function to call with the number of items done since the last call.
    """
    if sys.stderr is None or not logger.isEnabledFor(logging.INFO):
        yield lambda count: None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=description, total=total, initial=initial, unit="", file=sys.stderr, **_size()) as bar:
            yield bar.update
        return

    done, tenth, start = initial, -1, time.perf_counter()

    def update(count: int) -> None:
        nonlocal done, tenth
        done += count
        if not lines or 10 * done // total == tenth:
            return
        tenth, seconds = 10 * done // total, time.perf_counter() - start
        line = f"{done:,} / {total:,} {description}, {seconds:.0f} s"
        if initial < done < total:
            line += f", {seconds * (total - done) / (done - initial):.0f} s left"
        print_line(line, "stderr")

    yield update


def _size() -> dict[str, Any]:
    """Return tqdm's options for the size of the terminal; some terminals report a size of 0."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        size = (0, 0)
    return {"dynamic_ncols": True} if min(size) > 0 else {"ncols": 80, "nrows": 24}


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Context manager that shows the progress of several tasks, one after the other.

    Yields:
        A function `report(description, done, total)`, the callback of `evaluate`. A new description or a smaller `done`
        starts a new bar.
    """
    with ExitStack() as bar:
        current: str | None = None
        count, update = 0, lambda count: None

        def report(description: str, done: int, total: int) -> None:
            nonlocal current, count, update
            if description != current or done < count:
                bar.close()
                update = bar.enter_context(progress_bar(description, total, initial=done))
                current, count = description, done
            update(done - count)
            count = done
            if done >= total:
                bar.close()
                current = None

        yield report
