"""The engine: the one thread that runs networks. All rows of all jobs are in its continuous batches.

Between two network calls it lets jobs join and removes cancelled ones, so a cancelled job takes part in no further
step. Everything that happens is reported as events, in the order in which it happened.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from tessera.errors import TesseraError
from tessera.generation import ContinuousSampler, SampleRequest, decode
from tessera.generation.request import ROUTED
from tessera.model import Model
from tessera.sampling import SamplingConfig
from tessera.serving.scheduler import Call, RowScheduler

logger = logging.getLogger(__name__)
RowName = tuple[str, int]  # job and number of the row
Variant = tuple[str, ...]  # what rows of one sampler share beside the size: models, precision and caching


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory. name: as clients call it; weights: their hash; options: of `tessera sample`, to read it so."""

    name: str
    path: str
    model: Model
    weights: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def routed(self) -> "LoadedModel":
        """See `Model.routed`. One object, so that all jobs with it share batches."""
        return replace(self, name=ROUTED, path=ROUTED, model=self.model.routed)


@dataclass(frozen=True)
class Work:
    """The rows of a job. previews: the steps after which the predicted image is reported"""

    job: str
    client: Hashable
    model: LoadedModel
    request: SampleRequest
    guidance_model: LoadedModel | None = None
    previews: Callable[[int], set[int]] = lambda num_steps: set()


@dataclass(frozen=True)
class Started:
    """The first network call with rows of the job begins; each will take `num_steps` steps."""

    job: str
    num_steps: int


@dataclass(frozen=True)
class Progress:
    """`step` steps of a row are done; image uint8 [H, W, C] or [T, H, W, C] if a preview was requested."""

    job: str
    row: int
    step: int
    image: np.ndarray | None = None


@dataclass(frozen=True)
class RowFinished:
    """The image of a row, or why there is none."""

    job: str
    row: int
    result: np.ndarray | TesseraError


@dataclass(frozen=True)
class Failed:
    """An error that concerns the whole job; its rows are removed."""

    job: str
    error: TesseraError


Event = Started | Progress | RowFinished | Failed


@dataclass(frozen=True)
class CallReport:
    """One network call, for the metrics."""

    model: str
    evaluations: int
    rows: dict[str, int]  # by job
    seconds: float


@dataclass
class _ActiveJob:
    work: Work
    variant: Variant
    rows: set[int]
    num_steps: int
    previews: set[int]
    started: bool = False
    steps: dict[int, int] = field(default_factory=dict)


