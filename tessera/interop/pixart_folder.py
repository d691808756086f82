"""Folders of diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline, or of their transformer alone <-> a Model.

The transformer is the official network without its null embedding: the pipelines guide away from an empty prompt. They
set the prompts in lower case, and so does an import. With `clean_caption` and the packages bs4 and ftfy they also
remove addresses, HTML and some punctuation, which Tessera does not repeat. Import does not need diffusers.

Shapes: D width, O raw output channels, p patch side.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from tessera.bundle import BundleConfig, Model, Provenance, assemble
from tessera.checkpoint_files import find_weight_files, write_tensors
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.encoders.pretrained_text import SETTINGS_FILES
from tessera.encoders.text import AnyTextEncoder, FolderConfig, FrozenConfig
from tessera.errors import TesseraError
from tessera.files import atomic_folder, read_json
from tessera.interop import diffusers
from tessera.interop.diffusers import CONFIG, INDEX, SCHEDULER, SCHEDULER_CONFIG, TRANSFORMER, VAE, TensorMapping
from tessera.interop.pixart import SAMPLING, T5, T5_CHANNELS, TEXT_TOKENS
from tessera.interop.schedulers import SchedulerConfig, read_scheduler, sampling_config
from tessera.models.pixart import PixArtBlockConfig, PixArtConfig
from tessera.sampling import DPMSolver
from tessera.settings import Settings

PIPELINES = {"PixArtAlphaPipeline": TEXT_TOKENS["alpha"], "PixArtSigmaPipeline": TEXT_TOKENS["sigma"]}
TRANSFORMER_CLASS, TOKENIZER, TEXT_ENCODER = "PixArtTransformer2DModel", "tokenizer", "text_encoder"
REQUIRED = ("pos_embed.proj.weight", "adaln_single.linear.weight", "caption_projection.linear_1.weight")
NULL_EMBEDDING = "caption_projection.y_embedding"  # in folders of diffusers 0.22, which later versions ignore
SCHEDULER_CLASS = "DPMSolverMultistepScheduler"  # of the published folders
BINNED_SIZES = (32, 64, 128, 256)  # sample sizes for which the pipelines have resolution bins
EPS = 1e-6  # of the norms
SIZES_AT = 128  # the sample_size at which the pipelines pass height, width and ratio


class TransformerConfig(Settings):
    """config.json of a PixArtTransformer2DModel; the types allow only the values that Tessera supports."""

    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = 8
    num_layers: PositiveInt = 28
    dropout: float = 0.0
    norm_num_groups: int | None = 32
    cross_attention_dim: PositiveInt | None = 1152
    attention_bias: Literal[True] = True
    sample_size: PositiveInt = 128
    patch_size: PositiveInt = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: PositiveInt | None = 1000
    upcast_attention: bool = False
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = EPS
    interpolation_scale: PositiveFloat | None = None
    use_additional_conditions: bool | None = None
    caption_channels: PositiveInt
    attention_type: Literal["default"] = "default"


def is_pixart(folder: Path) -> bool:
    """Whether a folder of diffusers is a PixArt pipeline or transformer."""
    if (folder / INDEX).exists():
        folder = folder / TRANSFORMER
    data = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    kind = data.get("_class_name")  # the second until version 0.30
    return kind == TRANSFORMER_CLASS or (
        kind == "Transformer2DModel" and data.get("norm_type") == TransformerConfig.model_fields["norm_type"].default
    )


# Import


def read(folder: Path, device: torch.device | str = "cpu", *, codec: CodecSource | None = None) -> Model:
    """A Model from the folder of a pipeline or a transformer, which generates the images that diffusers generates.

    codec: instead of the folder's own vae/. A transformer alone gets the published autoencoder, text encoder and
    scheduler. Raises TesseraError if something is missing, damaged, or not supported by Tessera.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    pipeline = index.get("_class_name")
    if index and pipeline not in PIPELINES:
        raise TesseraError(
            f"{folder} is diffusers' {pipeline}; Tessera reads {' and '.join(PIPELINES)} of this network"
        )
    path = folder / TRANSFORMER if index else folder
    transformer = diffusers.parse(TransformerConfig, read_json(path / CONFIG), path / CONFIG)
    weights = diffusers.read_weights(path, REQUIRED)
    max_tokens = PIPELINES.get(str(pipeline), TEXT_TOKENS["alpha"])
    network, tensors = from_diffusers(transformer, weights.tensors, str(path), max_tokens)
    scheduler, kind = SchedulerConfig(timestep_spacing="linspace"), SCHEDULER_CLASS
    if index:
        scheduler, kind = read_scheduler(folder / SCHEDULER / SCHEDULER_CONFIG)
    if codec is None and index and (folder / VAE / CONFIG).exists():
        codec = str(folder)
    diffusion = diffusers.diffusion_config(scheduler, network, str(folder / SCHEDULER))
    steps = min(SAMPLING["num_steps"], scheduler.num_train_timesteps)
    sampling, differences = sampling_config(scheduler, kind, diffusion, steps, scales_state=True)
    notes = [f"of the scheduler: {'; '.join(differences)}"] if differences else []
    config = BundleConfig(
        network=network,
        diffusion=diffusion,
        codec=resolve_codec(codec, network.in_channels),
        text=text_config(folder, index, network, max_tokens),
        # The defaults of the pipelines, which guide every channel.
        sampling=sampling.model_copy(
            update={"guidance_scale": SAMPLING["guidance_scale"], "guidance_channels": "all", "null_text": "empty"}
        ),
        provenance=Provenance(
            converted_from=f"diffusers folder {folder.resolve().name}"
            + (f" (variant {weights.variant})" if weights.variant else ""),
            not_converted="; ".join([*weights.left_out, *notes]) or None,
        ),
    )
    return assemble(config, tensors, str(path), device)


