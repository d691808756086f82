"""Bulk sampling: many images generated into a folder, shard by shard. An interrupted run resumes with what is missing.

Shapes: B images, H W height and width, C channels (1 or 3).
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
from tessera.bundle import weights_hash
from tessera.codecs import StoredCodec, StoredConfig
from tessera.codecs.codec import listed_numbers
from tessera.files import atomic_file, read_array, write_array
from tessera.generation.pipeline import generate
from tessera.generation.request import sampling_config
from tessera.generation.resumable import claim_folder
from tessera.generation.shards import ImageShard, num_shards, shard_range
from tessera.model import Model
from tessera.runtime import Distributed, Precision
from tessera.sampling import SamplingConfig

STREAM = 0x636C6173  # random stream of the class labels
ClassPolicy = Literal["uniform", "balanced"]


@dataclass(frozen=True)
class BulkRequest:
    """What to generate: image i has seeds[i] and, if the model has classes, classes[i]."""

    seeds: Sequence[int]
    classes: Sequence[int] | None
    class_policy: str = "listed"  # how the classes were chosen
    settings: dict[str, Any] = field(default_factory=dict)  # changes to the model's sampling settings
    guidance_scale: float | None = None
    precision: Precision = "float32"
    size: tuple[int, int] | None = None  # of the images; None: the trained size


def bulk_request(model: Model, count: int, policy: ClassPolicy, first_seed: int = 0, **fields: Any) -> BulkRequest:
    """`count` images with consecutive seeds. balanced: classes in turn; uniform: each a random class, by its seed.

    fields: the other fields of the request.
    """
    seeds, num_classes = range(first_seed, first_seed + count), model.config.network.num_classes
    if not num_classes:
        return BulkRequest(seeds, None, "unconditional", **fields)
    if policy == "balanced":
        return BulkRequest(seeds, [i % num_classes for i in range(count)], policy, **fields)
    uniform = randomness.uniform(0, torch.tensor(list(seeds), dtype=torch.int64), STREAM)[:, 0]
    return BulkRequest(seeds, (uniform.double() * num_classes).long().tolist(), policy, **fields)


class BulkSamples:
    """The images of a request, generated into a folder: evaluated as samples, and written by `tessera sample --npz`."""

    def __init__(
        self, model: Model, request: BulkRequest, folder: Path, batch_size: int = 50, description: str = "a model"
    ) -> None:
        self.model, self.request, self.folder = model, request, folder
        self.batch_size, self.description = batch_size, description
        network, codec = model.config.network, model.codec
        self.count = len(request.seeds)
        self.size = request.size or (network.input_size[0] * codec.factor, network.input_size[1] * codec.factor)
        self.channels = codec.pixel_channels
        self.class_names = tuple(model.config.class_names)

    def begin(self, ranks: Distributed) -> None:
        """Claim the folder. Raises TesseraError if it holds the images of another request or model."""
        if ranks.is_main:
            claim_folder(self.folder, self.plan)
        ranks.barrier()

    @cached_property
    def sampling(self) -> SamplingConfig:
        return sampling_config(self.model, guidance_scale=self.request.guidance_scale, **self.request.settings)

    @cached_property
    def weights(self) -> str:
        return weights_hash(self.model.network)

    @property
    def sampling_protocol(self) -> dict[str, Any]:
        """How the images are generated, for any model."""
        request, seeds = self.request, self.request.seeds
        consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
        dtype = runtime.autocast_dtype(request.precision, self.model.device)  # "auto" resolved
        tf32 = self.model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        listed = f" {_hash(request.classes)}" if request.class_policy == "listed" else ""
        return {
            **self.sampling.model_dump(mode="json"),
            "seeds": f"{seeds[0]}-{seeds[-1]}" if consecutive else _hash(seeds),
            "class_policy": request.class_policy + listed,
            "precision": "tf32" if dtype is None and tf32 else str(dtype or torch.float32).removeprefix("torch."),
        }

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """Everything about the model that decides its images."""
        config = self.model.config
        identity: dict[str, Any] = {
            "weights": self.weights,
            "network": config.network.model_dump(mode="json"),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "codec": config.codec.kind,
        }
        codec = self.model.codec
        if isinstance(codec, StoredCodec) and isinstance(config.codec, StoredConfig):
            identity["codec"] = weights_hash(codec.network)
            if config.codec.scale is not None or config.codec.shift is not None:  # else those of the codec's folder
                identity |= {"codec_scale": listed_numbers(codec.scale), "codec_shift": listed_numbers(codec.shift)}
        return identity

    @property
    def plan(self) -> dict[str, Any]:
        return {**self.model_identity, "sampling": self.sampling_protocol, "size": list(self.size)}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def shard(self, index: int) -> ImageShard:
        """The images of a shard, generated if they are missing."""
        positions, request, path = shard_range(index, self.count), self.request, self.path(index)
        part = slice(positions.start, positions.stop)
        classes = None if request.classes is None else list(request.classes[part])
        if not path.exists():
            images = generate(
                self.model,
                classes,
                request.seeds[part],
                size=request.size,
                guidance_scale=request.guidance_scale,
                precision=request.precision,
                batch_size=self.batch_size,
                **request.settings,
            )
            write_array(path, images)
        labels = None if classes is None else np.array(classes, np.int64)
        return ImageShard(read_array(path), np.array(positions), labels)


def generate_shards(
    samples: BulkSamples, ranks: Distributed, progress: Callable[[int, int], None] | None = None
) -> None:
    """Generate every missing shard, distributed over the ranks."""
    samples.begin(ranks)
    total = num_shards(samples.count)
    for index in range(ranks.rank, total, ranks.world_size):
        samples.shard(index)
        if progress is not None:
            progress(min(index + ranks.world_size, total), total)
    ranks.barrier()


def write_npz(samples: BulkSamples, target: Path) -> None:
    """Write an .npz of the ADM suite: arr_0 uint8 [B, H, W, C], and arr_1 int64 [B] labels if there are classes.

    Written shard by shard, whole or not at all. Raises TesseraError if it cannot be written.
    """
    with atomic_file(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (samples.count, *samples.size, samples.channels)
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for index in range(num_shards(samples.count)):
                member.write(samples.shard(index).images.tobytes())
        if samples.request.classes is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(samples.request.classes, np.int64), allow_pickle=False)


def _hash(values: Sequence[int] | None) -> str:
    return hashlib.sha256(json.dumps(list(values or [])).encode()).hexdigest()[:8]
