"""The images interface of OpenAI: /v1/images/generations, /v1/images/edits and /v1/models."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response

from tessera.errors import TesseraError
from tessera.serving.errors import ApiError
from tessera.serving.jobs import Job
from tessera.serving.models import ModelEntry
from tessera.serving.parameters import (
    EditParameters,
    GenerationParameters,
    check_upload,
    parse_settings,
    previews_of,
    transparent_mask,
)
from tessera.serving.service import Service

KEEP_ALIVE = 15.0  # seconds between comments in a stream, which show whether the client is there


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class TokenDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens of the network: of the images that a request begins from, and of those that it generates."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    usage: Usage
    job: str


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tessera"
    loaded: bool
    facts: dict[str, Any] | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(with_comments(events), media_type="text/event-stream", headers=headers)


async def with_comments(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, with a comment whenever there was none for a while."""
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))  # pyright: ignore
            done, _ = await asyncio.wait([following], timeout=KEEP_ALIVE)
            if not done:
                yield b": waiting\n\n"
                continue
            try:
                content = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield content
    finally:
        if following is not None:
            following.cancel()  # the events end in that task
        else:
            await events.aclose()  # pyright: ignore


async def wait_for_end(request: Request, service: Service, job: Job) -> None:
    """Wait until a job has ended. If the client leaves, the job is cancelled."""
    ended = asyncio.ensure_future(job.ended_event())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([ended, left], return_when=asyncio.FIRST_COMPLETED)
        if job.active:
            raise ApiError(499, "the client has left", "client_left")  # as nginx calls it; nobody reads it
    finally:
        for task in (ended, left):
            task.cancel()
        if job.active:  # also where this handler was cancelled
            service.cancel_soon(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_ended(job: Job) -> None:
    """Raise ApiError unless the job is finished."""
    if job.state == "cancelled":
        raise ApiError(409, "the job was cancelled", "job_cancelled")
    if job.state == "failed":
        raise ApiError(500, str(job.error), "job_failed")


def image_router(service: Service, responses: dict[int | str, Any]) -> APIRouter:
    router = APIRouter(responses=responses)
    multipart = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _edit_schema()}}}}
    streams: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @router.post("/v1/images/generations", response_model=ImagesResponse, responses=streams)
    async def generate_images(request: Request, body: GenerationParameters) -> Any:
        """Generate images from a text, or of a class."""
        return await _respond(request, service, body, {}, "image_generation")

    @router.post("/v1/images/edits", response_model=ImagesResponse, responses=streams, openapi_extra=multipart)
    async def edit_images(request: Request) -> Any:
        """Change an image: the transparent part of the mask, or, without a mask, all of it."""
        parameters, files = await _read_form(request, service)
        return await _respond(request, service, parameters, files, "image_edit")

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> ModelList:
        return ModelList(data=[_model_object(entry) for entry in service.pool.entries.values()])

    @router.get("/v1/models/{model}", response_model=ModelObject)
    async def get_model(model: str) -> ModelObject:
        return _model_object(service.model_entry(model))

    return router


def _model_object(entry: ModelEntry) -> ModelObject:
    return ModelObject(id=entry.name, created=entry.created, loaded=entry.loaded is not None, facts=entry.facts or None)


async def _respond(
    request: Request, service: Service, parameters: GenerationParameters, files: dict[str, str], name: str
) -> Response | ImagesResponse:
    state = request.state
    count = parameters.partial_images or 0
    previews = (lambda num_steps: previews_of(count, num_steps)) if count else (lambda num_steps: set())
    by_url = parameters.response_format == "url"
    job = await service.submit(
        state.client, state.place, parameters, files, previews, keep_contents=not by_url or bool(parameters.stream)
    )
    if parameters.stream:
        return event_stream(_stream(service, job, name, count))
    await wait_for_end(request, service, job)
    check_ended(job)
    try:
        return _images_response(request, service, job, by_url)
    finally:
        job.contents.clear()


def _images_response(request: Request, service: Service, job: Job, by_url: bool) -> ImagesResponse:
    data = []
    for row, seed in enumerate(job.seeds):
        if by_url:
            url = str(request.url_for("get_result", job=job.id, image=row))
            data.append(ImageData(url=url, seed=seed))
        else:
            data.append(ImageData(b64_json=base64.b64encode(job.contents[row]).decode(), seed=seed))
    facts = _facts(service, job)
    return ImagesResponse(created=int(job.created), data=data, job=job.id, **facts)


