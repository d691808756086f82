"""The service behind the HTTP interface: jobs from acceptance to result.

It runs in the event loop's thread, beside the engine and one thread that encodes images and writes files.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tessera import __version__
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.generation import SampleRequest, image_size, sampling_config
from tessera.generation.image_settings import row_settings, trained_fps
from tessera.generation.request import ROUTED
from tessera.serving.admission import Admission, Limits, Place
from tessera.serving.encoding import encode, preview_format
from tessera.serving.engine import (
    CallReport,
    Engine,
    Event,
    Failed,
    LoadedModel,
    Progress,
    RowFinished,
    Started,
    Work,
)
from tessera.serving.errors import ApiError, retry_later
from tessera.serving.jobs import Job, JobFolder, JobRecord, JobStore, State
from tessera.serving.metrics import Metrics
from tessera.serving.models import ModelEntry, ModelPool
from tessera.serving.parameters import GenerationParameters, JobParameters, ResolvedJob, command_options, resolve_job
from tessera.serving.scheduler import RowScheduler
from tessera.settings import unknown_name

logger = logging.getLogger(__name__)
STOPPED = "the server stopped before this job was finished: send it again"


@dataclass(frozen=True)
class ServiceOptions:
    """seconds_per_call, max_rows: see `RowScheduler`; rows_per_call: see `RowDenoiser`; replica: part of jobs' ids;
    private: whether clients see their own jobs only."""

    out: Path = Path("served")
    limits: Limits = field(default_factory=Limits)
    max_loaded: int = 2
    seconds_per_call: float = 0.5
    max_rows: int = 64
    rows_per_call: int | None = None
    replica: str = "0"
    private: bool = False


@dataclass(eq=False)
class _Running:
    """What the service keeps of an active job beside its state."""

    request: SampleRequest
    parameters: JobParameters
    models: list[LoadedModel]
    guide: LoadedModel | None  # the guidance model
    place: Place
    options: dict[str, Any]  # of the command line
    keeps_contents: bool


class Service:
    def __init__(self, models: list[ModelEntry], options: ServiceOptions | None = None) -> None:
        self.options = options or ServiceOptions()
        self.metrics = Metrics()
        self.folder = JobFolder(self.options.out)
        self.store = JobStore(self.folder, self.options.replica)
        self.pool = ModelPool(models, self.options.max_loaded, self._loaded)
        self.admission = Admission(self.options.limits)
        scheduler = RowScheduler(self.options.seconds_per_call, self.options.max_rows)
        self.engine = Engine(scheduler, self._report, self.options.rows_per_call)
        self.files = ThreadPoolExecutor(1, "files")
        self.ready, self.draining = False, False
        self.startup_error: TesseraError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # Start and end

    async def start(self) -> None:
        """Start the engine and load models. Raises TesseraError."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        unfinished = await self._in_files(self.folder.close_unfinished, self.options.replica)
        if unfinished:
            logger.warning("jobs of an earlier process were not finished", extra={"jobs": unfinished})
        try:
            for name in list(self.pool.entries)[: self.options.max_loaded]:
                await self._warm_up(name)
        except TesseraError as error:
            self.startup_error = error
            raise
        self.ready = True
        self.metrics.ready.set(1)
        logger.info("ready", extra={"models": list(self.pool.entries)})

    async def _warm_up(self, name: str) -> None:
        """Generate an image in two steps: whatever is prepared at the first use is ready afterwards."""
        (loaded,) = await self.pool.acquire(name)
        job = self.store.new_id()
        done = asyncio.Event()
        job_state = Job(job, "warm-up", name, {}, [0], 0.0)
        self.store.add(job_state)
        try:
            request = warm_up_request(loaded)
            await asyncio.wrap_future(self.engine.submit(lambda: Work(job, "warm-up", loaded, request)))
            async for _ in job_state.changes():
                pass
            if job_state.state == "failed":
                raise TesseraError(f"model {name} generates no image: {job_state.error}")
        finally:
            done.set()
            self.store.forget(job)
            self.pool.release(name)

    async def drain(self, seconds: float) -> int:
        """Accept no more work, and wait until all is done or the time is over. Jobs that are left fail."""
        self.draining = True
        self.metrics.ready.set(0)
        waiting = [asyncio.ensure_future(job.ended_event()) for job in self.store.active()]
        if waiting:
            logger.info("draining", extra={"jobs": len(waiting), "seconds": seconds})
            _, pending = await asyncio.wait(waiting, timeout=seconds)
            for task in pending:
                task.cancel()
        left = self.store.active()
        await asyncio.gather(*(self._stop(job, "failed", STOPPED) for job in left))
        return len(left)

    async def close(self) -> None:
        """End the threads. Jobs that are active fail."""
        await self.drain(0)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.files.shutdown)

    # Jobs

    def check_open(self) -> None:
        """Raise ApiError 503 unless work is accepted."""
        if self.draining:
            raise retry_later(503, "the server is shutting down", "draining", 5)
        if not self.ready:
            raise retry_later(503, "the model is loading", "loading", 2)

    def model_entry(self, name: str | None) -> ModelEntry:
        """A model by name; None: the first. Raises ApiError 404."""
        name = self.pool.default if name is None else name
        if not self.pool.entries:
            raise ApiError(404, "this server has no model yet", "model_not_found", "model")
        if name not in self.pool.entries:
            message = unknown_name("model", name[:100], self.pool.entries)
            raise ApiError(404, message, "model_not_found", "model")
        return self.pool.entries[name]

    async def submit(
        self,
        client: str,
        place: Place,
        source: JobParameters | GenerationParameters,
        images: dict[str, str] | None = None,
        previews: Callable[[int], set[int]] | None = None,
        keep_contents: bool = False,
    ) -> Job:
        """Accept a job, which takes the place. images: fields of the parameters, as base64.

        previews: the steps of the previews by the number of steps; default: by preview_every. keep_contents: in memory,
        for a response that waits for them. Raises ApiError and TesseraError for what cannot be accepted.
        """
        names = [self.model_entry(source.model).name]
        guide = source.guidance_model if isinstance(source, JobParameters) else None
        if guide is not None and guide != ROUTED:
            names.append(self.model_entry(guide).name)
        models = await self.pool.acquire(*names)
        try:
            running, resolved = await self._prepare(source, images or {}, models, place, keep_contents)
            job = await self._enter(client, running, resolved, previews)
            job.user = source.user if isinstance(source, GenerationParameters) else None
            return job
        except BaseException:
            for model in models:
                self.pool.release(model.name)
            raise

    async def _prepare(
        self,
        source: JobParameters | GenerationParameters,
        images: dict[str, str],
        models: list[LoadedModel],
        place: Place,
        keep_contents: bool,
    ) -> tuple[_Running, ResolvedJob]:
        model = models[0].model
        parameters = source if isinstance(source, JobParameters) else source.job(model)
        parameters = parameters.model_copy(update=images).complete(self.pool.default)
        self.admission.add_cost(place, job_cost(parameters, models[0]))
        guide = models[0].routed if parameters.guidance_model == ROUTED else models[1] if len(models) > 1 else None
        weak = None if guide is None else guide.model
        resolved = await asyncio.to_thread(resolve_job, parameters, model, weak, self.options.limits.max_pixels)
        return _Running(resolved.request, parameters, models, guide, place, {}, keep_contents), resolved

    async def _enter(
        self, client: str, running: _Running, resolved: ResolvedJob, previews: Callable[[int], set[int]] | None
    ) -> Job:
        """Record the job, then add its rows to the engine."""
        parameters, models, request = running.parameters, running.models, running.request
        rows = len(request)
        seeds = list(request.seeds) * (rows if len(request.seeds) == 1 else 1)
        job = Job(self.store.new_id(), client, models[0].name, parameters.record(), seeds, running.place.cost)
        files = {name: str(self.folder.path(job.id, f"{name}.png")) for name in resolved.inputs}
        job.inputs = [f"{name}.png" for name in resolved.inputs]
        running.options = {**models[0].options, **command_options(parameters, files)}
        if running.guide is not None:
            running.options["guidance-model"] = running.guide.path
        every = parameters.preview_every
        previews = previews or (lambda num_steps: set(range(every, num_steps, every)) if every else set())
        self.store.add(job)
        self._running[job.id] = running
        try:
            await self._in_files(self._write_submitted, job, resolved.inputs)
            work = Work(job.id, client, models[0], request, running.guide, previews)
            config = await asyncio.wrap_future(self.engine.submit(lambda: work))
        except BaseException:
            self.engine.cancel(job.id)
            self._running.pop(job.id, None)
            self.store.end(job, "failed", "the job was not accepted")  # for those who follow its events
            self.store.forget(job.id)
            self.files.submit(self.folder.remove, job.id)
            raise
        job.num_steps = config.num_steps
        running.place.taken = True
        self._count_jobs()
        return job

    def _write_submitted(self, job: Job, inputs: dict[str, bytes]) -> None:
        for name, content in inputs.items():
            self.folder.write_file(job.id, f"{name}.png", content)
        self.folder.write(job.record())

    async def cancel(self, job: Job) -> None:
        """End a job. Its rows take part in no further step."""
        await self._stop(job, "cancelled", None)

    def cancel_soon(self, job: Job) -> None:
        """The same in a task of its own, for callers that are being cancelled themselves."""
        self._run_task(self.cancel(job))

    async def record(self, client: str, job: str) -> JobRecord:
        """The state of a job of a client. Raises ApiError 404."""
        active = self.store.jobs.get(job)
        record = active.record() if active is not None else await asyncio.to_thread(self.folder.read, job)
        if record is None or not self._may_see(client, record.client):
            raise ApiError(404, f"there is no job {job}", "job_not_found")
        return record

    async def list_jobs(self, client: str, limit: int, after: str | None = None) -> tuple[list[JobRecord], bool]:
        """Jobs of a client, newest first, and whether there are more. after: the last job of the page before"""
        ids = await asyncio.to_thread(self.folder.ids)
        ids = ids[ids.index(after) + 1 :] if after in ids else ([] if after else ids)
        records: list[JobRecord] = []
        for job in ids:
            active = self.store.jobs.get(job)
            record = active.record() if active is not None else await asyncio.to_thread(self.folder.read, job)
            if record is not None and self._may_see(client, record.client):
                if len(records) == limit:
                    return records, True
                records.append(record)
        return records, False

    async def delete(self, job: str) -> None:
        """Delete a job that has ended, with its files."""
        self.store.forget(job)
        await self._in_files(self.folder.remove, job)

    def _may_see(self, client: str, owner: str) -> bool:
        return not self.options.private or client == owner

    async def _stop(self, job: Job, state: State, error: str | None) -> None:
        if not job.active:
            return
        self._end(job, state, error, release=False)
        await asyncio.wrap_future(self.engine.cancel(job.id))
        self._release(job)
        await self._in_files(self.folder.write, job.record())

    def _end(self, job: Job, state: State, error: str | None = None, release: bool = True) -> None:
        self.store.end(job, state, error)
        if job.id in self._running:
            self.metrics.jobs.labels(job.model, state).inc()
            if state == "finished" and job.ended is not None:
                self.metrics.job_seconds.labels(job.model).observe(job.ended - job.created)
            seconds = round((job.ended or 0) - job.created, 4)
            logger.info("job", extra={"job": job.id, "state": state, "seconds": seconds, "model": job.model})
        if release:
            self._release(job)
        self._count_jobs()

    def _release(self, job: Job) -> None:
        running = self._running.pop(job.id, None)
        if running is not None:
            self.admission.leave(running.place)
            for model in running.models:
                self.pool.release(model.name)
            self._count_jobs()

    def _count_jobs(self) -> None:
        active = self.store.active()
        self.metrics.jobs_running.set(sum(job.state == "running" for job in active))
        self.metrics.jobs_submitted.set(sum(job.state == "submitted" for job in active))
        self.metrics.queue_pixel_steps.set(self.admission.cost)

    # Events of the engine

    def _report(self, events: list[Event], call: CallReport | None) -> None:
        """Called by the engine's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._handle, events, call)

    def _handle(self, events: list[Event], call: CallReport | None) -> None:
        if call is not None:
            self.metrics.call(call)
            self._measure(call)
        changed: dict[str, Job] = {}
        for event in events:
            job = self.store.jobs.get(event.job)
            if job is None or not job.active:
                continue
            changed[job.id] = job
            if isinstance(event, Started):
                job.state, job.started, job.num_steps = "running", time.time(), event.num_steps
                self.metrics.job_wait_seconds.labels(job.model).observe(job.started - job.created)
            elif isinstance(event, Progress):
                job.steps[event.row] = event.step
                if event.image is not None:
                    self._run_task(self._preview(job, event.row, event.step, event.image))
            elif isinstance(event, RowFinished):
                self._row_finished(job, event)
            elif isinstance(event, Failed):
                self._fail(job, str(event.error))
        for job in changed.values():
            job.notify()

    def _measure(self, call: CallReport) -> None:
        """The cost that a call has done, and its seconds."""
        jobs = [(self.store.jobs.get(name), rows) for name, rows in call.rows.items()]
        cost = sum(rows * job.cost / (len(job.seeds) * job.num_steps) for job, rows in jobs if job and job.num_steps)
        if cost:
            self.admission.measure(cost, call.seconds)

    def _row_finished(self, job: Job, event: RowFinished) -> None:
        running = self._running.get(job.id)
        if isinstance(event.result, TesseraError):
            message = str(event.result).replace(f"('{job.id}', {event.row})", f"image {event.row}")
            self._fail(job, message)
        elif running is None:  # the image that is generated at the start
            self.store.end(job, "finished")
        else:
            job.steps[event.row] = job.num_steps
            self._run_task(self._write_result(job, running, event.row, event.result))

    def _fail(self, job: Job, message: str) -> None:
        if job.id in self._running:
            self._run_task(self._stop(job, "failed", message))
        else:
            self.store.end(job, "failed", message)

    async def _preview(self, job: Job, row: int, step: int, image: np.ndarray) -> None:
        running = self._running.get(job.id)
        if running is None:
            return
        parameters, shown_format = running.parameters, preview_format(running.parameters.output_format)
        content = await self._in_files(encode, image, shown_format, parameters.output_compression)
        if job.active and job.results[row] is None and job.previews.get(row, (-1,))[0] < step:
            job.previews[row] = step, content
            job.notify()

    async def _write_result(self, job: Job, running: _Running, row: int, image: np.ndarray) -> None:
        try:
            await self._write_image(job, running, row, image)
        except Exception as error:
            logger.exception("a result could not be written", extra={"job": job.id})
            message = str(error) if isinstance(error, TesseraError) else f"{type(error).__name__}: {error}"
            await self._stop(job, "failed", message)

    async def _write_image(self, job: Job, running: _Running, row: int, image: np.ndarray) -> None:
        parameters, model = running.parameters, running.models[0]
        settings = {
            "model": model.path,
            "options": running.options,
            "tessera": __version__,
            "sampling": running.request.sampling(model.model).model_dump(mode="json"),
            "weights": model.weights,
            **row_settings(model.model, running.request, [row]),
        }
        fps = parameters.fps or trained_fps(model.model)
        if image.ndim == 4:
            settings["fps"] = fps
        name = f"{row}.{parameters.output_format}"

        def write() -> bytes:
            content = encode(image, parameters.output_format, parameters.output_compression, settings, fps)
            self.folder.write_file(job.id, name, content)
            return content

        content = await self._in_files(write)
        if not job.active:
            return
        if running.keeps_contents:
            job.contents[row] = content
        job.results[row], job.settings[row] = name, settings
        job.previews.pop(row, None)
        self.metrics.images.labels(job.model).inc()
        if all(job.results):
            record = job.record().model_copy(update={"state": "finished", "ended": time.time()})
            await self._in_files(self.folder.write, record)
            self._end(job, "finished")
        else:
            job.notify()

    # Helpers

    def _run_task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task failed", exc_info=task.exception())

    async def _in_files(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the thread for files, in the order of calls."""
        return await asyncio.get_running_loop().run_in_executor(self.files, function, *arguments)

    def _loaded(self, name: str, seconds: float) -> None:
        self.metrics.model_load_seconds.labels(name).observe(seconds)
        self.metrics.models_loaded.set(len(self.pool.loaded))


def job_cost(parameters: JobParameters, loaded: LoadedModel) -> float:
    """Images x steps x pixels. Raises TesseraError."""
    counts = [len(parameters.seeds or [0]), *map(len, parameters.condition.values())]
    counts += [len(values) for values in parameters.negative.values()]
    counts += [len(parameters.guidance_scale)] if isinstance(parameters.guidance_scale, list) else []
    num_steps = sampling_config(loaded.model, **parameters.settings).num_steps
    return float(max(counts) * num_steps * math.prod(parameters.size or image_size(loaded.model)))


def warm_up_request(loaded: LoadedModel) -> SampleRequest:
    """One image in two steps, with any condition."""
    config, rules = loaded.model.config, Condition.rules()
    names = [name for name in config.network.condition_fields if not rules[name].from_size]
    companions = {companion for name in names for companion in rules[name].companions}
    condition: dict[str, Any] = {
        name: [""] if name == "text" else rules[name].default_inputs([0], "balanced", config)
        for name in names
        if name not in companions
    }
    return SampleRequest([0], condition, settings={"num_steps": 2})