class Engine:
    """report: is called by the thread with the events of each network call, and with None where there are none.

    rows_per_call: see `RowDenoiser`
    """

    def __init__(
        self,
        scheduler: RowScheduler,
        report: Callable[[list[Event], CallReport | None], None],
        rows_per_call: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.rows_per_call, self.clock = scheduler, rows_per_call, clock
        self._report = report
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._samplers: dict[Variant, ContinuousSampler] = {}
        self._jobs: dict[str, _ActiveJob] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.calls = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the call that it is in."""
        self._commands.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, prepare: Callable[[], Work]) -> "Future[SamplingConfig]":
        """Add the rows of a job before the next call. prepare: makes the work, in the thread of the engine.

        The future has the sampling settings of the job, or the TesseraError of a request that cannot be fulfilled.
        """
        future: Future[SamplingConfig] = Future()

        def add() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._add(prepare()))
            except TesseraError as error:
                future.set_exception(error)
            except Exception as error:  # inputs of odd types and sizes
                logger.exception("a request could not be added")
                future.set_exception(_unexpected("the model cannot take this request", error))

        self._commands.put(add)
        return future

    def cancel(self, job: str) -> "Future[None]":
        """Remove the rows of a job before the next call. The future is done when they are removed."""
        future: Future[None] = Future()

        def remove() -> None:
            self._remove(job)
            future.set_result(None)

        self._commands.put(remove)
        return future

    def _add(self, work: Work) -> SamplingConfig:
        request, config = work.request, work.request.sampling(work.model.model)
        guidance_name = work.guidance_model.name if work.guidance_model is not None else ""
        variant = work.model.name, guidance_name, request.precision, config.caching.model_dump_json()
        sampler = self._samplers.get(variant)
        if sampler is None:
            caching = config.caching.model_dump()
            sampler = ContinuousSampler(
                work.model.model, request.guidance_model, request.precision, self.rows_per_call, caching=caching
            )
        names = [(work.job, row) for row in range(len(request))]
        state = sampler.add(request, names)
        self._samplers[variant] = sampler
        num_steps = int(state.num_steps[0])
        self._jobs[work.job] = _ActiveJob(work, variant, set(range(len(names))), num_steps, work.previews(num_steps))
        key = (*variant, *state.x.shape[1:])
        weak_outputs = (state.inputs.guidance.scale != 1).sum(dim=1).tolist()
        for name, count in zip(names, weak_outputs, strict=True):
            self.scheduler.add(work.client, key, work.job, name, 1 + count)
        return config.model_copy(update={"num_steps": num_steps})

    def _remove(self, job: str) -> None:
        active = self._jobs.pop(job, None)
        if active is None:
            return
        names = {(job, row) for row in active.rows}
        for name in names:
            self.scheduler.remove(name)
        self._samplers[active.variant].batch.remove(names)
        self._drop_if_empty(active.variant)

    def _drop_if_empty(self, variant: Variant) -> None:
        if variant in self._samplers and not self._samplers[variant].batch.num_rows:
            del self._samplers[variant]  # and with it the reference to its model

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            try:
                while True:
                    command = self._commands.get(block=not self._jobs)
                    if command is None:
                        return
                    command()
            except queue.Empty:
                pass
            self._call()

    def _call(self) -> None:
        """One network call."""
        within = {name for sampler in self._samplers.values() for name in sampler.batch.within_step}
        call = self.scheduler.choose(within)
        if call is None:
            return
        counts = Counter(job for job, _ in cast(list[RowName], call.names))
        sampled_jobs = list(counts)
        variant = self._jobs[sampled_jobs[0]].variant
        sampler, model = self._samplers[variant], self._jobs[sampled_jobs[0]].work.model
        new = [job for job in sampled_jobs if not self._jobs[job].started]
        events: list[Event] = [Started(job, self._jobs[job].num_steps) for job in new]
        for job in sampled_jobs:
            self._jobs[job].started = True
        if events:
            self._report(events, None)
        start = self.clock()
        try:
            results = sampler.step(set(call.names))
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds = self.clock() - start
            self.calls += 1
            self.scheduler.charge(call, seconds)
            events = self._events(call, variant, model.model, results)
        except Exception as error:
            logger.exception("a network call failed")
            self._fail(variant, error)
            return
        self._report(events, CallReport(model.name, call.evaluations, counts, seconds))

    def _events(self, call: Call, variant: Variant, model: Model, results: dict[Any, Any]) -> list[Event]:
        events: list[Event] = []
        chosen = set(call.names)
        for state in self._samplers[variant].batch.states:
            for index, (name, step) in enumerate(zip(state.name, state.step.tolist(), strict=True)):
                active = self._jobs.get(name[0])
                if name not in chosen or active is None or active.steps.get(name[1], 0) == step:
                    continue
                active.steps[name[1]] = step
                image = None
                if step in active.previews:
                    image = _finish(model, state.x0[index : index + 1], active.work.request, name[1])
                events.append(Progress(name[0], name[1], step, image))
        for name, result in results.items():
            job, row = name
            active = self._jobs.get(job)
            if active is None:  # cancelled within its last step
                continue
            if isinstance(result, torch.Tensor):
                result = _finish(model, result[None], active.work.request, row)
            events.append(RowFinished(job, row, result))
            self.scheduler.remove(name)
            active.rows.discard(row)
            if not active.rows:
                del self._jobs[job]
        self._drop_if_empty(variant)
        return events

    def _fail(self, variant: Variant, error: Exception) -> None:
        """Fail all jobs of a sampler: its rows may be in the middle of a step."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            self.scheduler.max_evaluations = max(1, self.scheduler.max_evaluations // 2)
            message = "the memory of the device was exhausted; later calls have half as many rows: send it again"
            failure = TesseraError(message)
        else:
            failure = error if isinstance(error, TesseraError) else _unexpected("the network call failed", error)
        jobs = [job for job, active in self._jobs.items() if active.variant == variant]
        for job in jobs:
            self._remove(job)
        self._samplers.pop(variant, None)
        self._report([Failed(job, failure) for job in jobs], None)


def _finish(model: Model, latents: torch.Tensor, request: SampleRequest, row: int) -> np.ndarray:
    """The image of latents [1, C, ...]: uint8 [H, W, C] or [T, H, W, C]. What a mask keeps is that of the image."""
    image = decode(model, latents)[0]
    if request.init_image is not None and request.mask is not None:
        part = request.select([row])
        if part.mask is not None and part.init_image is not None:
            image = np.where(part.mask[0][..., None] != 0, image, part.init_image[0])
    return image


def _unexpected(what: str, error: Exception) -> TesseraError:
    return TesseraError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
