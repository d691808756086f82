"""Requests as clients send them, and the `SampleRequest` of each.

`JobParameters` mirrors `SampleRequest`. The images interface of OpenAI has parameters of its own, which become a
`JobParameters`; where one of them would have no effect, the request is refused.
"""

import base64
import binascii
import difflib
import io
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from tessera import clips, images
from tessera.conditioning import LabelField
from tessera.conditioning.fields import INTEGER
from tessera.errors import TesseraError
from tessera.generation import ControlInput, SampleRequest, image_size
from tessera.generation.image_inputs import crop, images_config, read_image, read_mask
from tessera.model import Model
from tessera.runtime import Precision
from tessera.sampling import SamplingConfig
from tessera.settings import Settings, shorten, unknown_name

OutputFormat = Literal["png", "jpeg", "webp"]
JobFormat = Literal["png", "jpeg", "webp", "mp4", "webm"]
VIDEO_FORMATS = ("mp4", "webm")
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Value = int | float | str | list[Any]
MAX_ROWS = 1000  # of one job; the limit of its cost is usually lower
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE = "an image file, base64 or as a data: URL"


class ControlParameters(Settings):
    """The image of a control."""

    image: str = Field(description=IMAGE)
    strength: float = 1.0
    is_map: bool = Field(default=False, description="whether it is the control image itself, such as a sketch of edges")


class JobParameters(Settings):
    """What to sample. Whatever varies between images is a list, with one entry for each image or one for all."""

    model: str | None = Field(default=None, description="one of /v1/models; null: the first")
    seeds: list[Seed] | None = Field(
        default=None, min_length=1, max_length=MAX_ROWS, description="one for each image; null: one at random"
    )
    condition: dict[str, Annotated[list[Value], Field(min_length=1, max_length=MAX_ROWS)]] = Field(
        default_factory=dict, description='inputs by name, such as {"label": ["cat"]} or {"text": ["a red circle"]}'
    )
    negative: dict[str, Annotated[list[str | None], Field(min_length=1, max_length=MAX_ROWS)]] = Field(
        default_factory=dict, description='what guidance leads away from, such as {"text": ["blurred"]}'
    )
    guidance_scale: float | Annotated[list[float], Field(min_length=1, max_length=MAX_ROWS)] | None = None
    size: Annotated[list[Annotated[int, Field(ge=1, le=2**20)]], Field(min_length=2, max_length=3)] | None = Field(
        default=None, description="[height, width] or [frames, height, width] in pixels; null: as trained"
    )
    init_image: str | None = Field(default=None, description=f"{IMAGE}, to begin from; cropped to the size")
    strength: float | None = Field(default=None, description="how much init_image may change, above 0 and at most 1")
    mask: str | None = Field(default=None, description=f"{IMAGE}, white where init_image is replaced, else black")
    precision: Precision = "float32"
    settings: dict[str, Any] = Field(default_factory=dict, description="any sampling setting, such as num_steps")
    guidance_model: str | None = Field(
        default=None,
        description="one of /v1/models: autoguidance by a weaker model; routed: by the model itself with fewer tokens",
    )
    cut_long: bool = Field(default=False, description="cut prompts that are too long, instead of an error")
    controls: dict[str, ControlParameters] = Field(default_factory=dict, description="images for controls, by name")
    output_format: JobFormat = Field(default="png", description="of clips, png and webp are animations without loss")
    fps: float | None = Field(
        default=None, gt=0, le=clips.MAX_FPS, description="of clips, frames per second; null: as trained"
    )
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="quality of jpeg and webp (90); webp without it is lossless"
    )
    preview_every: int = Field(default=0, ge=0, description="steps between previews of each image; 0: none")

    def complete(self, default_model: str) -> "JobParameters":
        """With a model and seeds, and the settings checked by name. Raises TesseraError."""
        if self.output_format not in ("jpeg", "webp") and self.output_compression is not None:
            raise TesseraError(f"output_compression is for jpeg and webp: leave it out for {self.output_format}")
        known = [*SamplingConfig.model_fields, "overrides"]
        if unknown := [name for name in self.settings if name not in known]:
            raise TesseraError(unknown_name("setting", unknown[0], known))
        overrides = self.settings.get("overrides", [])
        if not isinstance(overrides, list) or not all(isinstance(each, str) for each in overrides):
            raise TesseraError('overrides is a list of words such as "num_steps=20"')
        if self.guidance_scale is not None and self.settings.get("guidance_scale") is not None:
            raise TesseraError("guidance_scale is given twice, in settings too: leave one of them out")
        return self.model_copy(
            update={"model": self.model or default_model, "seeds": self.seeds or [secrets.randbelow(2**32)]}
        )

    def record(self) -> dict[str, Any]:
        """The parameters that are not null, without the contents of images."""
        data = self.model_dump(mode="json", exclude_none=True)
        for name in ("init_image", "mask"):
            data.pop(name, None)
        for control in data["controls"].values():
            del control["image"]
        return data


