"""Folders of diffusers' DiTPipeline, or of its transformer alone <-> a Model.

diffusers' network differs from the official one in two numbers, both settings of a DiTConfig: it divides its timestep
frequencies by 127, and the norm before the MLP adds 1e-5. Import does not need diffusers. Export needs it only to
measure a difference or to download an autoencoder.

Shapes: D width, O raw output channels, p patch side.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from tessera.bundle import BundleConfig, Model, Provenance, assemble, copy_codec
from tessera.checkpoint_files import find_weight_files, write_tensors
from tessera.codecs import AutoencoderConfig, StoredConfig
from tessera.codecs.autoencoder import Autoencoder
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.conditioning import Condition
from tessera.diffusion.gaussian import CosineBetas, GaussianDiffusionConfig, LinearBetas, ScaledLinearBetas
from tessera.errors import TesseraError, bullet_list
from tessera.files import atomic_folder, read_json
from tessera.interop.common import relative_difference, require_dit
from tessera.interop.schedulers import PREDICTIONS, SchedulerConfig, read_scheduler, sampling_config
from tessera.interop.weights import find_weights
from tessera.layers.positions import sincos_grid
from tessera.models.dit import DiTConfig
from tessera.models.network import NetworkConfig
from tessera.sampling import DynamicThresholding, RangeClipping
from tessera.settings import S, Settings, diff, validate

INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model"
TRANSFORMER, SCHEDULER, VAE, SCHEDULER_CONFIG = "transformer", "scheduler", "vae", "scheduler_config.json"
VERSION = "0.31.0"  # of diffusers whose files are written; later versions read them
REQUIRED = ("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight", "proj_out_2.weight")
TIME_DIVISOR = 127  # hard-coded there
NULL_CLASS = 1000  # hard-coded in DiTPipeline


class TransformerConfig(Settings):
    """config.json of a DiTTransformer2DModel; the types allow only the values that Tessera supports."""

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


class TensorMapping(NamedTuple):
    """The names of a tensor in diffusers: one name, one for each chunk of its rows, or one for each of its copies."""

    ours: str
    how: Literal["one", "chunks", "copies"]
    theirs: tuple[str, ...]


def tensor_mappings(depth: int) -> list[TensorMapping]:
    """Every tensor of a network except the position table, which diffusers recomputes."""

    def both(ours: str, *theirs: str, how: Literal["one", "chunks", "copies"] = "one") -> list[TensorMapping]:
        return [
            TensorMapping(f"{ours}.{kind}", how, tuple(f"{name}.{kind}" for name in theirs))
            for kind in ("weight", "bias")
        ]

    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    embedders = [f"{block}.norm1.emb" for block in blocks]
    table = tuple(f"{name}.class_embedder.embedding_table.weight" for name in embedders)
    mappings = [
        *both("x_embedder.proj", "pos_embed.proj"),
        *both("t_embedder.mlp.0", *(f"{name}.timestep_embedder.linear_1" for name in embedders), how="copies"),
        *both("t_embedder.mlp.2", *(f"{name}.timestep_embedder.linear_2" for name in embedders), how="copies"),
        TensorMapping("y_embedder.embedding_table.weight", "copies", table),
        *both("final_layer.adaLN_modulation.1", "proj_out_1"),
        *both("final_layer.linear", "proj_out_2"),
    ]
    for i, block in enumerate(blocks):
        mappings += both(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
        mappings += both(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{part}" for part in "qkv"), how="chunks")
        mappings += both(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        mappings += both(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        mappings += both(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
    return mappings


# Import


def read(folder: Path, device: torch.device | str = "cpu", *, codec: CodecSource | None = None) -> Model:
    """A Model from the folder of a pipeline or a transformer, which generates the images that diffusers generates.

    codec: instead of the folder's own vae/. A transformer alone gets the paper's diffusion process. Raises TesseraError
    if something is missing, damaged, or not supported by Tessera.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    path = folder / TRANSFORMER if index else folder
    data = read_json(path / CONFIG)
    if data.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):  # the second until version 0.30
        raise TesseraError(
            f"{path} holds diffusers' {data.get('_class_name')}; Tessera reads DiTTransformer2DModel (DiTPipeline)"
        )
    if data.get("interpolation_scale") not in (None, 1):
        raise TesseraError(
            f"{path / CONFIG}: interpolation_scale {data['interpolation_scale']} scales the positions; expected 1"
        )
    transformer = parse(TransformerConfig, data, path / CONFIG)
    network = network_config(transformer, str(path / CONFIG))
    transformer_weights = read_weights(path, REQUIRED)
    tensors = from_diffusers(transformer_weights.tensors, network, str(path))
    scheduler, kind = SchedulerConfig(), "DDIMScheduler"
    if (folder / SCHEDULER / SCHEDULER_CONFIG).exists() or index:
        scheduler, kind = read_scheduler(folder / SCHEDULER / SCHEDULER_CONFIG)
    if codec is None and index and (folder / VAE / CONFIG).exists():
        codec = str(folder)
    diffusion = diffusion_config(scheduler, network, str(folder / SCHEDULER))
    sampling, differences = sampling_config(scheduler, kind, diffusion, min(50, scheduler.num_train_timesteps))
    notes = [f"of the scheduler: {'; '.join(differences)}"] if differences else []
    config = BundleConfig(
        network=network,
        diffusion=diffusion,
        codec=resolve_codec(codec, network.in_channels),
        # The default of DiTPipeline, which guides every channel.
        sampling=sampling.model_copy(update={"guidance_scale": 4.0, "guidance_channels": "all"}),
        class_names=_class_names(index.get("id2label"), network.num_classes),
        provenance=Provenance(
            converted_from=f"diffusers folder {folder.resolve().name}"
            + (f" (variant {transformer_weights.variant})" if transformer_weights.variant else ""),
            not_converted="; ".join([*transformer_weights.left_out, *notes]) or None,
        ),
    )
    return assemble(config, tensors, str(path), device)


