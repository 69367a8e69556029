"""Errors that a user can fix: one clear sentence, which the command line prints without a traceback."""


class UserError(Exception):
    """A request that cannot be carried out; the message names the setting, file or argument."""


class ConfigError(UserError):
    """An invalid setting, or settings that contradict each other."""


class RunError(UserError):
    """A run folder that cannot be used: no checkpoint, another configuration, a full disk."""


class EvaluationError(UserError):
    """A measurement that is not possible: an unknown metric, too few images, missing weights."""


class DivergedError(UserError):
    """Raised when a loss or a weight is not finite."""


class RankError(UserError):
    """A failure of another process of the same run, which reports the reason itself."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
