"""Transformer blocks: the four designs of the DiT paper (Peebles & Xie 2023, section 3.2) and two later ones.

Each design has its settings directly above its block. A block is `block(x, context)`. Shapes: B batch, N image tokens,
M condition tokens, G conditioning vectors (1, one for each frame, or N), D width, E channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from tessera.layers.attention import Attention, CrossAttention, MoreKeys, RotaryAttention
from tessera.layers.frames import AttentionMode, ClipAttention, Full, Temporal
from tessera.layers.mlp import MLP, SwiGLU
from tessera.layers.modulation import Modulation, ScaleShiftTable, gated_residual, modulate
from tessera.layers.norms import RMSNorm
from tessera.layers.positions import rope_grid, sincos_frames
from tessera.layers.text import TextEmbedder
from tessera.rows import SHARED, Rows, pad
from tessera.settings import Settings, expand_kind

FULL = Full()
FramePositions = Literal["all", "temporal", "none"]  # which attention layers know the order of frames


@dataclass(frozen=True)
class ControlInputs(Rows):
    """What a network gets from one control image (see `tessera.adapters.control`): it is the same at all times."""

    name: str  # of the adapter
    strength: Tensor  # [B] 0 where a row has no such image
    added: Tensor | None = None  # [B, N, D] added to the patch embeddings
    side: Tensor | None = None  # [B, N, D] input of the copied blocks
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None  # [B, K, M, E] of each block, for `MoreKeys`


@dataclass(frozen=True)
class Context(Rows):
    """The inputs that all blocks share, beside their tokens. `SharedConditioning` sets rope, v0 and shared_modulation
    if needed."""

    c: Tensor  # [B, G, D] conditioning vectors: time + label
    cond_tokens: Tensor  # [B, M, D] the same as tokens: time, then label
    grid: tuple[int, ...]  # (h, w) of the image tokens, or (t, h, w) of those of a clip
    shared_modulation: Tensor | None = None  # [B, G, 6 D] parameters to which every block adds its offsets
    rope: Tensor | None = field(default=None, metadata=SHARED)  # [N, E / 2, 2] angles of the grid
    v0: Tensor | None = None  # [B, N, D] values of the first layer, which every attention mixes in
    text: Tensor | None = field(default=None, metadata=pad(0))  # [B, M, D] text tokens
    text_mask: Tensor | None = field(default=None, metadata=pad(0))  # bool [B, M] which of them are valid; None: all
    text_keys: tuple[Tensor, ...] | None = field(default=None, metadata=pad(0))  # [B, M, 2 D] of each block, if known
    own_text_keys: Tensor | None = field(default=None, metadata=pad(0))  # [B, M, 2 D] those of the block that runs
    key_mask: Tensor | None = field(default=None, metadata=pad(0))  # bool [B, M + N] which keys attention attends to
    controls: tuple[ControlInputs, ...] = ()
    own_keys_values: tuple[tuple[Tensor, Tensor], ...] = ()  # of the controls, for the block that runs
    record: list[tuple[Tensor, Tensor]] | None = field(default=None, metadata=SHARED)  # see `MoreKeys`
    attention: AttentionMode = FULL  # of the network, or of the block that runs
    first_frame: int = 0  # the number of the first frame of the grid
    past: tuple[tuple[Tensor, Tensor], ...] = ()  # [B, K, P S, E] of earlier frames, for each block
    own_past: tuple[Tensor, Tensor] | None = None  # those of the block that runs

    @property
    def clip(self) -> ClipAttention | None:
        """Which tokens of a clip attend to each other; None: all"""
        if self.own_past is None and (self.grid[:-2] in ((), (1,)) or isinstance(self.attention, Full)):
            return None
        return ClipAttention(self.attention, self.grid, self.own_past)

    @property
    def more_keys(self) -> MoreKeys | None:
        """What self-attention attends to beside the tokens."""
        return MoreKeys(self.own_keys_values, self.record) if self.own_keys_values or self.record is not None else None

    def modulation_params(self, modulation: Modulation | ScaleShiftTable) -> Tensor:
        """The parameters [B, G, num_params D] of a modulation module.

        Blocks call this method instead of the module, so that a context can return precomputed parameters.
        """
        return modulation.params(self.c, self.shared_modulation)

    def of_tokens(self, rows: Tensor, count: int) -> "Context":
        """The context of some tokens, int64 [K]: of the image, which has `count`, and of all that are appended to it"""
        with_times = {  # of tokens that have their own
            name: value[:, rows]
            for name in ("c", "shared_modulation")
            if (value := getattr(self, name)) is not None and value.shape[1] == count > 1
        }
        rope, v0 = None if self.rope is None else self.rope[rows], None if self.v0 is None else self.v0[:, rows]
        return replace(self, rope=rope, v0=v0, **with_times)

    def for_block(self, number: int) -> "Context":
        """The context of one block: its attention mode, text keys, keys of the controls and of earlier frames."""
        own = tuple(each.keys_values[number] for each in self.controls if each.keys_values is not None)
        context = replace(self, own_keys_values=own) if own else self
        mode = self.attention.for_block(number)
        if mode is not self.attention or self.past:
            context = replace(context, attention=mode, own_past=self.past[number] if self.past else None)
        return context if self.text_keys is None else replace(context, own_text_keys=self.text_keys[number])


@dataclass(frozen=True)
class PreparedText(Rows):
    """What blocks need of a text. It is the same at all times, so sampling computes it once."""

    text: Tensor = field(metadata=pad(0))  # [B, M, D]
    mask: Tensor = field(metadata=pad(0))  # bool [B, M]
    keys: tuple[Tensor, ...] | None = field(default=None, metadata=pad(0))  # [B, M, 2 D] of each block


@dataclass(frozen=True)
class BlockDims:
    """The sizes of a block."""

    width: int
    num_heads: int
    mlp_width: int
    mlp_norm_eps: float = 1e-6  # diffusers' DiT uses 1e-5 in this norm only
    temporal_attention: bool = False  # a layer of it in each block
    frame_positions: "FramePositions" = "all"


def layer_norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    """LayerNorm without learned weights."""
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)


class SharedConditioning(nn.Module):
    """Values that all blocks of a network share, computed once per forward pass and passed on in the context.

    v0 is a linear layer of the normalized patch embeddings. Zhou et al. (2024) use the values of the first block. With
    a layer of its own, all blocks are alike and no block returns more than its tokens.
    """

    def __init__(self, dims: BlockDims, modulation: bool, rope: bool = False, value_residual: bool = False) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(dims.width, 6) if modulation else None
        self.rope_channels = dims.width // dims.num_heads if rope else 0
        self.frame_positions = dims.frame_positions == "all"
        self.norm = RMSNorm(dims.width)
        self.v0_proj = nn.Linear(dims.width, dims.width, bias=False) if value_residual else None

    def forward(self, x: Tensor, context: Context) -> Context:
        """x [B, N, D]: the patch embeddings, and text tokens that are appended to them"""
        modulation, rope = self.adaLN_modulation, None
        if self.rope_channels:
            rope = rope_grid(context.grid, self.rope_channels, x.device, context.first_frame, self.frame_positions)
            if (appended := x.shape[1] - len(rope)) > 0:  # text tokens have no place in the grid: not rotated
                rope = nn.functional.pad(rope, (0, 0, 0, 0, 0, appended))
                rope[-appended:, :, 0] = 1
        return replace(
            context,
            shared_modulation=None if modulation is None else context.modulation_params(modulation),
            rope=rope,
            v0=None if self.v0_proj is None else self.v0_proj(self.norm(x)),
        )

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        modulation = 0 if self.adaLN_modulation is None else self.adaLN_modulation.macs()
        return modulation + (0 if self.v0_proj is None else tokens * self.v0_proj.weight.numel())


class TemporalAttention(nn.Module):
    """x + attention among the tokens at the same place in all frames, with weights of its own.

    After spatial attention it makes an image network one of clips (Ho et al. 2022, "Video diffusion models"; Zheng et
    al. 2024, "Open-Sora"; Guo et al. 2023, "AnimateDiff"). A new layer is the identity, and images skip it.
    """

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.norm = layer_norm(dims.width)
        self.attn = RotaryAttention(dims.width, dims.num_heads, bias=True, qk_norm=False, value_residual=False)
        self.frame_positions = dims.frame_positions

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new layer is the identity."""
        nn.init.zeros_(self.attn.proj.weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D] -> [B, N, D]"""
        if context.grid[:-2] in ((), (1,)):
            return x
        tokens, frames = self.norm(x), context.grid[0]
        rope = context.rope if self.frame_positions == "all" else None
        if rope is None and self.frame_positions != "none":
            positions = sincos_frames(frames, x.shape[2]).to(tokens, non_blocking=x.is_cuda)
            tokens = tokens + positions.repeat_interleave(x.shape[1] // frames, 0)
        return x + self.attn(tokens, rope, clip=ClipAttention(Temporal(), context.grid))

    def macs(self, tokens: int, grid: Sequence[int]) -> int:
        """Multiply-adds for one sample."""
        is_clip = len(grid) == 3 and grid[0] > 1
        return self.attn.macs(tokens, grid[0]) if is_clip else 0


class Block(nn.Module):
    """The parts of all designs: attention, then an MLP, each behind a norm without learned weights."""

    appends_tokens: bool = False  # condition tokens are appended to the image tokens of all blocks
    modulated_head: ClassVar[bool] = False  # the final layer is modulated, too

    def __init__(
        self,
        dims: BlockDims,
        norm: Callable[[int, float], nn.Module] = layer_norm,
        attn: Attention | None = None,
        mlp: MLP | SwiGLU | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dims.width, 1e-6)
        self.attn = Attention(dims.width, dims.num_heads) if attn is None else attn
        self.temporal = TemporalAttention(dims) if dims.temporal_attention else None
        self.norm2 = norm(dims.width, dims.mlp_norm_eps)
        self.mlp = MLP(dims.width, dims.mlp_width) if mlp is None else mlp

    def attend_in_time(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D] after the layer of temporal attention, where there is one."""
        return x if self.temporal is None else self.temporal(x, context)

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        """Multiply-adds for one sample with N = tokens and M = cond_tokens. keys: see `Attention.macs`"""
        return self.attn.macs(tokens, keys) + self.mlp.macs(tokens)


