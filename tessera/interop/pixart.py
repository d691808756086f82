"""Official PixArt-alpha and PixArt-sigma checkpoints <-> a Model. `pixart_folder` reads diffusers' folders.

Names are mapped, weights are not changed. The position table of an official file is not stored in a bundle: it follows
from the side of the token grid in training and the divisor of positions, which it determines.
"""

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
from tessera.encoders.text import HUB_PREFIX, FolderConfig
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
TEXT_TOKENS = {"alpha": 120, "sigma": 300}
# PixArt-sigma was trained with another autoencoder than alpha, and with the same text encoder, T5 v1.1 XXL.
SIGMA_HUB = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
SIGMA_CODEC = AutoencoderConfig(source=SIGMA_HUB, subfolder="vae")
T5, T5_CHANNELS = f"{HUB_PREFIX}{SIGMA_HUB}", 4096
SAMPLING = {"sampler": "dpm++", "num_steps": 20, "guidance_scale": 4.5}  # of the official scripts: DPM-Solver


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
    variant = "sigma" if network.text_tokens >= TEXT_TOKENS["sigma"] else "alpha"
    codec = SIGMA_CODEC if variant == "sigma" and codec is None else codec
    config = BundleConfig(
        network=network,
        diffusion=GaussianDiffusionConfig(),
        codec=resolve_codec(codec, network.in_channels, "ema"),
        text=text_config(network, variant),
        # The official samplers guide away from the null embedding, with the mask of the prompt.
        sampling=SamplingConfig.model_validate({**SAMPLING, "null_text": "embedding"}),
        provenance=Provenance(
            converted_from=f"official PixArt-{variant} checkpoint {path.name} ({part})",
            not_converted="; ".join(left_out) or None,
        ),
    )
    return assemble(config, {name: tensor.clone() for name, tensor in state.items()}, str(path), device)


def text_config(network: PixArtConfig, variant: str) -> FolderConfig | None:
    """The text encoder of the published models, on the hub; None for a network with another one.

    alpha's code sets prompts in lower case, sigma's does not.
    """
    if network.text_channels != T5_CHANNELS:
        return None
    return FolderConfig(source=T5, max_tokens=network.text_tokens, lower_case=variant == "alpha")


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


def write(network: PixArt, target: Path, approximate: bool = False) -> str:
    """Write the weights as an official state dict; returns a message with what a user of the file must know.

    Raises TesseraError if the file would be read back as another network, unless approximate.
    """
    config = network.config
    if config.block.window_layers:
        raise TesseraError("the official code has no windows and no relative positions: convert to a bundle")
    if config.vocabulary_size:
        raise TesseraError("an official PixArt reads T5's channels, and this network embeds ids: convert to a bundle")
    if not config.null_embedding:
        raise TesseraError(
            "an official PixArt has a null embedding, and this network has none: convert to a bundle or to diffusers"
        )
    table = network.positions((config.position_base, config.position_base))[None]
    tensors = {to_official(name): tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    tensors = {"pos_embed": table, **tensors}
    implied = infer_config(tensors, str(target), config.num_heads)
    stated = dict(config)
    lost = [
        f"{name} is {_summary(stated[name])}; the file implies {_summary(value)}"
        for name, value in implied
        if stated[name] != value
    ]
    if lost and not approximate:
        raise TesseraError(
            "\n  ".join(("the official format holds only weights, which do not determine all of this model:", *lost))
            + "\nconvert to a bundle, or pass approximate=True (--approximate) to write it anyway"
        )
    with atomic_file(target) as partial:
        torch.save({"state_dict": tensors}, partial)
    messages = [f"wrote {target}: an official state dict of {len(tensors)} tensors"]
    if PUBLISHED_HEADS.get(config.hidden_size) != config.num_heads:
        messages.append(f"{config.num_heads} heads: the file cannot record this number")
    return "\n".join([*messages, *(f"approximate: {each}" for each in lost)])


def _summary(value: Any) -> str:
    return value.summary() if isinstance(value, PixArtBlockConfig) else str(value)
