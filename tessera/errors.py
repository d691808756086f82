"""The one kind of error a user is meant to read."""


class TesseraError(Exception):
    """Something outside the program is not as it must be; the text says what was got, expected and what to do.

    The command line prints the text alone, without a traceback, and exits non-zero.
    """


def listed(faults: list[str], shown: int = 8) -> str:
    """Faults one below the other, the first few of many."""
    more = [f"and {len(faults) - shown} more"] if len(faults) > shown else []
    return "".join(f"\n  {fault}" for fault in faults[:shown] + more)
