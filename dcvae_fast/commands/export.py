"""`dcvae export` and `dcvae import-official`: save models as safetensors."""

import argparse
from pathlib import Path

from dcvae_fast.commands.common import add_model, add_out, load_model
from dcvae_fast.errors import RunError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add export and import-official to argparse's subparsers."""
    text = "Save a run's model as a folder with safetensors weights, config.json and a model card."
    parser = commands.add_parser("export", help=text, description=text)
    add_model(parser)
    add_out(parser, "exported", kind="folder")
    parser.set_defaults(run_command=run_export)

    text = "Convert a checkpoint of the authors' code to a saved model."
    parser = commands.add_parser("import-official", help=text, description=text)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with {epoch}_encoder.sd etc.")
    parser.add_argument("--epoch", type=int, required=True, help="epoch number in the file names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.set_defaults(run_command=run_import)


def run_export(arguments: argparse.Namespace) -> int:
    _check_empty(arguments.out)
    load_model(arguments).save_pretrained(arguments.out)
    print(arguments.out)
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from dcvae_fast.models.official import load_official

    _check_empty(arguments.out)
    load_official(arguments.folder, arguments.epoch).model.save_pretrained(arguments.out)
    print(arguments.out)
    return 0


def _check_empty(folder: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        RunError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"--out {folder} exists and is not empty; choose another folder.")