class BlockConfig(Settings):
    """The settings of a block design. Its properties state what a network of such blocks needs in addition."""

    def summary(self) -> str:
        """The kind, and the settings that differ from the defaults."""
        fields = type(self).model_fields
        changes = [f"{name}={value}" for name, value in self if name != "kind" and value != fields[name].default]
        return " ".join([fields["kind"].default, *changes])

    @property
    def absolute_positions(self) -> bool:
        """Whether a table of positions is added to the patch embeddings."""
        return True

    @property
    def takes_attention_modes(self) -> bool:
        """Whether self-attention may have another mode than full: not if condition tokens are among its tokens."""
        return True

    def check(self, width: int, num_heads: int) -> None:
        """Raise ValueError if a block cannot have these sizes."""

    def shared(self, dims: BlockDims) -> SharedConditioning | None:
        """The module that computes what the blocks share."""
        return None

    @property
    def uses_text(self) -> bool:
        """Whether the blocks are conditioned on text."""
        return False

    def text_embedder(self, dims: BlockDims, channels: int, vocabulary_size: int) -> TextEmbedder | None:
        """The module that makes text tokens of the outputs of a text encoder."""
        return None

    def key_mask(self, text_mask: Tensor, num_tokens: int) -> Tensor | None:
        """Which keys self-attention attends to, bool [B, M + N], from text_mask [B, M]; None: all"""
        return None