# Other names of parameters of the images interface that clients of other servers use.
SYNONYMS = {
    "steps": "num_steps", "num_inference_steps": "num_steps", "cfg_scale": "guidance_scale", "class": "label",
}  # fmt: skip


def _with_synonyms(schema: dict[str, Any]) -> None:
    """Add the synonyms to the JSON schema."""
    properties = schema["properties"]
    for synonym, name in SYNONYMS.items():
        properties[synonym] = {**properties[name], "title": synonym, "description": f"the same as {name}"}


class GenerationParameters(Settings):
    """The body of /v1/images/generations: the parameters of OpenAI, then those of Tessera."""

    model_config = {"json_schema_extra": _with_synonyms}

    prompt: str = Field(max_length=32000, description="a text, or the name or number of a class")
    model: str | None = None
    n: int | None = Field(default=1, ge=1, le=10, description="images, with the seeds seed, seed + 1, ...")
    size: str | None = Field(default="auto", pattern=r"^(auto|[1-9]\d{0,5}x[1-9]\d{0,5})$", description="WIDTHxHEIGHT")
    quality: Literal["auto", "standard"] | None = Field(default=None, description="set num_steps for another")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: OutputFormat | None = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(default=None, description="nothing is moderated")
    user: str | None = Field(default=None, max_length=200, description="recorded with the job")
    stream: bool | None = False
    partial_images: int | None = Field(default=None, ge=0, le=3, description="previews in a stream")
    seed: Seed | None = Field(default=None, description="null: at random")
    num_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = None
    negative_prompt: str | None = Field(default=None, max_length=32000)
    label: int | str | None = Field(default=None, description="the class, of a model of text and classes")
    sampler: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict, description="any other sampling setting")

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        result = {}
        for key, value in data.items():
            name = SYNONYMS.get(key, key)
            if name in result:
                raise ValueError(f"{name} is given twice, under another name too: leave one of them out")
            result[name] = value
        return result

    def job(self, model: Model) -> JobParameters:
        """The job of these parameters. Raises TesseraError."""
        if self.stream and (self.n or 1) != 1:
            raise TesseraError("a stream has one image: leave n at 1")
        if self.partial_images is not None and not self.stream:
            raise TesseraError("partial_images needs stream=true")
        named = {"num_steps": self.num_steps, "sampler": self.sampler}
        named = {name: value for name, value in named.items() if value is not None}
        if twice := [name for name in (*named, "guidance_scale") if name in self.settings and getattr(self, name)]:
            raise TesseraError(f"{twice[0]} is given twice, in settings too: leave one of them out")
        seed, n = secrets.randbelow(2**32) if self.seed is None else self.seed, self.n or 1
        if seed + n > 2**63:
            raise TesseraError(f"seed {seed} leaves no {n} seeds below 2^63: use a smaller one")
        size = None if self.size in (None, "auto") else [int(number) for number in self.size.split("x")][::-1]
        return JobParameters(
            model=self.model,
            seeds=list(range(seed, seed + n)),
            condition=self._condition(model),
            negative={} if self.negative_prompt is None else {"text": [self.negative_prompt]},
            guidance_scale=self.guidance_scale,
            size=size,
            settings={**self.settings, **named},
            output_format=self.output_format or "png",
            output_compression=self.output_compression,
        )

    def _condition(self, model: Model) -> dict[str, Any]:
        """The prompt as a text or a class. Raises TesseraError."""
        network = model.config.network
        if network.uses_text:
            if self.label is not None and not network.num_classes:
                raise TesseraError("this model is conditioned on text, not on classes: leave label out")
            return {"text": [self.prompt]} | ({} if self.label is None else {"label": [self.label]})
        if not network.num_classes:
            if self.prompt or self.label is not None:
                raise TesseraError('this model is unconditional: send an empty prompt, "", and no label')
            return {}
        if self.label is not None and self.prompt and str(self.label) != self.prompt:
            raise TesseraError("this model takes a class, not a text: send it as prompt or as label, not both")
        return {"label": [find_class(model, str(self.prompt if self.label is None else self.label))]}


