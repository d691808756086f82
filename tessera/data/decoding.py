"""Processes that decode the images of a batch.

Most of the time to decode a small image is Python code, which threads cannot run at the same time. The processes are
started as commands, not forked and not by `multiprocessing`: they share no locks with the threads of this process, need
no `if __name__ == "__main__"` in a script, and end when this process does, because their input ends.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from tessera.data.images import ImagesConfig, InvalidSample, load_image
from tessera.errors import TesseraError

COMMAND = "from tessera.data.decoding import serve; serve()"


class DecodingProcesses:
    """Decode images in processes, one batch in each. Several threads may call `decode` at the same time."""

    def __init__(self, config: ImagesConfig, count: int) -> None:
        """count: of processes, each with about 0.2 GB of memory, which take about two seconds to start."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which ends the others
            )
            for _ in range(count)
        ]
        self._free: SimpleQueue[Any] = SimpleQueue()
        for process in self._processes:
            pickle.dump(config, process.stdin)  # pyright: ignore[reportArgumentType]
            self._free.put(process)

    def decode(self, files: Sequence[Path | bytes], size: tuple[int, ...] | None) -> tuple[list[int], np.ndarray]:
        """`load_image` of files, by path or content: the places of the valid ones, and their pixels [K, C, H, W].

        Raises TesseraError if a process ended.
        """
        process = self._free.get()
        try:
            pickle.dump((files, size), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            raise TesseraError(
                "a process that decodes images ended, probably for lack of memory: set training.decode_processes to "
                f"fewer than {len(self._processes)}, or to 0"
            ) from None
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()  # closes the pipes


def serve() -> None:
    """Decode what the standard input requests, until it ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not a reply
    config = pickle.load(requests)
    while True:
        try:
            files, size = pickle.load(requests)
        except EOFError:
            return
        valid, images = [], []
        for place, file in enumerate(files):
            with suppress(InvalidSample):
                images.append(load_image(file, config, size))
                valid.append(place)
        pickle.dump((valid, np.stack(images) if images else np.empty(0)), replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()
