"""Errors that are meant for the user."""


class TesseraError(Exception):
    """Invalid input or environment. The message states the value, what was expected, and the remedy.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class Interrupted(TesseraError):
    """The user stopped the command. Its work so far is saved."""

    exit_code = 130  # as a shell reports Ctrl-C


class PartlyFailed(TesseraError):
    """The command did all its work, and parts of it failed. A repetition does not help."""

    exit_code = 3


def bullet_list(items: list[str], limit: int = 8) -> str:
    """The first items, one per indented line, and the number of the others."""
    rest = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "".join(f"\n  {item}" for item in items[:limit] + rest)