class EditParameters(GenerationParameters):
    """The fields of /v1/images/edits beside its files."""

    strength: float | None = Field(default=None, description="how much the image may change, above 0 and at most 1")

    def job(self, model: Model) -> JobParameters:
        return super().job(model).model_copy(update={"strength": self.strength})


def find_class(model: Model, text: str) -> int:
    """The number of the class with a name or number. Raises TesseraError with the nearest names."""
    names = model.class_names
    try:
        return int(LabelField().encode([text if text in names else text.strip()], model)[0])
    except TesseraError as error:
        if text in names or INTEGER.fullmatch(text.strip()):  # ambiguous, or out of range
            raise
        by_lower = {name.lower(): name for name in reversed(names)}
        near = difflib.get_close_matches(text.strip().lower()[:100], list(by_lower), n=5, cutoff=0.0)
        nearest = ", ".join(f"'{by_lower[name]}'" for name in near)
        raise TesseraError(
            f"'{shorten(text)}' is not a class of this model, which takes a class by name or number as prompt; the "
            f"nearest names: {nearest}"
        ) from error


def previews_of(partial_images: int, num_steps: int) -> set[int]:
    """The steps after which a stream shows an image: the first within two steps, the last before the end."""
    first, count = min(2, num_steps), partial_images
    return {first + (num_steps - first) * number // count for number in range(count)} - {num_steps}


def parse_settings(text: Any) -> Any:
    """The `settings` of a form, which are JSON. Raises TesseraError."""
    import json

    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise TesseraError("settings is not valid JSON") from None


def decode_base64(name: str, text: str) -> bytes:
    """The content of a base64 text or data: URL. Raises TesseraError."""
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            raise TesseraError(f"{name} is a data: URL without base64: write data:image/png;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise TesseraError(f"{name} is not base64: send an image file as base64") from None


def check_upload(name: str, content: bytes, max_pixels: int) -> None:
    """Raise TesseraError for a file that is not one image of at most max_pixels; nothing is decoded yet."""
    try:
        with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as image:
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
    except Exception:  # decoders raise anything
        raise TesseraError(f"{name} is no image that can be read: send a {', '.join(UPLOAD_FORMATS)}") from None
    if frames != 1:
        raise TesseraError(f"{name} has {frames} frames: send a file of one image")
    if width * height > max_pixels:
        raise TesseraError(f"{name} has {width} x {height} pixels: at most {max_pixels} are allowed")


def transparent_mask(name: str, content: bytes) -> bytes | None:
    """A PNG that is white where an image is fully transparent, black elsewhere; None where it is nowhere transparent.

    content: see `check_upload`. Raises TesseraError.
    """
    try:
        with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as image:
            if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
                return None
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except Exception:
        raise TesseraError(f"{name} is no image that can be read: it is damaged") from None
    mask = np.where(alpha == 0, np.uint8(255), np.uint8(0))[..., None]
    return images.to_png(mask) if mask.any() else None


@dataclass(frozen=True)
class ResolvedJob:
    """The request of a job, and the files it begins from by name, as PNGs."""

    request: SampleRequest
    inputs: dict[str, bytes]


def resolve_job(parameters: JobParameters, model: Model, guidance_model: Model | None, max_pixels: int) -> ResolvedJob:
    """What to sample, with all images read. Raises TesseraError."""
    size = tuple(parameters.size) if parameters.size is not None else None
    _check_format(parameters, len(size or image_size(model)) == 3)
    height, width = (size or image_size(model))[-2:]
    config, inputs, arguments = images_config(model), {}, {}

    def read(name: str, text: str, reader: Callable[[str, bytes], np.ndarray]) -> np.ndarray:
        content = decode_base64(name, text)
        check_upload(name, content, max_pixels)
        return reader(name, content)

    def read_pixels(name: str, content: bytes) -> np.ndarray:
        return read_image(name, content, config)

    controls = {}
    for name, control in parameters.controls.items():
        image = crop(read(f"the image of control {name}", control.image, read_pixels), (height, width))
        controls[name] = ControlInput(image, control.strength, control.is_map)
        if not name.replace("-", "").replace("_", "").isalnum():
            raise TesseraError(f"control {name!r} is not a name of letters, digits, - and _")
        inputs[f"control-{name}"] = images.to_png(image)
    if parameters.init_image is not None:
        image = read("init_image", parameters.init_image, read_pixels)
        arguments["init_image"] = crop(image, (height, width))
        inputs["init-image"] = images.to_png(arguments["init_image"])
        if parameters.mask is not None:
            mask = read("mask", parameters.mask, read_mask)
            if mask.shape[:2] != image.shape[:2]:
                raise TesseraError(
                    f"the mask has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), but the image has "
                    f"{image.shape[0]} x {image.shape[1]}: both need the same size"
                )
            arguments["mask"] = crop(mask, (height, width))[..., 0] >= 128
            inputs["mask"] = images.to_png(np.where(arguments["mask"], np.uint8(255), np.uint8(0))[..., None])
    elif parameters.mask is not None:
        raise TesseraError("a mask needs an image: send init_image, too")
    scale = parameters.guidance_scale
    request = SampleRequest(
        seeds=parameters.seeds or [0],
        condition=parameters.condition,
        guidance_scale=[float(each) for each in scale] if isinstance(scale, list) else scale,
        size=size,
        strength=parameters.strength,
        precision=parameters.precision,
        settings=parameters.settings,
        guidance_model=guidance_model,
        negative=parameters.negative,
        cut_long=parameters.cut_long,
        controls=controls,
        **arguments,
    )
    return ResolvedJob(request, inputs)


def _check_format(parameters: JobParameters, is_clip: bool) -> None:
    """Raise TesseraError if results cannot be written in the format of a job."""
    name = parameters.output_format
    if is_clip and name != "jpeg":
        clips.check_target(Path(f"clip.{name}"), parameters.fps or clips.DEFAULT_FPS)
    elif parameters.fps is not None or name in VIDEO_FORMATS:
        setting = name if name in VIDEO_FORMATS else "fps"
        raise TesseraError(f"{setting} is for files of clips: leave it out for {'JPEGs' if is_clip else 'images'}")


def command_options(parameters: JobParameters, files: Mapping[str, str]) -> dict[str, Any]:
    """The options of `tessera sample` for a job, beside settings, classes, prompts and seeds. files: of its inputs"""
    controls = {True: [], False: []}
    for name, control in parameters.controls.items():
        controls[control.is_map].append(f"{name}={files[f'control-{name}']}:{control.strength:g}")
    options = {
        "precision": None if parameters.precision == "float32" else parameters.precision,
        "size": None if parameters.size is None else "x".join(map(str, parameters.size)),
        "fps": parameters.fps,
        "format": parameters.output_format if parameters.output_format in VIDEO_FORMATS else None,
        "guidance-model": parameters.guidance_model,
        "init-image": files.get("init-image"),
        "strength": parameters.strength,
        "mask": files.get("mask"),
        "cut-prompts": parameters.cut_long or None,
        "control": controls[False],
        "control-map": controls[True],
    }
    return {name: value for name, value in options.items() if value not in (None, [])}
