"""On SIGINT and SIGTERM, training saves a checkpoint and stops."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# A signal repeated within this time counts once, because launchers and schedulers can both forward it.
SAME_SIGNAL_SECONDS = 5


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context manager that records SIGINT and SIGTERM in the yielded list. A later second signal ends the process."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    received_at: dict[int, float] = {}

    def handle(number: int, frame: object) -> None:
        if number in received_at:
            if time.monotonic() - received_at[number] > SAME_SIGNAL_SECONDS:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            return
        received_at[number] = time.monotonic()
        received.append(number)
        logger.info("\n%s: saving a checkpoint, then stopping", signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
