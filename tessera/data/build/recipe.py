"""The recipe of `tessera data build`: which samples are read, which are selected, and how they are written."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from tessera.data.check.decisions import SAMPLE_KINDS, excluded_kinds
from tessera.data.files import FilesConfig
from tessera.data.images import MAX_FPS, Level
from tessera.errors import TesseraError
from tessera.settings import Settings, apply_overrides, read_yaml, validate

OWN_KINDS = {  # kinds of findings that have settings of their own, which say from which value on
    "small": "min_side",
    "extreme-aspect": "max_aspect",
    "missing-captions": "require_captions",
    "empty-captions": "require_captions",
    "short-clips": "frames",
}
CLIP_KINDS = ("frozen", "scene-cuts", "odd-fps", "low-fps", "variable-fps")  # findings of clips
KINDS = ("corrupt", *(kind for kind in SAMPLE_KINDS if kind not in OWN_KINDS))
ENCODINGS = {"images": ("jpeg", "png", "webp"), "clips": ("mp4", "webp")}  # the first is the default


class Source(Settings):
    """One of the places that samples come from: any layout that `data.path` reads."""

    path: str = Field(description="as data.path: a folder, tables, tars, an index, hub:owner/name, s3://...")
    kind: Literal["files", "folder", "frame-folders", "parquet"] = Field(default="files", description="as data.kind")
    classes: Literal["auto", "folders", "none"] = Field(default="auto", description="as data.classes")
    image: str = Field(default="auto", description="as data.image: the column of images in tables")
    label: str | None = Field(default="auto", description="as data.label: the column of labels")
    caption: str | None = Field(default="auto", description="as data.caption: the column of captions")
    split: str | None = Field(default=None, description="as data.split")


class CaptionerConfig(Settings):
    """A model that describes images: any image-text-to-text model that transformers loads."""

    source: str = Field(description="its folder, as transformers saves it")
    replace: bool = Field(default=False, description="describe every image, also those that have a caption")
    prompt: str | None = Field(default=None, description="text that precedes the description; null: none")
    max_tokens: PositiveInt = Field(default=64, description="of a description")
    batch_size: PositiveInt = Field(default=16, description="images that are described at once")
    device: str = Field(default="auto", description="auto, cpu, cuda or mps")


def _as_sources(value: Any) -> Any:
    """Expand one path, or a list of paths, to sources."""
    if isinstance(value, dict):
        return (value,)
    values = [value] if isinstance(value, str) else value
    return [{"path": each} if isinstance(each, str) else each for each in values] if isinstance(values, list) else value


def _as_captioner(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class BuildRecipe(Settings):
    """Everything that `tessera data build` reads, selects and writes."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(_as_sources)] = Field(
        description="paths, or mappings with a path and the settings of its columns", min_length=1
    )
    output: str = Field(description="the folder of the data set, on a disk or in a bucket", min_length=1)
    work: str | None = Field(
        default=None,
        description="folder of measurements, on a disk that all processes share; null: OUTPUT/work, of a bucket in the "
        "cache folder",
    )

    size: PositiveInt | None = Field(
        default=512, description="pixels of the shorter side, to which larger images are resized; null: no resizing"
    )
    upscale: bool = Field(default=False, description="also enlarge images whose shorter side is below size")
    resampling: Literal["lanczos", "bicubic", "box"] = Field(default="lanczos", description="filter of the resizing")
    channels: Literal[1, 3] = Field(default=3, description="3 for color, 1 for gray")
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), description="color behind transparent pixels"
    )

    frames: PositiveInt | None = Field(
        default=None, description="samples are clips, which are left out if they have fewer frames; null: images"
    )
    fps: Annotated[float, Field(gt=0, le=MAX_FPS)] | None = Field(
        default=None, description="frames per second that clips are resampled to; null: those of each file"
    )
    max_frames: PositiveInt | None = Field(
        default=None, description="frames of a clip that are written, the first ones; null: 512"
    )

    min_side: PositiveInt | None = Field(
        default=None, description="pixels of the shorter side below which an image is left out; null: size"
    )
    max_aspect: Annotated[float, Field(ge=1)] | None = Field(
        default=3.0, description="longer side over shorter above which an image is left out; null: no limit"
    )
    require_captions: bool = Field(default=False, description="leave out images without a caption")
    exclude: tuple[str, ...] = Field(
        default=("corrupt", "duplicates", "near-duplicates", "leaks", "missing-labels", "loose-images"),
        description="kinds of findings of `tessera data check` whose samples are left out",
    )
    reference: str | None = Field(
        default=None, description="validation data, whose images are left out (leaks, near-leaks)"
    )
    captioner: Annotated[CaptionerConfig | None, BeforeValidator(_as_captioner)] = Field(
        default=None, description="a model that describes images without a caption; null: none"
    )

    format: Literal["tar", "parquet"] = Field(default="tar", description="of the shards: WebDataset tars, or parquet")
    samples_per_shard: PositiveInt = Field(default=10_000, description="at most; shards differ by one sample at most")
    encoding: Literal["auto", "jpeg", "png", "webp", "mp4"] = Field(
        default="auto",
        description="of images jpeg (auto), png (lossless) or webp; of clips mp4 (auto: H.264, crf 18) or webp",
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(default=95, description="of jpeg and webp")
    shuffle: int | None = Field(
        default=None, ge=0, description="seed of the order of the samples; null: the order of the sources"
    )

    @field_validator("exclude")
    @classmethod
    def _check_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if setting := OWN_KINDS.get(kind):
                raise ValueError(f"'{kind}' has a setting of its own: set {setting}")
        try:
            excluded_kinds(kinds)
        except TesseraError as error:
            raise ValueError(str(error).removeprefix("--exclude: ")) from None
        return kinds

    @model_validator(mode="after")
    def _check_together(self) -> "BuildRecipe":
        if self.size is None and self.upscale:
            raise ValueError("upscale has no effect without size: set size, or leave upscale out")
        if self.size is not None and self.min_side is not None and self.min_side > self.size and self.upscale:
            raise ValueError(f"min_side {self.min_side} leaves out all that upscale would enlarge to {self.size}")
        return self

    @model_validator(mode="after")
    def _check_clips(self) -> "BuildRecipe":
        samples = "images" if self.frames is None else "clips"
        if self.encoding not in ("auto", *ENCODINGS[samples]):
            raise ValueError(f"encoding {self.encoding} is not for {samples}: give {' or '.join(ENCODINGS[samples])}")
        if self.frames is not None:
            if self.max_frames is not None and self.max_frames < self.frames:
                raise ValueError(f"max_frames {self.max_frames} is less than frames {self.frames}, the least of a clip")
            return self
        for name in ("fps", "max_frames"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for clips: set frames, the least number of frames, such as frames: 16")
        if kinds := [kind for kind in self.exclude if kind in CLIP_KINDS]:
            raise ValueError(f"exclude {kinds[0]} is for clips: set frames, the least number of frames")
        if any(source.kind == "frame-folders" for source in self.sources):
            raise ValueError("kind frame-folders is for clips: set frames, the least number of frames")
        return self

    @property
    def file_format(self) -> str:
        """The encoding, also where the recipe leaves it to the kind of the samples."""
        return ENCODINGS["images" if self.frames is None else "clips"][0] if self.encoding == "auto" else self.encoding

    @property
    def least_side(self) -> int:
        """Pixels of the shorter side below which an image is left out."""
        if self.min_side is not None:
            return self.min_side
        return 1 if self.size is None or self.upscale else self.size

    def files_config(self, source: Source) -> FilesConfig:
        """The data of a source. Images and frames are read at their own size."""
        settings = {"channels": self.channels, "background": self.background, "frames": self.frames, "fps": self.fps}
        return FilesConfig(size=(1, 1), **settings, **source.model_dump())

    def identity(self) -> dict[str, Any]:
        """Everything that the written bytes depend on."""
        return self.model_dump(mode="json", exclude={"output", "work"})


def read_recipe(path: Path, overrides: list[str] | None = None) -> BuildRecipe:
    """Read a recipe with overrides such as `size=256`. Raises TesseraError."""
    data = apply_overrides(read_yaml(path, BuildRecipe), overrides or [], BuildRecipe, "size=256")
    return validate(BuildRecipe, data, f"the recipe {path}")