def text_config(folder: Path, index: dict[str, Any], network: PixArtConfig, max_tokens: int) -> AnyTextEncoder | None:
    """The text encoder of a folder; that of the published models if it has none, or None for other channels."""
    options = {"max_tokens": max_tokens, "lower_case": True}
    if index and (folder / TEXT_ENCODER).is_dir():
        parts = {"subfolder": TEXT_ENCODER, "tokenizer_subfolder": TOKENIZER}
        return FolderConfig(source=str(folder.resolve()), **parts, **options)
    return FolderConfig(source=T5, **options) if network.text_channels == T5_CHANNELS else None


def from_diffusers(
    config: TransformerConfig, tensors: dict[str, Tensor], source: str, text_tokens: int
) -> tuple[PixArtConfig, dict[str, Tensor]]:
    """Our settings and state dict of a PixArtTransformer2DModel. Raises TesseraError if they do not fit."""
    sample_size, patch, width = config.sample_size, config.patch_size, config.num_attention_heads
    width *= config.attention_head_dim
    if config.cross_attention_dim != width:
        raise TesseraError(
            f"{source}: cross_attention_dim is {config.cross_attention_dim}; expected the width, {width}"
        )
    has_null = NULL_EMBEDDING in tensors
    if config.norm_eps != EPS:
        raise TesseraError(f"{source}: norm_eps is {config.norm_eps}; expected {EPS}, as in the official network")
    sizes, scale = config.use_additional_conditions, config.interpolation_scale
    network = PixArtConfig(
        input_size=(sample_size, sample_size),
        in_channels=config.in_channels,
        out_channels=config.out_channels or config.in_channels,
        patch_size=patch,
        depth=config.num_layers,
        hidden_size=width,
        num_heads=config.num_attention_heads,
        text_channels=config.caption_channels,
        text_tokens=len(tensors[NULL_EMBEDDING]) if has_null else text_tokens,
        position_base=sample_size // patch,
        position_scale=max(sample_size // 64, 1) if scale is None else scale,
        size_conditions=sample_size == SIZES_AT if sizes is None else sizes,
        null_embedding=has_null,
    )
    return network, diffusers.from_mappings(list(tensor_mappings(network)), tensors, source)


def both(ours: str, theirs: str, parts: str = "") -> Iterator[TensorMapping]:
    """Weight and bias of a layer, with its name or names in diffusers."""
    names = [f"{theirs}{part}" for part in parts] or [theirs]
    for kind in ("weight", "bias"):
        yield TensorMapping(f"{ours}.{kind}", "chunks", tuple(f"{name}.{kind}" for name in names))


def tensor_mappings(network: PixArtConfig) -> Iterator[TensorMapping]:
    """Every tensor of a network with its name or names in diffusers."""
    embedder = "adaln_single.emb"
    yield from both("x_embedder.proj", "pos_embed.proj")
    embedders = {"t_embedder": "timestep_embedder"}
    if network.size_conditions:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for ours, theirs in embedders.items():
        yield from both(f"{ours}.mlp.0", f"{embedder}.{theirs}.linear_1")
        yield from both(f"{ours}.mlp.2", f"{embedder}.{theirs}.linear_2")
    yield from both("shared.adaLN_modulation.1", "adaln_single.linear")
    yield from both("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    yield from both("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    if network.null_embedding:
        yield TensorMapping("y_embedder.y_embedding", "chunks", (NULL_EMBEDDING,))
    yield from both("final_layer.linear", "proj_out")
    yield TensorMapping("final_layer.scale_shift_table", "chunks", ("scale_shift_table",))
    for number in range(network.depth):
        yield from block_mappings(f"blocks.{number}", f"transformer_blocks.{number}")


def block_mappings(ours: str, theirs: str) -> Iterator[TensorMapping]:
    """Every tensor of a block, whose name is `ours` here and `theirs` in diffusers."""
    yield TensorMapping(f"{ours}.adaLN_modulation.table", "chunks", (f"{theirs}.scale_shift_table",))
    yield from both(f"{ours}.attn.qkv", f"{theirs}.attn1.to_", "qkv")
    yield from both(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
    yield from both(f"{ours}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
    yield from both(f"{ours}.cross_attn.kv_linear", f"{theirs}.attn2.to_", "kv")
    yield from both(f"{ours}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
    yield from both(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
    yield from both(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")


# Export


def write(model: Model, target: Path) -> str:
    """Write the folder of a pipeline with all parts; returns a message with what a user of the folder must know.

    The null embedding has no place there. Raises TesseraError for a network that diffusers does not support.
    """
    network = model.config.network
    assert isinstance(network, PixArtConfig)
    if problems := list(_problems(model.config, network)):
        raise TesseraError("diffusers' PixArt pipelines cannot hold this model:\n  " + "\n  ".join(problems))
    tokens = getattr(model.config.text, "max_tokens", None) or network.text_tokens
    pipeline = next((name for name, limit in PIPELINES.items() if tokens <= limit), "PixArtSigmaPipeline")
    with atomic_folder(target) as folder:
        for name in (TRANSFORMER, SCHEDULER):
            (folder / name).mkdir()
        settings = transformer_config(network).model_dump()
        diffusers.write_json(folder / TRANSFORMER / CONFIG, TRANSFORMER_CLASS, settings)
        stored = network.model_copy(update={"null_embedding": False})
        tensors = diffusers.to_mappings(list(tensor_mappings(stored)), model.network.state_dict())
        write_tensors(tensors, folder / TRANSFORMER / f"{diffusers.WEIGHTS}.safetensors")
        scheduler, settings = scheduler_config(model.config)
        diffusers.write_json(folder / SCHEDULER / SCHEDULER_CONFIG, scheduler, settings)
        vae = diffusers.write_vae(model, folder / VAE)
        index = {
            SCHEDULER: ["diffusers", scheduler],
            TRANSFORMER: ["diffusers", TRANSFORMER_CLASS],
            VAE: ["diffusers", "AutoencoderKL"] if vae else [None, None],
            **_write_text_encoder(model.config.text, folder),
        }
        diffusers.write_json(folder / INDEX, pipeline, index)
    messages = [f"wrote {target}: a folder of diffusers' {pipeline}, with exact weights"]
    return "\n".join([*messages, *_remarks(model.config, network, pipeline, tokens, vae, index)])


def _problems(config: BundleConfig, network: PixArtConfig) -> Iterator[str]:
    """What diffusers' network or scheduler does not support, one line each."""
    if not isinstance(config.diffusion, GaussianDiffusionConfig):
        yield f"diffusion is {config.diffusion.summary()}; only Gaussian is supported there"
    allowed = PixArtBlockConfig(drop_path=network.block.drop_path)  # drop_path does not change the trained network
    if network.block != allowed:
        yield f"block is {network.block.summary()}; there is only the block without these options"
    if len(network.input_size) == 3:
        yield f"input_size is {network.input_size}; only images are supported there"
    if int(network.hidden_size * network.mlp_ratio) != 4 * network.hidden_size:
        yield f"mlp_ratio is {network.mlp_ratio:g}; only 4 is supported there"
    if network.num_classes:
        yield f"the network has {network.num_classes} classes; there are none there"
    if network.vocabulary_size:
        yield "the network embeds ids of a vocabulary; only the channels of a text encoder are supported there"
    if network.timestep_freq_divisor != 128:
        yield f"timestep_freq_divisor is {network.timestep_freq_divisor}; it is 128 there"
    if network.mlp_norm_eps != EPS:
        yield f"mlp_norm_eps is {network.mlp_norm_eps}; only {EPS} is supported there"


def transformer_config(network: PixArtConfig) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=network.num_heads,
        attention_head_dim=network.hidden_size // network.num_heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        num_layers=network.depth,
        cross_attention_dim=network.hidden_size,
        sample_size=network.position_base * network.patch_size,
        patch_size=network.patch_size,
        interpolation_scale=network.position_scale,
        use_additional_conditions=network.size_conditions,
        caption_channels=network.text_channels,
    )


def scheduler_config(config: BundleConfig) -> tuple[str, dict[str, Any]]:
    """The class and the settings of a scheduler: DPM-Solver++ for dpm++ of order 2, else DDIM."""
    settings, solver = diffusers.scheduler_config(config), config.sampling.sampler
    if not (isinstance(solver, DPMSolver) and solver.order == 2):
        return "DDIMScheduler", settings
    at_first = not settings.pop("set_alpha_to_one")
    for name in ("clip_sample", "clip_sample_range"):
        settings.pop(name, None)
    if config.sampling.timestep_spacing.kind not in ("leading", "trailing"):
        settings["timestep_spacing"] = "linspace"
    return SCHEDULER_CLASS, settings | {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": not at_first,
        "final_sigmas_type": "sigma_min" if at_first else "zero",
    }


def _write_text_encoder(text: AnyTextEncoder | None, folder: Path) -> dict[str, list[str | None]]:
    """Copy tokenizer/ and text_encoder/ of a frozen encoder in a folder; returns their entries of the index."""
    absent: dict[str, list[str | None]] = {TOKENIZER: [None, None], TEXT_ENCODER: [None, None]}
    if not isinstance(text, FrozenConfig) or (isinstance(text, FolderConfig) and text.folder is None):
        return absent
    tokenizer, weights = text.folders
    stored = find_weight_files(weights)
    for source, name, files in (
        (tokenizer, TOKENIZER, []),
        (weights, TEXT_ENCODER, [] if stored is None else stored.files),
    ):
        (folder / name).mkdir()
        for file in {path for pattern in SETTINGS_FILES for path in source.glob(pattern)}.union(files):
            shutil.copyfile(file, folder / name / file.name)
    data, of_tokenizer = read_json(weights / CONFIG), tokenizer / "tokenizer_config.json"
    tokenizer_class = read_json(of_tokenizer).get("tokenizer_class") if of_tokenizer.exists() else None
    return {
        TOKENIZER: ["transformers", tokenizer_class or "AutoTokenizer"],
        TEXT_ENCODER: ["transformers", (data.get("architectures") or ["AutoModel"])[0]],
    }


def _remarks(
    config: BundleConfig, network: PixArtConfig, pipeline: str, tokens: int, vae: bool, index: dict[str, Any]
) -> Iterator[str]:
    """What a user of the folder must know, one line each."""
    sample_size = network.position_base * network.patch_size
    if network.null_embedding and config.sampling.null_text == "embedding":
        yield (
            "the null embedding has no place there: the pipeline guides away from an empty prompt, as Tessera does "
            "with null_text=empty"
        )
    if network.input_size != (sample_size, sample_size):
        size = " x ".join(map(str, network.input_size))
        yield f"the default size of latents is {sample_size} x {sample_size} there, and {size} here"
    if network.size_conditions and sample_size != SIZES_AT:
        yield f"the pipeline cannot sample: it passes sizes at sample_size {SIZES_AT} alone, and this is {sample_size}"
    if sample_size not in BINNED_SIZES[: 4 if pipeline == "PixArtSigmaPipeline" else 3]:
        yield f"sample there with use_resolution_binning=False: it has no bins for sample_size {sample_size}"
    if tokens != PIPELINES[pipeline]:
        yield f"sample there with max_sequence_length={tokens}"
    if not vae:
        yield "there is no vae/ (the network works on pixels): the pipeline cannot decode latents"
    if index[TEXT_ENCODER][0] is None:
        yield "there is no text_encoder/: load the pipeline with tokenizer and text_encoder, or pass prompt_embeds"
    elif not getattr(config.text, "lower_case", False):
        yield "the pipeline sets prompts in lower case, and this model's text encoder does not"
