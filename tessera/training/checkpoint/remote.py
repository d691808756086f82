"""A run whose folder is in a bucket: it works on a local copy, which is uploaded with each checkpoint.

The bucket is what counts. At the start the local copy is made equal to it: the files of the run and its newest whole
checkpoints are downloaded, and what the bucket does not have is removed. A checkpoint is uploaded file by file, and
training.json, without which it is not read, last. It is deleted in the opposite order.

One run at a time may use the folder: an object names the process that does, which renews it. The object of a process
that was killed is replaced: at once on the same machine, elsewhere when it was not renewed for LEASE seconds.
"""

import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera import files, storage
from tessera.errors import TesseraError
from tessera.files import PARTIAL
from tessera.power_ema import SNAPSHOTS, snapshot_step
from tessera.training.checkpoint.retention import expired
from tessera.training.checkpoint.state import TRAINER_STATE, checkpoint_path

LEASE = 60.0  # seconds without renewal after which a process counts as dead
IN_USE = "in-use.json"
CHECKPOINTS = "checkpoints"


class RemoteRun:
    """The folder of a run in a bucket, and its local copy."""

    def __init__(self, run_dir: str | Path) -> None:
        self.place = storage.locate(run_dir)  # stands for the address
        self.address = storage.address(self.place)
        self.local = local_folder(run_dir)
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of local files by name
        self._lost = threading.Event()

    # The local copy

    def pull(self, keep: int) -> None:
        """Make the local copy equal to the folder in the bucket. keep: how many checkpoints, the newest, are needed."""
        names = storage.listing(self.place)
        names = [name for name in names if name != IN_USE]
        whole = sorted((name.split("/")[1] for name in names if _is_marker(name)), reverse=True)
        parts = [name for name in names if name.startswith(f"{CHECKPOINTS}/") and name.split("/")[1] not in whole]
        storage.remove(f"{self.address}/{name}" for name in parts)  # of a process that was killed
        complete = [name for name in whole[:keep] if self._is_same(name)]
        for path in self.local.iterdir() if self.local.exists() else ():
            if path.name == CHECKPOINTS:
                for checkpoint in path.iterdir():
                    if checkpoint.name not in complete:
                        shutil.rmtree(checkpoint, ignore_errors=True)
            elif path.name != files.LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        missing = [name for name in names if not name.startswith((f"{CHECKPOINTS}/", f"{SNAPSHOTS}/"))]
        for checkpoint in whole[:keep]:
            if checkpoint not in complete:
                missing += [name for name in names if name.startswith(f"{CHECKPOINTS}/{checkpoint}/")]
        storage.copy_folder(self.place, self.local, missing)
        self._uploaded = {name: _state(self.local / name) for name in missing}

    def _is_same(self, checkpoint: str) -> bool:
        """Whether the local copy has a checkpoint: training.json has the checksums of its files."""
        name = f"{CHECKPOINTS}/{checkpoint}/{TRAINER_STATE}"
        with suppress(OSError):
            return (self.local / name).read_bytes() == storage.content(f"{self.address}/{name}")
        return False

    # The bucket

    def push(self) -> None:
        """Upload the files of the run that have changed, except checkpoints. Raises TesseraError."""
        self._check_lease()
        names = [
            path.relative_to(self.local).as_posix()
            for path in self.local.rglob("*")
            if path.is_file() and path.suffix != PARTIAL and path.name != files.LOCK
        ]
        states = {name: _state(self.local / name) for name in names if not name.startswith(f"{CHECKPOINTS}/")}
        changed = [name for name, state in states.items() if self._uploaded.get(name) != state]
        storage.upload_folder(self.local, self.address, changed)
        self._uploaded |= {name: states[name] for name in changed}

    def push_checkpoint(self, step: int) -> None:
        """Upload the files of the run, then a checkpoint, the file that makes it whole last. Raises TesseraError."""
        self.push()
        folder = checkpoint_path(self.local, step)
        url = f"{self.address}/{CHECKPOINTS}/{folder.name}"
        storage.remove([f"{url}/{TRAINER_STATE}"])  # of a damaged one
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        storage.upload_folder(folder, url, [name for name in names if name != TRAINER_STATE])
        self._check_lease()
        storage.upload(folder / TRAINER_STATE, f"{url}/{TRAINER_STATE}")

    def prune(self, keep_last: int, keep_every_n_steps: int | None, best_step: int | None) -> None:
        """As `retention.prune`, of the bucket."""
        checkpoints = self._checkpoints()
        self._delete(checkpoints, set(expired(list(checkpoints), keep_last, keep_every_n_steps, best_step)))

    def delete_after(self, step: int) -> None:
        """As `retention.delete_after`, of the bucket."""
        checkpoints = self._checkpoints()
        self._delete(checkpoints, {each for each in checkpoints if each > step})
        averages = [name for name in storage.listing(self.place / SNAPSHOTS) if (snapshot_step(name) or 0) > step]
        storage.remove(f"{self.address}/{SNAPSHOTS}/{name}" for name in averages)

    def _checkpoints(self) -> dict[int, list[str]]:
        """The names of the files of each checkpoint, whole or not, by step."""
        checkpoints: dict[int, list[str]] = {}
        for name in storage.listing(self.place / CHECKPOINTS):
            with suppress(ValueError):
                checkpoints.setdefault(int(name.split("/")[0].removeprefix("step-")), []).append(name)
        return checkpoints

    def _delete(self, checkpoints: dict[int, list[str]], steps: set[int]) -> None:
        self._check_lease()
        for step in sorted(steps):
            names = sorted(checkpoints[step], key=lambda name: not name.endswith(f"/{TRAINER_STATE}"))
            storage.remove(f"{self.address}/{CHECKPOINTS}/{name}" for name in names)

    # One run at a time

    @contextmanager
    def exclusive(self, log: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder for this process. Raises InUse if another process renews its hold."""
        owner = {"id": uuid.uuid4().hex, "machine": platform.node(), "process": os.getpid()}
        self._acquire(owner, log)
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(owner, done), daemon=True, name="tessera-lease")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if not self._lost.is_set():
                storage.remove([f"{self.address}/{IN_USE}"])

    def _acquire(self, owner: dict, log: Callable[[str], None]) -> None:
        url = f"{self.address}/{IN_USE}"
        content, previous, since, is_free = json.dumps(owner | {"renewals": 0}).encode(), None, 0.0, False
        while not (storage.create(url, content, overwrite=is_free) and self._owner() == owner["id"]):
            held = storage.content(url)
            if held is None:
                continue
            holder = json.loads(held)
            is_free = holder["machine"] == owner["machine"] and not _is_alive(holder["process"])
            if not is_free and previous is None:
                log(f"{self._holder(holder)}: waiting up to {LEASE:.0f} seconds to see whether it still runs")
                previous, since = held, time.monotonic()
            elif not is_free and held != previous:
                raise files.InUse(f"{self._holder(holder)}: wait for it, or choose another run_dir=")
            elif not is_free:
                is_free = time.monotonic() - since > LEASE
                time.sleep(0 if is_free else LEASE / 20)

    def _holder(self, holder: dict) -> str:
        return f"{self.address} is in use by process {holder['process']} on {holder['machine']}"

    def _owner(self) -> str | None:
        content = storage.content(f"{self.address}/{IN_USE}")
        return None if content is None else json.loads(content)["id"]

    def _renew(self, owner: dict, done: threading.Event) -> None:
        renewals = 0
        while not done.wait(LEASE / 4):
            with suppress(TesseraError):  # the server does not answer: the next checkpoint reports it
                if self._owner() != owner["id"]:
                    self._lost.set()
                    return
                renewals += 1
                content = json.dumps(owner | {"renewals": renewals}).encode()
                storage.create(f"{self.address}/{IN_USE}", content, overwrite=True)

    def _check_lease(self) -> None:
        if self._lost.is_set():
            raise TesseraError(
                f"{self.address} was taken over by another run, as this one was not heard of for a while"
            )


def local_folder(run_dir: str | Path) -> Path:
    """Where a run works: in its folder, or in a local copy of a remote one."""
    place = storage.locate(run_dir)
    if not storage.is_remote(place):
        return Path(run_dir)
    protocol, _, rest = storage.address(place).partition("://")
    return files.cache_folder().absolute() / "runs" / protocol / rest.lstrip("/")


def remote_run(run_dir: str | Path) -> RemoteRun | None:
    """The folder of a run in a bucket; None if it is local."""
    return RemoteRun(run_dir) if storage.is_remote(storage.locate(run_dir)) else None


def _is_marker(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == CHECKPOINTS and parts[2] == TRAINER_STATE


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one with our own number was another container's."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