class InContext(BlockConfig):
    """Conditioning by two additional tokens: the cheapest design."""

    kind: Literal["in-context"] = "in-context"

    @property
    def takes_attention_modes(self) -> bool:
        return False

    def build(self, dims: BlockDims) -> Block:
        return InContextBlock(dims)


class InContextBlock(Block):
    """x + branch(norm(x)): a plain transformer block. Time and label are two more tokens of the sequence."""

    appends_tokens = True

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N + M, D] -> [B, N + M, D]"""
        x = x + self.attn(self.norm1(x), context.more_keys, context.clip)
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        return super().macs(tokens + cond_tokens, cond_tokens)


class CrossAttend(BlockConfig):
    """Conditioning by cross-attention: about 15 % more compute."""

    kind: Literal["cross-attention"] = "cross-attention"

    def build(self, dims: BlockDims) -> Block:
        return CrossAttentionBlock(dims)


class CrossAttentionBlock(Block):
    """x + branch(norm(x)): self-attention, then attention to the tokens of time and label, then the MLP."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__(dims)
        self.norm_cross = layer_norm(dims.width)
        self.cross_attn = CrossAttention(dims.width, dims.num_heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.cond_tokens [B, M, D] -> [B, N, D]"""
        x = x + self.attn(self.norm1(x), context.more_keys, context.clip)
        x = self.attend_in_time(x, context)
        x = x + self.cross_attn(self.norm_cross(x), context.cond_tokens)
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        return super().macs(tokens, cond_tokens, keys) + self.cross_attn.macs(tokens, cond_tokens)


class AdaLN(BlockConfig):
    """Conditioning by adaptive layer norm."""

    kind: Literal["adaln"] = "adaln"

    def build(self, dims: BlockDims) -> Block:
        return AdaLNBlock(dims)


class AdaLNBlock(Block):
    """x + branch(norm(x) (1 + scale) + shift), for attention and then for the MLP."""

    modulated_head = True

    def __init__(self, dims: BlockDims) -> None:
        super().__init__(dims)
        self.adaLN_modulation = Modulation(dims.width, 4)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.c [B, G, D] -> [B, N, D]"""
        shift1, scale1, shift2, scale2 = context.modulation_params(self.adaLN_modulation).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1), context.more_keys, context.clip)
        x = self.attend_in_time(x, context)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        return super().macs(tokens, cond_tokens, keys) + self.adaLN_modulation.macs()


