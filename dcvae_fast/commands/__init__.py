"""The commands of `dcvae`, a module for each group.

`add_commands` of a module adds their parsers, each with the function that runs the command as `run_command`. Modules
that import torch are imported inside these functions, so that `--help` answers at once.
"""
