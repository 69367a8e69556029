"""The `dcvae` command: dispatch and error reporting.

A mistake by the user results in one sentence and exit code 1, not a traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from dcvae_fast.commands import evaluate, export, latent, prepare, reproduce, train
from dcvae_fast.console import configure_logging, print_line
from dcvae_fast.errors import RankError, UserError, reason

COMMANDS = (train, prepare, latent, evaluate, reproduce, export)

# Parts of the messages of collectives when another rank has ended.
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 128 + the signal if a signal stopped it.

    Training with several processes or with DeepSpeed ends this process instead of returning.
    """
    configure_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["train"]:
        return _run(argv)
    try:
        code = _run(argv)
    except Exception:
        from dcvae_fast.distributed import is_distributed

        if not is_distributed():
            raise
        traceback.print_exc()
        code = 1
    if "torch" in sys.modules:  # without torch, no process group can exist
        from dcvae_fast.distributed import exit_process

        exit_process(code)
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = _parse(argv)
        return arguments.run_command(arguments)
    except RankError:  # the rank that failed reports it
        return 1
    except KeyboardInterrupt:
        print_line("\ninterrupted", "stderr")
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
    print_line(f"dcvae: error: {message}", "stderr")
    return 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dcvae", description="Train and use DC-VAE models.")
    parser.set_defaults(takes_settings=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_commands(commands)
    arguments, arguments.settings = parser.parse_known_args(argv)
    if arguments.settings and not arguments.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(arguments.settings)}")
    return arguments


def _message(error: Exception) -> str | None:
    """Return the sentence that reports an error to the user, or None for an error that needs a traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # for example a full disk or a read-only folder
        return None if error.errno is None else f"{error.filename or 'writing'}: {os.strerror(error.errno)}"
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).split(".")[0]
        extra = "eval" if package in ("torch_fidelity", "matplotlib", "scipy") else "train"
        return f"{package} is not installed: pip install 'dcvae_fast[{extra}]'"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower()):
        return f"out of memory ({reason(error)}); reduce the batch, the width of the networks or the number of images"
    if isinstance(error, RuntimeError) and any(part in str(error) for part in LOST_RANK):
        return "another rank has ended; see the output of that rank"
    from dcvae_pipelines import DataError

    return str(error) if isinstance(error, DataError) else None


if __name__ == "__main__":
    sys.exit(main())
