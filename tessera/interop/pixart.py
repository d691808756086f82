"""Official PixArt-alpha and PixArt-sigma checkpoints, and diffusers' PixArt transformers.

Names are mapped, weights are not changed. The position table of an official file is not stored in a bundle: it follows
from the side of the token grid in training and the divisor of positions, which it determines.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bundle import BundleConfig, Model, Provenance, assemble
from tessera.codecs import AutoencoderConfig
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.diffusion import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import atomic_file
from tessera.interop.weights import find_weights
from tessera.models.pixart import PixArt, PixArtBlockConfig, PixArtConfig, position_table
from tessera.sampling import SamplingConfig

REQUIRED = (
    "x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.scale_shift_table",
    "blocks.0.scale_shift_table", "blocks.0.cross_attn.q_linear.weight",
)  # fmt: skip
POSITION_SCALES = (0.5, 1.0, 2.0, 4.0)  # of the published models
PUBLISHED_HEADS = {1152: 16}  # by width
TO_OFFICIAL = (("shared.adaLN_modulation.", "t_block."), (".adaLN_modulation.table", ".scale_shift_table"))
SIGMA_TOKENS = 300  # PixArt-sigma was trained with more text tokens than alpha, and with another autoencoder
SIGMA_CODEC = AutoencoderConfig(source="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", subfolder="vae")
DIFFUSERS_CLASS = "PixArtTransformer2DModel"
DIFFUSERS_NAMES = (  # ours, theirs
    ("x_embedder.proj.", "pos_embed.proj."),
    ("t_embedder.mlp.0.", "adaln_single.emb.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "adaln_single.emb.timestep_embedder.linear_2."),
    ("csize_embedder.mlp.0.", "adaln_single.emb.resolution_embedder.linear_1."),
    ("csize_embedder.mlp.2.", "adaln_single.emb.resolution_embedder.linear_2."),
    ("ar_embedder.mlp.0.", "adaln_single.emb.aspect_ratio_embedder.linear_1."),
    ("ar_embedder.mlp.2.", "adaln_single.emb.aspect_ratio_embedder.linear_2."),
    ("shared.adaLN_modulation.1.", "adaln_single.linear."),
    ("y_embedder.y_proj.fc1.", "caption_projection.linear_1."),
    ("y_embedder.y_proj.fc2.", "caption_projection.linear_2."),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.scale_shift_table", "scale_shift_table"),
)
DIFFUSERS_BLOCK_NAMES = (
    ("adaLN_modulation.table", "scale_shift_table"),
    ("attn.proj.", "attn1.to_out.0."),
    ("cross_attn.q_linear.", "attn2.to_q."),
    ("cross_attn.proj.", "attn2.to_out.0."),
    ("mlp.fc1.", "ff.net.0.proj."),
    ("mlp.fc2.", "ff.net.2."),
)


def is_pixart(stored: Any, source: str) -> bool:
    """Whether the contents of a weight file are those of a PixArt, wrapped in anything."""
    tensors = find_weights(stored, REQUIRED, source).tensors
    return all(name in tensors for name in REQUIRED)


def read(
    stored: Any,
    path: Path,
    device: torch.device | str = "cpu",
    *,
    num_heads: int | None = None,
    codec: CodecSource | None = None,
) -> Model:
    """A Model from the contents of an official .pth. num_heads: needed if the width is not the published models'.

    Raises TesseraError if the contents do not determine the network.
    """
    tensors, part, left_out = find_weights(stored, REQUIRED, str(path))
    network = infer_config(tensors, str(path), num_heads)
    state = {from_official(name): tensor for name, tensor in tensors.items() if name != "pos_embed"}
    is_sigma = network.text_tokens >= SIGMA_TOKENS
    config = BundleConfig(
        network=network,
        diffusion=GaussianDiffusionConfig(),
        codec=SIGMA_CODEC if is_sigma and codec is None else resolve_codec(codec, network.in_channels, "ema"),
        sampling=_sampling(),
        provenance=Provenance(
            converted_from=f"official PixArt-{'sigma' if is_sigma else 'alpha'} checkpoint {path.name} ({part})",
            not_converted="; ".join(left_out) or None,
        ),
    )
    return assemble(config, {name: tensor.clone() for name, tensor in state.items()}, str(path), device)


def _sampling() -> SamplingConfig:
    """DPM-Solver with 20 steps and guidance 4.5, as the official scripts."""
    return SamplingConfig.model_validate({"sampler": "dpm++", "num_steps": 20, "guidance_scale": 4.5})


def infer_config(tensors: dict[str, Tensor], source: str, num_heads: int | None = None) -> PixArtConfig:
    """The settings that an official state dict implies. Raises TesseraError."""
    for name in (*REQUIRED, "y_embedder.y_embedding", "final_layer.linear.weight"):
        if name not in tensors:
            raise TesseraError(f"{source} is not a complete PixArt: it has no {name}")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    heads = num_heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise TesseraError(f"{source} has the width {width}, and weights do not determine the heads: pass num_heads")
    base, scale = infer_positions(tensors.get("pos_embed"), width, source)
    tokens, text_channels = tensors["y_embedder.y_embedding"].shape
    return PixArtConfig(
        input_size=(base * patch, base * patch),
        in_channels=channels,
        out_channels=tensors["final_layer.linear.weight"].shape[0] // patch**2,
        patch_size=patch,
        depth=len(layers),
        hidden_size=width,
        num_heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        block=PixArtBlockConfig(
            qk_norm="blocks.0.attn.q_norm.weight" in tensors,
            compressed_layers=tuple(sorted(n for n in layers if f"blocks.{n}.attn.sr.weight" in tensors)),
        ),
        text_channels=text_channels,
        text_tokens=tokens,
        position_base=base,
        position_scale=scale,
        size_conditions="csize_embedder.mlp.0.weight" in tensors,
    )


def infer_positions(table: Tensor | None, width: int, source: str) -> tuple[int, float]:
    """(side of the token grid, divisor) of a stored position table [1, N, D]. Raises TesseraError."""
    if table is None:
        raise TesseraError(
            f"{source} has no pos_embed, which determines the token grid and the scale of positions: take the original "
            "file, or a diffusers folder, whose config.json has both"
        )
    base = math.isqrt(table.shape[1])
    for scale in POSITION_SCALES:
        if base**2 == table.shape[1] and torch.allclose(
            table[0].float(), position_table((base, base), base, scale, width), atol=1e-4
        ):
            return base, scale
    raise TesseraError(
        f"{source}: pos_embed {list(table.shape)} is not a position table of PixArt with a scale of "
        f"{', '.join(map(str, POSITION_SCALES))}"
    )


def from_official(name: str) -> str:
    """Our name of an official weight."""
    for ours, theirs in TO_OFFICIAL:
        if name.startswith(theirs) or (name.startswith("blocks.") and name.endswith(theirs)):
            return name.replace(theirs, ours)
    return name


def to_official(name: str) -> str:
    """The official name of our weight."""
    for ours, theirs in TO_OFFICIAL:
        name = name.replace(ours, theirs)
    return name


def write(model: Model, target: Path) -> str:
    """Write the weights as an official bare state dict. Raises TesseraError."""
    network = model.network
    if not isinstance(network, PixArt):
        raise TesseraError(f"this network is a {model.config.network.display_name}, not a PixArt")
    config = network.config
    table = network.positions((config.position_base, config.position_base))[None]
    tensors = {to_official(name): tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    with atomic_file(target) as partial:
        torch.save({"state_dict": {"pos_embed": table, **tensors}}, partial)
    return (
        f"{config.num_heads} heads: the file cannot record this number"
        if PUBLISHED_HEADS.get(config.hidden_size) != config.num_heads
        else ""
    )


def from_diffusers(
    config: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> tuple[PixArtConfig, dict[str, Tensor]]:
    """Our settings and state dict of a PixArtTransformer2DModel. Raises TesseraError for settings we do not have.

    diffusers has no null caption: it encodes an empty prompt instead, so the network has no null value of its own.
    """
    expected = {"norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_bias": True}
    differing = {name: config[name] for name, value in expected.items() if config.get(name, value) != value}
    if differing:
        raise TesseraError(f"{source}: {json.dumps(differing)} is not supported; expected {json.dumps(expected)}")
    sample_size, patch = config["sample_size"], config["patch_size"]
    sizes = config.get("use_additional_conditions")
    scale = config.get("interpolation_scale")
    network = PixArtConfig(
        input_size=(sample_size, sample_size),
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        patch_size=patch,
        depth=config["num_layers"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        text_channels=config["caption_channels"],
        position_base=sample_size // patch,
        position_scale=max(sample_size // 64, 1) if scale is None else scale,
        size_conditions=sample_size == 128 if sizes is None else sizes,
        null_embedding=False,
    )
    return network, {ours: join(tensors) for ours, join in _diffusers_sources(network)}


def _diffusers_sources(network: PixArtConfig) -> list[tuple[str, Any]]:
    """For each of our names, the function from diffusers' state dict to its tensor."""
    with torch.device("meta"):
        names = list(network.build().state_dict())

    def source(name: str) -> Any:
        match = re.match(r"blocks\.(\d+)\.(.*)", name)
        if match is None:
            theirs = next(name.replace(a, b) for a, b in DIFFUSERS_NAMES if name.startswith(a))
            return lambda tensors: tensors[theirs]
        prefix, rest = f"transformer_blocks.{match[1]}.", match[2]
        fused = {"attn.qkv.": ("attn1", "qkv"), "cross_attn.kv_linear.": ("attn2", "kv")}
        for ours, (attention, letters) in fused.items():
            if rest.startswith(ours):
                kind = rest.removeprefix(ours)
                parts = [f"{prefix}{attention}.to_{letter}.{kind}" for letter in letters]
                return lambda tensors: torch.cat([tensors[part] for part in parts])
        theirs = next(prefix + rest.replace(a, b) for a, b in DIFFUSERS_BLOCK_NAMES if rest.startswith(a))
        return lambda tensors: tensors[theirs]

    return [(name, source(name)) for name in names]
