"""Bulk sampling: many images generated into a folder, shard by shard. An interrupted run resumes with what is missing.

Shapes: B images, H W height and width, C channels (1 or 3).
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tessera import runtime
from tessera.bundle import weights_hash
from tessera.codecs import StoredCodec, StoredConfig
from tessera.codecs.codec import listed_numbers
from tessera.data import AnyData
from tessera.data.images import Dataset
from tessera.data.latents import LatentsDataset
from tessera.data.resolve import open_data
from tessera.files import atomic_file, read_array, this_writer, write_array
from tessera.generation.pipeline import generate_request
from tessera.generation.request import SampleRequest, image_size
from tessera.generation.resumable import claim_folder
from tessera.generation.shards import ImageShard, num_shards, shard_range
from tessera.model import Model
from tessera.runtime import Distributed
from tessera.settings import Settings

Policy = Literal["uniform", "balanced", "data"]


def default_condition(
    model: Model, seeds: Sequence[int], policy: Policy, data: AnyData | Dataset | LatentsDataset | None = None
) -> dict[str, list[Any]]:
    """Inputs for images with these seeds, by field: each condition chooses its own by the policy.

    Those that follow from the size of the images are left out: the request adds them. data: what captions are chosen
    from. Raises TesseraError for a condition that cannot choose.
    """
    network = model.config.network
    names, rules = network.condition_fields, network.condition_type.rules()
    companions = {companion for name in names for companion in rules[name].companions}
    dataset = data if any(rules[name].from_data for name in names) else None
    if isinstance(dataset, Settings):
        dataset = open_data(dataset)
    return {
        name: rules[name].inputs_from_data(seeds, policy, dataset)
        if rules[name].from_data
        else rules[name].default_inputs(seeds, policy, model.config)
        for name in names
        if name not in companions and not rules[name].from_size
    }


def bulk_request(
    model: Model,
    count: int,
    policy: Policy,
    first_seed: int = 0,
    data: AnyData | Dataset | LatentsDataset | None = None,
    **fields: Any,
) -> SampleRequest:
    """A request for `count` images with consecutive seeds and default conditions. fields: its other fields.

    balanced: classes in turn; data: as often as in the training data; uniform: each a random class, by its seed.
    Captions are chosen from the data in the same way, and cut as in training. Raises TesseraError for a condition that
    cannot choose.
    """
    seeds = range(first_seed, first_seed + count)
    condition = default_condition(model, seeds, policy, data)
    policy_name = policy if condition else "unconditional"
    return SampleRequest(seeds, condition, policy=policy_name, cut_long=True, **fields)


class BulkSamples:
    """The images of a request, generated into a folder: evaluated as samples, and written by `tessera sample --npz`."""

    def __init__(
        self, model: Model, request: SampleRequest, folder: Path, batch_size: int = 50, description: str = "a model"
    ) -> None:
        self.model, self.request, self.folder = model, request, folder
        self.batch_size, self.description = batch_size, description
        self.sampling = request.check(model)
        self.count = len(request)
        self.size = request.size or image_size(model)
        self.channels = model.codec.pixel_channels
        self.class_names = tuple(model.config.class_names)

    def begin(self, ranks: Distributed) -> None:
        """Claim the folder. Raises TesseraError if it holds the images of another request or model."""
        if ranks.is_main:
            claim_folder(self.folder, self.plan)
        ranks.barrier()

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
        hashes = {name: hash_values(values) for name, values in request.condition.items()}
        listed = f" {hashes.pop('label', '')}" if request.policy == "listed" and "label" in hashes else ""
        hashes.pop("label", None)
        negative = {name: hash_values(values) for name, values in request.negative.items()}
        controls = {
            name: [hash_values(each.rows.tolist()), hash_values(each.strengths.tolist()), each.is_map]
            for name, each in request.controls.items()
        }
        scales = torch.as_tensor(1.0 if request.guidance_scale is None else request.guidance_scale)
        return {
            **self.sampling.model_dump(mode="json"),
            "seeds": f"{seeds[0]}-{seeds[-1]}" if consecutive else hash_values(seeds),
            "class_policy": request.policy + listed,
            **({"condition": hashes} if hashes else {}),
            **({"negative": negative} if negative else {}),
            **({"controls": controls} if controls else {}),
            **({"guidance_scale": hash_values(scales.tolist())} if scales.ndim else {}),
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
        positions, path = shard_range(index, self.count), self.path(index)
        request = self.request.select(positions)
        if not path.exists():
            write_array(path, generate_request(self.model, request, self.batch_size), this_writer())
        labels = None if request.classes is None else np.array(request.classes, np.int64)
        return ImageShard(read_array(path), np.array(positions), labels, request.prompts)


def generate_shards(
    samples: BulkSamples,
    ranks: Distributed,
    progress: Callable[[int, int], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Generate every missing shard, distributed over the ranks. part: only these: number from 0, and of how many."""
    samples.begin(ranks)
    shards = range(part[0], num_shards(samples.count), part[1])
    for done in range(ranks.rank, len(shards), ranks.world_size):
        samples.shard(shards[done])
        if progress is not None:
            progress(min(done + ranks.world_size, len(shards)), len(shards))
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


def hash_values(values: Sequence[Any]) -> str:
    """Eight hexadecimal digits of a hash of numbers, texts or tensors."""
    listed = [value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value for value in values]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:8]
