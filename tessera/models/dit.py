"""The diffusion transformer (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

Shapes: B batch, C channels, O raw output channels, T frames, H W height and width, p patch size, (h, w) = (H / p,
W / p) the token grid of an image, (t, h, w) that of a clip, N = h w or t h w tokens, M condition tokens, G conditioning
vectors of an image or clip, D width, F channels of predicted features.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.layers.embeddings import LabelEmbedder, StepSizeEmbedder, TimestepEmbedder
from tessera.layers.frames import AnyAttention, Full
from tessera.layers.modulation import Modulation, modulate
from tessera.layers.patches import PatchEmbed, unpatchify
from tessera.layers.positions import sincos_frames, sincos_grid
from tessera.models.blocks import (
    AdaLNZero,
    AdaLNZeroBlock,
    AnyBlock,
    Block,
    BlockDims,
    Context,
    ControlInputs,
    FramePositions,
    PreparedText,
)
from tessera.models.network import Network, NetworkConfig, check_rows, check_times, self_initialized
from tessera.models.presets import PRESETS, UNET_PRESETS
from tessera.settings import unknown_name

RunBlocks = Callable[[Tensor, Context], Tensor]  # as `DiT.run_blocks`
# The rows that the low-rank layers of controls change, by the name of the adapter: a factor, or one for each row [B].
ACTIVE_CONTROLS: ContextVar[Mapping[str, Tensor | float]] = ContextVar("ACTIVE_CONTROLS", default={})  # noqa: B039


@contextmanager
def active_controls(strengths: Mapping[str, Tensor | float]) -> Iterator[None]:
    """Set ACTIVE_CONTROLS for the blocks that run inside."""
    token = ACTIVE_CONTROLS.set(strengths)
    try:
        yield
    finally:
        ACTIVE_CONTROLS.reset(token)


@dataclass(frozen=True)
class Route:
    """Some tokens of an image skip the blocks start .. end - 1 (training.token_routing)."""

    start: int
    end: int
    rows: Tensor  # int64 [K] the tokens that do not skip


class Control(Protocol):
    """What an adapter attaches to a network to control it by images: see `tessera.adapters.control`."""

    def inputs(self, network: "DiT", latents: Tensor, strength: Tensor, condition: Condition) -> ControlInputs:
        """What does not depend on x and t. latents [B, C, h, w] of the images, strength [B] of each"""
        ...

    def residuals(self, inputs: ControlInputs, tokens: Tensor, context: Context) -> list[Tensor]:
        """What is added to the outputs of the first blocks, from the output of the first: [B, N (+ M), D] each"""
        ...

    def macs(self, network: "DiT", tokens: int, block_macs: Sequence[int]) -> int:
        """Multiply-adds that a control adds to a forward pass of one image, its inputs included. block_macs: of each
        block of the network"""
        ...


class DiTConfig(NetworkConfig):
    """A DiT of any size. `preset: DiT-B/4` sets depth, hidden_size, num_heads and patch_size.

    The defaults are DiT-XL/2 for ImageNet latents.
    """

    display_name: ClassVar[str] = "diffusion transformer"
    kind: Literal["dit"] = "dit"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    patch_size: PositiveInt = Field(default=2, description="height and width of a patch")
    temporal_patch_size: PositiveInt = Field(default=1, description="frames of a patch, in a network for clips")
    depth: PositiveInt = Field(default=28, description="number of blocks")
    hidden_size: PositiveInt = Field(default=1152, description="width: channels of a token")
    num_heads: PositiveInt = Field(default=16, description="attention heads of a block; they divide the width")
    mlp_ratio: PositiveFloat = Field(default=4.0, description="hidden width of the MLP, relative to hidden_size")
    block: AnyBlock = Field(default=AdaLNZero(), description="the block design")
    attention: AnyAttention = Field(
        default=Full(), description="which tokens of a clip attend to each other; the weights do not depend on it"
    )
    temporal_attention: bool = Field(
        default=False,
        description="a layer of temporal attention with its own weights in each block, which has no effect at first; "
        "with attention=spatial each block then has spatial and temporal attention",
    )
    frame_positions: FramePositions = Field(
        default="all",
        description="which attention layers get the positions of the frames; temporal: only those of "
        "temporal_attention, so that the others treat the frames as images",
    )
    step_size_embedding: bool = Field(
        default=False,
        description="the length of a step is an input of the network, which predicts the average velocity over it, for "
        "sampling in one or a few steps (tessera distill)",
    )
    label_init_std: PositiveFloat = Field(
        default=0.02,
        description="standard deviation of the initial class embeddings; 0.02 in the paper's code. That of the time "
        "embedding soon is about 1, and labels have an effect sooner if they start with 1, too",
    )
    feature_channels: PositiveInt | None = Field(
        default=None, description="set by training.alignment: channels of the features that it predicts from a block"
    )
    timestep_freq_divisor: PositiveInt = Field(
        default=128, description="divisor in the timestep frequencies; diffusers computes DiT with 127"
    )
    mlp_norm_eps: PositiveFloat = Field(
        default=1e-6, description="eps of the norm before the MLP; diffusers' DiT: 1e-5"
    )

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("preset") is None:  # also a preset that an override unsets
            return {key: value for key, value in data.items() if key != "preset"}
        name = str(data["preset"])
        if name in UNET_PRESETS:
            raise ValueError(f"{name} is a U-Net: set network.kind=unet")
        if name not in PRESETS:
            raise ValueError(unknown_name("preset", name, PRESETS))
        return {**PRESETS[name], **{key: value for key, value in data.items() if key != "preset"}}

    @model_validator(mode="after")
    def _check(self) -> "DiTConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by 4, as 2-D sin-cos positions need")
        self.block.check(self.hidden_size, self.num_heads)
        if self.text_channels and self.vocabulary_size:
            raise ValueError(
                f"text_channels {self.text_channels} and vocabulary_size {self.vocabulary_size} exclude each other: a "
                "network gets the tokens of a text encoder, or ids"
            )
        of_clips = {
            "attention": None if isinstance(self.attention, Full) else self.attention.kind,
            "temporal_attention": self.temporal_attention or None,
            "temporal_patch_size": self.temporal_patch_size if self.temporal_patch_size > 1 else None,
            "frame_positions": None if self.frame_positions == "all" else self.frame_positions,
        }
        settings = {name: value for name, value in of_clips.items() if value is not None}
        if settings.keys() & {"attention", "temporal_attention"} and not self.block.takes_attention_modes:
            name = next(iter(settings))
            raise ValueError(
                f"{name} {settings[name]} needs blocks that attend to the image tokens alone, and the block is "
                f"{self.block.summary()}: leave {name} out, or choose another block"
            )
        if self.frame_positions == "temporal" and not self.temporal_attention:
            raise ValueError("frame_positions temporal needs temporal_attention=true, or set frame_positions=none")
        if "input_size" in self.model_fields_set:  # otherwise it follows from the data
            if settings and not self.is_temporal:
                name = next(iter(settings))
                raise ValueError(
                    f"{name} {settings[name]} needs a network for clips: set input_size to (frames, height, width), or "
                    f"leave {name} out"
                )
            self.check_size(self.input_size)
        return self

    @property
    def size_multiple(self) -> int:
        return self.patch_size

    @property
    def uses_text(self) -> bool:
        return self.block.uses_text

    @property
    def takes_step_size(self) -> bool:
        return self.step_size_embedding

    @property
    def is_causal(self) -> bool:
        # In cross-attention blocks, all frames attend to the times of all frames.
        allowed = self.attention.is_causal and not self.temporal_attention and self.block.kind != "cross-attention"
        return self.is_temporal and self.temporal_patch_size == 1 and allowed

    def frame_times_problem(self) -> str | None:
        if self.temporal_patch_size > 1:
            return f"needs temporal_patch_size 1, not {self.temporal_patch_size}: frames of a patch have one time"
        if getattr(self.block, "text", None) == "sequence":
            return "needs block.text=keys or block.text=cross: text tokens in the sequence have no time"
        return super().frame_times_problem()

    def token_times_problem(self) -> str | None:
        if self.is_temporal:
            return "needs a network for images, and this one is for clips: see training.frame_times"
        if self.block.kind in ("in-context", "cross-attention"):
            return f"needs a block with modulation, and {self.block.kind} has a condition token for each time"
        if getattr(self.block, "text", None) == "sequence":
            return "needs block.text=keys or block.text=cross: text tokens in the sequence have no time"
        return None

    def token_grid(self, size: Sequence[int]) -> tuple[int, ...]:
        patch = (self.temporal_patch_size, self.patch_size, self.patch_size)[-len(size) :]
        return tuple(length // divisor for length, divisor in zip(size, patch))

    def check_size(self, size: Sequence[int]) -> None:
        super().check_size(size)
        height, width = size[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide the size {height} x {width}")
        frames = size[0] if len(size) == 3 else 1
        if frames % self.temporal_patch_size:
            raise ValueError(f"temporal_patch_size {self.temporal_patch_size} does not divide {frames} frames")

    def summary(self) -> str:
        sizes = f"depth {self.depth}, width {self.hidden_size}, heads {self.num_heads}, patch {self.patch_size}"
        frames = f" x {self.temporal_patch_size} frames" if self.temporal_patch_size > 1 else ""
        attention = "" if isinstance(self.attention, Full) else f", {self.attention.kind} attention"
        attention += ", temporal attention" * self.temporal_attention
        return f"DiT, {self.block.summary()}{attention}, {sizes}{frames}"

    def build(self) -> "DiT":
        return DiT(self)


class FinalLayer(nn.Module):
    """LayerNorm and a linear map from a token to its patch. In the adaLN designs, the norm is modulated by c."""

    def __init__(self, width: int, out_features: int, modulated: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = Modulation(width, 2) if modulated else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero: a new network predicts zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.c [B, G, D] -> [B, N, p p O]"""
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = context.modulation_params(self.adaLN_modulation).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        modulation = 0 if self.adaLN_modulation is None else self.adaLN_modulation.macs()
        return tokens * self.linear.weight.numel() + modulation


