"""Many pictures drawn onto disk, a shard at a time: what is drawn once is never drawn again, whatever ends the program.

Shapes: N pictures, H W height and width, C channels (1 or 3).
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tessera import randomness, runtime
from tessera.bundle import Model, weights_hash
from tessera.codecs import StoredCodec, StoredConfig
from tessera.codecs.codec import listed_numbers
from tessera.evaluation.sources import ImageShard, rows, shards
from tessera.files import atomic_file, read_array, write_array
from tessera.generation import pipeline
from tessera.generation.resumable import begin_work
from tessera.runtime import Distributed, Precision
from tessera.sampling import SamplingConfig

STREAM = 0x636C6173  # of randomness: which classes are drawn
ClassPolicy = Literal["uniform", "balanced"]


@dataclass(frozen=True)
class BulkRequest:
    """What a model is to draw: picture i has seeds[i] and, in a model with classes, classes[i]."""

    seeds: Sequence[int]
    classes: Sequence[int] | None
    policy: str = "as told"  # how the classes were chosen
    settings: dict[str, Any] = field(default_factory=dict)  # of the sampler: changes to the model's own
    guidance: float | None = None
    precision: Precision = "float32"
    size: tuple[int, int] | None = None  # of the pictures, if not the trained one


def asked_by_policy(model: Model, count: int, policy: ClassPolicy, first_seed: int = 0, **more: Any) -> BulkRequest:
    """`count` pictures of consecutive seeds; their classes in turn, or each drawn evenly by its seed."""
    seeds, classes = range(first_seed, first_seed + count), model.config.network.num_classes
    if not classes:
        return BulkRequest(seeds, None, "without classes", **more)
    if policy == "balanced":
        return BulkRequest(seeds, [number % classes for number in range(count)], policy, **more)
    drawn = randomness.uniform(0, torch.tensor(list(seeds), dtype=torch.int64), STREAM)[:, 0]
    return BulkRequest(seeds, (drawn.double() * classes).long().tolist(), policy, **more)


class BulkSamples:
    """What a model draws, kept in a folder: a subject of evaluation, and what `tessera sample --npz` packs."""

    def __init__(self, model: Model, asked: BulkRequest, folder: Path, batch: int = 50, where: str = "a model") -> None:
        self.model, self.asked, self.folder, self.batch, self.where = model, asked, folder, batch, where
        network, codec = model.config.network, model.codec
        self.count = len(asked.seeds)
        self.size = asked.size or (network.input_size[0] * codec.factor, network.input_size[1] * codec.factor)
        self.channels = codec.pixel_channels
        self.class_names = tuple(model.config.class_names)

    def begin(self, ranks: Distributed) -> None:
        """Claim the folder. Raises TesseraError if it holds pictures of another plan."""
        if ranks.is_main:
            begin_work(self.folder, self.plan)
        ranks.barrier()

    @cached_property
    def sampling(self) -> SamplingConfig:
        return pipeline.sampling_config(self.model, guidance=self.asked.guidance, **self.asked.settings)

    @cached_property
    def weights(self) -> str:
        return weights_hash(self.model.network)

    @property
    def protocol(self) -> dict[str, Any]:
        """How the pictures are drawn, whatever the model."""
        seeds, asked = self.asked.seeds, self.asked
        consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
        dtype = runtime.autocast_dtype(asked.precision, self.model.device)  # what auto means here
        tf32 = self.model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        policy = asked.policy if asked.policy != "as told" else f"as told, {_hash(asked.classes)}"
        return {
            **self.sampling.model_dump(mode="json"),
            "seeds": f"{seeds[0]}-{seeds[-1]}" if consecutive else _hash(seeds),
            "class policy": policy,
            "precision": "tf32" if dtype is None and tf32 else str(dtype or torch.float32).removeprefix("torch."),
        }

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """The model, as far as it decides a picture."""
        config = self.model.config
        codec, hashed = self.model.codec, config.codec.kind
        told: dict[str, Any] = {}
        if isinstance(codec, StoredCodec) and isinstance(config.codec, StoredConfig):
            hashed = weights_hash(codec.network)
            if config.codec.scale is not None or config.codec.shift is not None:  # else the weights' folder has them
                told = {"codec scale": listed_numbers(codec.scale), "codec shift": listed_numbers(codec.shift)}
        return {
            "weights": self.weights,
            "network": config.network.model_dump(mode="json"),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "codec": hashed,
            **told,
        }

    @property
    def plan(self) -> dict[str, Any]:
        return {**self.made_by, "drawing": self.protocol, "size": list(self.size)}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def shard(self, index: int) -> ImageShard:
        """The pictures of a shard, drawn if they are not there."""
        row, asked, path = rows(self, index), self.asked, self.path(index)
        classes = None if asked.classes is None else list(asked.classes[row.start : row.stop])
        if not path.exists():
            drawn = pipeline.generate(
                self.model,
                classes,
                asked.seeds[row.start : row.stop],
                size=asked.size,
                guidance=asked.guidance,
                precision=asked.precision,
                batch=self.batch,
                **asked.settings,
            )
            write_array(path, drawn)
        label = None if classes is None else np.array(classes, np.int64)
        return ImageShard(read_array(path), np.array(row), label)


def generate_shards(drawn: BulkSamples, ranks: Distributed, progress: Callable[[int, int], None] | None = None) -> None:
    """Draw every shard that is missing, shared out among the processes."""
    drawn.begin(ranks)
    total = shards(drawn)
    for index in range(ranks.rank, total, ranks.world_size):
        drawn.shard(index)
        if progress is not None:
            progress(min(index + ranks.world_size, total), total)
    ranks.barrier()


def write_npz(drawn: BulkSamples, target: Path) -> None:
    """The pictures as an .npz of the ADM suite: arr_0 uint8 [N, H, W, C], arr_1 int64 [N] labels if there are classes.

    Written a shard at a time, whole or not at all. Raises TesseraError if it cannot be written.
    """
    with atomic_file(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (drawn.count, *drawn.size, drawn.channels)
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for index in range(shards(drawn)):
                member.write(drawn.shard(index).pictures.tobytes())
        if drawn.asked.classes is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(drawn.asked.classes, np.int64), allow_pickle=False)


def _hash(values: Sequence[int] | None) -> str:
    return hashlib.sha256(json.dumps(list(values or [])).encode()).hexdigest()[:8]
