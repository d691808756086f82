"""A run in memory: data, network, optimizer and everything else that the training loop uses."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import __version__, adapters, bundle, runtime, storage
from tessera.acceleration import compilation
from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.adapters import ControlConfig
from tessera.codecs import Codec
from tessera.conditioning import NULL_LABEL, Condition, NetworkFunction
from tessera.data import Loader, index
from tessera.data.buckets import Buckets
from tessera.data.captions import Captions, TextSizes, encode_captions
from tessera.data.control import control_images
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.images import Dataset, sample_size
from tessera.data.latents import LatentsDataset, open_cache
from tessera.data.sampler import ShardedOrder, WeightedOrder
from tessera.data.text_cache import open_text_cache
from tessera.diffusion import DiffusionProcess
from tessera.encoders.text import FrozenConfig, WordsConfig
from tessera.errors import TesseraError
from tessera.files import atomic_write, remove_partials
from tessera.interop import load
from tessera.model import AdapterInfo
from tessera.models.network import Network
from tessera.power_ema import SNAPSHOTS
from tessera.runtime import SINGLE, Distributed
from tessera.settings import to_yaml
from tessera.training import checkpoint, initialization, parallel, scores
from tessera.training.alignment import Alignment, build_features
from tessera.training.checkpoint import CheckpointWriter, TrainerState
from tessera.training.distillation import Distillation, Teacher
from tessera.training.ema import EMA
from tessera.training.objective import TrainingObjective
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import (
    Recipe,
    infer_pixel_channels,
    inherit_text,
    null_fields,
    resolve_recipe,
    resolve_text,
    training_macs,
)
from tessera.training.scores import Scorer
from tessera.training.step import TrainState
from tessera.training.students import check_student, check_student_classes, load_teacher, student_recipe
from tessera.training.token_routing import TokenRouting

RECIPE, SAMPLES = "recipe.yaml", "samples"
SKIPPED_SAMPLES, SHORT_SAMPLES, INIT_REPORT = "skipped_samples.txt", "short_clips.txt", "init_report.txt"


@dataclass
class TrainingRun:
    """Everything that a run holds in memory."""

    recipe: Recipe
    ema_model: bundle.Model  # the EMA network and everything needed to sample; each rank may hold only a shard
    state: TrainState
    ema: EMA
    loader: Loader
    accumulation_steps: int
    objective: TrainingObjective
    compile_mode: compilation.CompileMode
    init_report: str  # which weights were taken from training.init_from
    scorer: Scorer | None  # if the recipe has evaluations
    remote: checkpoint.RemoteRun | None = None  # the folder of the run in a bucket, of which run_dir is a copy
    base: dict[str, Tensor] | None = None  # the whole weights below an adapter, until they are in the run's folder

    @property
    def run_dir(self) -> Path:
        return checkpoint.local_folder(self.recipe.run_dir)

    @property
    def address(self) -> str:
        """Where the user looks for the run: a folder, or a bucket of which run_dir is a copy."""
        return str(self.run_dir) if self.remote is None else self.remote.address

    @property
    def parallel(self) -> ParallelContext:
        return self.state.parallel

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self.state.network

    @property
    def macs(self) -> float:
        """Multiply-adds of the forward pass of a sample; the mean over all samples if their sizes differ. With
        distillation, alignment or routing: a third of those of a sample in a step of training."""
        distillation = self.objective.distillation
        if self.loader.buckets is None:
            macs = training_macs(self.recipe.training, self.network)
            return macs if distillation is None else macs + distillation.extra_macs(macs) / 3
        codec, bucket_ids = self.ema_model.codec, self.loader.buckets.bucket_ids
        macs = [self.network.macs(codec.latent_size(size)) for size in self.loader.buckets.sizes]
        return float(np.asarray(macs, dtype=np.float64)[bucket_ids].mean())

    @cached_property
    def data_fingerprint(self) -> dict[str, Any]:
        """What the order of the samples depends on (`data.index.fingerprint`); empty for data without an index."""
        dataset = self.loader.dataset
        source = files_dataset(dataset)
        if source is None:
            return {}
        table = source.table.take(dataset.indices) if isinstance(dataset, LatentsDataset) else source.table
        return index.fingerprint(table)

    def unload_text_encoder(self) -> None:
        """Free the memory that a frozen encoder takes after sampling texts that are not training captions."""
        if self.loader.dataset.text is not None:
            self.loader.dataset.text.encoder.unload()

    def delete_saved_after(self, step: int) -> None:
        """Delete the checkpoints and the averages of the steps after one that the run resumes from."""
        checkpoint.delete_after(self.run_dir, step)
        if self.remote is not None:
            self.remote.delete_after(step)

    def full_ema_model(self) -> bundle.Model:
        """The EMA model with whole weights, for sampling. Every rank must call it."""
        self.ema.synchronize()
        return replace(self.ema_model, network=parallel.full_network(self.ema.network))


def build_run(
    recipe: Recipe,
    checkpoint_dir: Path | None = None,
    world: Distributed = SINGLE,
    log: Callable[[str], None] = lambda text: None,
) -> TrainingRun:
    """Open the data, build the network and everything around it. Writes nothing. Raises TesseraError.

    checkpoint_dir: the checkpoint to resume. It replaces training.init_from, which may no longer exist.
    """
    device, teacher = runtime.choose_device(recipe.training.device), None
    if recipe.training.distillation is not None:
        teacher = load_teacher(recipe.training.distillation)
        recipe = student_recipe(recipe, teacher)
    config = recipe.training
    init_model = load_init_model(recipe, checkpoint_dir)
    if init_model is not None:
        recipe = initialization.inherit_settings(recipe, init_model)
    if teacher is not None:
        check_student(recipe)
    recipe = infer_pixel_channels(recipe)
    trained = bundle.load_config(checkpoint_dir) if checkpoint_dir else init_model and init_model.config
    recipe = inherit_text(recipe, trained and trained.text)
    dtype = runtime.autocast_dtype(config.precision, device)
    if device.type == "cuda":
        runtime.peak_flops(device, dtype or torch.float32)  # measured now, while there is free memory
    codec = recipe.codec.build().to(device)
    if init_model is not None:
        recipe = initialization.inherit_size(recipe, init_model.config, codec)
    base_classes = init_model.config.class_names if init_model is not None and recipe.adapter is not None else ()
    recipe, loader, accumulation_steps = build_data(recipe, codec, device, world, log, base_classes)
    class_names = loader.dataset.class_names if recipe.network.num_classes else ()
    if teacher is not None:
        check_student_classes(teacher, class_names)
    network, init_report = build_network(recipe, class_names, init_model, resumes=checkpoint_dir is not None)
    base = None
    ema_model_adapters = {}
    if recipe.adapter is not None:
        if world.world_size > 1 and recipe.adapter.base_weights != "float32":
            raise TesseraError(
                f"adapter.base_weights={recipe.adapter.base_weights} is for one process, and there are "
                f"{world.world_size}: their weights are divided by training.fsdp=full instead"
            )
        base = adapters.base_state(network)
        ema_model_adapters[bundle.TRAINED] = add_adapter(recipe, network, class_names)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the matrix products that autocast leaves in float32
    network.to(device)
    ema = EMA(network, config.ema, share_frozen=world.world_size == 1)
    ema_model = build_ema_model(recipe, loader.dataset, class_names, ema, codec)
    ema_model.adapters = ema_model_adapters
    if loader.dataset.text is not None:
        ema_model.loaded_text_encoder = loader.dataset.text.encoder
    objective = build_objective(recipe, ema_model.diffusion, codec, dtype)
    if teacher is not None:
        objective = replace(objective, distillation=build_distillation(recipe, teacher, objective, ema, device))
    if config.alignment is not None:
        features = build_features(config.alignment, ema, objective.diffusion, codec, device, objective.seed)
        end = round(config.alignment.until * config.steps) * config.global_batch_size
        objective = replace(objective, alignment=Alignment(config.alignment, features, end, dtype))
    if config.token_routing is not None:
        routing = TokenRouting(config.token_routing, config.global_batch_size, objective.seed)
        objective = replace(objective, token_routing=routing)
    if recipe.sampling.null_text == "empty" and loader.dataset.text is not None:
        text = loader.dataset.text.encoder.encode_exactly("", is_negative=True)[None]
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        objective = replace(objective, empty_text=Condition(text=text, text_mask=mask))
    evaluates = recipe.evaluation.enabled
    scorer = (
        Scorer(recipe.evaluation, ema_model, recipe.data, checkpoint.local_folder(recipe.run_dir))
        if evaluates
        else None
    )
    # The ranks communicate from here on. Each of them has raised the errors of the recipe before.
    context = ParallelContext(world, config.fsdp, device.type)
    checkpoint_activations(network, config.activation_checkpointing)
    forward, compile_mode = compile_network(
        recipe, network, objective, loader, accumulation_steps, checkpoint_dir, world, log
    )
    context.distribute(network)
    ema.distribute(network, context)
    optimizer = config.optimizer.build(network)
    optimizer.register_step_pre_hook(lambda *_: ema.synchronize())
    state = TrainState(network, forward, optimizer, config.optimizer, context)
    return TrainingRun(
        recipe,
        ema_model,
        state,
        ema,
        loader,
        accumulation_steps,
        objective,
        compile_mode,
        init_report,
        scorer,
        base=base,
    )


def load_init_model(recipe: Recipe, checkpoint_dir: Path | None) -> bundle.Model | None:
    """The model of training.init_from, or the resumed checkpoint in its place."""
    config = recipe.training
    if config.init_from is None:
        return None
    if checkpoint_dir is not None:
        return initialization.with_recipe_sampling(bundle.load(checkpoint_dir))
    return load.load(
        config.init_from,
        "cpu",
        num_heads=config.init_num_heads,
        num_classes=config.init_num_classes,
        checkpoint_type=config.init_type,
    )


def build_data(
    recipe: Recipe,
    codec: Codec,
    device: torch.device,
    world: Distributed,
    log: Callable[[str], None] = lambda text: None,
    class_names: tuple[str, ...] = (),
) -> tuple[Recipe, Loader, int]:
    """The complete recipe, the loader of this rank's part of each batch, and the number of accumulation steps.

    class_names: of the model, if it must keep them; those of the data are matched by name.
    """
    config, dataset = recipe.training, open_data(recipe, codec)
    if class_names:
        match_classes(dataset, class_names)
    captions = Captions.of(dataset, recipe.data.description) if recipe.network.uses_text else None
    recipe = resolve_text(recipe, captions)
    if recipe.text is not None and captions is not None:
        encoder, folder = recipe.text.build().to(device), text_cache_folder(recipe)
        values = None if folder is None else open_text_cache(storage.locate(folder), captions, encoder)
        prompts = list(config.sample_prompts) if world.is_main else []
        prompts += [""] if recipe.sampling.null_text == "empty" else []
        dataset.text = encode_captions(dataset, captions, encoder, config.seed, values, log, prompts)
    num_unlabeled = int((dataset.labels < 0).sum()) if isinstance(dataset, FilesDataset) else 0
    sizes = None if dataset.text is None else dataset.text.sizes
    recipe = resolve_recipe(recipe, dataset.class_names, codec, num_unlabeled, sizes)
    buckets = build_buckets(recipe, dataset)
    if "size" in recipe.network.condition_fields:
        dataset.image_sizes = image_sizes(dataset, recipe.data.size, buckets)
    most = -(-config.global_batch_size // world.world_size)  # samples of the rank that has most
    accumulation_steps = -(-most // min(config.micro_batch_size or most, most))
    rows = parallel.local_batch(config.global_batch_size, accumulation_steps, world)
    loader = Loader(
        dataset,
        config.global_batch_size,
        config.seed,
        config.num_workers,
        rows,
        device.type == "cuda",
        buckets,
        recipe.data.hflip,
        recipe.network.condition_type,
        recipe.network.condition_fields,
        control_images(recipe.adapter.image, dataset) if isinstance(recipe.adapter, ControlConfig) else None,
        order=sample_order(recipe, dataset),
        decode_processes=config.decode_processes,
    )
    return recipe, loader, accumulation_steps


def text_cache_folder(recipe: Recipe) -> str | None:
    """The folder of cached embeddings of captions; None if they are encoded at the start."""
    if not isinstance(recipe.text, FrozenConfig):
        return None
    return recipe.text.cache or getattr(recipe.data, "cache", None)


def measure_text(recipe: Recipe, dataset: Dataset | LatentsDataset) -> tuple[Recipe, TextSizes | None]:
    """The recipe with its text encoder, and what the network must know about it; None if the network reads no text.

    Nothing is encoded. Raises TesseraError as `resolve_text`.
    """
    captions = Captions.of(dataset, recipe.data.description) if recipe.network.uses_text else None
    recipe = resolve_text(recipe, captions)
    if recipe.text is None or captions is None:
        return recipe, None
    return recipe, TextSizes.measure(captions, recipe.text.build())


def open_data(recipe: Recipe, codec: Codec) -> Dataset | LatentsDataset:
    """The data of a recipe, or its latent cache. Raises TesseraError."""
    data = recipe.data
    cache = data.cache if isinstance(data, FilesConfig) else None
    return data.open() if cache is None else open_cache(storage.locate(cache), data, codec, data.open())


def files_dataset(dataset: Dataset | LatentsDataset) -> FilesDataset | None:
    """The images in files that a data set or its latents come from, None for any other data."""
    source = dataset.source if isinstance(dataset, LatentsDataset) else dataset
    return source if isinstance(source, FilesDataset) else None


def unusable_classes(dataset: Dataset | LatentsDataset, invalid_rows: Collection[int]) -> set[str]:
    """The classes all of whose images are invalid. invalid_rows: of images in files; a cache has left them out."""
    source = files_dataset(dataset)
    if source is None or not source.class_names:
        return set()
    usable = np.ones(len(source), bool)
    if isinstance(dataset, LatentsDataset):
        usable[:] = False
        usable[dataset.indices] = True
    usable[list(invalid_rows)] = False
    labeled, size = source.labels >= 0, len(source.class_names)
    counts, usable_counts = (np.bincount(source.labels[rows], minlength=size) for rows in (labeled, labeled & usable))
    return {source.class_names[number] for number in np.flatnonzero((counts > 0) & (usable_counts == 0))}


def build_buckets(recipe: Recipe, dataset: Dataset | LatentsDataset) -> Buckets | None:
    """The sizes of batches, if the recipe has buckets. Buckets with fewer samples than a batch are not used."""
    data = recipe.data
    if not isinstance(data, FilesConfig) or data.buckets is None:
        return None
    if isinstance(dataset, LatentsDataset):
        return dataset.buckets
    assert isinstance(dataset, FilesDataset)
    return Buckets.assign(
        dataset.sizes(), data.buckets.sizes(sample_size(data)), min_samples=recipe.training.global_batch_size
    )


def sample_order(recipe: Recipe, dataset: Dataset | LatentsDataset) -> WeightedOrder | ShardedOrder | None:
    """The order of samples if the recipe has weights of paths or of classes, or shuffles some shards at a time.

    Raises TesseraError if a path with a weight has no usable sample, or if the data have no classes to balance.
    """
    source, data, config = files_dataset(dataset), recipe.data, recipe.training
    if isinstance(data, FilesConfig) and data.shuffle_shards is not None:
        assert isinstance(dataset, FilesDataset | LatentsDataset)
        return ShardedOrder(dataset.shard_ids(), data.shuffle_shards, config.global_batch_size, config.seed)
    if source is None or not isinstance(data, FilesConfig) or not data.weights:
        return None
    parts = np.repeat(np.arange(len(source.path_sizes)), source.path_sizes)
    if data.weights == "classes":
        parts = source.labels
    if isinstance(dataset, LatentsDataset):
        parts = parts[dataset.indices]
    if data.weights == "classes":
        classes, parts = np.unique(parts, return_inverse=True)
        if not source.class_names or classes[0] < 0:
            problem = "have no classes" if not source.class_names else "have samples without a class"
            raise TesseraError(f"data.weights=classes balances classes, and the data {problem}: leave it out")
        return WeightedOrder(parts, [1] * len(classes), config.global_batch_size, config.seed)
    if empty := [path for part, path in enumerate(data.paths) if part not in parts]:
        raise TesseraError(
            f"data.weights has a share for {empty[0]}, which has no image that can be used: leave it out"
        )
    return WeightedOrder(parts, data.weights, config.global_batch_size, config.seed)


def image_sizes(dataset: Dataset | LatentsDataset, size: tuple[int, int], buckets: Buckets | None) -> np.ndarray:
    """Height and width of the file of each sample, and the ratio of the size that it is cropped to: float32 [N, 3].

    size: of the crops without buckets. Images that are not files have the size of their crop.
    """
    crops = np.broadcast_to(size, (len(dataset), 2))
    if buckets is not None:
        crops = np.array(buckets.sizes)[buckets.bucket_ids, -2:]
    source, sizes = files_dataset(dataset), crops
    if source is not None:
        shapes = source.shapes()
        sizes = shapes[dataset.indices] if isinstance(dataset, LatentsDataset) else shapes
        sizes = np.where(sizes > 0, sizes, crops)
    return np.concatenate((sizes, crops[:, :1] / crops[:, 1:]), axis=1).astype(np.float32)


def match_classes(dataset: Dataset | LatentsDataset, class_names: tuple[str, ...]) -> None:
    """Number the classes of a data set as a model does, in place. Samples without a class stay so.

    Raises TesseraError if the data have a class that the model does not have.
    """
    if unknown := [name for name in dataset.class_names if name not in class_names]:
        raise TesseraError(
            f"an adapter keeps the {len(class_names)} classes of its base, and the data have {len(unknown)} others, "
            f"such as {unknown[0]}: add them first (tessera classes), give the images classes of the model, or none"
        )
    if dataset.class_names == class_names:
        return
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, np.ndarray):  # embedded data sets that compute them
        raise TesseraError("these data have classes of their own, and the base of the adapter has others")
    numbers = np.array([class_names.index(name) for name in dataset.class_names] or [NULL_LABEL], labels.dtype)
    matched = np.where(labels < 0, NULL_LABEL, numbers[np.minimum(labels, len(numbers) - 1)])
    setattr(dataset, "labels", matched)  # noqa: B010 (not every data set has them)
    dataset.class_names = class_names


def add_adapter(recipe: Recipe, network: Network, class_names: tuple[str, ...]) -> AdapterInfo:
    """Freeze a network and attach the adapter of a recipe, which alone is trained. Returns the facts about it."""
    assert recipe.adapter is not None
    info = AdapterInfo(
        summary=recipe.adapter.summary(),
        settings=recipe.adapter.model_dump(mode="json"),
        base=bundle.weights_hash(network),
        base_network=recipe.network.summary(),
    )
    torch.manual_seed(recipe.training.seed)
    attach_trained(network, recipe, class_names)
    return info


def attach_trained(network: Network, recipe: Recipe, class_names: tuple[str, ...]) -> None:
    """Attach the adapter of a recipe; the network itself is frozen, in the format that the adapter sets."""
    assert recipe.adapter is not None
    network.requires_grad_(False)
    vocabulary = recipe.text.vocabulary if isinstance(recipe.text, WordsConfig) else ()
    layers = recipe.adapter.layers(network, class_names, vocabulary)  # of the weights before they are quantized
    adapters.quantize_base(network, recipe.adapter.base_weights)
    adapters.attach(network, bundle.TRAINED, layers)


def build_network(
    recipe: Recipe,
    class_names: tuple[str, ...],
    init_model: bundle.Model | None,
    resumes: bool = False,
) -> tuple[Network, str]:
    """The network with its initial weights, on the CPU, and the report of the weights taken from another model.

    resumes: whether that model is a checkpoint of this run, of which only what is not trained is taken.
    """
    torch.manual_seed(recipe.training.seed)
    report = ""
    if recipe.adapter is not None and init_model is not None and _is_same_network(recipe, class_names, init_model):
        network = init_model.network.train()  # not a copy: the base is in memory once
        if resumes:
            adapters.detach(network)
        else:
            adapters.merge(network)
            report = f"{initialization.COPIED}: {', '.join(network.state_dict())}"
        return network, report
    network = recipe.network.build()
    if resumes:
        if recipe.adapter is not None and init_model is not None:
            network.load_state_dict(adapters.base_state(init_model.network))
    elif init_model is not None:
        adapters.merge(init_model.network)
        names_by_kind = initialization.init_from(network, class_names, init_model, str(recipe.training.init_from))
        report = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in names_by_kind.items() if names)
        if recipe.adapter is not None and (untrained := names_by_kind[initialization.INITIALIZED]):
            own, base = recipe.network.model_dump(), init_model.config.network.model_dump()
            differing = [f"{key} {base.get(key)} (here {own[key]})" for key in own if own[key] != base.get(key)]
            raise TesseraError(
                f"an adapter trains nothing of its base, and {recipe.training.init_from} has no values for "
                f"{len(untrained)} of its weights, such as {untrained[0]}: its network has {', '.join(differing)}; "
                "leave out the settings of data, codec and network that cause this"
            )
        names = [name for name in names_by_kind[initialization.INITIALIZED] if initialization.TEMPORAL not in name]
        if recipe.training.trainable == "temporal" and names:
            raise TesseraError(
                f"training.trainable=temporal trains temporal layers alone, and {recipe.training.init_from} has no "
                f"values for {len(names)} other weights, such as {names[0]}: leave trainable out, or train on the same "
                "classes and channels"
            )
    if recipe.training.trainable == "temporal":
        initialization.freeze_image_layers(network)
    return network, report


def _is_same_network(recipe: Recipe, class_names: tuple[str, ...], model: bundle.Model) -> bool:
    """Whether a resolved recipe has the network of a model, so that its weights are taken as they are."""
    network = model.network.config.model_dump()
    return recipe.network.model_dump() == network and class_names == model.config.class_names


def build_ema_model(
    recipe: Recipe, dataset: Dataset | LatentsDataset, class_names: tuple[str, ...], ema: EMA, codec: Codec
) -> bundle.Model:
    text = recipe.text
    labels = np.asarray(getattr(dataset, "labels", ()), dtype=np.int64)
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist() if len(labels) else []
    if isinstance(text, FrozenConfig):
        text = text.model_copy(update={"cache": None})  # of the training captions
    config = bundle.BundleConfig(
        network=recipe.network,
        diffusion=recipe.diffusion,
        codec=recipe.codec,
        text=text,
        sampling=recipe.sampling,
        class_names=class_names,
        class_counts=tuple(counts) if len(counts) == len(class_names) else (),
        recipe=recipe.model_dump(mode="json"),
    )
    return bundle.Model(config, ema.network, codec)


def build_objective(
    recipe: Recipe, diffusion: DiffusionProcess, codec: Codec, dtype: torch.dtype | None
) -> TrainingObjective:
    return TrainingObjective(
        diffusion=diffusion,
        codec=codec,
        hflip=recipe.data.hflip,
        condition_dropout=recipe.training.condition_dropout,
        # Training has no rows without a control image: a control does not change these.
        null_fields=null_fields(recipe.network, recipe.sampling),
        seed=recipe.training.seed,
        dtype=dtype,
        field_dropout=recipe.training.field_dropout,
        uniform_numbers=recipe.network.uniform_numbers,
        frame_times=recipe.training.frame_times,
        token_times=recipe.training.token_times,
        patch_size=recipe.network.size_multiple,
    )


def build_distillation(
    recipe: Recipe, teacher: Teacher, objective: TrainingObjective, ema: EMA, device: torch.device
) -> Distillation:
    config = recipe.training
    assert config.distillation is not None
    teacher.model.network.to(device)
    positions = config.steps * config.global_batch_size
    average = ema if config.distillation.target_weights == "average" else None
    return Distillation(
        config.distillation, teacher, objective.diffusion, objective.seed, positions, objective.dtype, average
    )


def compile_network(
    recipe: Recipe,
    network: Network,
    objective: TrainingObjective,
    loader: Loader,
    accumulation_steps: int,
    checkpoint_dir: Path | None,
    world: Distributed,
    log: Callable[[str], None],
) -> tuple[NetworkFunction, compilation.CompileMode]:
    """The function to call instead of the network, and the compile mode.

    `auto` keeps the mode of the checkpoint: modes differ in the last bit of the result.
    """
    mode = recipe.training.compile
    if mode == "auto" and checkpoint_dir is not None:
        before = (bundle.load_config(checkpoint_dir).recipe or {}).get("training", {}).get("compile")
        mode = checkpoint.read_state(checkpoint_dir).compile_mode if before == "auto" else mode
    if mode == "auto":
        log("measuring the speed of each compile mode; this takes a minute or two")
        most = -(-recipe.training.global_batch_size // world.world_size)
        device = next(network.parameters()).device
        run_once = _training_pass(recipe, objective, most // accumulation_steps, device)
        timings = compilation.time_modes(network, run_once, lambda: runtime.synchronize(device))
        log(str(timings))
        mode = world.broadcast(timings.fastest)
    if mode == "whole" and (world.world_size > 1 or objective.alignment or objective.token_routing):
        mode = "blocks"  # FSDP, alignment and routing do something between the blocks
    forward, reason = compilation.compile_network(network, mode, dynamic_shapes=loader.buckets is not None)
    if reason is not None:
        log(f"training.compile={recipe.training.compile}, but this machine cannot compile: {reason}")
        mode = "off"
    return forward, mode


def _training_pass(
    recipe: Recipe, objective: TrainingObjective, batch_size: int, device: torch.device
) -> Callable[[NetworkFunction], None]:
    """A forward and backward pass of a micro batch of noise."""

    def run(forward: NetworkFunction) -> None:
        config = recipe.network
        x = torch.randn(batch_size, config.in_channels, *config.input_size, device=device)
        t = torch.rand(batch_size, device=device)
        condition = config.condition_type.example(config.condition_fields, batch_size, config).to(device)
        with runtime.autocast(objective.dtype, device):
            raw = forward(x, t, condition)
        raw.float().square().mean().backward()

    return run


def set_memory_policy(recipe: Recipe) -> None:
    """On a CPU, keep freed memory, which is faster; return it in runs that are to take little. For commands only."""
    adapter, recomputes = recipe.adapter, recipe.training.activation_checkpointing != "none"
    if runtime.choose_device(recipe.training.device).type != "cpu":
        return
    if recomputes or (adapter is not None and adapter.base_weights != "float32"):
        runtime.return_freed_memory(2**18)
    elif adapter is not None:
        runtime.return_freed_memory()
    else:
        runtime.keep_freed_memory()


def prepare_folder(run: TrainingRun) -> None:
    """Create the folder of the run with its recipe, codec and text encoder. Raises TesseraError if that fails."""
    run_dir = run.run_dir
    for name in ("", "checkpoints", SAMPLES, SNAPSHOTS):  # unfinished files of a killed run
        remove_partials(run_dir / name)
    atomic_write(run_dir / RECIPE, to_yaml(run.recipe))
    if run.base is not None and not (run_dir / bundle.BASE).exists():
        bundle.save_base(run.ema_model.config, run.base, run_dir / bundle.BASE)
    run.base = None
    source = files_dataset(run.loader.dataset)
    if source is not None and not (path := index_path(run_dir, run.data_fingerprint)).exists():
        index.write(source.table, path)
    bundle.copy_parts(run.recipe, run_dir)


def index_path(run_dir: Path, fingerprint: dict[str, Any]) -> Path:
    """Where a run keeps the index of its data. If they change, the index of each version stays."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return run_dir / f"index-{digest[:12]}.parquet"


