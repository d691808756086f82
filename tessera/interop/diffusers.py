"""Folders of diffusers' DiTPipeline, or of its transformer alone <-> a Model.

diffusers' network is the official one but for two numbers, which our configuration carries: its time frequencies divide
by 127, and the norm before the MLP adds 1e-5. Import needs no diffusers; export needs it only to measure or to fetch.

Shapes: D width, O raw output channels, p patch side.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tessera.bundle import BundleConfig, Model, assemble, copy_codec, read_tensors, write_tensors
from tessera.codecs import AutoencoderConfig, StoredConfig
from tessera.codecs.autoencoder import Autoencoder
from tessera.conditioning import Condition
from tessera.diffusion.gaussian import CosineBetas, GaussianDiffusionConfig, LinearBetas
from tessera.errors import TesseraError, listed
from tessera.files import atomic_folder
from tessera.interop.readers import Codec, codec_for, difference, dit_of, read_json, read_pickle
from tessera.layers.positions import sincos_grid
from tessera.models.dit import DiTConfig
from tessera.sampling import DDIM, Ancestral, SamplingConfig
from tessera.sampling.timesteps import Leading, Trailing, Uniform
from tessera.settings import S, Settings, validate

INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model"
TRANSFORMER, SCHEDULER, VAE, SCHEDULER_CONFIG = "transformer", "scheduler", "vae", "scheduler_config.json"
VERSION = "0.31.0"  # of diffusers, whose files these are; every later one reads them
TIME_DIVISOR = 127  # hard-coded there
NULL_CLASS = 1000  # hard-coded in DiTPipeline
SPACING_OF = {"linspace": Uniform(), "leading": Leading(), "trailing": Trailing()}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


class TransformerConfig(Settings):
    """config.json of a DiTTransformer2DModel; where Tessera knows but one value, so does the type."""

    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = None
    num_layers: PositiveInt = 28
    dropout: float = 0.0
    norm_num_groups: int | None = 32
    attention_bias: Literal[True] = True
    sample_size: PositiveInt = 32
    patch_size: PositiveInt = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: PositiveInt = 1000
    upcast_attention: bool = False
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = 1e-5


class SchedulerConfig(Settings):
    """scheduler_config.json of a DDIMScheduler: the process, and how to draw from it."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: Annotated[list[float], Field(min_length=1)] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    thresholding: bool = False
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    variance_type: str | None = Field(default=None, description="of the DDPM scheduler", exclude=True)


class FieldMapping(NamedTuple):
    """Where one of our tensors stands there: under one name, in parts cut along its rows, or copied to all blocks."""

    ours: str
    how: Literal["one", "parts", "copies"]
    theirs: tuple[str, ...]


