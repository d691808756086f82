"""What the studio needs beside the other interfaces: the choices of its forms, and thumbnails of classes."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from tessera import __version__
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.generation.image_settings import sample_command
from tessera.sampling import SAMPLERS, TIMESTEP_SPACINGS
from tessera.serving.engine import LoadedModel
from tessera.serving.errors import ApiError
from tessera.serving.images_api import event, event_stream
from tessera.serving.jobs import ID
from tessera.serving.parameters import MAX_ROWS, JobParameters
from tessera.serving.service import Service

logger = logging.getLogger(__name__)
STUDIO = Path(__file__).with_name("studio")  # served at /; the content-security-policy allows files from here alone
CLIENT = "thumbnails"  # of the jobs that generate them
MAX_STEPS = 20  # of a thumbnail


class Choices(BaseModel):
    """The values of the studio's forms, and what this server offers."""

    version: str
    samplers: list[str]
    timestep_spacings: list[str]
    runs: bool


class ModelId(BaseModel):
    id: str


class Command(BaseModel):
    command: str


def studio_router(service: Service, responses: dict[int | str, Any], has_runs: bool) -> APIRouter:
    router = APIRouter(prefix="/v1/studio", responses=responses)

    @router.get("", response_model=Choices)
    async def choices() -> Choices:
        return Choices(
            version=__version__, samplers=list(SAMPLERS), timestep_spacings=list(TIMESTEP_SPACINGS), runs=has_runs
        )

    @router.post("/load", response_model=ModelId)
    async def load_model(model: str) -> ModelId:
        """Load a model, so that its facts are known."""
        entry = service.model_entry(model)
        service.check_open()
        await service.pool.acquire(entry.name)
        service.pool.release(entry.name)
        return ModelId(id=entry.name)

    @router.get("/command", response_model=Command)
    async def command(
        request: Request,
        job: Annotated[str, Query(pattern=f"^{ID.pattern}$")],
        image: Annotated[int, Query(ge=0, lt=MAX_ROWS)] = 0,
    ) -> Command:
        """The `tessera sample` command that generates an image of a job again."""
        record = await service.record(request.state.client, job)
        if image >= len(record.settings) or not record.settings[image]:
            raise ApiError(404, f"the job has no result {image} (its state: {record.state})", "no_result")
        return Command(command=sample_command(record.settings[image]))

    @router.get("/thumbnails", response_class=StreamingResponse, include_in_schema=False)
    async def thumbnails(
        request: Request,
        model: str | None = None,
        label: Annotated[list[int] | None, Query(max_length=64)] = None,
    ) -> StreamingResponse:
        """Server-sent events with an image of each class; those that are missing are generated."""
        entry = service.model_entry(model)
        service.check_open()
        (loaded,) = await service.pool.acquire(entry.name)
        try:
            config = loaded.model.config.network
            if not config.num_classes or config.uses_text:
                raise ApiError(400, f"model {entry.name} is not conditioned on classes alone", "no_classes")
            labels = sorted({each for each in label or () if 0 <= each < config.num_classes})
            return event_stream(_thumbnails(service, loaded, labels))
        finally:
            service.pool.release(entry.name)

    return router


async def _thumbnails(service: Service, loaded: LoadedModel, labels: Sequence[int]) -> AsyncIterator[bytes]:
    folder = service.options.out / "thumbnails" / loaded.weights[:16]
    cached = await asyncio.to_thread(lambda: dict(_read(folder, labels)))
    for label, content in cached.items():
        yield _event(label, content)
    missing = [label for label in labels if label not in cached]
    if not missing:
        return
    parameters = JobParameters(
        model=loaded.name,
        seeds=[0],
        condition={"label": list(missing)},
        settings={"num_steps": min(MAX_STEPS, loaded.model.config.sampling.num_steps)},
        output_format="webp",
        output_compression=85,
    )
    place = None
    try:
        place = service.admission.enter(CLIENT)
        job = await service.submit(CLIENT, place, parameters, keep_contents=True)
    except (TesseraError, ApiError) as error:
        yield event("error", {"message": str(getattr(error, "detail", error))})
        return
    finally:
        if place is not None and not place.taken:  # also where the client has left
            service.admission.leave(place)
    sent: set[int] = set()
    try:
        async for _ in job.changes():
            for row, content in list(job.contents.items()):
                if row not in sent:
                    sent.add(row)
                    await asyncio.to_thread(atomic_write, folder / f"{missing[row]}.webp", content)
                    yield _event(missing[row], content)
        if job.error:
            yield event("error", {"message": job.error})
    finally:
        asyncio.ensure_future(_remove(service, job.id))  # noqa: RUF006 (the store holds the job until then)


async def _remove(service: Service, job: str) -> None:
    if job in service.store.jobs:
        await service.cancel(service.store.jobs[job])
    await service.delete(job)


def _read(folder: Path, labels: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    for label in labels:
        path = folder / f"{label}.webp"
        if path.is_file():
            yield label, path.read_bytes()


def _event(label: int, content: bytes) -> bytes:
    return event("thumbnail", {"label": label, "b64_json": base64.b64encode(content).decode()})
