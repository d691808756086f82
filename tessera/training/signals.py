"""Ctrl-C and SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which the number of each Ctrl-C or SIGTERM is appended. A second Ctrl-C raises KeyboardInterrupt."""
    received: list[int] = []

    def append(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:  # a cluster and torchrun may both send SIGTERM
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, append) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
