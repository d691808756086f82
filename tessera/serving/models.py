"""The models of a server: a few are in memory, the others are loaded when a job needs them."""

import asyncio
import gc
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tessera.bundle import weights_hash
from tessera.errors import TesseraError
from tessera.generation import image_size
from tessera.interop import load
from tessera.model import Model
from tessera.serving.engine import LoadedModel

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


@dataclass
class ModelEntry:
    """A model by name. loader: reads it, in another thread; options: of `tessera sample`, to read it in the same way"""

    name: str
    path: str
    loader: Callable[[], Model]
    options: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    loaded: LoadedModel | None = None
    users: int = 0  # jobs that need it now
    last_used: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # known since it was loaded first


def parse_models(
    words: Sequence[str], device: str = "auto", adapters: Sequence[str] = (), **options: Any
) -> list[ModelEntry]:
    """PATH or NAME=PATH of each model. The name of a path is its last part. options: of `load`. Raises TesseraError."""
    if adapters and len(words) > 1:
        raise TesseraError("--adapter needs one model: serve bundles that hold their adapters, or one process for each")
    entries: dict[str, ModelEntry] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name or Path(word).expanduser().exists():
            path = word
            name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).expanduser().resolve().name).strip("-._") or "model"
        if not NAME.fullmatch(name):
            raise TesseraError(f"model name '{name}' is not valid: use letters, digits, '.', '_' and '-'")
        if name in entries:
            raise TesseraError(f"two models have the name '{name}': give others, as in NAME={path}")
        if not load.is_model(path):
            raise TesseraError(f"no model at {path}: {load.ACCEPTED}")

        def loader(path: str = path) -> Model:
            return load.load(path, device=device, adapters=list(adapters), **options)

        entries[name] = ModelEntry(name, path, loader, _command_options(adapters, options))
    return list(entries.values())


def _command_options(adapters: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load` as options of `tessera sample`, without those that are not set."""
    named = {"adapter": list(adapters)} | {name.replace("_", "-"): value for name, value in options.items()}
    return {name: value for name, value in named.items() if value not in (None, False, [])}


def describe(model: Model) -> dict[str, Any]:
    """What a client must know of a model."""
    config, network = model.config, model.config.network
    return {
        "network": network.summary(),
        "diffusion": config.diffusion.summary(),
        "size": list(image_size(model)),
        "size_multiple": model.codec.factor * network.size_multiple,
        "clips": network.is_temporal,
        "classes": model.class_names if network.num_classes else [],
        "text": network.uses_text,
        "condition": list(network.condition_fields),
        "controls": list(model.network.controls),
        "adapters": list(model.adapters),
        "sampling": config.sampling.model_dump(mode="json"),
        "can_be_guided": bool(model.null_fields or network.uses_text),
    }


class ModelPool:
    """At most `max_loaded` models in memory; the one that was used longest ago makes room for another.

    on_load: called with the seconds that loading took
    """

    def __init__(
        self, entries: Sequence[ModelEntry], max_loaded: int = 1, on_load: Callable[[str, float], None] | None = None
    ) -> None:
        if max_loaded < 1:
            raise TesseraError(f"max_loaded is {max_loaded}; use 1 or more")
        self.entries = {entry.name: entry for entry in entries}
        self.max_loaded = max_loaded
        self._on_load = on_load
        self._lock = asyncio.Lock()  # first come, first served: a model in constant use cannot keep others out
        self._idle = asyncio.Event()

    @property
    def default(self) -> str:
        """The first model; empty if there is none yet, as on a server that shows runs."""
        return next(iter(self.entries), "")

    @property
    def loaded(self) -> list[ModelEntry]:
        return [entry for entry in self.entries.values() if entry.loaded is not None]

    async def acquire(self, *names: str) -> list[LoadedModel]:
        """The models in memory until each is released. Waits for room. Raises KeyError and TesseraError."""
        entries = [self.entries[name] for name in names]
        if len(set(names)) > self.max_loaded:
            raise TesseraError(
                f"this needs {len(set(names))} models in memory, but the server holds at most {self.max_loaded}"
            )
        async with self._lock:
            for entry in entries:  # none of them makes room for another
                entry.users += 1
            try:
                for entry in entries:
                    if entry.loaded is None:
                        await self._make_room()
                        await self._load(entry)
            except BaseException:
                for entry in entries:
                    self._free(entry)
                raise
        return [self._use(entry) for entry in entries]

    def release(self, name: str) -> None:
        self._free(self.entries[name])

    def _free(self, entry: ModelEntry) -> None:
        entry.users -= 1
        if not entry.users:
            self._idle.set()

    def _use(self, entry: ModelEntry) -> LoadedModel:
        entry.last_used = time.monotonic()
        assert entry.loaded is not None
        return entry.loaded

    async def _make_room(self) -> None:
        while len(self.loaded) >= self.max_loaded:
            idle = [entry for entry in self.loaded if not entry.users]
            if idle:
                oldest = min(idle, key=lambda entry: entry.last_used)
                oldest.loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                logger.info("unloaded", extra={"model": oldest.name})
            else:
                self._idle.clear()
                await self._idle.wait()

    async def _load(self, entry: ModelEntry) -> None:
        start = time.monotonic()
        model, weights = await asyncio.to_thread(_load, entry.loader)
        entry.loaded, entry.facts = LoadedModel(entry.name, entry.path, model, weights, entry.options), describe(model)
        seconds = time.monotonic() - start
        logger.info("loaded", extra={"model": entry.name, "seconds": round(seconds, 3)})
        if self._on_load is not None:
            self._on_load(entry.name, seconds)


def _load(loader: Callable[[], Model]) -> tuple[Model, str]:
    model = loader()
    model.codec  # noqa: B018 (loaded at first use)
    if model.config.text is not None:
        model.text_encoder  # noqa: B018
    return model, weights_hash(model.network)
