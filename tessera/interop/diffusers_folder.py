"""Folders of diffusers' pipelines, or of their transformers alone <-> a Model with `network.kind: diffusers`.

Which classes there are, and how each is called, is the table of `tessera.models.diffusers_classes`. DiT and PixArt have
networks of their own: see `diffusers` and `pixart_folder`.
"""

import inspect
from pathlib import Path
from typing import Any

import torch

from tessera.bundle import BundleConfig, Model, Provenance, assemble, copy_codec
from tessera.checkpoint_files import write_tensors
from tessera.codecs import AnyCodec, AutoencoderConfig, StoredConfig
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.diffusion.flow import FlowMatchingConfig, LogitNormalTimesteps
from tessera.diffusion.gaussian import ScaledLinearBetas
from tessera.encoders.pipeline_text import components, copy_encoders
from tessera.encoders.text import PipelineTextConfig
from tessera.errors import TesseraError
from tessera.files import atomic_folder, read_json
from tessera.interop import diffusers
from tessera.interop.diffusers import (
    CONFIG,
    INDEX,
    SCHEDULER,
    SCHEDULER_CONFIG,
    TRANSFORMER,
    VAE,
    WEIGHTS,
    replaced_settings,
)
from tessera.interop.flow_scheduler import flow_scheduler, read_flow_scheduler
from tessera.interop.schedulers import SchedulerConfig, read_scheduler, sampling_config
from tessera.models.diffusers_classes import CLASSES, TransformerClass
from tessera.models.diffusers_network import PREFIX, DiffusersConfig, transformer_type
from tessera.sampling import SamplingConfig
from tessera.settings import validate

NATIVE = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "Transformer2DModel")


def transformer_class(folder: Path) -> str | None:
    """The class of the transformer of a pipeline's folder, or of a transformer's; None if there is none."""
    for path in (folder / TRANSFORMER / CONFIG, folder / CONFIG):
        if path.exists():
            return read_json(path).get("_class_name")
    return None


def accepts(folder: Path) -> bool:
    """Whether a folder holds a transformer of another class than those with a network of their own."""
    return transformer_class(folder) not in (None, *NATIVE)


def read(folder: Path, device: torch.device | str = "cpu", *, codec: CodecSource | None = None) -> Model:
    """A Model from the folder of a pipeline or a transformer, which generates what diffusers generates.

    codec: instead of the folder's own vae/. A transformer alone has no text encoder: its texts are tokens. Raises
    TesseraError that lists the classes for one that is not in the table, and if something is missing or damaged.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    path = folder / TRANSFORMER if index else folder
    data = read_json(path / CONFIG)
    name = str(data.get("_class_name"))
    if name not in CLASSES:
        raise TesseraError(
            f"{path} holds diffusers' {name}, which Tessera does not know; it reads {', '.join(sorted(CLASSES))}, "
            "DiTTransformer2DModel and PixArtTransformer2DModel"
        )
    row = CLASSES[name]
    if index and index.get("_class_name") != row.pipeline:
        raise TesseraError(
            f"{folder} is diffusers' {index.get('_class_name')}; Tessera reads {row.pipeline} of this network: give "
            f"{path} to read the transformer alone"
        )
    for component, value in index.items():  # of Wan 2.2, for example
        if component.startswith(f"{TRANSFORMER}_") and isinstance(value, list) and value[1]:
            raise TesseraError(f"{folder} has two transformers, {TRANSFORMER} and {component}; Tessera reads one")
    for option, value in row.index_needs.items():
        if index.get(option, value) not in (value, None):
            raise TesseraError(f"{folder / INDEX}: {option} {index[option]} is not supported; expected {value}")
    settings = {key: value for key, value in data.items() if not key.startswith("_")}
    known = inspect.signature(transformer_type(name).__init__).parameters
    left_out = sorted(key for key in settings if key not in known)
    settings = {key: value for key, value in settings.items() if key in known}
    vae = read_json(folder / VAE / CONFIG) if (folder / VAE / CONFIG).exists() else {}
    network = {"class_name": name, "settings": settings, "options": row.options_of_vae(vae)}
    network = validate(DiffusersConfig, network, str(path / CONFIG))
    weights = diffusers.read_weights(path, weight_names(network))
    notes = [f"settings of the transformer: {', '.join(left_out)}"] if left_out else []
    diffusion, sampling, differences = _process(folder if index else None, row, network)
    notes += [f"of the pipeline: {'; '.join(differences)}"] if differences else []
    config = BundleConfig(
        network=network,
        diffusion=diffusion,
        codec=_codec(folder, codec, bool(vae), row, network),
        text=text_config(folder, row, network) if index else None,
        sampling=sampling,
        provenance=Provenance(
            converted_from=f"diffusers folder {folder.resolve().name}"
            + (f" (variant {weights.variant})" if weights.variant else ""),
            not_converted="; ".join([*weights.left_out, *notes]) or None,
        ),
    )
    tensors = {f"{PREFIX}{key}": value for key, value in weights.tensors.items()}
    return assemble(config, tensors, str(path), device)


def weight_names(network: DiffusersConfig) -> list[str]:
    """The names of the weights in a folder of this network."""
    with torch.device("meta"):
        return [name.removeprefix(PREFIX) for name in network.build().state_dict()]


def _codec(
    folder: Path, codec: CodecSource | None, has_vae: bool, row: TransformerClass, network: DiffusersConfig
) -> AnyCodec:
    if codec is None and not has_vae:
        return AutoencoderConfig(source=row.published, subfolder=VAE)
    return resolve_codec(str(folder) if codec is None else codec, network.in_channels)


def text_config(folder: Path, row: TransformerClass, network: DiffusersConfig) -> PipelineTextConfig | None:
    """The text encoders of a pipeline's folder; None if it has none."""
    if not any(name.startswith("text_encoder") for name, _ in components(read_json(folder / INDEX))):
        return None
    parts = [
        {name: getattr(part, name) for name in ("width", "positive", "negative", "rows", "least_prompts")}
        | {"options": dict(part.options)}
        for part in network.text_parts
    ]
    data = {"source": str(folder.resolve()), "pipeline": row.pipeline, "parts": parts, "tokens": network.text_tokens}
    return validate(PipelineTextConfig, data, str(folder / INDEX))