class FeatureHead(nn.Module):
    """Predicts features from tokens (training.alignment); no part of the output."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, F]"""
        return self.out(nn.functional.silu(self.hidden(self.norm(x))))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return tokens * (self.hidden.weight.numel() + self.out.weight.numel())


class DiT(Network):
    """A transformer over patches, conditioned on the timestep and the class.

    Parameter names are those of the official checkpoints.
    """

    def __init__(self, config: DiTConfig, reset: bool = True) -> None:
        """reset: initialize the weights. A subclass with more modules does it after it has made them."""
        super().__init__()
        config.check_size(config.input_size)
        width = config.hidden_size
        self.config: DiTConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        self.dims = dims = BlockDims(
            width,
            config.num_heads,
            int(width * config.mlp_ratio),
            config.mlp_norm_eps,
            config.temporal_attention,
            config.frame_positions,
        )
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width, config.temporal_patch_size)
        self.t_embedder = TimestepEmbedder(width, config.timestep_freq_divisor)
        self.step_size_embedder = StepSizeEmbedder(width) if config.step_size_embedding else None
        self.y_embedder = (
            LabelEmbedder(config.num_classes, width, config.learn_null_class, config.label_init_std)
            if config.num_classes
            else None
        )
        self.text_embedder = config.block.text_embedder(dims, config.text_channels, config.vocabulary_size)
        # A frozen parameter, not a buffer: official checkpoints contain it, and the paper's counts include it.
        # Of one frame: so the weights of an image network fit a network for clips.
        table = torch.zeros(1, math.prod(config.grid[-2:]), width)
        self.pos_embed = nn.Parameter(table, requires_grad=False) if config.block.absolute_positions else None
        self.shared = config.block.shared(dims)
        blocks = [config.block.build(dims) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.appends_tokens = blocks[0].appends_tokens
        patch_values = config.temporal_patch_size * config.patch_size**2
        self.final_layer = FinalLayer(width, patch_values * config.out_channels, blocks[0].modulated_head)
        self.feature_head = FeatureHead(width, config.feature_channels) if config.feature_channels else None
        if reset:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights as the official code does: Xavier for every Linear, then each module's own values."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_grid(self.config.grid[-2:], self.config.hidden_size))
        # In this order, a seed gives the same weights as in earlier versions.
        first: list[Any] = [self.x_embedder, *([] if self.y_embedder is None else [self.y_embedder]), self.t_embedder]
        for module in (*first, *(module for module in self_initialized(self) if module not in first)):
            module.reset_parameters()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] in the units the network was trained in (0 to 999 in the paper) -> [B, O, H, W]

        For clips see `Network.forward`. Positions are computed for any token grid. Raises ValueError if the patch sizes
        do not divide the size, for times of another shape, or if labels are missing.
        """
        return self.output(x, self._context(x, t, condition))

    def output(self, x: Tensor, context: Context, run_blocks: RunBlocks | None = None) -> Tensor:
        """The forward pass with a context that `embed_condition` returned.

        run_blocks: called as `run_blocks(tokens, context)` in place of the method of that name.
        """
        tokens, context = self.embed_patches(x, context)
        return self.head((run_blocks or self.run_blocks)(tokens, context), context)

    def embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Context]:
        """Return the tokens [B, N, D] (N + M where the condition is appended) and the context of the blocks."""
        return self.embed_patches(x, self._context(x, t, condition))

    def _context(self, x: Tensor, t: Tensor, condition: Condition) -> Context:
        check_rows(condition, x)
        grid = self.grid(x)
        return self.embed_condition(check_times(t, x, math.prod(grid)), condition, grid)

    def training_forward(
        self, x: Tensor, t: Tensor, condition: Condition, feature_block: int | None = None, route: Route | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the features [B, N, F] that the head predicts from the output of a block (1: the first).

        feature_block: None for no features. It must not be on the route that some tokens take.
        """
        tokens, context = self.embed(x, t, condition)
        capture: dict[int, Tensor | None] = {} if feature_block is None else {feature_block - 1: None}
        tokens = (self.run_blocks if route is None else partial(self._run_routed, route))(
            tokens, context, capture=capture
        )
        features = None
        for captured in capture.values():
            assert captured is not None
            assert self.feature_head is not None
            features = self.feature_head(captured[:, : math.prod(context.grid)])
        return self.head(tokens, context), features

    def _run_routed(self, route: Route, tokens: Tensor, context: Context, capture: dict[int, Tensor | None]) -> Tensor:
        """`run_blocks`, where only some tokens of the image pass the blocks of a route."""
        count = math.prod(context.grid)
        rows = torch.cat((route.rows, torch.arange(count, tokens.shape[1]))).to(tokens.device, non_blocking=True)
        tokens = self.run_blocks(tokens, context, end=route.start, capture=capture)
        some = context.of_tokens(rows, count)
        if context.text_mask is not None:
            some = replace(some, key_mask=self.config.block.key_mask(context.text_mask, len(route.rows)))
        routed = self.run_blocks(tokens[:, rows], some, route.start, route.end)
        tokens = tokens.index_copy(1, rows, routed.to(tokens.dtype))
        return self.run_blocks(tokens, context, route.end, capture=capture)

    def block_output(self, x: Tensor, t: Tensor, condition: Condition, blocks: int) -> Tensor:
        """The tokens of the image after the first blocks: [B, N, D]"""
        tokens, context = self.embed(x, t, condition)
        return self.run_blocks(tokens, context, end=blocks)[:, : math.prod(context.grid)]

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """Return the token grid (h, w) of x [B, C, H, W], or (t, h, w) of x [B, C, T, H, W]."""
        self.config.check_size(x.shape[2:])
        return self.config.token_grid(x.shape[2:])

    def embed_patches(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Like `embed`, with a context that `embed_condition` returned."""
        tokens = self._with_added(self.embed_image(x, context.first_frame), context)
        if context.text_mask is not None:
            context = replace(context, key_mask=self.config.block.key_mask(context.text_mask, tokens.shape[1]))
        if self.appends_tokens:
            tokens = torch.cat((tokens, context.cond_tokens.to(tokens.dtype)), dim=1)
        if self.shared is not None:
            context = self.shared(tokens, context)
        return tokens, context

    def embed_image(self, x: Tensor, first_frame: int = 0) -> Tensor:
        """The patch embeddings with their positions: [B, C, H, W] -> [B, N, D]"""
        # Tokens in the dtype of the input: under autocast, residuals are then summed in float32.
        tokens = self.x_embedder(x).to(x.dtype)
        return tokens if self.pos_embed is None else tokens + self._positions(self.grid(x), self.pos_embed, first_frame)

    def _with_added(self, tokens: Tensor, context: Context) -> Tensor:
        for control in context.controls:
            tokens = tokens if control.added is None else tokens + control.added.to(tokens.dtype)
        return tokens

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, ...]) -> Context:
        """Return what blocks and head need beside the image or clip, for its token grid.

        t [B], or [B, G]: a time for each frame (G = t), or for each token (G = N).
        """
        time = self.t_embedder(t if t.ndim == 2 else t[:, None])
        if condition.step_size is not None:
            time = time + self._embed_step_size(condition.step_size)
        c, cond_tokens = time, [self._time_tokens(time, grid)]
        if self.y_embedder is not None:
            label = self.y_embedder(condition.label)[:, None]
            c = time + label
            cond_tokens.append(label)
        context = Context(c, torch.cat(cond_tokens, dim=1), grid, attention=self.config.attention)
        context = context if self.text_embedder is None else self._with_text(context, condition)
        return self._with_controls(context, condition)

    def _embed_step_size(self, step_size: Tensor) -> Tensor:
        if self.step_size_embedder is None:
            raise ValueError(
                "this network predicts the velocity at a time, not over a step: it has step_size_embedding=false"
            )
        return self.step_size_embedder(step_size if step_size.ndim == 2 else step_size[:, None])

    def _with_text(self, context: Context, condition: Condition) -> Context:
        prepared = condition.prepared
        if not isinstance(prepared, PreparedText):
            prepared = self._embed_text(condition)
        if self.appends_tokens:
            if context.c.shape[1] > 1:
                raise ValueError("times of frames or tokens need text=keys or text=cross: text tokens have no time")
            context = replace(context, cond_tokens=prepared.text)
        return replace(context, text=prepared.text, text_mask=prepared.mask, text_keys=prepared.keys)

    def _embed_text(self, condition: Condition) -> PreparedText:
        if condition.text is None:
            raise ValueError("this network is conditioned on text: pass Condition(text=..., text_mask=...)")
        assert self.text_embedder is not None
        return PreparedText(*self.text_embedder(condition.text, condition.text_mask))

    def prepare(self, condition: Condition) -> Condition:
        condition = self._prepare_text(condition)
        if condition.control is None:
            return condition
        return replace(condition, prepared_control=self._control_inputs(condition))

    def _prepare_text(self, condition: Condition) -> Condition:
        if self.text_embedder is None:
            return condition
        prepared = self._embed_text(condition)
        keys = [block.text_keys(prepared.text) for block in self.blocks if isinstance(block, AdaLNZeroBlock)]
        keys = tuple(each for each in keys if each is not None)
        return replace(condition, prepared=replace(prepared, keys=keys or None))

    def _control_inputs(self, condition: Condition) -> tuple[ControlInputs, ...]:
        """What the network gets from each control image of a condition."""
        images, controls = condition.control, self.controls
        assert images is not None
        if images.shape[1] != len(controls):
            raise ValueError(f"the network has {len(controls)} controls, and the condition {images.shape[1]} images")
        present = ~images[:, :, 0, 0, 0].isnan()
        strengths = present if condition.control_strength is None else present * condition.control_strength
        return tuple(
            control.inputs(self, images[:, number].nan_to_num(), strengths[:, number].to(images.dtype), condition)
            for number, control in enumerate(controls.values())
        )

    def _with_controls(self, context: Context, condition: Condition) -> Context:
        if condition.control is None:
            return context
        if (grid := self.config.token_grid(condition.control.shape[-2:])) != context.grid:
            raise ValueError(f"a control image has the token grid {grid}, and the image {context.grid}")
        inputs = condition.prepared_control
        if inputs is None:
            inputs = self._control_inputs(condition)
        on_cpu = condition.control.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and not any(each.strength.any() for each in inputs):
            return context  # the same numbers in less time; a GPU would have to be waited for
        return replace(context, controls=inputs)

    def _time_tokens(self, time: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Time vectors [B, G, D] as condition tokens, with the positions of the frames or tokens that they belong to.

        The time of a whole clip is a token for each frame, so equal times of all frames are one time.
        """
        groups, width = time.shape[1:]
        frames = self._frames_with_times(grid)
        if groups in (1, frames):
            return time if frames == 1 else time + sincos_frames(frames, width).to(time, non_blocking=time.is_cuda)
        of_frames = len(grid) == 3 and groups == grid[0] * self.config.temporal_patch_size
        if groups == math.prod(grid) and not of_frames:
            return time + sincos_grid(grid, width).to(time, non_blocking=time.is_cuda)
        raise ValueError(
            f"{groups} times for a token grid of {' x '.join(map(str, grid))}: expected one, one for each frame (with "
            f"temporal_patch_size 1), or one for each token"
        )

    def _frames_with_times(self, grid: Sequence[int]) -> int:
        """The number of frames that may have their own times."""
        return grid[0] if len(grid) == 3 and self.config.temporal_patch_size == 1 else 1

    def run_blocks(
        self,
        tokens: Tensor,
        context: Context,
        start: int = 0,
        end: int | None = None,
        residuals: Mapping[int, Tensor] | None = None,
        capture: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """Apply the blocks start .. end - 1 (default: to the last) to the tokens: [B, N (+ M), D] -> the same shape.

        residuals: added to the output of a block, by its number, as ControlNet does. capture: a dictionary with the
        numbers of blocks as keys; their outputs become its values.
        """
        # Those with keys change only the tokens that these belong to.
        rows = {each.name: each.strength for each in context.controls if each.keys_values is None}
        for number, block in enumerate(list(self.blocks)[start:end], start):  # a slice of a ModuleList is a new module
            if number == 1 and context.controls:
                residuals = self._side_residuals(tokens, context, residuals or {})
                tokens = tokens + residuals[0] if 0 in residuals else tokens
            with active_controls(rows) if rows else nullcontext():
                tokens = block(tokens, context.for_block(number))
            if residuals is not None and number in residuals:
                tokens = tokens + residuals[number]
            if capture is not None and number in capture:
                capture[number] = tokens
        return tokens

    def _side_residuals(self, tokens: Tensor, context: Context, residuals: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Residuals and those of the controls, from the output of the first block: [B, N (+ M), D] each"""
        result = {number: residual for number, residual in residuals.items() if number}  # that of block 0 is in tokens
        controls, context = (
            context.controls,
            replace(context, controls=(), text_keys=None),
        )  # copies have their own maps to text keys
        for inputs in controls:
            if inputs.side is not None:
                sides = self.controls[inputs.name].residuals(inputs, tokens, context)
                for number, residual in enumerate(sides):
                    result[number] = result[number] + residual if number in result else residual
        return result

    def head(self, tokens: Tensor, context: Context) -> Tensor:
        """Map the tokens of the last block to the output: [B, N (+ M), D] -> [B, O, H, W] or [B, O, T, H, W]"""
        patches = self.final_layer(tokens[:, : math.prod(context.grid)], context)
        return unpatchify(patches, self.x_embedder.patch_size, context.grid)

    def _positions(self, grid: tuple[int, ...], table: Tensor, first_frame: int = 0) -> Tensor:
        if grid[-2:] != self.config.grid[-2:]:
            table = sincos_grid(grid[-2:], self.config.hidden_size).to(table, non_blocking=table.is_cuda)
        frames = first_frame + (grid[0] if len(grid) == 3 else 1)
        if frames == 1:
            return table
        if self.config.frame_positions != "all":
            return table.repeat(1, frames - first_frame, 1)
        positions = sincos_frames(frames, self.config.hidden_size)[first_frame:]
        return (positions.to(table, non_blocking=table.is_cuda)[:, None] + table).flatten(0, 1)

    def block_macs(self, grid: tuple[int, ...], tokens: int | None = None) -> list[int]:
        """Multiply-adds of each block for one sample of a token grid. tokens: of an image, where some are left out"""
        count = math.prod(grid) if tokens is None else tokens
        text_tokens = self.config.text_tokens if self.text_embedder is not None else 0
        cond_tokens = text_tokens or self._frames_with_times(grid) + (self.y_embedder is not None)
        modes = (self.config.attention.for_block(number) for number in range(len(self.blocks)))
        return [
            block.macs(count, cond_tokens, mode.keys(grid) if tokens is None else tokens)
            + (0 if block.temporal is None else block.temporal.macs(count, grid))
            for block, mode in zip(self.blocks, modes)
            if isinstance(block, Block)
        ]

    def macs(self, size: Sequence[int] | None = None) -> int:
        grid = self.config.token_grid(size or self.config.input_size)
        tokens, blocks = math.prod(grid), self.block_macs(grid)
        text_tokens = self.config.text_tokens if self.text_embedder is not None else 0
        appended = text_tokens if self.appends_tokens else 0
        return (
            self.x_embedder.macs(tokens)
            + self.t_embedder.macs()
            + (0 if self.step_size_embedder is None else self.step_size_embedder.macs())
            + (0 if self.text_embedder is None else self.text_embedder.macs(text_tokens))
            + (0 if self.shared is None else self.shared.macs(tokens + appended))
            + sum(blocks)
            + self.final_layer.macs(tokens)
            + sum(control.macs(self, tokens, blocks) for control in self.controls.values())
        )