class AdaLNZero(BlockConfig):
    """Conditioning by adaptive layer norm with zero-initialized gates: the paper's choice."""

    kind: Literal["adaln-zero"] = "adaln-zero"

    def build(self, dims: BlockDims) -> Block:
        return AdaLNZeroBlock(dims)


class AdaLNZeroBlock(Block):
    """x + gate * branch(norm(x) (1 + scale) + shift), for attention and then for the MLP.

    The modulation is zero-initialized, so a fresh block is the identity.
    """

    modulated_head = True

    def __init__(
        self, dims: BlockDims, modulation: type[Modulation] | type[ScaleShiftTable] = Modulation, **parts: Any
    ) -> None:
        """parts: `norm`, `attn` and `mlp` of `Block`"""
        super().__init__(dims, **parts)
        self.adaLN_modulation = modulation(dims.width, 6)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.c [B, G, D] -> [B, N, D]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = context.modulation_params(self.adaLN_modulation).chunk(6, dim=-1)
        x = gated_residual(x, gate1, self.attend(modulate(self.norm1(x), shift1, scale1), context))
        x = self.attend_to_text(self.attend_in_time(x, context), context)
        return gated_residual(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """The attention branch: x [B, N, D] -> [B, N, D]"""
        return self.attn(x, context.more_keys, context.clip)

    def attend_to_text(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D] plus what it attends to in the text, in designs with cross-attention"""
        return x

    def text_keys(self, text: Tensor) -> Tensor | None:
        """The keys and values of the text: [B, M, D] -> [B, M, 2 D]; None in designs without."""
        return None

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        return super().macs(tokens, cond_tokens, keys) + self.adaLN_modulation.macs()


class AdaLNSingle(BlockConfig):
    """adaLN-Zero with one modulation layer for all blocks (PixArt-alpha): up to a third fewer parameters.

    A block adds a learned table to the shared parameters. PixArt-alpha initializes the tables randomly. Here they and
    the shared layer are zero-initialized, so that a fresh block is the identity: in the DiT paper this made the
    difference between adaLN-Zero and adaLN.
    """

    kind: Literal["adaln-single"] = "adaln-single"

    def build(self, dims: BlockDims) -> Block:
        return AdaLNZeroBlock(dims, ScaleShiftTable)

    def shared(self, dims: BlockDims) -> SharedConditioning:
        return SharedConditioning(dims, modulation=True)


class RoPESwiGLU(BlockConfig):
    """adaLN-Zero with parts that later transformers found better. Each part can be switched back alone.

    The paper's adaLN-Zero block is `mlp: gelu, norm: layer, positions: sincos, modulation: per-block, qk_norm: false,
    value_residual: false, bias: true`.
    """

    kind: Literal["rope-swiglu"] = "rope-swiglu"
    mlp: Literal["swiglu", "gelu"] = Field(
        default="swiglu", description="SwiGLU (two thirds of the hidden width) or GELU"
    )
    norm: Literal["rms", "layer"] = Field(
        default="rms", description="the norm before attention and MLP, without learned weights"
    )
    positions: Literal["rotary", "sincos"] = Field(
        default="rotary", description="queries and keys rotated by row and column, or a table added to the patches"
    )
    modulation: Literal["shared", "per-block"] = Field(
        default="shared", description="one modulation layer for all blocks (adaLN-single), or one in each"
    )
    qk_norm: bool = Field(default=True, description="normalize queries and keys, with a learned scale for each head")
    value_residual: bool = Field(
        default=True, description="interpolate the values of each attention with those of the first layer"
    )
    bias: bool = Field(default=False, description="biases in attention and MLP; the modulation always has them")
    text: Literal["none", "keys", "cross", "sequence"] = Field(
        default="none",
        description="conditioning on text: keys beside those of the image, cross-attention after self-attention, or "
        "its tokens in the sequence",
    )
    text_layers: int = Field(default=2, ge=0, description="transformer layers over the text alone, before the blocks")
    text_offset: bool = Field(
        default=False,
        description="text=keys: logits of the text have a learned offset that begins at -20, so that the weights of a "
        "model without text keep their function",
    )

    @property
    def absolute_positions(self) -> bool:
        return self.positions == "sincos"

    @property
    def takes_attention_modes(self) -> bool:
        return self.text != "sequence"

    def check(self, width: int, num_heads: int) -> None:
        channels = width // num_heads
        if self.positions == "rotary" and channels % 4:
            raise ValueError(
                f"hidden_size {width} and num_heads {num_heads} give {channels} channels per head, and rotary "
                f"positions need a multiple of 4: change one of them, or set block.positions=sincos"
            )
        if self.text_offset and self.text != "keys":
            raise ValueError(f"text_offset has no effect with text={self.text}: it needs text=keys")

    @property
    def uses_text(self) -> bool:
        return self.text != "none"

    def text_embedder(self, dims: BlockDims, channels: int, vocabulary_size: int) -> TextEmbedder | None:
        if not self.uses_text:
            return None
        return TextEmbedder(
            channels,
            vocabulary_size,
            dims.width,
            dims.num_heads,
            dims.mlp_width,
            self.text_layers,
            self.text == "cross",
        )

    def key_mask(self, text_mask: Tensor, num_tokens: int) -> Tensor | None:
        image = text_mask.new_ones(()).expand(len(text_mask), num_tokens)
        if self.text == "keys":
            return torch.cat((text_mask, image), dim=1)
        return torch.cat((image, text_mask), dim=1) if self.text == "sequence" else None

    def build(self, dims: BlockDims) -> Block:
        return RoPESwiGLUBlock(dims, self)

    def shared(self, dims: BlockDims) -> SharedConditioning | None:
        modulation, rope = self.modulation == "shared", self.positions == "rotary"
        if not (modulation or rope or self.value_residual):
            return None
        return SharedConditioning(dims, modulation, rope, self.value_residual)


class RoPESwiGLUBlock(AdaLNZeroBlock):
    """An adaLN-Zero block of the parts that its settings select."""

    def __init__(self, dims: BlockDims, config: RoPESwiGLU) -> None:
        mlp = SwiGLU if config.mlp == "swiglu" else MLP
        norm = RMSNorm if config.norm == "rms" else layer_norm
        attn = RotaryAttention(
            dims.width, dims.num_heads, config.bias, config.qk_norm, config.value_residual,
            more_keys=config.text == "keys", learned_offset=config.text_offset,
        )  # fmt: skip
        super().__init__(
            dims,
            modulation=ScaleShiftTable if config.modulation == "shared" else Modulation,
            norm=norm,
            attn=attn,
            mlp=mlp(dims.width, dims.mlp_width, config.bias),
        )
        self.attn: RotaryAttention = attn
        self.text = config.text
        self.appends_tokens = config.text == "sequence"
        self.norm_text = norm(dims.width, 1e-6) if config.text == "cross" else None
        self.cross_attn = CrossAttention(dims.width, dims.num_heads) if config.text == "cross" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Cross-attention begins without effect: a new block is the identity."""
        if self.cross_attn is not None:
            nn.init.zeros_(self.cross_attn.proj.weight)

    def attend(self, x: Tensor, context: Context) -> Tensor:
        keys = self._own_text_keys(context) if self.text == "keys" else None
        return self.attn(x, context.rope, context.v0, keys, context.key_mask, context.more_keys, context.clip)

    def attend_to_text(self, x: Tensor, context: Context) -> Tensor:
        if self.cross_attn is None or self.norm_text is None or context.text is None:
            return x
        return x + self.cross_attn(self.norm_text(x), context.text, context.text_mask, context.own_text_keys)

    def _own_text_keys(self, context: Context) -> Tensor | None:
        if context.own_text_keys is not None or context.text is None:
            return context.own_text_keys
        return self.text_keys(context.text)

    def text_keys(self, text: Tensor) -> Tensor | None:
        if self.text == "keys":
            return self.attn.keys_values(text)
        return None if self.cross_attn is None else self.cross_attn.kv_linear(text)

    def macs(self, tokens: int, cond_tokens: int, keys: int | None = None) -> int:
        """cond_tokens: of the text"""
        width = self.attn.proj.in_features
        match self.text:
            case "sequence":
                return super().macs(tokens + cond_tokens, 0)
            case "keys":
                return super().macs(tokens, 0, keys) + 2 * cond_tokens * width * (width + tokens)
            case "cross":
                assert self.cross_attn is not None
                return super().macs(tokens, 0, keys) + self.cross_attn.macs(tokens, cond_tokens)
        return super().macs(tokens, 0, keys)


_Block = InContext | CrossAttend | AdaLN | AdaLNZero | AdaLNSingle | RoPESwiGLU  # the one list of all designs
AnyBlock = Annotated[_Block, BeforeValidator(expand_kind), Field(discriminator="kind")]