def _facts(service: Service, job: Job) -> dict[str, Any]:
    size, tokens = job_size(service, job)
    inputs = tokens * sum(name == "init-image.png" for name in job.inputs)
    outputs = tokens * len(job.seeds)
    details = TokenDetails(image_tokens=inputs, text_tokens=0)
    usage = Usage(
        input_tokens=inputs, input_tokens_details=details, output_tokens=outputs, total_tokens=inputs + outputs
    )
    return {
        "output_format": job.parameters["output_format"],
        "quality": f"{job.num_steps} steps",
        "size": f"{size[-1]}x{size[-2]}",
        "usage": usage,
    }


def job_size(service: Service, job: Job) -> tuple[list[int], int]:
    """The size of the images of a job in pixels, and their tokens."""
    facts = service.pool.entries[job.model].facts
    size = list(job.parameters.get("size") or facts["size"])
    pixels_per_token = facts["size_multiple"] ** 2
    return size, size[-1] * size[-2] // pixels_per_token * (size[0] if len(size) == 3 else 1)


async def _stream(service: Service, job: Job, name: str, count: int) -> AsyncIterator[bytes]:
    """Previews as they come, then the image. If the client leaves, the job is cancelled."""
    facts = _facts(service, job)
    common = {key: facts[key] for key in ("size", "quality", "output_format")} | {"background": "opaque"}
    sent, shown = 0, 0
    try:
        async for _ in job.changes():
            step, content = job.previews.get(0, (0, b""))
            if step > shown and sent < count:
                kind = f"{name}.partial_image"
                data = {"type": kind, "b64_json": base64.b64encode(content).decode(), "partial_image_index": sent}
                yield event(kind, {**data, "created_at": int(job.created), **common})
                sent, shown = sent + 1, step
        if job.state != "finished":
            error = ApiError(500, job.error or "the job was cancelled", f"job_{job.state}")
            yield event("error", {"type": "error", **error.body()})
            return
        kind, content = f"{name}.completed", job.contents[0]
        data = {"type": kind, "b64_json": base64.b64encode(content).decode(), "created_at": int(job.created)}
        yield event(kind, {**data, **common, "usage": facts["usage"].model_dump(), "seed": job.seeds[0], "job": job.id})
    finally:
        job.contents.clear()
        if job.active:
            service.cancel_soon(job)


def _edit_schema() -> dict[str, Any]:
    """The multipart body of an edit."""
    schema = EditParameters.model_json_schema()
    schema["properties"]["settings"] = {"type": "string", "description": "JSON: any other sampling setting"}
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {
        "image": {**file, "description": "PNG, JPEG or WebP"},
        "mask": {**file, "description": "a PNG of the same size, fully transparent where the image is to change"},
        **schema["properties"],
    }
    schema["required"] = ["image", "prompt"]
    schema.pop("$defs", None)
    return schema


async def _read_form(request: Request, service: Service) -> tuple[EditParameters, dict[str, str]]:
    """The fields and files of an edit. Raises ApiError and TesseraError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send multipart/form-data, with the file in the field image", "content_type")
    try:
        form = await request.form(max_files=4, max_fields=60, max_part_size=service.options.limits.max_body_bytes)
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        raise ApiError(400, f"the form is not valid: {error}", "invalid_form") from None
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        target = "image" if name == "image[]" else name
        if target in fields or target in files:
            hint = "this server changes one image" if target == "image" else "send it once"
            raise ApiError(400, f"{target} is sent twice: {hint}", "repeated_field", target)
        if isinstance(value, UploadFile):
            if target not in ("image", "mask"):
                raise ApiError(
                    400, f"{target[:100]} is no file: files are image and mask", "unknown_file", target[:100]
                )
            files[target] = await value.read()
        elif target in ("image", "mask"):
            raise ApiError(400, f"{target} must be a file", "not_a_file", target)
        else:
            fields[target] = parse_settings(value) if target == "settings" else value
    if "image" not in files:
        raise ApiError(400, "the file image is missing", "missing_file", "image")
    for name, content in files.items():
        check_upload(name, content, service.options.limits.max_pixels)
    try:
        parameters = EditParameters.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors()) from None
    encoded = {"init_image": base64.b64encode(files["image"]).decode()}
    mask = await asyncio.to_thread(transparent_mask, "mask", files.get("mask", files["image"]))
    if mask is not None:
        encoded["mask"] = base64.b64encode(mask).decode()
    elif "mask" in files:
        raise TesseraError("the mask is nowhere fully transparent: its transparent pixels are those to change")
    return parameters, encoded


def invalid(problems: Any) -> ApiError:
    """400 for a body that is not valid. problems: of pydantic"""
    first = problems[0]
    param = ".".join(str(part) for part in first.get("loc", ()) if part != "body") or None
    message = str(first.get("msg", "not valid")).removeprefix("Value error, ")
    if first.get("type") == "model_attributes_type":  # another type of content is not even parsed
        message = "the body must be a JSON object, sent with the header Content-Type: application/json"
    return ApiError(400, f"{param}: {message}" if param else message, "invalid_request", param)
