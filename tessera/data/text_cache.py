"""Cached embeddings of captions: written once by `tessera data cache`, and read by memory map.

    FOLDER/text/KEY/plan.json             the text encoder and the captions
    FOLDER/text/KEY/000000.safetensors    a shard: embeddings of texts of true length, float16, with a checksum
    FOLDER/text/KEY/texts.safetensors     the number of tokens of each text, and whether it was cut
    FOLDER/text/KEY/text.json             counts and checksums; written last

Texts are numbered as in `Captions`: by the sample and the caption in which each appears first.

Shapes: U texts, n texts of a shard, T tokens of a shard, E channels.
"""

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tessera import storage
from tessera.data.cache import ShardedCache, deterministic, write_file
from tessera.data.captions import Captions, encode_batch
from tessera.data.latents import PLAN, REPAIR, cache_key, load_tensors, short
from tessera.encoders.text import FrozenConfig, TextEncoder
from tessera.errors import TesseraError
from tessera.files import read_json, remove_partials
from tessera.settings import diff

FORMAT = 1
FOLDER, TEXTS, SUMMARY = "text", "texts.safetensors", "text.json"
EMBEDDINGS, LENGTHS, IS_CUT = "embeddings", "lengths", "is_cut"  # tensors
TEXTS_PER_SHARD = 1024


def text_spec(captions: Captions, encoder: TextEncoder) -> dict[str, Any]:
    """Everything that the embeddings of captions depend on."""
    facts = {"text encoder": encoder.fingerprint(), "captions": captions.digest, "number of captions": len(captions)}
    return {**facts, "format": FORMAT}


class TextCacheWriter(ShardedCache):
    """Writes the embeddings of the captions of one data set. It can be pickled: a process builds its encoder."""

    def __init__(
        self, folder: Path, captions: Captions, config: FrozenConfig, encoder: TextEncoder, description: str
    ) -> None:
        """folder: of all caches; description: of the data"""
        self.captions, self.config, self.encoder = captions, config, encoder
        self.spec = text_spec(captions, encoder)
        self.names = {"text encoder": config.name, "captions": description}
        self.key = cache_key(self.spec)
        self.folder = folder / FOLDER / self.key

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None}

    def __len__(self) -> int:
        return -(-len(self.captions) // TEXTS_PER_SHARD)

    def indices(self, shard: int) -> np.ndarray:
        return np.arange(shard * TEXTS_PER_SHARD, min((shard + 1) * TEXTS_PER_SHARD, len(self.captions)))

    def write(
        self, shards: Iterable[int], device: torch.device, batch_size: int, num_readers: int = 1
    ) -> Generator[int, None, None]:
        if self.encoder is None:
            self.encoder = self.config.build()
        self.encoder.to(device)
        with deterministic(device):
            for shard in shards:
                texts = self.captions.texts.slice(shard * TEXTS_PER_SHARD, TEXTS_PER_SHARD).to_pylist()
                values, is_cut = zip(*encode_batch(self.encoder, texts, batch_size))
                tensors = {
                    EMBEDDINGS: torch.from_numpy(np.concatenate(values)),
                    LENGTHS: torch.tensor([len(each) for each in values], dtype=torch.int32),
                    IS_CUT: torch.tensor(is_cut),
                }
                self.save_shard(shard, tensors, {})
                yield len(texts)

    def finish(self) -> dict[str, Any] | None:
        if not all(storage.exists(self.path(shard)) for shard in range(len(self))):
            return None
        shards, lengths, is_cut = [], [], []
        for shard, _, tensors in self.shards():
            shards.append(shard)
            lengths.append(tensors[LENGTHS])
            is_cut.append(tensors[IS_CUT])
        facts = {LENGTHS: torch.cat(lengths), IS_CUT: torch.cat(is_cut)}
        counts = {"count": len(self.captions), "tokens": int(facts[LENGTHS].sum()), "cut": int(facts[IS_CUT].sum())}
        summary: dict[str, Any] = {**counts, "shards": shards}
        write_file(self.folder / TEXTS, save(facts))
        write_file(self.folder / SUMMARY, json.dumps(summary, indent=1).encode())
        remove_partials(self.folder)  # of processes that were killed
        return summary


class CachedTokens:
    """The embeddings of a finished cache, as `Tokens`. It can be pickled.

    lengths: int64 [U]. is_cut: bool [U].
    """

    def __init__(self, folder: Path) -> None:
        """folder: FOLDER/text/KEY. Raises TesseraError if the cache is damaged."""
        self.folder = folder
        summary, texts = read_json(storage.fetch(folder / SUMMARY), REPAIR), load_tensors(folder / TEXTS)
        try:
            self.shards: list[dict[str, Any]] = summary["shards"]
            self.lengths = texts[LENGTHS].numpy().astype(np.int64)
            self.is_cut = texts[IS_CUT].numpy()
            if storage.is_remote(folder):
                storage.listing(folder)
            for shard in self.shards:
                path = folder / shard["file"]
                size = storage.size_of(path)
                if size != shard["bytes"]:
                    raise TesseraError(f"{path} is damaged: {size or 'no'} bytes of {shard['bytes']}; {REPAIR}")
        except (KeyError, TypeError) as error:
            raise TesseraError(f"{folder / SUMMARY} is damaged ({error}): {REPAIR}") from None
        starts = self.lengths.cumsum() - self.lengths
        self._starts = starts - starts[np.arange(len(starts)) // TEXTS_PER_SHARD * TEXTS_PER_SHARD]  # in the shard
        self._maps: dict[int, np.ndarray] = {}  # by shard, opened on demand

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """float16 [M, E]"""
        shard, start = number // TEXTS_PER_SHARD, self._starts[number]
        if (values := self._maps.get(shard)) is None:
            values = load_tensors(self.folder / self.shards[shard]["file"])[EMBEDDINGS].numpy()
            self._maps[shard] = values
        return values[start : start + self.lengths[number]]


def open_text_cache(
    folder: Path, captions: Captions, encoder: TextEncoder, command: str = "tessera data cache RECIPE"
) -> CachedTokens:
    """The cache in a folder of exactly these captions and this encoder.

    command: what writes the cache, for the message. Raises TesseraError with the caches that exist and how they differ.
    """
    spec, others = text_spec(captions, encoder), []
    for path in storage.glob(folder / FOLDER, f"*/{PLAN}"):
        plan = read_json(storage.fetch(path), REPAIR)
        before, names = plan.get("spec", {}), plan.get("names", {})
        differences = [
            f"{name} was {short(old)}" + (f" ({names[name]})" if name in names else "") + f", is {short(new)}"
            for name, old, new in diff(before, spec)
        ]
        if not differences and storage.exists(path.parent / SUMMARY):
            return CachedTokens(path.parent)
        others.append(f"{path.parent.name}: {'; '.join(differences) or 'not finished'}")
    where = storage.address(folder)
    existing = "\n".join(["existing caches:", *(f"  {other}" for other in others)]) if others else "there is none"
    raise TesseraError(
        f"no cache of text in {where} has this text encoder and these captions; {existing}\ncreate it: {command}, or "
        "leave text.cache and data.cache out to encode the captions at the start of each run"
    )
