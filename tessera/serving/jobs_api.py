"""The native interface: /v1/jobs, for everything that can be sampled, clips included."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel

from tessera.serving.encoding import MEDIA_TYPES, preview_format
from tessera.serving.errors import ApiError
from tessera.serving.images_api import event, event_stream
from tessera.serving.jobs import ID, Job, JobRecord
from tessera.serving.parameters import MAX_ROWS, JobParameters
from tessera.serving.service import Service

JobId = Annotated[str, Path(pattern=f"^{ID.pattern}$")]
Row = Annotated[int, Path(ge=0, lt=MAX_ROWS)]


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobRecord]
    has_more: bool


def job_router(service: Service, responses: dict[int | str, Any]) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", responses=responses)
    files: dict[int | str, Any] = {
        200: {"content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()}}
    }
    streams: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @router.post("", status_code=202, response_model=JobRecord)
    async def submit_job(request: Request, body: JobParameters) -> JobRecord:
        """Submit a job. It continues when the client leaves."""
        job = await service.submit(request.state.client, request.state.place, body)
        return job.record()

    @router.get("", response_model=JobList)
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[
            str | None, Query(pattern=f"^{ID.pattern}$", description="the last job of the page before")
        ] = None,
    ) -> JobList:
        """The jobs of the client, newest first."""
        records, has_more = await service.list_jobs(request.state.client, limit, after)
        return JobList(data=records, has_more=has_more)

    @router.get("/events", response_class=StreamingResponse, include_in_schema=False)
    async def all_events(request: Request) -> StreamingResponse:
        """The events of all jobs of the client that are active, or are submitted while this is read."""
        return event_stream(_all_events(service, request.state.client))

    @router.get("/{job}", response_model=JobRecord)
    async def get_job(request: Request, job: JobId) -> JobRecord:
        return await service.record(request.state.client, job)

    @router.post("/{job}/cancel", response_model=JobRecord)
    async def cancel_job(request: Request, job: JobId) -> JobRecord:
        """Cancel a job. One that has ended stays as it is."""
        await service.record(request.state.client, job)
        if job in service.store.jobs:
            await service.cancel(service.store.jobs[job])
        return await service.record(request.state.client, job)

    @router.delete("/{job}", response_model=JobRecord)
    async def delete_job(request: Request, job: JobId) -> JobRecord:
        """Delete a job that has ended, with its files."""
        record = await service.record(request.state.client, job)
        if record.state in ("submitted", "running"):
            raise ApiError(409, "the job is active: cancel it first", "job_active")
        await service.delete(job)
        return record

    @router.get("/{job}/events", response_class=StreamingResponse, responses=streams)
    async def job_events(request: Request, job: JobId) -> StreamingResponse:
        """Server-sent events: state, progress, preview and result, and at last end."""
        record = await service.record(request.state.client, job)
        return event_stream(_events(service.store.jobs.get(job), record))

    @router.get("/{job}/results/{image}", response_class=FileResponse, responses=files, name="get_result")
    async def get_result(request: Request, job: JobId, image: Row) -> FileResponse:
        """The file of an image or clip."""
        record = await service.record(request.state.client, job)
        name = record.results[image] if image < len(record.results) else None
        if name is None:
            raise ApiError(404, f"the job has no result {image} (its state: {record.state})", "no_result")
        return await _file(service, job, name)

    @router.get("/{job}/inputs/{name}", response_class=FileResponse, responses=files)
    async def get_input(request: Request, job: JobId, name: str) -> FileResponse:
        """The file of an image that the job begins from."""
        record = await service.record(request.state.client, job)
        if name not in record.inputs:
            raise ApiError(404, "the job has no such input", "no_input")
        return await _file(service, job, name)

    return router


async def _file(service: Service, job: str, name: str) -> FileResponse:
    try:
        path = service.folder.path(job, name)
    except ValueError:  # its record was changed
        raise ApiError(404, "there is no such file", "no_file") from None
    if not path.is_file():
        raise ApiError(404, f"the file {name} was removed", "no_file")
    return FileResponse(path, media_type=MEDIA_TYPES.get(path.suffix.removeprefix(".")))


async def _events(job: Job | None, record: JobRecord) -> AsyncIterator[bytes]:
    """What happens to a job from now on. What happened before is in the first event, or repeated."""
    yield event("state", record.model_dump(mode="json"))
    if job is not None:
        steps, shown, results, state = [0] * len(job.seeds), {}, set(), record.state
        async for _ in job.changes():
            if job.active and job.state != state:
                state = job.state
                yield event("state", job.record().model_dump(mode="json"))
            for row, step in enumerate(job.steps):
                if step > steps[row]:
                    steps[row] = step
                    yield event("progress", {"job": job.id, "image": row, "step": step, "num_steps": job.num_steps})
            for row, (step, content) in list(job.previews.items()):
                if step > shown.get(row, 0):
                    shown[row] = step
                    data = {"job": job.id, "image": row, "step": step, "num_steps": job.num_steps}
                    data["output_format"] = preview_format(job.parameters["output_format"])
                    yield event("preview", {**data, "b64_json": base64.b64encode(content).decode()})
            for row, name in enumerate(job.results):
                if name is not None and row not in results:
                    results.add(row)
                    data = {"job": job.id, "image": row, "url": f"/v1/jobs/{job.id}/results/{row}"}
                    yield event("result", {**data, "settings": job.settings[row]})
        record = job.record()
    yield event("end", record.model_dump(mode="json"))


async def _all_events(service: Service, client: str) -> AsyncIterator[bytes]:
    """Ends when the server shuts down and the client's jobs are done."""
    events: asyncio.Queue[bytes] = asyncio.Queue(64)
    tasks: set[asyncio.Task[None]] = set()

    async def follow(job: Job) -> None:
        async for content in _events(job, job.record()):
            await events.put(content)

    def start(job: Job) -> None:
        if job.client == client:
            task = asyncio.ensure_future(follow(job))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    for active in service.store.active():
        start(active)
    service.store.listeners.add(start)
    try:
        yield b": open\n\n"
        while tasks or not events.empty() or not service.draining:
            with suppress(TimeoutError):
                yield await asyncio.wait_for(events.get(), 1)
    finally:
        service.store.listeners.discard(start)
        for task in list(tasks):
            task.cancel()
