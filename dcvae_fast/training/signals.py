"""SIGINT and SIGTERM end training after a checkpoint."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# A signal repeated within this time is the same one: launchers and schedulers may both pass it on.
SAME_SIGNAL_SECONDS = 5


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in the yielded list instead of ending the process; a later second one ends it."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    first: dict[int, float] = {}

    def note(number: int, frame: object) -> None:
        if number in first:
            if time.monotonic() - first[number] > SAME_SIGNAL_SECONDS:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            return
        first[number] = time.monotonic()
        received.append(number)
        logger.info("\n%s: saving a checkpoint, then stopping", signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
