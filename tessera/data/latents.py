"""Latents that were computed once (`tessera data cache`), read by memory map.

    FOLDER/KEY/plan.json              what is cached: codec, preprocessing, data
    FOLDER/KEY/000000.safetensors     a shard: samples of one size; whole by itself, with its checksum
    FOLDER/KEY/samples.safetensors    labels and numbers of all samples, in the order of the shards
    FOLDER/KEY/skipped.jsonl          what was left out, and why
    FOLDER/KEY/cache.json             counts, checksums, statistics: written last

KEY is the beginning of a hash of the facts in plan.json, so that a change of any of them is another cache.

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

from tessera.codecs import Codec
from tessera.data.buckets import Buckets
from tessera.data.files import FilesDataset
from tessera.data.images import RESIZING, Dataset, ImagesConfig
from tessera.errors import TesseraError
from tessera.settings import diff

if TYPE_CHECKING:
    from tessera.data import AnyData

FORMAT = 1
PLAN, CACHE, SAMPLES, SKIPPED = "plan.json", "cache.json", "samples.safetensors", "skipped.jsonl"
LATENTS, FLIPPED, LABELS, INDICES = "latents", "mirrored", "labels", "numbers"  # tensors of a shard
METADATA_KEY = "tessera"  # the one key of a shard's metadata: of several, safetensors writes the order at random
KEY_LENGTH = 16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
AGAIN = "run the same `tessera data cache` again, which mends it"


class LatentsDataset:
    """The samples of a finished cache; sample i is the i-th that could be used. It may be pickled.

    labels int32 [N], numbers int64 [N]: which sample of the data each one is.
    """

    def __init__(self, folder: Path) -> None:
        """folder: that of one cache. Raises TesseraError if it is not finished, or damaged."""
        self.folder = folder
        plan, told = read_json(folder / PLAN), read_json(folder / CACHE)
        try:
            self.spec: dict[str, Any] = plan["facts"]
            self.description: str = plan["told"]["data"]
            self.class_names: tuple[str, ...] = tuple(told["class_names"])
            self.statistics: dict[str, Any] = told["statistics"]
            self.shards: list[dict[str, Any]] = told["shards"]
            self.dtype: torch.dtype = DTYPES[self.spec["dtype"]]
            counts = np.array([shard["count"] for shard in self.shards], np.int64)
        except (KeyError, TypeError) as error:
            raise TesseraError(f"{folder / CACHE} is damaged ({error}): {AGAIN}") from None
        for shard in self.shards:
            path = folder / shard["file"]
            found = path.stat().st_size if path.exists() else None
            if found != shard["bytes"]:
                raise TesseraError(f"{path} is damaged: {found or 'no'} bytes of {shard['bytes']}; {AGAIN}")
        samples = load_tensors(folder / SAMPLES)
        self.labels, self.indices = samples[LABELS].numpy(), samples[INDICES].numpy()
        self._ends = counts.cumsum()
        self._starts = self._ends - counts
        self._maps: dict[int, tuple[np.ndarray, ...]] = {}  # by shard, opened when first asked for

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hflip(self) -> bool:
        """Whether there are latents of mirrored images."""
        return bool(self.spec["hflip"])

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes of images in pixels, and which one each sample has."""
        sizes = sorted({tuple(shard["size"]) for shard in self.shards}, key=lambda one: (one[0] * one[1], one[0]))
        place = [sizes.index(tuple(shard["size"])) for shard in self.shards]
        return Buckets(sizes, np.repeat(np.array(place, np.int64), [shard["count"] for shard in self.shards]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.description} sample {self.indices[index]}"

    def gather(self, indices: np.ndarray, flip: np.ndarray) -> Tensor:
        """Raw moments of samples of one size, of the image or of its mirror image.

        indices int64 [B], mirrored bool [B] -> float16 or bfloat16 [B, 2C, h, w], mean and standard deviation; or
        [B, C, h, w] of a codec whose latents follow from the pixels.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._ends, indices, side="right")
        places = indices - self._starts[shards]
        out: np.ndarray | None = None
        for row, (shard, place, variant) in enumerate(zip(shards.tolist(), places.tolist(), flip.tolist())):
            moments = self._map(shard)[variant]
            if out is None:
                out = np.empty((len(indices), *moments.shape[1:]), np.int16)
            elif moments.shape[1:] != out.shape[1:]:
                raise ValueError("samples that are gathered at once must be of one size: see buckets")
            out[row] = moments[place]
        if out is None:
            raise IndexError("no samples are asked for")
        return torch.from_numpy(out).view(self.dtype)

    def _map(self, shard: int) -> tuple[np.ndarray, ...]:
        """The latents, and the mirrored ones where there are any, as int16, which stands for every type of 16 bits."""
        if (found := self._maps.get(shard)) is None:
            tensors = load_tensors(self.folder / self.shards[shard]["file"])
            names = (LATENTS, FLIPPED) if self.hflip else (LATENTS,)
            found = self._maps[shard] = tuple(tensors[name].view(torch.int16).numpy() for name in names)
        return found


def open_cache(
    folder: Path,
    config: "AnyData",
    codec: Codec,
    source: Dataset | None,
    command: str = "tessera data cache RECIPE",
) -> LatentsDataset:
    """The cache below a folder that was made of this data by this codec; no other will do.

    source: the opened data; None where the images are not at hand, so that whether they have changed is not known.
    command: what makes the cache, for the message. Raises TesseraError that says which caches there are, and in what
    they differ.
    """
    wanted = cache_spec(config, codec, source)
    found = sorted(folder.glob(f"*/{PLAN}"))
    others = []
    for path in found:
        plan = read_json(path)
        differing = _differing(plan, wanted)
        finished = (path.parent / CACHE).exists()
        if not differing and finished:
            return LatentsDataset(path.parent)
        others.append(f"{path.parent.name}: {'; '.join(differing) or 'begun, but not finished'}")
    there = "\n".join(["these are there:", *(f"  {other}" for other in others)]) if others else "there is none"
    raise TesseraError(f"no cache in {folder} is of this codec, preprocessing and data; {there}\nmake it: {command}")


def _differing(plan: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what a cache is not what is wanted, in words. How it is stored does not matter; flips may be there unused."""
    was = {name: value for name, value in plan.get("facts", {}).items() if name in wanted}
    told = plan.get("told", {})
    if was.get("hflip"):
        was["hflip"] = wanted["hflip"]
    return [
        f"{name} was {_short(old)}" + (f" ({told[name]})" if name in told else "") + f", is {_short(new)}"
        for name, old, new in diff(_said(was), _said(wanted))
    ]


def _said(facts: dict[str, Any]) -> dict[str, Any]:
    """With the settings that went unsaid."""
    usual = ImagesConfig().model_dump(mode="json", exclude={"hflip", "cache"})
    return {**facts, "images": {**usual, **facts.get("images", {})}}


def _short(value: Any) -> Any:
    return value[:8] if isinstance(value, str) and len(value) == 64 else value


def cache_spec(config: "AnyData", codec: Codec, source: Dataset | None) -> dict[str, Any]:
    """All that raw moments of a data set depend on. Settings as they are by default go unsaid, so that a new one
    leaves old caches good."""
    told = config.model_dump(mode="json", exclude_defaults=True)
    images = {name: told[name] for name in ImagesConfig.model_fields if name in told and name not in ("hflip", "cache")}
    images |= {"size": list(config.size), "channels": config.channels, "resizing": RESIZING}
    known = {"codec": codec.fingerprint(), "images": images, "hflip": config.hflip}
    return known if source is None else {**known, "data": data_fingerprint(config, source)}


def data_fingerprint(config: "AnyData", source: Dataset) -> str:
    """A hash of which samples a data set has: the names, sizes and dates of its files, or the digests that its index
    has of them, and its labels; of an embedded set its settings. Where the files lie does not matter."""
    whole = hashlib.sha256(json.dumps(source.class_names).encode())
    if not isinstance(source, FilesDataset):
        whole.update(config.model_dump_json().encode())
        return whole.hexdigest()
    table = source.table
    digests = not table["digest"].null_count
    columns = ["path", "offset", "length", "label"] + (["digest"] if digests else [])
    whole.update(f"column {source.config.image}".encode())
    for start in range(0, len(table), 65536):
        whole.update(json.dumps(table.slice(start, 65536).select(columns).to_pydict()).encode())
    for file in [] if digests else source.files():
        try:
            state = file.stat()
        except OSError:  # reading it says what is wrong
            continue
        whole.update(f"{state.st_size} {int(state.st_mtime)}\n".encode())
    return whole.hexdigest()


def cache_key(told: dict[str, Any]) -> str:
    """The name of the cache that has these facts."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def read_json(path: Path) -> dict[str, Any]:
    """Raises TesseraError if there is no such file, or it holds something else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TesseraError(f"{path} is not there: {path.parent} is no finished cache of latents") from None
    except (OSError, ValueError) as error:
        raise TesseraError(f"{path} is damaged ({error}): {AGAIN}") from None
    if not isinstance(told, dict):
        raise TesseraError(f"{path} is damaged (it holds no mapping): {AGAIN}")
    return told


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as a memory map. Raises TesseraError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise TesseraError(f"{path} is damaged ({error}): {AGAIN}") from None
