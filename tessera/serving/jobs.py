"""Jobs: the state of every request, in memory while it is active, and in the output folder.

A job has a folder of its own: `job.json`, the images it begins from, and its results. `job.json` is written when the
job is submitted and when it ends. So after a crash finished jobs are complete, and the others are known to be
unfinished. All methods but those of `JobFolder` run in the event loop's thread.
"""

import asyncio
import logging
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_write
from tessera.settings import Settings

logger = logging.getLogger(__name__)
State = Literal["submitted", "running", "finished", "cancelled", "failed"]
ACTIVE: tuple[State, ...] = ("submitted", "running")
ID = re.compile(r"job_[a-z0-9]{1,8}_[0-9a-f]{24}")  # the replica, and a random number
UNFINISHED = "the server stopped before this job was finished: send it again"


class JobRecord(Settings):
    """job.json."""

    id: str
    object: Literal["job"] = "job"
    state: State
    model: str
    client: str = Field(description="the name of the API key, or the address")
    created: float = Field(description="seconds since 1970, as all times")
    started: float | None = None
    ended: float | None = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="as requested, without images")
    seeds: list[int] = []
    num_images: int = 0
    num_steps: int = 0
    steps: list[int] = Field(default=[], description="steps done, of each image")
    results: list[str | None] = Field(default=[], description="the file of each image that is finished")
    settings: list[dict[str, Any]] = Field(default=[], description="complete settings of each image that is finished")
    inputs: list[str] = Field(default=[], description="files of the images that the job begins from")
    error: str | None = None
    user: str | None = None


class JobFolder:
    """The files of jobs. Its methods wait for the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TesseraError(f"cannot write {self.folder}: {error.strerror or error}") from None

    def path(self, job: str, name: str = "job.json") -> Path:
        """The path of a file of a job. Raises ValueError for names that are not those of jobs and their files."""
        if not ID.fullmatch(job) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{job}/{name} is not the file of a job")
        return self.folder / job / name

    def write(self, record: JobRecord) -> None:
        atomic_write(self.path(record.id), record.model_dump_json(indent=1))

    def write_file(self, job: str, name: str, content: bytes) -> None:
        atomic_write(self.path(job, name), content)

    def read(self, job: str) -> JobRecord | None:
        """The record of a job; None if there is none that can be read."""
        try:
            return JobRecord.model_validate_json(self.path(job).read_bytes())
        except (OSError, ValueError, ValidationError):
            return None

    def ids(self) -> list[str]:
        """Newest first, by the time of the folder's creation in its record or file time."""
        paths = [path for path in self.folder.glob("job_*/job.json") if ID.fullmatch(path.parent.name)]
        return [path.parent.name for path in sorted(paths, key=lambda path: path.stat().st_ctime_ns, reverse=True)]

    def remove(self, job: str) -> None:
        shutil.rmtree(self.path(job).parent, ignore_errors=True)

    def close_unfinished(self, replica: str) -> int:
        """Mark the jobs of an earlier process with this name that it did not finish. Returns how many."""
        count = 0
        for path in self.folder.glob(f"job_{replica}_*"):
            for partial in path.glob("*" + PARTIAL):
                partial.unlink(missing_ok=True)
            record = self.read(path.name)
            if record is not None and record.state in ACTIVE:
                self.write(record.model_copy(update={"state": "failed", "error": UNFINISHED, "ended": time.time()}))
                count += 1
        return count


@dataclass(eq=False)
class Job:
    """An active job, or one that ended a short time ago."""

    id: str
    client: str
    model: str
    parameters: dict[str, Any]
    seeds: list[int]
    cost: float
    created: float = field(default_factory=time.time)
    state: State = "submitted"
    started: float | None = None
    ended: float | None = None
    num_steps: int = 0
    error: str | None = None
    user: str | None = None
    steps: list[int] = field(default_factory=list)
    results: list[str | None] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    previews: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # the newest of each image, with its step
    contents: dict[int, bytes] = field(default_factory=dict)  # results, for the response that waits for them
    holds_contents: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.steps = [0] * len(self.seeds)
        self.results, self.settings = [None] * len(self.seeds), [{} for _ in self.seeds]

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def record(self) -> JobRecord:
        names = JobRecord.model_fields.keys() - {"object", "num_images"}
        return JobRecord(num_images=len(self.seeds), **{name: getattr(self, name) for name in names})

    def notify(self) -> None:
        """Wake those who wait for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        await self._changed.wait()

    async def ended_event(self) -> None:
        while self.active:
            await self.changed()

    async def changes(self) -> AsyncIterator[None]:
        """Once now and after every change; the last time, the job has ended. Changes in quick succession are one."""
        while True:
            changed, active = self._changed, self.active
            yield
            if not active:  # it may have ended while the caller was busy, which then sees that first
                return
            await changed.wait()


class JobStore:
    """All jobs: active ones, some that ended, and those in the folder."""

    REMEMBERED = 200  # ended jobs in memory

    def __init__(self, folder: JobFolder, replica: str = "0") -> None:
        self.folder, self.replica = folder, replica
        self.jobs: dict[str, Job] = {}
        self.listeners: set[Callable[[Job], None]] = set()  # are called with new jobs
        self._ended: list[str] = []

    def new_id(self) -> str:
        return f"job_{self.replica}_{secrets.token_hex(12)}"

    def add(self, job: Job) -> None:
        self.jobs[job.id] = job
        for listener in list(self.listeners):
            listener(job)

    def active(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.active]

    def end(self, job: Job, state: State, error: str | None = None) -> None:
        """The last change of a job. Does nothing if it has ended."""
        if not job.active:
            return
        job.state, job.error, job.ended = state, error, time.time()
        job.previews.clear()
        self._ended.append(job.id)
        while len(self._ended) > self.REMEMBERED:
            self.jobs.pop(self._ended.pop(0), None)
        job.notify()

    def forget(self, job: str) -> None:
        self.jobs.pop(job, None)
        if job in self._ended:
            self._ended.remove(job)
