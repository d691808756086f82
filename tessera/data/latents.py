"""Reading of cached latents, which `tessera data cache` computes once, by memory map.

    FOLDER/KEY/plan.json              codec, preprocessing and data
    FOLDER/KEY/000000.safetensors     a shard: samples of one size, with a checksum
    FOLDER/KEY/samples.safetensors    labels and data indices of all samples, in the order of the shards
    FOLDER/KEY/skipped.jsonl          the samples left out, and the reasons
    FOLDER/KEY/cache.json             counts, checksums, statistics; written last

KEY is the start of a hash of the specification, so any change of it gives another cache.

Shapes: N samples, B batch, C latent channels, h w height and width of the latents.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera import storage
from tessera.codecs import Codec
from tessera.data.buckets import Buckets, area_then_height
from tessera.data.clips import READING
from tessera.data.files import FilesDataset
from tessera.data.images import RESIZING, Dataset, ImagesConfig
from tessera.data.index import SPAN_COLUMNS
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.settings import diff

if TYPE_CHECKING:
    from tessera.data import AnyData
    from tessera.data.captions import EncodedCaptions

FORMAT = 2
PLAN, CACHE, SAMPLES, SKIPPED = "plan.json", "cache.json", "samples.safetensors", "skipped.jsonl"
LATENTS, FLIPPED, LABELS, INDICES = "latents", "flipped", "labels", "indices"  # tensors of a shard
OWN_FRAMES = "own_frames"  # the same, of clips with data.short=pad: the frames before the padding
METADATA_KEY = "tessera"  # the only key of a shard's metadata: safetensors writes several in random order
KEY_LENGTH = 16
OPEN_SHARDS = 64  # of a cache in a bucket that are mapped at once
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
REPAIR = "run the same `tessera data cache` again, which repairs it"


class LatentsDataset:
    """The samples of a finished cache: all valid samples of the data set. It can be pickled.

    labels: int32 [N]. indices: the index of each sample in the data set, int64 [N]. source: that data set, if it is
    open. text: the captions as tokens, where a network reads them. own_frames: of clips with data.short=pad, the frames
    before the padding, int32 [N].
    """

    source: Dataset | None = None
    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None
    own_frames: np.ndarray | None = None

    def __init__(self, folder: Path) -> None:
        """folder: FOLDER/KEY. Raises TesseraError if the cache is not finished, damaged, or of another format."""
        self.folder = folder
        plan, cache = read_plan(folder), read_json(storage.fetch(folder / CACHE), REPAIR)
        try:
            self.spec: dict[str, Any] = plan["spec"]
            self.description: str = plan["names"]["data"]
            self.class_names: tuple[str, ...] = tuple(cache["class_names"])
            self.statistics: dict[str, Any] = cache["statistics"]
            self.shards: list[dict[str, Any]] = cache["shards"]
            self.dtype: torch.dtype = DTYPES[self.spec["dtype"]]
            counts = np.array([shard["count"] for shard in self.shards], np.int64)
        except (KeyError, TypeError) as error:
            raise TesseraError(f"{folder / CACHE} is damaged ({error}): {REPAIR}") from None
        self.remote = storage.is_remote(folder)
        if self.remote:
            storage.listing(folder)
        for shard in self.shards:
            path = folder / shard["file"]
            size = storage.size_of(path)
            if size != shard["bytes"]:
                raise TesseraError(f"{path} is damaged: {size or 'no'} bytes of {shard['bytes']}; {REPAIR}")
        samples = load_tensors(folder / SAMPLES)
        self.labels, self.indices = samples[LABELS].numpy(), samples[INDICES].numpy()
        self.own_frames = samples[OWN_FRAMES].numpy() if OWN_FRAMES in samples else None
        self._ends = counts.cumsum()
        self._starts = self._ends - counts
        self._maps: dict[int, tuple[np.ndarray, ...]] = {}  # by shard, opened on demand

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hflip(self) -> bool:
        """Whether the cache contains latents of flipped images."""
        return bool(self.spec["hflip"])

    @cached_property
    def buckets(self) -> Buckets:
        """The image sizes in pixels, and the size of each sample."""
        sizes = sorted({tuple(shard["size"]) for shard in self.shards}, key=area_then_height)
        bucket_ids = [sizes.index(tuple(shard["size"])) for shard in self.shards]
        return Buckets(sizes, np.repeat(np.array(bucket_ids, np.int64), [shard["count"] for shard in self.shards]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def caption(self, index: int) -> str | None:
        """Of the image, where the data set is open and has captions."""
        caption = getattr(self.source, "caption", None)
        return None if caption is None else caption(int(self.indices[index]))

    def shard_ids(self) -> np.ndarray:
        """The file of each sample, int64 [N]"""
        return np.repeat(np.arange(len(self.shards)), [shard["count"] for shard in self.shards])

    def prefetch(self, indices: np.ndarray) -> None:
        """Download the files of samples that are read soon, if they are in a bucket."""
        if self.remote:
            for shard in np.unique(np.searchsorted(self._ends, indices, side="right")).tolist():
                storage.fetch(self.folder / self.shards[shard]["file"])

    def name(self, index: int) -> str:
        return f"{self.description} sample {self.indices[index]}"

    def gather(self, indices: np.ndarray, flip: np.ndarray) -> Tensor:
        """Raw moments of samples of one size, each of the image or of its horizontal flip.

        indices int64 [B], flip bool [B] -> float16 or bfloat16 [B, 2C, h, w], mean and standard deviation; [B, C, h, w]
        from a deterministic codec. Of clips with frames before h.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._starts[shards]
        out: np.ndarray | None = None
        for i, (shard, row, variant) in enumerate(zip(shards.tolist(), rows.tolist(), flip.tolist())):
            moments = self._map(shard)[variant]
            if out is None:
                out = np.empty((len(indices), *moments.shape[1:]), np.int16)
            elif moments.shape[1:] != out.shape[1:]:
                raise ValueError("samples that are gathered together must have one size: see buckets")
            out[i] = moments[row]
        if out is None:
            raise IndexError("no indices")
        return torch.from_numpy(out).view(self.dtype)

    def _map(self, shard: int) -> tuple[np.ndarray, ...]:
        """The latents, and those of flipped images if there are any; int16 stands for any 16-bit type."""
        if (arrays := self._maps.get(shard)) is None:
            tensors = load_tensors(self.folder / self.shards[shard]["file"])
            names = (LATENTS, FLIPPED) if self.hflip else (LATENTS,)
            while self.remote and len(self._maps) >= OPEN_SHARDS:  # a removed file takes space while it is mapped
                self._maps.pop(next(iter(self._maps)), None)
            arrays = self._maps[shard] = tuple(tensors[name].view(torch.int16).numpy() for name in names)
        return arrays


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a cache. Raises TesseraError if a version of Tessera with another format wrote it."""
    plan = read_json(storage.fetch(folder / PLAN), REPAIR)
    if (version := plan.get("spec", {}).get("format", 1)) != FORMAT:
        raise TesseraError(
            f"the latent cache {folder} has format {version}, of another version of Tessera; this version reads format "
            f"{FORMAT} only: delete it and run `tessera data cache` again"
        )
    return plan


def open_cache(
    folder: Path,
    config: "AnyData",
    codec: Codec,
    dataset: Dataset | None,
    command: str = "tessera data cache RECIPE",
) -> LatentsDataset:
    """The cache in a folder with exactly this data and codec.

    dataset: the opened data; None if the images are not available, so that changed images are not detected.
    command: what writes the cache, for the message. Raises TesseraError with the caches that exist and how they differ.
    """
    spec = cache_spec(config, codec, dataset)
    others = []
    for path in storage.glob(folder, f"*/{PLAN}"):
        differences = _differences(read_plan(path.parent), spec)
        if not differences and storage.exists(path.parent / CACHE):
            latents = LatentsDataset(path.parent)
            latents.source = dataset
            return latents
        others.append(f"{path.parent.name}: {'; '.join(differences) or 'not finished'}")
    where = storage.address(folder)
    existing = "\n".join(["existing caches:", *(f"  {other}" for other in others)]) if others else "there is none"
    raise TesseraError(f"no cache in {where} has this codec, preprocessing and data; {existing}\ncreate it: {command}")


def _differences(plan: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """How a cache differs from a specification. How it is stored does not matter, nor do unused flips."""
    before = {name: value for name, value in plan["spec"].items() if name in spec}
    if before.get("hflip"):
        before["hflip"] = spec["hflip"]
    names = plan["names"]
    return [
        f"{name} was {short(old)}" + (f" ({names[name]})" if name in names else "") + f", is {short(new)}"
        for name, old, new in diff(_with_defaults(before), _with_defaults(spec))
    ]


def _with_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    defaults = ImagesConfig().model_dump(mode="json", exclude={"hflip", "cache"})
    return {**spec, "images": {**defaults, **spec.get("images", {})}}


def short(value: Any) -> Any:
    """The beginning of a hash; any other value as it is."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else value


