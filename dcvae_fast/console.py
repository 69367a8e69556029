"""Messages of the command line, through `logging`: INFO of this package to stdout, warnings and errors to stderr."""

import logging
import os
import sys
from typing import Literal, TextIO


class ConsoleHandler(logging.Handler):
    """Print records to the current `sys.stdout` or `sys.stderr` without damaging a progress bar."""

    def __init__(self, stream: Literal["stdout", "stderr"]):
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _print(self.format(record), getattr(sys, self._stream))
        except BrokenPipeError:  # the reader has gone, as in `dcvae train … | head`, which must not stop training
            setattr(sys, self._stream, open(os.devnull, "w"))  # noqa: SIM115, it stays open until the end
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Print INFO of `dcvae_fast` to stdout as it is, and warnings and errors of all packages to stderr with their
    level in front. Calling it again changes nothing; logging that the caller has configured is kept."""
    package = logging.getLogger("dcvae_fast")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not any(isinstance(handler, ConsoleHandler) for handler in package.handlers):
        messages = ConsoleHandler("stdout")
        messages.addFilter(lambda record: record.levelno < logging.WARNING)
        package.addHandler(messages)
    warnings = ConsoleHandler("stderr")
    warnings.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[warnings])


def _print(line: str, stream: TextIO) -> None:
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None:
        print(line, file=stream)
    else:
        tqdm.write(line, file=stream)
    stream.flush()
