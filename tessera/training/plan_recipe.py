"""The workload of a recipe for planning: its training step and its sampling, traced on fake tensors.

The traced step is the trainer's own, so everything that a run does is counted.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import adapters, bundle, sampling
from tessera.acceleration import activation_checkpointing
from tessera.acceleration.activation_checkpointing import CheckpointingMode
from tessera.codecs import Codec, PixelsConfig, StoredConfig
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.data.captions import TextSizes
from tessera.data.files import FilesConfig
from tessera.data.images import Dataset, sample_size
from tessera.data.latents import LatentsDataset
from tessera.data.text_cache import FOLDER as TEXT_CACHE
from tessera.encoders.text import FolderConfig, WordsConfig
from tessera.errors import TesseraError
from tessera.evaluation import suite
from tessera.evaluation.features import feature_macs
from tessera.evaluation.reference import is_statistics_path
from tessera.models import PixArtConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig, parameter_count
from tessera.models.presets import PRESETS, UNET_PRESETS
from tessera.planning.hardware import Hardware, find
from tessera.planning.plan import AdapterWork, Plan, SamplingWork, Workload, plan
from tessera.planning.trace import Recorder, StepMemory, StepTrace, Trace, fake_tensors, meta_network
from tessera.reporting.text import format_bytes
from tessera.runtime import autocast
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import apply_overrides, validate
from tessera.training import initialization
from tessera.training.ema import EMA
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import (
    Recipe,
    infer_pixel_channels,
    inherit_text,
    read_recipe,
    resolve_recipe,
    resolve_text,
    text_settings,
)
from tessera.training.run import (
    attach_trained,
    build_objective,
    load_init_model,
    match_classes,
    measure_text,
    open_data,
    text_cache_folder,
)
from tessera.training.samples import images_per_grid, num_grids
from tessera.training.step import TrainState, train_step

ASSUMED_CHANNELS, ASSUMED_TOKENS = {"minilm": 384, "folder": 4096}, 120  # of text encoders; those of T5-XXL
PRESET_SETTINGS = {  # the recipe of a preset
    "run_dir": "runs/plan",
    "data": {"kind": "folder", "path": "imagenet/train", "size": 256, "hflip": True},
    "codec": {"kind": "autoencoder-kl", "source": "stabilityai/sd-vae-ft-ema"},
    "sampling": {"sampler": "ancestral", "num_steps": 250},
    "training": {"sample_every": 10_000, "checkpoint_every": 10_000},
}


def plan_for_recipe(
    recipe: Recipe, hardware: Hardware | str | None = None, *, alternatives: bool = False, **options: Any
) -> Plan:
    """The plan of a recipe on hardware as `tessera plan` names it (None: this machine). options: as for `plan`.

    Raises TesseraError for invalid recipes.
    """
    hardware = hardware if isinstance(hardware, Hardware) else find(hardware)
    return plan(workload(recipe), hardware, alternatives=alternatives, **options)


def preset_recipe(name: str, overrides: list[str]) -> Recipe:
    """A preset trained as in the DiT paper on latents of 256 x 256 pixels, with overrides. Raises TesseraError."""
    data = apply_overrides({**PRESET_SETTINGS, "network": {"preset": name}}, overrides, Recipe)
    if data.get("adapter") is not None:
        data["training"] = {"init_from": name, **data["training"]}
    return validate(Recipe, data, f"{name} with these settings")


def is_preset(target: str) -> bool:
    """Whether a target is the name of a network, not the path of a recipe."""
    return target in PRESETS or target in UNET_PRESETS


def resolve_target(target: str, overrides: list[str]) -> Recipe:
    """The recipe at a path, or of a preset. Raises TesseraError."""
    if is_preset(target):
        return preset_recipe(target, overrides)
    if not target.endswith((".yaml", ".yml")) and not Path(target).exists():
        raise TesseraError(
            f"{target} is neither a recipe nor a preset: give the path of a .yaml file, or one of "
            f"{', '.join((*PRESETS, *UNET_PRESETS))}"
        )
    return read_recipe(Path(target), overrides)


def workload(recipe: Recipe, name: str | None = None) -> Workload:
    """The workload of a recipe. `notes` state what is assumed of data or a codec that are not on this machine.

    Raises TesseraError for invalid recipes.
    """
    recipe, codec, images, class_names, text, notes = _resolve(recipe)
    config, network, evaluation = recipe.training, recipe.network, recipe.evaluation
    process = recipe.diffusion.resolve(network.in_channels, network.input_size).build()
    num_evaluations = evaluation.count(config.steps)
    num_scored = evaluation.num_samples * num_evaluations
    reference = evaluation.reference or recipe.data
    features = evaluation.features or suite.default_features(reference, evaluation.metrics)
    num_extracted = num_scored
    if num_evaluations and suite.needs_reference(evaluation.metrics) and not is_statistics_path(reference):
        num_extracted += min(images or num_scored, 50_000)
    autoencoder, pixel_size = None if isinstance(recipe.codec, PixelsConfig) else codec, sample_size(recipe.data)
    cached = isinstance(recipe.data, FilesConfig) and recipe.data.cache is not None
    checkpoints = config.keep_last + bool(num_evaluations) + 1  # the best, and the one being written
    if config.keep_every_n_steps is not None:
        checkpoints += config.steps // config.keep_every_n_steps
    moments = 2 * network.in_channels if codec is None or codec.stochastic else network.in_channels
    latent_bytes = 2 * moments * math.prod(network.input_size) * (2 if recipe.data.hflip else 1)
    return Workload(
        name=name or f"{network.summary()}, {recipe.data.description}",
        network=network,
        steps=config.steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        fsdp=config.fsdp,
        compile_mode="blocks" if config.compile == "auto" else config.compile,
        trace_step=partial(trace_step, recipe, class_names=class_names),
        trace_call=trace_call,
        trace_encode=partial(_trace_encode, autoencoder, pixel_size) if autoencoder and not cached else None,
        trace_decode=partial(_trace_decode, autoencoder, network) if autoencoder else None,
        sampling=SamplingWork(
            grid_images=num_grids(recipe) * images_per_grid(recipe),
            scored_images=num_scored,
            extracted_images=num_extracted,
            calls_per_image=count_function_evaluations(recipe, process),
            batch_size=evaluation.batch_size if num_evaluations else images_per_grid(recipe),
            extractor_macs=feature_macs(features),
            num_evaluations=num_evaluations,
        ),
        num_checkpoints=checkpoints,
        num_images=images,
        image_bytes=recipe.data.channels * math.prod(pixel_size),
        latent_bytes=0 if isinstance(recipe.codec, PixelsConfig) else latent_bytes,
        notes=tuple(notes),
        text="" if text is None else text_summary(recipe, text),
        adapter=_adapter_work(recipe, class_names),
        num_snapshots=config.ema.num_snapshots(config.steps, config.steps),
        num_averages=len(config.ema.averages),
    )


def _adapter_work(recipe: Recipe, class_names: tuple[str, ...]) -> AdapterWork | None:
    adapter = recipe.adapter
    if adapter is None:
        return None
    model = _meta_model(recipe.network, recipe, class_names)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return AdapterWork(
        summary=adapter.summary(),
        base_weights=adapter.base_weights,
        trained_parameters=trained,
        saved_bytes=4 * trained * (1 + len(recipe.training.ema.averages)),
        base_bytes=4 * parameter_count(meta_network(recipe.network)),
        can_recompute=not (isinstance(adapter, adapters.ControlConfig) and adapter.low_rank),
        is_uniform=not getattr(adapter, "where", None) and not isinstance(adapter, adapters.ControlConfig),
    )


def text_summary(recipe: Recipe, text: TextSizes) -> str:
    """The text encoder of a resolved recipe, its captions and their embeddings, in one line."""
    config = recipe.text or WordsConfig()
    name = f"{config.kind} ({config.name})" if isinstance(config, FolderConfig) else config.kind
    kind = f"{text.channels} channels" if text.channels else f"{text.vocabulary_size:,} ids"
    parts = [f"{name}: {kind}, at most {text.max_tokens} tokens"]
    if text.num_texts:
        of = f" (of {text.counted_texts:,} captions)" if text.counted_texts < text.num_texts else ""
        parts.append(f"{text.num_texts:,} different captions, the longest has {text.longest} tokens{of}")
    if not text.channels:
        return "; ".join(parts)
    if text.num_texts:
        about = "about " if text.counted_texts < text.num_texts else ""
        size = f"{about}{format_bytes(text.embedding_bytes)} of embeddings"
    else:
        size = f"{format_bytes(2 * text.channels * text.max_tokens)} of embeddings for each caption of this length"
    folder = text_cache_folder(recipe)
    if folder is None:
        parts.append(f"{size}, computed at the start and kept in memory: tessera data cache stores them")
    elif (Path(folder) / TEXT_CACHE).is_dir():
        parts.append(f"{size}, cached in {folder}")
    else:
        parts.append(f"{size}, to be cached in {folder} before training (tessera data cache)")
    return "; ".join(parts)


def _resolve(
    recipe: Recipe,
) -> tuple[Recipe, Codec | None, int | None, tuple[str, ...], TextSizes | None, list[str]]:
    """The resolved recipe, its codec, the number of images, the names of the classes, what is known of its text, and
    the assumptions."""
    notes: list[str] = []
    start = _initial_config(recipe, notes)
    is_unknown = recipe.adapter is not None and start is None and "codec" not in recipe.model_fields_set
    if start is not None:
        recipe = initialization.inherit_settings(recipe, bundle.Model(start, meta_network(start.network)))
    recipe = inherit_text(infer_pixel_channels(recipe), start and start.text)
    codec = dataset = None
    stored = recipe.codec if isinstance(recipe.codec, StoredConfig) else None
    if not is_unknown and (stored is None or stored.folder is not None):  # a plan downloads nothing
        codec = recipe.codec.build()
        recipe = recipe if start is None else initialization.inherit_size(recipe, start, codec)
    else:
        name = "the codec" if stored is None else stored.source
        notes.append(
            f"{name} is not on this machine: a codec with a factor of 8 is assumed, and encoding and decoding are left "
            "out"
        )
    if codec is not None:
        try:
            dataset = open_data(recipe, codec)
        except TesseraError as error:
            notes.append(
                f"the data could not be opened ({str(error).splitlines()[0]}): the number of classes is that of the "
                "network"
            )
    if dataset is not None and start is not None and start.class_names and recipe.adapter is not None:
        match_classes(dataset, start.class_names)
    known = recipe.network if start is None else start.network
    if dataset is not None:
        names = dataset.class_names
    elif isinstance(recipe.adapter, adapters.ClassesConfig) and not (start and start.class_names):
        names = recipe.adapter.classes + ("",) * (known.num_classes - len(recipe.adapter.classes))
    else:
        names = (start and start.class_names) or ("",) * known.num_classes
    recipe, text = _text(recipe, dataset, notes)
    if codec is not None:
        recipe = resolve_recipe(recipe, names, codec, text=text)
    else:  # the network of the recipe, for latents of an eighth of the image size by default
        network = recipe.network
        sizes: dict[str, Any] = {name: getattr(known, name) for name in DATA_DEPENDENT if name != "input_size"}
        process = recipe.diffusion.resolve(known.in_channels, network.input_size).build()
        sizes["out_channels"] = process.out_channels(known.in_channels)
        if text is not None:
            sizes |= text_settings(network, text)
        if "input_size" not in network.model_fields_set:
            height, width = recipe.data.size
            sizes["input_size"] = (*sample_size(recipe.data)[:-2], height // 8, width // 8)
        unset = {key: value for key, value in sizes.items() if key not in network.model_fields_set}
        recipe = recipe.model_copy(update={"network": validate(type(network), network.model_dump() | unset, "network")})
    return recipe, codec, None if dataset is None else len(dataset), tuple(names), text, notes


def _initial_config(recipe: Recipe, notes: list[str]) -> bundle.BundleConfig | None:
    """The configuration of training.init_from. Of a bundle or a run no weights are read. None if it is not here."""
    if recipe.training.init_from is None:
        return None
    path = Path(recipe.training.init_from).expanduser()
    with contextlib.suppress(TesseraError):
        return bundle.load_config(next(iter(bundle.checkpoints(path)), path))
    if not path.exists():
        notes.append(f"training.init_from={path} is not on this machine: the network is that of the recipe")
        return None
    model = load_init_model(recipe, None)
    return None if model is None else model.config


def _text(
    recipe: Recipe, dataset: Dataset | LatentsDataset | None, notes: list[str]
) -> tuple[Recipe, TextSizes | None]:
    """The recipe with its text encoder, and its sizes; assumed where data or encoder are not on this machine."""
    text, network = recipe.text or WordsConfig(), recipe.network
    is_remote = isinstance(text, FolderConfig) and not (text.folder is not None and text.folder.is_dir())
    if not network.uses_text or (dataset is not None and not is_remote):
        return measure_text(recipe, dataset) if dataset is not None else (resolve_text(recipe, None), None)
    tokens = network.text_tokens or text.max_tokens or ASSUMED_TOKENS
    if isinstance(text, WordsConfig) and not isinstance(network, PixArtConfig):
        sizes = TextSizes(0, network.vocabulary_size or text.build().vocabulary_size, tokens, tokens)
        facts = f"{sizes.vocabulary_size} ids"
    else:
        sizes = TextSizes(network.text_channels or ASSUMED_CHANNELS.get(text.kind, 0), 0, tokens, tokens)
        facts = f"{sizes.channels} channels"
    notes.append(f"captions or text encoder are not on this machine: {facts} and {tokens} tokens are assumed")
    return recipe, sizes


def count_function_evaluations(recipe: Recipe, process: Any) -> int:
    """Network evaluations for one sampled image, counted by sampling with a network that returns zeros."""
    config, network = recipe.sampling, recipe.network
    x = torch.zeros(1, network.in_channels, 1, 1)
    rows = 0

    def zeros(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x.new_zeros(len(x), network.out_channels, *x.shape[2:])

    condition = network.condition_type.example(network.condition_fields, 1, network)
    denoise = Denoiser(
        zeros,
        process,
        condition,
        config.guidance_scale,
        guidance_interval=config.guidance_interval,
        guidance_schedule=config.guidance_schedule,
    )
    grid = timestep_grid(config.timestep_spacing, config.num_steps, process)
    for _ in sampling.sample_loop(config.sampler, denoise, x, grid, lambda: torch.zeros_like(x)):
        pass
    return rows


class Latents:
    """A codec that returns its input. The encoder is traced on its own."""

    stochastic = False

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return pixels


def trace_step(
    recipe: Recipe,
    network: NetworkConfig,
    micro_batch_size: int,
    accumulation_steps: int,
    dtype: torch.dtype | None,
    checkpointing: CheckpointingMode,
    class_names: tuple[str, ...] = (),
) -> StepTrace:
    """One step of a resolved recipe with a given network, in `accumulation_steps` micro batches.

    It is not the first step, in which the optimizer allocates its state. Encoding is left out.
    class_names: of the network; an adapter may name some.
    """
    config, count = recipe.training, micro_batch_size * accumulation_steps
    if network.num_classes:  # without a null label, labels are checked by value, which fake tensors do not have
        network = network.model_copy(update={"learn_null_class": True})
    process = recipe.diffusion.resolve(network.in_channels, network.input_size).build()
    model = _meta_model(network, recipe, class_names)
    ema = EMA(model, config.ema)
    with fake_tensors():
        for each in (model, *ema.networks.values()):
            each.to_empty(device="cpu")
        ema.distribute(model, ParallelContext())
        activation_checkpointing.checkpoint_activations(model, checkpointing)
        optimizer = config.optimizer.build(model)
        laps: list[Trace] = []
        recorder = Recorder()

        def forward(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            raw = model(x, t, condition)
            if not laps:
                laps.append(recorder.lap())
            return raw

        def end_of_backward(*_: object) -> None:
            laps.append(recorder.lap())

        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # allocates its state
        optimizer.zero_grad(set_to_none=True)
        optimizer.register_step_pre_hook(end_of_backward)
        recipe = recipe.model_copy(update={"network": network})
        objective = build_objective(recipe, process, Latents(), dtype)  # pyright: ignore[reportArgumentType]
        state = TrainState(model, forward, optimizer, config.optimizer, ParallelContext())
        with recorder:
            images = torch.empty(count, network.in_channels, *network.input_size, dtype=torch.uint8)
            batch = Batch(
                images,
                network.condition_type.example(network.condition_fields, count, network),
                torch.empty(count, dtype=torch.int64),
                torch.empty_like(images) if isinstance(recipe.adapter, adapters.ControlConfig) else None,
            )
            train_step(state, batch, objective, count, accumulation_steps, torch.empty(2))
            ema.update(1)
            laps.append(recorder.lap())
        frozen = _bytes(weight for weight in model.parameters() if not weight.requires_grad)
        sizes = StepMemory(
            weights=_bytes(model.parameters()),
            ema=sum(_bytes(each.parameters()) for each in ema.networks.values()),
            optimizer=sum(_bytes(tensors.values()) for tensors in optimizer.state.values()),
            gradients=_bytes(weight for weight in model.parameters() if weight.requires_grad),
            activations=laps[0].live_bytes,
            peak=max(lap.peak_bytes for lap in laps),
            shared=frozen * len(ema.networks) if recipe.adapter is not None else 0,
        )
        forward_trace, backward_trace, update_trace = laps
        return StepTrace(forward_trace, backward_trace, update_trace, sizes)


def _meta_model(network: NetworkConfig, recipe: Recipe, class_names: tuple[str, ...]) -> Network:
    """A network without values, with the adapter of a recipe."""
    model = copy.deepcopy(meta_network(network))
    if recipe.adapter is not None:
        attach_trained(model, recipe, class_names)
    return model


def trace_call(network: NetworkConfig, rows: int) -> Trace:
    """One network evaluation as in sampling."""
    model = copy.deepcopy(meta_network(network))
    with fake_tensors(), torch.no_grad(), Recorder() as recorder:
        model.to_empty(device="cpu")
        recorder.lap()
        condition = network.condition_type.example(network.condition_fields, rows, network)
        x = torch.empty(rows, network.in_channels, *network.input_size)
        with autocast(None, x.device):
            model(x, torch.empty(rows), condition)
        return recorder.lap()


def _trace_encode(codec: Codec, size: Sequence[int], rows: int) -> Trace:
    with fake_tensors(), torch.no_grad(), Recorder() as recorder:
        codec.moments(torch.empty(rows, codec.pixel_channels, *size))
        return recorder.lap()


def _trace_decode(codec: Codec, network: NetworkConfig, rows: int) -> Trace:
    with fake_tensors(), torch.no_grad(), Recorder() as recorder:
        codec.decode(torch.empty(rows, codec.latent_channels, *network.input_size))
        return recorder.lap()


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