def save_checkpoint(run: TrainingRun, writer: CheckpointWriter, state: TrainerState) -> None:
    """Begin to write a checkpoint. Old checkpoints are pruned once it is complete."""
    device, config, world_size = run.ema_model.device, run.recipe.training, run.parallel.world.world_size
    runtime.synchronize(device)
    samples = "clips" if run.ema_model.config.network.is_temporal else "images"
    provenance = bundle.Provenance(
        trained_with=f"tessera {__version__}, torch {torch.__version__}, {runtime.device_name(device)}"
        + (f", {world_size} ranks" if world_size > 1 else ""),
        device=device.type,
        data=f"{len(run.loader.dataset):,} {samples} ({run.recipe.data.description})",
        steps=state.step,
        images_seen=state.position,
        global_batch_size=config.global_batch_size,
        optimizer=config.optimizer.kind,
        learning_rate=config.optimizer.learning_rate,
        init_from=config.init_from,
        **config.ema.provenance(),
    )
    model = replace(run.ema_model, config=run.ema_model.config.model_copy(update={"provenance": provenance}))
    model.adapters = {
        name: info.model_copy(update={"provenance": provenance}) for name, info in run.ema_model.adapters.items()
    }
    run.ema.synchronize()
    writer.save(state, model, run.network, run.ema, run.state.optimizer, after=lambda: prune_checkpoints(run))


def prune_checkpoints(run: TrainingRun) -> None:
    """Delete the checkpoints that the recipe does not keep."""
    best = scores.best(scores.history(run.run_dir)) if run.scorer else None
    config = run.recipe.training
    rule = config.keep_last, config.keep_every_n_steps, best[0] if best else None
    checkpoint.prune(run.run_dir, *rule)
    if run.remote is not None:
        run.remote.prune(*rule)
