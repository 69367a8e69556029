"""The commands of `dcvae`, one module per group.

`add_commands` of each module adds the parsers and sets `run_command`, the function that runs the command. These
functions import torch themselves, so that `--help` does not wait for it.
"""