def _process(
    folder: Path | None, row: TransformerClass, network: DiffusersConfig
) -> tuple[Any, SamplingConfig, list[str]]:
    """The diffusion process and the sampling settings of a pipeline, and what diffusers does otherwise."""
    steps, scale = row.sampling
    guidance = {"num_steps": steps, "guidance_scale": scale, "guidance_channels": "all", "null_text": "empty"}
    differences = list(row.differences)
    if row.times is None:
        path = None if folder is None else folder / SCHEDULER / SCHEDULER_CONFIG
        scheduler, kind = (SchedulerConfig(**row.scheduler), "DDIMScheduler") if path is None else read_scheduler(path)
        diffusion = diffusers.diffusion_config(scheduler, network, str(path))
        sampling, notes = sampling_config(scheduler, kind, diffusion, steps, scales_state=True)
        return diffusion, sampling.model_copy(update=guidance), differences + notes
    path = None if folder is None else folder / SCHEDULER / SCHEDULER_CONFIG
    flow = read_flow_scheduler(path, row.grid, row.tokens(network.settings) if row.tokens else None)
    diffusion = FlowMatchingConfig(
        network_times=row.times,
        rounded_times=flow.rounded_times,
        shift=flow.shift,
        timestep_sampling=LogitNormalTimesteps(),
    )
    return diffusion, flow.sampling.model_copy(update=guidance), differences + flow.differences


def write(model: Model, target: Path) -> str:
    """Write the folder of the pipeline with all parts; returns a message with what a user of the folder must know."""
    network = model.config.network
    assert isinstance(network, DiffusersConfig)
    row, text, codec = network.row, model.config.text, model.config.codec
    messages = [f"wrote {target}: a folder of diffusers' {row.pipeline}, with exact weights"]
    with atomic_folder(target) as folder:
        for name in (TRANSFORMER, SCHEDULER):
            (folder / name).mkdir()
        diffusers.write_json(folder / TRANSFORMER / CONFIG, network.class_name, network.settings)
        tensors = {
            name.removeprefix(PREFIX): tensor.detach().cpu().clone()
            for name, tensor in model.network.state_dict().items()
        }
        write_tensors(tensors, folder / TRANSFORMER / f"{WEIGHTS}.safetensors")
        scheduler, settings, notes = _scheduler(model.config)
        messages += notes
        diffusers.write_json(folder / SCHEDULER / SCHEDULER_CONFIG, scheduler, settings)
        index: dict[str, Any] = {SCHEDULER: ["diffusers", scheduler], TRANSFORMER: ["diffusers", network.class_name]}
        if isinstance(codec, StoredConfig) and codec.folder is not None:
            copy_codec(codec, folder / VAE)
            index[VAE] = ["diffusers", read_json(folder / VAE / CONFIG)["_class_name"]]
        else:
            messages.append("there is no vae/: load the pipeline with vae=...")
        if isinstance(text, PipelineTextConfig):
            copy_encoders(text.folders[0], folder)
            index |= dict(components(read_json(folder / INDEX)))
        else:
            messages.append("there is no text encoder: load the pipeline with its tokenizers and text encoders")
        absent = inspect.signature(getattr(__import__("diffusers"), row.pipeline).__init__).parameters
        index |= {name: [None, None] for name in absent if name.startswith(COMPONENTS) and name not in index}
        diffusers.write_json(folder / INDEX, row.pipeline, index)
    return "\n".join(messages)


COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


def _scheduler(config: BundleConfig) -> tuple[str, dict[str, Any], list[str]]:
    """The class and the settings of the scheduler, and how it samples otherwise."""
    if isinstance(config.diffusion, FlowMatchingConfig):
        return flow_scheduler(config)
    settings, schedule, replaced = (
        diffusers.scheduler_config(config),
        config.diffusion.schedule,
        replaced_settings(config),
    )
    notes = (
        [f"its scheduler is DDIM, which samples otherwise than this model: {'; '.join(replaced)}"] if replaced else []
    )
    if isinstance(schedule, ScaledLinearBetas) and schedule.snr_divisor != 1:
        betas = {"beta_schedule": "scaled_linear", "beta_start": schedule.start, "beta_end": schedule.end}
        settings |= {**betas, "trained_betas": None, "snr_shift_scale": schedule.snr_divisor}
        return "CogVideoXDDIMScheduler", settings, notes
    return "DDIMScheduler", settings, notes