def places(depth: int) -> list[FieldMapping]:
    """Every tensor of a network but the position table, which diffusers makes anew."""

    def both(ours: str, *theirs: str, how: Literal["one", "parts", "copies"] = "one") -> list[FieldMapping]:
        return [
            FieldMapping(f"{ours}.{kind}", how, tuple(f"{name}.{kind}" for name in theirs))
            for kind in ("weight", "bias")
        ]

    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    told = [f"{block}.norm1.emb" for block in blocks]
    table = tuple(f"{name}.class_embedder.embedding_table.weight" for name in told)
    found = [
        *both("x_embedder.proj", "pos_embed.proj"),
        *both("t_embedder.mlp.0", *(f"{name}.timestep_embedder.linear_1" for name in told), how="copies"),
        *both("t_embedder.mlp.2", *(f"{name}.timestep_embedder.linear_2" for name in told), how="copies"),
        FieldMapping("y_embedder.embedding_table.weight", "copies", table),
        *both("final_layer.adaLN_modulation.1", "proj_out_1"),
        *both("final_layer.linear", "proj_out_2"),
    ]
    for i, block in enumerate(blocks):
        found += both(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
        found += both(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{part}" for part in "qkv"), how="parts")
        found += both(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        found += both(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        found += both(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
    return found


# Import


def read(folder: Path, device: torch.device | str = "cpu", *, codec: Codec | None = None) -> Model:
    """A Model from a pipeline's folder or a transformer's, which draws what diffusers draws.

    codec: in place of the folder's own vae/. A transformer alone is taken to be under the paper's process. Raises
    TesseraError if something is missing or damaged, or is of a kind that Tessera cannot represent.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    place = folder / TRANSFORMER if index else folder
    told = read_json(place / CONFIG)
    if told.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):  # the second until version 0.30
        raise TesseraError(
            f"{place} holds diffusers' {told.get('_class_name')}; Tessera reads DiTTransformer2DModel (DiTPipeline)"
        )
    if told.get("interpolation_scale") not in (None, 1):
        raise TesseraError(
            f"{place / CONFIG}: interpolation_scale {told['interpolation_scale']} stretches the positions; expected 1"
        )
    transformer = _parse(TransformerConfig, told, place / CONFIG)
    network = network_of(transformer, str(place / CONFIG))
    tensors = from_diffusers(_tensors(place), network, str(place))
    scheduler, kind = SchedulerConfig(clip_sample=False), "DDIMScheduler"
    if (folder / SCHEDULER / SCHEDULER_CONFIG).exists() or index:
        scheduler, kind = _scheduler(folder / SCHEDULER / SCHEDULER_CONFIG)
    if codec is None and index and (folder / VAE / CONFIG).exists():
        codec = str(folder)
    origin = {"from": f"diffusers folder {folder.resolve().name}"}
    unused = _unused(scheduler)
    if unused:
        origin["not carried over"] = f"{', '.join(unused)} of the scheduler"
    config = BundleConfig(
        network=network,
        diffusion=process_of(scheduler, network, str(folder / SCHEDULER)),
        codec=codec_for(codec, network.in_channels),
        sampling=SamplingConfig(
            sampler=Ancestral() if kind == "DDPMScheduler" else DDIM(),
            num_steps=min(50, scheduler.num_train_timesteps),
            timestep_spacing=SPACING_OF[scheduler.timestep_spacing],
            guidance_scale=4.0,  # DiTPipeline's own, which guides every channel
            guidance_channels="all",
        ),
        class_names=_class_names(index.get("id2label"), network.num_classes),
        origin=origin,
    )
    return assemble(config, tensors, str(place), device)


def network_of(config: TransformerConfig, source: str) -> DiTConfig:
    """Our configuration of diffusers' network; of its classes, one more is the null class."""
    return validate(
        DiTConfig,
        {
            "input_size": (config.sample_size, config.sample_size),
            "in_channels": config.in_channels,
            "out_channels": config.out_channels or config.in_channels,
            "num_classes": config.num_embeds_ada_norm,
            "learn_null_class": True,
            "patch_size": config.patch_size,
            "depth": config.num_layers,
            "hidden_size": config.num_attention_heads * config.attention_head_dim,
            "num_heads": config.num_attention_heads,
            "timestep_freq_divisor": TIME_DIVISOR,
            "mlp_norm_eps": config.norm_eps,
        },
        source,
    )


def from_diffusers(tensors: dict[str, Tensor], network: DiTConfig, source: str) -> dict[str, Tensor]:
    """diffusers' state dict -> ours. Raises TesseraError that names what is missing, too much or not representable."""
    wanted = places(network.depth)
    names = {name for place in wanted for name in place.theirs}
    faults = [f"missing {name}" for name in sorted(names - tensors.keys())]
    faults += [f"unexpected {name}" for name in sorted(tensors.keys() - names)]
    if faults:
        raise TesseraError(f"{source} holds another architecture than its configuration says:{listed(faults)}")
    # As diffusers does: the positions of the configured grid, unscaled at any size.
    result = {"pos_embed": sincos_grid(network.grid, network.hidden_size)[None]}
    for ours, how, theirs in wanted:
        first = tensors[theirs[0]]
        if how == "copies":
            odd = next((name for name in theirs if not torch.equal(tensors[name], first)), None)
            if odd is not None:
                raise TesseraError(
                    f"{source}: {odd} differs from {theirs[0]}; Tessera has one embedding for all blocks, as the "
                    "official network does, and cannot represent one for each"
                )
        result[ours] = torch.cat([tensors[name] for name in theirs]) if how == "parts" else first
    return result


def process_of(scheduler: SchedulerConfig, network: DiTConfig, source: str) -> GaussianDiffusionConfig:
    """The process that a scheduler's betas belong to. Raises TesseraError if Tessera has no such schedule."""
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise TesseraError(
            f"{source}: {network.out_channels} raw outputs for {network.in_channels} channels; expected 1x or 2x"
        )
    steps = scheduler.num_train_timesteps
    if scheduler.trained_betas is not None:
        betas = torch.tensor(scheduler.trained_betas, dtype=torch.float64)
        first, last = (float(betas[i]) * steps / 1000 for i in (0, -1))
        candidates = [LinearBetas(), CosineBetas()] + (
            [LinearBetas(start=first, end=last)] if 0 < first < 1 and 0 < last < 1 else []
        )
    elif scheduler.beta_schedule == "linear":
        betas = torch.linspace(scheduler.beta_start, scheduler.beta_end, steps, dtype=torch.float64)
        ends = {"start": scheduler.beta_start * steps / 1000, "end": scheduler.beta_end * steps / 1000}
        candidates = [validate(LinearBetas, ends, source)]  # ours are said for 1000 steps
    else:
        candidates, betas = [CosineBetas()], CosineBetas().betas(steps)
    for schedule in candidates:
        if len(betas) == steps and torch.allclose(schedule.betas(steps), betas, rtol=1e-6, atol=1e-8):
            fixed = "beta" if (scheduler.variance_type or "").startswith("fixed_large") else "posterior"
            told = {
                "num_timesteps": steps,
                "schedule": schedule,
                "prediction": PREDICTIONS[scheduler.prediction_type],
                "variance": "learned" if network.out_channels == 2 * network.in_channels else fixed,
                "zero_terminal_snr": scheduler.rescale_betas_zero_snr,  # of the betas said, as there
            }
            return validate(GaussianDiffusionConfig, told, source)
    raise TesseraError(f"{source}: its {len(betas)} betas are neither linear nor the cosine schedule of {steps} steps")


def _scheduler(path: Path) -> tuple[SchedulerConfig, str]:
    told = read_json(path)
    kind = str(told.get("_class_name"))
    if kind not in ("DDIMScheduler", "DDPMScheduler") and not told.keys() & {"beta_schedule", "trained_betas"}:
        raise TesseraError(f"{path} is a {kind}; expected a scheduler with betas, such as DDIMScheduler")
    if told.get("trained_betas") is not None:
        told.pop("beta_schedule", None)  # overruled
    return _parse(SchedulerConfig, told, path), kind


def _parse(kind: type[S], told: dict[str, Any], path: Path) -> S:
    """The fields that matter here; every version of diffusers writes some more."""
    return validate(kind, {name: value for name, value in told.items() if name in kind.model_fields}, str(path))


def _unused(scheduler: SchedulerConfig) -> list[str]:
    """What changes the pictures that diffusers draws and has no part in ours."""
    usual = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True, "steps_offset": 0}
    return [f"{name} {getattr(scheduler, name)}" for name, value in usual.items() if getattr(scheduler, name) != value]


def _class_names(labels: Any, classes: int) -> tuple[str, ...]:
    """A name for each class, or none at all if they are but the numbers."""
    if not isinstance(labels, dict):
        return ()
    names = tuple(str(labels.get(str(i), i)) for i in range(classes))
    return () if names == tuple(str(i) for i in range(classes)) else names


def _tensors(folder: Path) -> dict[str, Tensor]:
    """A transformer's state dict: safetensors before pickles, whole or in shards."""
    for ending, reader in ((".safetensors", read_tensors), (".bin", _read_bin)):
        whole, index = folder / f"{WEIGHTS}{ending}", folder / f"{WEIGHTS}{ending}.index.json"
        if whole.exists():
            return reader(whole)
        if index.exists():
            shards = read_json(index).get("weight_map")
            files = sorted(set(shards.values())) if isinstance(shards, dict) else []
            if not files or not all(isinstance(file, str) and file == Path(file).name for file in files):
                raise TesseraError(f"{index} names no files: expected a weight_map from tensors to files beside it")
            return {name: tensor for file in files for name, tensor in reader(folder / file).items()}
    raise TesseraError(f"{folder} holds no weights: expected {WEIGHTS}.safetensors (or .bin), or its .index.json")


def _read_bin(path: Path) -> dict[str, Tensor]:
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TesseraError(f"{path} holds no state dict")
    return {name: tensor.clone() for name, tensor in tensors.items()}  # off the mapped file


# Export


def write(model: Model, target: Path, approximate: bool = False) -> str:
    """Write the folder of a DiTPipeline; returns a message that says what the reader must know.

    diffusers' time frequencies are fixed: a network with others is written only if approximate, and the difference of
    one forward pass is measured. Raises TesseraError for a network that diffusers has no place for.
    """
    target, network = Path(target), dit_of(model, "a folder for diffusers' DiTPipeline").config
    faults = _faults(model, network)
    if faults:
        raise TesseraError("diffusers' DiTPipeline cannot hold this model:\n  " + "\n  ".join(faults))
    exact = network.timestep_freq_divisor == TIME_DIVISOR
    if not exact and not approximate:
        raise TesseraError(
            f"diffusers' DiT fixes the time_divisor at {TIME_DIVISOR}, and this network was trained with "
            f"{network.timestep_freq_divisor}: its outputs there would differ. Pass approximate=True (--approximate) to write "
            f"it all the same and measure by how much, or train with time_divisor {TIME_DIVISOR}"
        )
    said = [f"wrote {target}: a folder for diffusers' DiTPipeline, exact" if exact else f"wrote {target}: approximate"]
    with atomic_folder(target) as folder:
        for name in (TRANSFORMER, SCHEDULER):
            (folder / name).mkdir()
        _write_json(folder / TRANSFORMER / CONFIG, "DiTTransformer2DModel", transformer_of(network).model_dump())
        write_tensors(
            to_diffusers(model.network.state_dict(), network), folder / TRANSFORMER / f"{WEIGHTS}.safetensors"
        )
        _write_json(folder / SCHEDULER / SCHEDULER_CONFIG, "DDIMScheduler", scheduler_of(model.config).model_dump())
        vae = _write_vae(model, folder / VAE)
        index = {
            "id2label": {str(i): name for i, name in enumerate(model.class_names)},
            SCHEDULER: ["diffusers", "DDIMScheduler"],
            TRANSFORMER: ["diffusers", "DiTTransformer2DModel"],
            VAE: ["diffusers", "AutoencoderKL"] if vae else [None, None],
        }
        _write_json(folder / INDEX, "DiTPipeline", index)
        if not exact:
            said.append(f"one forward pass there differs by {_measured(model, folder):.3g} (relative L2)")
    if not vae:
        said.append(
            "there is no vae/, as the network sees pixels: DiTPipeline.from_pretrained(..., vae=None) loads it, but "
            "draws only with an autoencoder"
        )
    if network.num_classes != NULL_CLASS:
        said.append(
            f"DiTPipeline guides with class {NULL_CLASS}, and the null class of this model is {network.num_classes}: "
            "draw there with guidance_scale=1"
        )
    return "\n".join(said)


def _faults(model: Model, network: DiTConfig) -> list[str]:
    """What diffusers' network, scheduler or pipeline has no place for, one line each."""
    faults = []
    if not isinstance(model.config.diffusion, GaussianDiffusionConfig):
        faults.append(f"its process is {model.config.diffusion.summary()}; only Gaussian ones are known there")
    if network.block.kind != "adaln-zero":
        faults.append(f"its blocks are {network.block.kind}; only adaln-zero is known there")
    if network.input_size[0] != network.input_size[1]:
        faults.append(f"it sees {network.input_size[0]} x {network.input_size[1]}; only squares are known there")
    if int(network.hidden_size * network.mlp_ratio) != 4 * network.hidden_size:
        faults.append(f"its mlp_ratio is {network.mlp_ratio:g}; only 4 is known there")
    if not network.num_classes:
        faults.append("it is unconditional; only networks told a class are known there")
    elif not network.learn_null_class:
        faults.append("it has no null class; the label table there always has one")
    table = model.network.state_dict().get("pos_embed")
    if table is not None and not torch.allclose(
        table[0], sincos_grid(network.grid, network.hidden_size).to(table), rtol=0, atol=1e-5
    ):
        faults.append("its positions are no sin-cos table of its grid; diffusers would make that in their place")
    return faults


def transformer_of(network: DiTConfig) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=network.num_heads,
        attention_head_dim=network.hidden_size // network.num_heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        num_layers=network.depth,
        sample_size=network.input_size[0],
        patch_size=network.patch_size,
        num_embeds_ada_norm=network.num_classes,
        norm_eps=network.mlp_norm_eps,
    )


def to_diffusers(tensors: dict[str, Tensor], network: DiTConfig) -> dict[str, Tensor]:
    """Our state dict -> diffusers'; each tensor with memory of its own."""
    result = {}
    for ours, how, theirs in places(network.depth):
        tensor = tensors[ours].detach().cpu()
        parts = tensor.chunk(len(theirs)) if how == "parts" else [tensor] * len(theirs)
        result.update({name: part.clone() for name, part in zip(theirs, parts)})
    return result


def scheduler_of(config: BundleConfig) -> SchedulerConfig:
    """The DDIM scheduler with a process's betas: by name where there is one, else number by number."""
    assert isinstance(config.diffusion, GaussianDiffusionConfig)  # _faults has said so
    steps, schedule = config.diffusion.num_timesteps, config.diffusion.schedule
    told: dict[str, Any] = {"trained_betas": schedule.betas(steps).tolist()}
    if schedule == CosineBetas():
        told = {"beta_schedule": "squaredcos_cap_v2"}
    elif isinstance(schedule, LinearBetas) and schedule.end * 1000 / steps < 0.999:
        told = {"beta_start": schedule.start * 1000 / steps, "beta_end": schedule.end * 1000 / steps}
    return SchedulerConfig.model_validate(
        {
            "num_train_timesteps": steps,
            "prediction_type": next(name for name, ours in PREDICTIONS.items() if ours == config.diffusion.prediction),
            "timestep_spacing": "trailing" if config.sampling.timestep_spacing.kind == "trailing" else "leading",
            "rescale_betas_zero_snr": config.diffusion.zero_terminal_snr,
            "clip_sample": False,
            **told,
        }
    )


def _write_vae(model: Model, target: Path) -> bool:
    """Copy the autoencoder, or fetch it from the hub; False if the network sees pixels."""
    codec = model.config.codec
    if not isinstance(codec, StoredConfig):
        return False
    if not isinstance(codec, AutoencoderConfig):
        raise TesseraError(f"DiTPipeline draws with an AutoencoderKL alone, and this model's codec is {codec.kind}")
    if codec.folder is not None and codec.scale is None and codec.shift is None:
        copy_codec(codec, target)
    elif isinstance(model.codec, Autoencoder):
        model.codec.save(target)
    told = read_json(target / CONFIG)
    if shift := told.get("shift_factor"):
        raise TesseraError(f"DiTPipeline ignores an autoencoder's shift_factor, and this one's is {shift}")
    if told.get("latents_mean") or told.get("latents_std"):
        raise TesseraError(
            "DiTPipeline knows one scaling_factor, and this model's latents are scaled and shifted channel by channel"
        )
    return True


def _write_json(path: Path, kind: str, told: dict[str, Any]) -> None:
    data = {"_class_name": kind, "_diffusers_version": VERSION, **told}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _measured(model: Model, folder: Path) -> float:
    """Relative L2 distance of one forward pass: diffusers' network, loaded from the folder, and ours."""
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError:
        raise TesseraError("measuring the difference needs diffusers: pip install 'tessera[diffusers]'") from None
    theirs: Any = DiTTransformer2DModel.from_pretrained(folder, subfolder=TRANSFORMER).eval()
    classes = model.config.network.num_classes

    def forward(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        label = condition.label
        assert label is not None  # such a network was refused
        return theirs(x, timestep=t, class_labels=torch.where(label < 0, classes, label)).sample

    return difference(model.network, forward)
