"""Logging for the command line: INFO of this package to stdout, warnings and errors to stderr."""

import logging
import os
import sys
from typing import Literal

Stream = Literal["stdout", "stderr"]


class ConsoleHandler(logging.Handler):
    """Print records to the current `sys.stdout` or `sys.stderr`."""

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream: Stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record), self._stream)


def configure_logging() -> None:
    """Print INFO messages of `dcvae_fast` to stdout, and warnings and errors of all packages to stderr.

    Warnings and errors are prefixed with their level. Further calls have no effect. A root logger that the caller has
    configured to print INFO prints these messages too.
    """
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


def print_line(line: str, name: Stream) -> None:
    """Print a line to the current `sys.stdout` or `sys.stderr` without breaking a progress bar.

    A stream that cannot be written is replaced by `os.devnull`: training must not stop because of a closed pipe, as in
    `dcvae train … | head`, or a full disk.
    """
    stream = getattr(sys, name)
    if stream is None:  # closed before Python started
        return
    encoding = stream.encoding or "utf-8"  # some encodings lack ×
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        if tqdm is None:
            print(line, file=stream)
        else:
            tqdm.write(line, file=stream)
        stream.flush()
    except OSError as error:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, stays open until exit
        if name == "stdout" and not isinstance(error, BrokenPipeError):
            print_line(f"WARNING: stdout cannot be written ({error.strerror}); its messages are lost", "stderr")