def cache_spec(config: "AnyData", codec: Codec, dataset: Dataset | None) -> dict[str, Any]:
    """Everything that the raw moments of a data set depend on. Settings with default values are left out, so that a new
    setting does not invalidate existing caches."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    names = ImagesConfig.model_fields.keys() - {"hflip", "cache"}
    images = {name: value for name, value in settings.items() if name in names}
    images |= {"size": list(config.size), "channels": config.channels, "resizing": RESIZING}
    images |= {} if config.frames is None else {"reading": READING}
    spec = {"codec": codec.fingerprint(), "images": images, "hflip": config.hflip}
    return spec if dataset is None else {**spec, "data": data_fingerprint(config, dataset)}


def data_fingerprint(config: "AnyData", dataset: Dataset) -> str:
    """A hash of the samples and labels of a data set: of the names, sizes and dates of its files, or the digests in its
    index; for an embedded data set, of its settings. The location of the files does not matter."""
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    if not isinstance(dataset, FilesDataset):
        digest.update(config.model_dump_json().encode())
        return digest.hexdigest()
    table = dataset.table
    has_digests = not table["digest"].null_count
    columns = ["path", "offset", "length", "label"] + (["digest"] if has_digests else [])
    columns += [name for name in SPAN_COLUMNS if table[name].null_count < len(table)]
    digest.update(f"column {dataset.config.image}".encode())
    for start in range(0, len(table), 65536):
        digest.update(json.dumps(table.slice(start, 65536).select(columns).to_pydict()).encode())
    for file in [] if has_digests else dataset.files():
        try:
            state = storage.stat(file)
        except OSError:  # reported when the file is read
            continue
        digest.update(f"{state.st_size} {int(state.st_mtime)}\n".encode())
    return digest.hexdigest()


def cache_key(spec: dict[str, Any]) -> str:
    """The name of the cache with this specification."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as a memory map. Raises TesseraError."""
    try:
        with safe_open(storage.fetch(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (OSError, SafetensorError) as error:
        raise TesseraError(f"{path} is damaged ({error}): {REPAIR}") from None
