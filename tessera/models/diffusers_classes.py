"""How each transformer of diffusers is called: one row per class. Adding a class is a row here, and a test.

A row states which pipeline the class belongs to, which arguments its `forward` has and how they follow from the latents
x, the time and the text, what it predicts, and how the pipeline encodes a prompt. Everything else is read from its
config.json. Texts of several encoders are one sequence of rows: see `TextPart`.

Shapes: B batch, C latent channels, T frames, H W height and width, h w those of the tokens, M text tokens, E channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

ConfigDict = Mapping[str, Any]  # config.json of a transformer, with the defaults of its class


@dataclass(frozen=True)
class TextPart:
    """One output of a pipeline's `encode_prompt`, and its rows in the text of a `Condition`.

    The text of a condition is all parts one after the other, each filled up with zeros to the widest. name: of the
    part in `Call.text`. width: its channels. rows: how many it has; None for the last part, which has the rest, and of
    which only the valid rows are kept if it has a mask.
    positive, negative: the outputs for a prompt and for a negative prompt: the tokens [B, M, E], or [B, E] as one row,
    and their mask, or None. options: further arguments of `encode_prompt`. least_prompts: fewer are repeated, because
    `encode_prompt` would treat them in another way.
    """

    name: str
    width: int
    positive: tuple[int, int | None]
    negative: tuple[int, int | None]
    rows: int | None = None
    pooled: bool = False
    least_prompts: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """What the arguments of a `forward` are made of.

    x [B, C, H, W], or [B, C, T, H, W] of a class for clips. t [B] in the units of the class. text: each part by name,
    [B, M, E], or [B, E] if it is pooled. mask: valid tokens of the last part, bool [B, M]. options: the numbers of the
    pipeline: see `TransformerClass.options`.
    """

    settings: ConfigDict
    x: Tensor
    t: Tensor
    text: Mapping[str, Tensor]
    mask: Tensor
    options: ConfigDict


def _plain(call: Call) -> dict[str, Any]:
    return {"hidden_states": call.x, "timestep": call.t, "encoder_hidden_states": call.text["tokens"]}


def _first_channels(call: Call, raw: Tensor) -> Tensor:
    """Without a learned variance, which the pipelines leave out."""
    return raw[:, : call.x.shape[1]]


@dataclass(frozen=True)
class TransformerClass:
    """One class of diffusers: what its config.json does not state."""

    pipeline: str  # the class of its pipeline
    published: str  # a repository with an autoencoder, for a transformer alone
    blocks: tuple[str, ...]  # the names of its lists of blocks
    text: Callable[[ConfigDict], tuple[TextPart, ...]]  # the parts of its text
    length: int  # most rows of the last part
    channels: Callable[[ConfigDict], int]  # of the latents
    patch: Callable[[ConfigDict], int]  # latents per token, along height and width
    size: Callable[[ConfigDict], tuple[int, ...]]  # of the latents that it was trained at
    sampling: tuple[int, float]  # the pipeline's number of steps and guidance scale
    arguments: Callable[[Call], dict[str, Any]] = _plain  # of `forward`
    unpack: Callable[[Call, Tensor], Tensor] = _first_channels  # its output as [B, C, ...]
    times: tuple[float, float] | None = (0.0, 1000.0)  # its time for data and for noise; None: a Gaussian process
    sign: Literal[1, -1] = 1  # -1: it predicts x0 - eps instead of the velocity eps - x0
    is_masked: bool = False  # whether the last part of its text may have a mask
    options: ConfigDict = field(default_factory=dict)  # numbers that the pipeline passes, with their defaults
    options_of_vae: Callable[[ConfigDict], dict[str, float]] = lambda vae: {}  # that follow from the vae
    grid: Literal["linspace", "scheduler"] = "linspace"  # sigmas: those that the pipeline gives, or the scheduler's own
    tokens: Callable[[ConfigDict], int] | None = None  # what a dynamic shift depends on, if not on the tokens
    scheduler: ConfigDict = field(default_factory=dict)  # of the published models, where it is not of flow matching
    needs: ConfigDict = field(default_factory=dict)  # settings that have only these values here
    index_needs: ConfigDict = field(default_factory=dict)  # the same, of model_index.json
    frames: Callable[[ConfigDict], tuple[int, ...]] | None = None  # that it takes, if not any number
    differences: tuple[str, ...] = ()  # what of the pipeline is not repeated


def _tokens(
    width: str, positive: tuple[int, int | None], negative: tuple[int, int | None], **more: Any
) -> Callable[[ConfigDict], tuple[TextPart, ...]]:
    """The only part of a text. width: the setting with its channels"""
    return lambda settings: (TextPart("tokens", settings[width], positive, negative, **more),)


def _square(name: str = "sample_size", default: int = 128) -> Callable[[ConfigDict], tuple[int, ...]]:
    return lambda settings: (settings.get(name) or default,) * 2


def _setting(name: str, divisor: int = 1) -> Callable[[ConfigDict], int]:
    return lambda settings: settings[name] // divisor


# SD3


def _sd3_text(settings: ConfigDict) -> tuple[TextPart, ...]:
    return (
        TextPart("pooled", settings["pooled_projection_dim"], (2, None), (3, None), rows=1, pooled=True),
        TextPart("tokens", settings["joint_attention_dim"], (0, None), (1, None)),
    )


def _with_pooled(call: Call) -> dict[str, Any]:
    return _plain(call) | {"pooled_projections": call.text["pooled"]}


# FLUX: 2 x 2 latents are one token, and positions are arguments


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W / 4, 4 C]: squares of 2 x 2 as tokens"""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H W / 4, 4 C] -> [B, C, H, W]"""
    height, width = size
    x = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(tokens), -1, height, width)


def _unpack(call: Call, raw: Tensor) -> Tensor:
    return unpack(raw, call.x.shape[-2:])


def _position_ids(height: int, width: int, device: torch.device) -> Tensor:
    """[h w, 3]: 0, row and column of each token"""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).to(device, torch.float32)


def _packed(call: Call) -> dict[str, Any]:
    height, width = (side // 2 for side in call.x.shape[-2:])
    tokens = call.text["tokens"]
    return _plain(call) | {
        "hidden_states": pack(call.x),
        "img_ids": _position_ids(height, width, call.x.device),
        "txt_ids": torch.zeros(tokens.shape[1], 3, device=call.x.device),
    }


def _flux(call: Call) -> dict[str, Any]:
    arguments = _packed(call) | {"pooled_projections": call.text["pooled"]}
    if call.settings["guidance_embeds"]:
        arguments["guidance"] = torch.full_like(call.t, call.options["guidance"])
    return arguments


def _flux_text(settings: ConfigDict) -> tuple[TextPart, ...]:
    return (
        TextPart("pooled", settings["pooled_projection_dim"], (1, None), (1, None), rows=1, pooled=True),
        TextPart("tokens", settings["joint_attention_dim"], (0, None), (0, None)),
    )


# SANA, Lumina2


def _masked(call: Call) -> dict[str, Any]:
    return _plain(call) | {"encoder_attention_mask": call.mask.to(torch.int64)}


def _sana(call: Call) -> dict[str, Any]:
    return _masked(call) | {"timestep": call.t * call.settings["timestep_scale"]}


# HunyuanDiT: two texts with masks, rotary positions, and the size of the image


def _hunyuan_text(settings: ConfigDict) -> tuple[TextPart, ...]:
    """Masked tokens of T5 are part of a mean there, so masks are vectors of the text and nothing is cut."""
    bert, t5 = ({"text_encoder_index": index} for index in (0, 1))
    width, width_t5 = settings["cross_attention_dim"], settings["cross_attention_dim_t5"]
    length, length_t5 = settings["text_len"], settings["text_len_t5"]
    return (
        TextPart("mask", length, (2, None), (3, None), rows=1, pooled=True, options=bert),
        TextPart("mask_t5", length_t5, (2, None), (3, None), rows=1, pooled=True, options=t5),
        TextPart("tokens", width, (0, None), (1, None), rows=length, options=bert),
        TextPart("t5", width_t5, (0, None), (1, None), options=t5),
    )


def _hunyuan(call: Call) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    settings = call.settings
    grid = tuple(side // settings["patch_size"] for side in call.x.shape[-2:])
    size = [float(side * 8) for side in call.x.shape[-2:]]
    crop = get_resize_crop_region_for_grid(grid, 64 // settings["patch_size"])
    head = settings["hidden_size"] // settings["num_attention_heads"]
    rotary = get_2d_rotary_pos_embed(head, crop, grid, device=call.x.device, output_type="pt")
    sizes = torch.tensor([[1024.0, 1024.0, *size, 0.0, 0.0]], device=call.x.device)  # as the pipeline, for any image
    return _plain(call) | {
        "text_embedding_mask": call.text["mask"].to(torch.int64),
        "encoder_hidden_states_t5": call.text["t5"],
        "text_embedding_mask_t5": call.text["mask_t5"].to(torch.int64),
        "image_meta_size": sizes.repeat(len(call.x), 1),
        "style": torch.zeros(len(call.x), dtype=torch.int64, device=call.x.device),
        "image_rotary_emb": rotary,
    }


# Chroma, QwenImage, PRX


CHROMA_TOKENS = 512  # most tokens of a text there


def _chroma_text(settings: ConfigDict) -> tuple[TextPart, ...]:
    """The pipeline's mask is a number that is added to attention logits, 1 for valid tokens and 0 for others, which
    are attended to, too. So the mask is a vector of the text."""
    return (
        TextPart("mask", CHROMA_TOKENS, (2, None), (5, None), rows=1, pooled=True),
        TextPart("tokens", settings["joint_attention_dim"], (0, None), (3, None)),
    )


def _chroma(call: Call) -> dict[str, Any]:
    arguments = _packed(call)
    mask = call.text["mask"][:, : call.text["tokens"].shape[1]]
    ones = mask.new_ones(arguments["hidden_states"].shape[:2])
    return arguments | {"attention_mask": torch.cat((mask, ones), dim=1)}


def _qwen(call: Call) -> dict[str, Any]:
    height, width = (side // 2 for side in call.x.shape[-2:])
    shapes = [[(1, height, width)]] * len(call.x)
    return _masked_qwen(call) | {"hidden_states": pack(call.x), "img_shapes": shapes}


def _masked_qwen(call: Call) -> dict[str, Any]:
    return _plain(call) | {"encoder_hidden_states_mask": call.mask.to(torch.int64)}


def _prx(call: Call) -> dict[str, Any]:
    return _plain(call) | {"attention_mask": call.mask}


# Clips


def _cogvideox(call: Call) -> dict[str, Any]:
    """Frames before channels, and rotary positions as an argument."""
    arguments = _plain(call) | {"hidden_states": call.x.transpose(1, 2)}
    settings = call.settings
    if settings["use_rotary_positional_embeddings"]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        patch = settings["patch_size"]
        grid = tuple(side // patch for side in call.x.shape[-2:])
        sides = (settings[name] // patch for name in ("sample_width", "sample_height"))
        crop = get_resize_crop_region_for_grid(grid, *sides)
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(
            settings["attention_head_dim"], crop, grid, call.x.shape[2], device=call.x.device
        )
    return arguments


def _cogvideox_size(settings: ConfigDict) -> tuple[int, ...]:
    frames = (settings["sample_frames"] - 1) // settings["temporal_compression_ratio"] + 1
    return frames, settings["sample_height"], settings["sample_width"]


def _ltx(call: Call) -> dict[str, Any]:
    """Every latent is one token."""
    options, (frames, height, width) = call.options, call.x.shape[-3:]
    return _masked(call) | {
        "hidden_states": call.x.flatten(2).transpose(1, 2),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (options["time"] / options["frame_rate"], options["space"], options["space"]),
    }


def _ltx_unpack(call: Call, raw: Tensor) -> Tensor:
    return raw.transpose(1, 2).unflatten(2, call.x.shape[-3:])


def _ltx_options(vae: ConfigDict) -> dict[str, float]:
    """Pixels and frames per latent, which its positions are scaled by."""
    if "spatio_temporal_scaling" not in vae:
        return {}
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    return {
        "space": vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings,
        "time": vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings,
    }


def _hunyuan_video(call: Call) -> dict[str, Any]:
    arguments = _masked(call) | {"pooled_projections": call.text["pooled"]}
    if call.settings["guidance_embeds"]:
        arguments["guidance"] = torch.full_like(call.t, call.options["guidance"]) * 1000
    return arguments


def _hunyuan_video_text(settings: ConfigDict) -> tuple[TextPart, ...]:
    return (
        TextPart("pooled", settings["pooled_projection_dim"], (1, None), (1, None), rows=1, pooled=True),
        TextPart("tokens", settings["text_embed_dim"], (0, 2), (0, 2)),
    )


CLASSES: dict[str, TransformerClass] = {
    "SD3Transformer2DModel": TransformerClass(
        pipeline="StableDiffusion3Pipeline",
        blocks=("transformer_blocks",),
        text=_sd3_text,
        arguments=_with_pooled,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(),
        grid="scheduler",
        length=333,
        sampling=(28, 7.0),
        published="stabilityai/stable-diffusion-3.5-medium",
    ),
    "FluxTransformer2DModel": TransformerClass(
        pipeline="FluxPipeline",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text=_flux_text,
        arguments=_flux,
        unpack=_unpack,
        channels=_setting("in_channels", 4),
        patch=lambda settings: 2,
        size=_square(),
        times=(0.0, 1.0),
        options={"guidance": 3.5},
        length=512,
        sampling=(28, 1.0),
        published="black-forest-labs/FLUX.1-dev",
    ),
    "SanaTransformer2DModel": TransformerClass(
        pipeline="SanaPipeline",
        blocks=("transformer_blocks",),
        text=_tokens("caption_channels", (0, 1), (2, 3)),
        arguments=_sana,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(default=32),
        grid="scheduler",
        is_masked=True,
        needs={"guidance_embeds": False},
        length=300,
        sampling=(20, 4.5),
        published="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    ),
    "Lumina2Transformer2DModel": TransformerClass(
        pipeline="Lumina2Pipeline",
        blocks=("context_refiner", "noise_refiner", "layers"),
        text=_tokens("cap_feat_dim", (0, 1), (2, 3)),
        arguments=_masked,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(),
        times=(1.0, 0.0),
        sign=-1,
        is_masked=True,
        tokens=lambda settings: settings["in_channels"],  # as in the pipeline, which takes axis 1 of the latents
        length=256,
        sampling=(30, 4.0),
        published="Alpha-VLLM/Lumina-Image-2.0",
        differences=("cfg_normalization: the pipeline rescales a guided output along the width of the image",),
    ),
    "AuraFlowTransformer2DModel": TransformerClass(
        pipeline="AuraFlowPipeline",
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        text=_tokens("joint_attention_dim", (0, None), (2, None)),
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(),
        times=(0.0, 1.0),
        grid="scheduler",
        length=256,
        sampling=(50, 3.5),
        published="fal/AuraFlow-v0.3",
    ),
    "HunyuanDiT2DModel": TransformerClass(
        pipeline="HunyuanDiTPipeline",
        blocks=("blocks",),
        text=_hunyuan_text,
        arguments=_hunyuan,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(),
        times=None,
        scheduler={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03, "steps_offset": 1}
        | {"prediction_type": "v_prediction"},
        length=256,
        sampling=(50, 5.0),
        published="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
    ),
    "ChromaTransformer2DModel": TransformerClass(
        pipeline="ChromaPipeline",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text=_chroma_text,
        arguments=_chroma,
        unpack=_unpack,
        channels=_setting("in_channels", 4),
        patch=lambda settings: 2,
        size=_square(),
        times=(0.0, 1.0),
        length=512,
        sampling=(35, 5.0),
        published="lodestones/Chroma1-HD",
    ),
    "QwenImageTransformer2DModel": TransformerClass(
        pipeline="QwenImagePipeline",
        blocks=("transformer_blocks",),
        text=_tokens("joint_attention_dim", (0, 1), (0, 1)),
        arguments=_qwen,
        unpack=_unpack,
        channels=_setting("in_channels", 4),
        patch=lambda settings: 2,
        size=_square(),
        times=(0.0, 1.0),
        is_masked=True,
        needs={"guidance_embeds": False, "use_additional_t_cond": False, "use_layer3d_rope": False},
        length=512,
        sampling=(50, 4.0),
        published="Qwen/Qwen-Image",
        differences=("the pipeline rescales the guided velocity of each token to the norm of the conditional one",),
    ),
    "PRXTransformer2DModel": TransformerClass(
        pipeline="PRXPipeline",
        blocks=("blocks",),
        text=_tokens("context_in_dim", (0, 1), (2, 3)),
        arguments=_prx,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_square(default=32),
        times=(0.0, 1.0),
        grid="scheduler",
        is_masked=True,
        length=256,
        sampling=(28, 4.0),
        published="Photoroom/prx-512-t2i-sft",
    ),
    "CogVideoXTransformer3DModel": TransformerClass(
        pipeline="CogVideoXPipeline",
        blocks=("transformer_blocks",),
        text=_tokens("text_embed_dim", (0, None), (1, None)),
        arguments=_cogvideox,
        unpack=lambda call, raw: raw.transpose(1, 2),
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=_cogvideox_size,
        times=None,
        needs={"patch_size_t": None, "ofs_embed_dim": None},
        scheduler={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "snr_shift_scale": 3.0}
        | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        length=226,
        sampling=(50, 6.0),
        published="zai-org/CogVideoX-2b",
    ),
    "LatteTransformer3DModel": TransformerClass(
        pipeline="LattePipeline",
        blocks=("transformer_blocks", "temporal_transformer_blocks"),
        text=_tokens("caption_channels", (0, None), (1, None), least_prompts=2),
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=lambda settings: (settings["video_length"], settings["sample_size"], settings["sample_size"]),
        frames=lambda settings: (1, settings["video_length"]),
        times=None,
        scheduler={"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        length=120,
        sampling=(50, 7.5),
        published="maxin-cn/Latte-1",
        differences=("a single prompt is encoded like several: with zeros for its padding instead of without it",),
    ),
    "LTXVideoTransformer3DModel": TransformerClass(
        pipeline="LTXPipeline",
        blocks=("transformer_blocks",),
        text=_tokens("caption_channels", (0, 1), (2, 3)),
        arguments=_ltx,
        unpack=_ltx_unpack,
        channels=_setting("in_channels"),
        patch=lambda settings: 1,
        size=lambda settings: (21, 16, 22),
        is_masked=True,
        needs={"patch_size": 1, "patch_size_t": 1},
        options={"frame_rate": 25.0, "space": 32.0, "time": 8.0},
        options_of_vae=_ltx_options,
        length=128,
        sampling=(50, 3.0),
        published="Lightricks/LTX-Video",
    ),
    "WanTransformer3DModel": TransformerClass(
        pipeline="WanPipeline",
        blocks=("blocks",),
        text=_tokens("text_dim", (0, None), (1, None)),
        channels=_setting("in_channels"),
        patch=lambda settings: settings["patch_size"][1],
        size=lambda settings: (21, 60, 104),
        grid="scheduler",
        needs={"image_dim": None, "added_kv_proj_dim": None},
        index_needs={"expand_timesteps": False, "boundary_ratio": None},
        length=512,
        sampling=(50, 5.0),
        published="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ),
    "SanaVideoTransformer3DModel": TransformerClass(
        pipeline="SanaVideoPipeline",
        blocks=("transformer_blocks",),
        text=_tokens("caption_channels", (0, 1), (2, 3)),
        arguments=_masked,
        channels=_setting("in_channels"),
        patch=lambda settings: settings["patch_size"][1],
        size=lambda settings: (21, 60, 104),
        grid="scheduler",
        is_masked=True,
        needs={"guidance_embeds": False},
        length=300,
        sampling=(50, 6.0),
        published="Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
    ),
    "HunyuanVideoTransformer3DModel": TransformerClass(
        pipeline="HunyuanVideoPipeline",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text=_hunyuan_video_text,
        arguments=_hunyuan_video,
        channels=_setting("in_channels"),
        patch=_setting("patch_size"),
        size=lambda settings: (33, 90, 160),
        is_masked=True,
        needs={"image_condition_type": None},
        options={"guidance": 6.0},
        length=256,
        sampling=(50, 1.0),
        published="hunyuanvideo-community/HunyuanVideo",
    ),
}
