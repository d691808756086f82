"""The one kind of error a user is meant to read."""


class TesseraError(Exception):
    """Something outside the program is not as it must be; the text says what was got, expected and what to do.

    The command line prints the text alone, without a traceback, and exits non-zero.
    """