def network_config(config: TransformerConfig, source: str) -> DiTConfig:
    """The DiTConfig of diffusers' network; it has one more class, the null label."""
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
    """diffusers' state dict -> Tessera's. Raises TesseraError that lists missing, unexpected or unsupported tensors."""
    # As in diffusers: the positions of the configured grid, unscaled at any size.
    positions = {"pos_embed": sincos_grid(network.grid, network.hidden_size)[None]}
    return positions | from_mappings(tensor_mappings(network.depth), tensors, source)


def from_mappings(mappings: list[TensorMapping], tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a state dict of diffusers by our names. Raises TesseraError as `from_diffusers`."""
    names = {name for mapping in mappings for name in mapping.theirs}
    problems = [f"missing {name}" for name in sorted(names - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - names)]
    if problems:
        raise TesseraError(f"{source} holds another architecture than its configuration:{bullet_list(problems)}")
    result = {}
    for ours, how, theirs in mappings:
        first = tensors[theirs[0]]
        if how == "copies":
            different = [name for name in theirs if not torch.equal(tensors[name], first)]
            if different:
                largest = max(float((tensors[name] - first).norm() / first.norm()) for name in different)
                raise TesseraError(
                    f"{source}: {different[0]} differs from {theirs[0]} ({len(different)} of {len(theirs)} copies, by "
                    f"up to {largest:.2g} relative). diffusers has a copy of the embedders in every block, and "
                    "training there unties them; Tessera has one for all blocks, like the official network, and "
                    "cannot represent them. Sample from this folder with diffusers, or repeat the fine-tuning in "
                    "Tessera from the folder before it (training.init_from), or in diffusers with tied embedders "
                    "(block.norm1.emb = transformer_blocks[0].norm1.emb)"
                )
        result[ours] = torch.cat([tensors[name] for name in theirs]) if how == "chunks" else first
    return result


def diffusion_config(scheduler: SchedulerConfig, network: NetworkConfig, source: str) -> GaussianDiffusionConfig:
    """The diffusion process with a scheduler's betas. Raises TesseraError if Tessera has no such schedule."""
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise TesseraError(
            f"{source}: {network.out_channels} output channels for {network.in_channels} inputs; expected 1x or 2x"
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
        candidates = [validate(LinearBetas, ends, source)]  # Tessera's are those of 1000 steps
    elif scheduler.beta_schedule == "scaled_linear":
        ends = {"start": scheduler.beta_start * steps / 1000, "end": scheduler.beta_end * steps / 1000}
        candidates = [validate(ScaledLinearBetas, {**ends, "snr_divisor": scheduler.snr_shift_scale}, source)]
        betas = candidates[0].betas(steps)
    else:
        candidates, betas = [CosineBetas()], CosineBetas().betas(steps)
    for schedule in candidates:
        if len(betas) == steps and torch.allclose(schedule.betas(steps), betas, rtol=1e-6, atol=1e-8):
            fixed = "beta" if (scheduler.variance_type or "").startswith("fixed_large") else "posterior"
            data = {
                "num_timesteps": steps,
                "schedule": schedule,
                "prediction": PREDICTIONS[scheduler.prediction_type],
                "variance": "learned" if network.out_channels == 2 * network.in_channels else fixed,
                "zero_terminal_snr": scheduler.rescale_betas_zero_snr,  # of the betas as stated, as in diffusers
            }
            return validate(GaussianDiffusionConfig, data, source)
    raise TesseraError(f"{source}: its {len(betas)} betas are neither linear nor the cosine schedule of {steps} steps")


def parse(kind: type[S], data: dict[str, Any], path: Path) -> S:
    """The fields that Tessera uses; each version of diffusers writes others, too."""
    return validate(kind, {name: value for name, value in data.items() if name in kind.model_fields}, str(path))


def _class_names(labels: Any, classes: int) -> tuple[str, ...]:
    """A name for each class; none if the names are only the numbers."""
    if not isinstance(labels, dict):
        return ()
    names = tuple(str(labels.get(str(i), i)) for i in range(classes))
    return () if names == tuple(str(i) for i in range(classes)) else names


class TransformerWeights(NamedTuple):
    tensors: dict[str, Tensor]
    variant: str | None
    left_out: list[str]


def read_weights(folder: Path, required: Collection[str]) -> TransformerWeights:
    """A transformer's state dict: one file or shards, of a variant if there is nothing else."""
    files = find_weight_files(folder, [WEIGHTS])
    if files is None:
        raise TesseraError(f"{folder} holds no weights: expected {WEIGHTS}.safetensors (or .bin), or its .index.json")
    weights = find_weights(files.read(), required, str(folder))
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}  # pickles are memory-mapped
    return TransformerWeights(tensors, files.variant, weights.left_out)


# Export


def write(model: Model, target: Path, approximate: bool = False) -> str:
    """Write the folder of a DiTPipeline; returns a message with what a user of the folder must know.

    The timestep frequencies of diffusers are fixed: a network with others is written only if approximate, and the
    difference of one forward pass is measured. Raises TesseraError for a network that diffusers does not support.
    """
    target, network = Path(target), require_dit(model, "a folder of diffusers' DiTPipeline").config
    if problems := _problems(model, network):
        raise TesseraError("diffusers' DiTPipeline cannot hold this model:\n  " + "\n  ".join(problems))
    exact = network.timestep_freq_divisor == TIME_DIVISOR
    if not exact and not approximate:
        raise TesseraError(
            f"diffusers' DiT has a timestep_freq_divisor of {TIME_DIVISOR}, and this network was trained with "
            f"{network.timestep_freq_divisor}: its outputs would differ. Pass approximate=True (--approximate) "
            f"to write it anyway and measure by how much, or train with timestep_freq_divisor {TIME_DIVISOR}"
        )
    messages = [f"wrote {target}: a folder of diffusers' DiTPipeline, " + ("exact" if exact else "approximate")]
    with atomic_folder(target) as folder:
        for name in (TRANSFORMER, SCHEDULER):
            (folder / name).mkdir()
        write_json(folder / TRANSFORMER / CONFIG, "DiTTransformer2DModel", transformer_config(network).model_dump())
        write_tensors(
            to_diffusers(model.network.state_dict(), network), folder / TRANSFORMER / f"{WEIGHTS}.safetensors"
        )
        write_json(folder / SCHEDULER / SCHEDULER_CONFIG, "DDIMScheduler", scheduler_config(model.config))
        vae = write_vae(model, folder / VAE)
        index = {
            "id2label": {str(i): name for i, name in enumerate(model.class_names)},
            SCHEDULER: ["diffusers", "DDIMScheduler"],
            TRANSFORMER: ["diffusers", "DiTTransformer2DModel"],
            VAE: ["diffusers", "AutoencoderKL"] if vae else [None, None],
        }
        write_json(folder / INDEX, "DiTPipeline", index)
        if not exact:
            messages.append(f"one forward pass in diffusers differs by {_difference(model, folder):.3g} (relative L2)")
    if not vae:
        messages.append(
            "there is no vae/ (the network works on pixels): DiTPipeline.from_pretrained(..., vae=None) loads it, "
            "but samples only with an autoencoder"
        )
    if replaced := replaced_settings(model.config):
        messages.append(f"its scheduler is DDIM, which samples otherwise than this model: {'; '.join(replaced)}")
    if network.num_classes != NULL_CLASS:
        messages.append(
            f"DiTPipeline guides with class {NULL_CLASS}, and the null label of this model is {network.num_classes}: "
            "sample there with guidance_scale=1"
        )
    return "\n".join(messages)


def _problems(model: Model, network: DiTConfig) -> list[str]:
    """What diffusers' network, scheduler or pipeline does not support, one line each."""
    problems = []
    if not isinstance(model.config.diffusion, GaussianDiffusionConfig):
        problems.append(f"diffusion is {model.config.diffusion.summary()}; only Gaussian is supported there")
    if network.block.kind != "adaln-zero":
        problems.append(f"block is {network.block.kind}; only adaln-zero is supported there")
    if network.is_temporal:
        problems.append(f"input_size is {network.input_size}; only images are supported there")
    elif network.input_size[0] != network.input_size[1]:
        problems.append(
            f"input_size is {network.input_size[0]} x {network.input_size[1]}; only squares are supported there"
        )
    if int(network.hidden_size * network.mlp_ratio) != 4 * network.hidden_size:
        problems.append(f"mlp_ratio is {network.mlp_ratio:g}; only 4 is supported there")
    if not network.num_classes:
        kind = "conditioned on text" if network.uses_text else "unconditional"
        problems.append(f"the network is {kind}; only class-conditional networks are supported there")
    elif not network.learn_null_class:
        problems.append("learn_null_class is false; the label table there always has a null label")
    table = model.network.state_dict().get("pos_embed")
    if table is not None and not torch.allclose(
        table[0], sincos_grid(network.grid, network.hidden_size).to(table), rtol=0, atol=1e-5
    ):
        problems.append("the positions are not the sin-cos table of the grid, which diffusers recomputes")
    return problems


def transformer_config(network: DiTConfig) -> TransformerConfig:
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
    """Tessera's state dict -> diffusers'; each tensor has its own memory."""
    return to_mappings(tensor_mappings(network.depth), tensors)


def to_mappings(mappings: list[TensorMapping], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our state dict by diffusers' names; each has its own memory."""
    result = {}
    for ours, how, theirs in mappings:
        tensor = tensors[ours].detach().cpu()
        tensors_there = tensor.chunk(len(theirs)) if how == "chunks" else [tensor] * len(theirs)
        result.update({name: each.clone() for name, each in zip(theirs, tensors_there)})
    return result


def scheduler_config(config: BundleConfig) -> dict[str, Any]:
    """The DDIM scheduler with the betas of a process: by name if diffusers has one, else as a list."""
    assert isinstance(config.diffusion, GaussianDiffusionConfig)  # checked by _problems
    steps, schedule, sampling = config.diffusion.num_timesteps, config.diffusion.schedule, config.sampling
    betas: dict[str, Any] = {"trained_betas": schedule.betas(steps).tolist()}
    if schedule == CosineBetas():
        betas = {"beta_schedule": "squaredcos_cap_v2"}
    elif isinstance(schedule, ScaledLinearBetas) and schedule.snr_divisor == 1:
        betas = {"beta_schedule": "scaled_linear", "beta_start": schedule.start * 1000 / steps}
        betas |= {"beta_end": schedule.end * 1000 / steps}
    elif isinstance(schedule, LinearBetas) and schedule.end * 1000 / steps < 0.999:
        betas = {"beta_start": schedule.start * 1000 / steps, "beta_end": schedule.end * 1000 / steps}
    clipping, spacing = sampling.clipping, sampling.timestep_spacing
    data = {
        "num_train_timesteps": steps,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": next(name for name, ours in PREDICTIONS.items() if ours == config.diffusion.prediction),
        "timestep_spacing": "trailing" if spacing.kind == "trailing" else "leading",
        "steps_offset": getattr(spacing, "offset", 0),
        "rescale_betas_zero_snr": config.diffusion.zero_terminal_snr,
        "set_alpha_to_one": getattr(spacing, "end", "data") == "data",
        "clip_sample": isinstance(clipping, RangeClipping),
        "thresholding": isinstance(clipping, DynamicThresholding),
    }
    if isinstance(clipping, RangeClipping):
        data["clip_sample_range"] = clipping.range
    if isinstance(clipping, DynamicThresholding):
        data |= {"dynamic_thresholding_ratio": clipping.quantile, "sample_max_value": clipping.max_value}
    return data | betas


def replaced_settings(config: BundleConfig) -> list[str]:
    """How the DDIM scheduler of a written folder samples otherwise than the model."""
    assert isinstance(config.diffusion, GaussianDiffusionConfig)  # checked by _problems
    scheduler = validate(SchedulerConfig, scheduler_config(config), "the scheduler")
    written, _ = sampling_config(scheduler, "DDIMScheduler", config.diffusion, config.sampling.num_steps)
    names = {"sampler", "timestep_spacing", "clipping"}
    changes = diff(*(each.model_dump(mode="json", include=names) for each in (config.sampling, written)))
    return [f"{name} was {old}, is {new}" for name, old, new in changes if "absent" not in (old, new)]


def write_vae(model: Model, target: Path) -> bool:
    """Copy the autoencoder, or download it from the hub; False if the network works on pixels."""
    codec = model.config.codec
    if not isinstance(codec, StoredConfig):
        return False
    if not isinstance(codec, AutoencoderConfig):
        raise TesseraError(f"diffusers' pipeline needs an AutoencoderKL, and this model's codec is {codec.kind}")
    if codec.folder is not None and codec.scale is None and codec.shift is None:
        copy_codec(codec, target)
    elif isinstance(model.codec, Autoencoder):
        model.codec.save(target)
    data = read_json(target / CONFIG)
    if shift := data.get("shift_factor"):
        raise TesseraError(f"diffusers' pipeline ignores an autoencoder's shift_factor, and this one's is {shift}")
    if data.get("latents_mean") or data.get("latents_std"):
        raise TesseraError(
            "diffusers' pipeline has one scaling_factor, and this model's latents are scaled and shifted channel by "
            "channel"
        )
    return True


def write_json(path: Path, kind: str, data: dict[str, Any]) -> None:
    data = {"_class_name": kind, "_diffusers_version": VERSION, **data}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _difference(model: Model, folder: Path) -> float:
    """Relative L2 distance of one forward pass of diffusers' network, loaded from the folder, from Tessera's."""
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError:
        raise TesseraError("measuring the difference needs diffusers: pip install 'tessera[diffusers]'") from None
    theirs: Any = DiTTransformer2DModel.from_pretrained(folder, subfolder=TRANSFORMER).eval()
    classes = model.config.network.num_classes

    def forward(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        label = condition.label
        assert label is not None  # checked by _problems
        return theirs(x, timestep=t, class_labels=torch.where(label < 0, classes, label)).sample

    return relative_difference(model.network, forward)
