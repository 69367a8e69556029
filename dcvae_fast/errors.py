"""Errors that a user can mend: one clear sentence, which the command line prints without a traceback."""


class UserError(Exception):
    """Something the user asked for cannot be done as asked; the message names the setting, file or argument."""


class ConfigError(UserError):
    """A setting has no meaning, or contradicts another one."""


class RunError(UserError):
    """A run folder cannot be used as asked: no checkpoint, another configuration, a full disk."""


class EvaluationError(UserError):
    """A measurement cannot be made as asked: a metric that is none, too few images, weights that are missing."""


class DivergedError(UserError):
    """A loss or a weight is no longer a finite number."""


class RankError(UserError):
    """Another process of the same run has failed; it says why itself."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
