"""PixArt-alpha and PixArt-sigma: a diffusion transformer conditioned on text (Chen et al. 2023 and 2024).

Shapes: B batch, N image tokens on a grid (h, w), M text tokens, E channels of the text encoder, D width, G conditioning
vectors, K heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from tessera.conditioning import Condition
from tessera.layers.attention import Attention, CrossAttention, MoreKeys
from tessera.layers.embeddings import TimestepEmbedder, sinusoidal_embedding
from tessera.layers.mlp import MLP
from tessera.layers.modulation import ScaleShiftTable, gated_residual, modulate
from tessera.layers.positions import sincos
from tessera.layers.text import TextEmbedder
from tessera.models.blocks import AdaLNZeroBlock, BlockConfig, BlockDims, Context, PreparedText, SharedConditioning
from tessera.models.dit import DiT, DiTConfig

Compression = Literal["conv", "uniform", "every"]


class PixArtBlockConfig(BlockConfig):
    """The block of PixArt: adaLN-single, self-attention, cross-attention to text, MLP."""

    kind: Literal["pixart"] = "pixart"
    qk_norm: bool = Field(default=False, description="layer norm of queries and keys over the whole width")
    compression: Compression = Field(
        default="conv",
        description="of keys and values: a learned convolution of 2 x 2, every second row and column, or every second "
        "token",
    )
    compressed_layers: tuple[int, ...] = Field(default=(), description="blocks with compressed keys and values")
    window_layers: tuple[int, ...] = Field(
        default=(), description="blocks whose self-attention has windows or relative positions (ViTDet)"
    )
    window_size: int = Field(default=0, ge=0, description="side of the windows in tokens; 0: the whole grid")
    relative_positions: bool = Field(
        default=False, description="learned offsets of the attention logits by row and column distance"
    )
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="stochastic depth in training: how often the last block's attention and MLP are left out for a "
        "sample; grows linearly from 0 in the first block",
    )

    @model_validator(mode="after")
    def _check_windows(self) -> "PixArtBlockConfig":
        if bool(self.window_layers) != bool(self.window_size or self.relative_positions):
            raise ValueError(
                "window_layers needs window_size, relative_positions or both, and these need window_layers; got "
                f"window_layers {list(self.window_layers)}, window_size {self.window_size}, relative_positions "
                f"{self.relative_positions}"
            )
        if both := sorted(set(self.window_layers) & set(self.compressed_layers)):
            raise ValueError(f"blocks {both} are in window_layers and in compressed_layers: a block has one of both")
        return self

    @property
    def absolute_positions(self) -> bool:
        return False  # of its own kind: see `PixArt.positions`

    @property
    def takes_attention_modes(self) -> bool:
        return False

    def build(self, dims: BlockDims) -> "PixArtBlock":
        return PixArtBlock(dims, self)

    def shared(self, dims: BlockDims) -> SharedConditioning:
        return SharedConditioning(dims, modulation=True)

    def text_embedder(self, dims: BlockDims, channels: int, vocabulary_size: int) -> TextEmbedder | None:
        """For ids only, which no published PixArt has: two layers, as in the rope-swiglu block, to compare with it."""
        if not vocabulary_size:
            return None
        return TextEmbedder(
            0, vocabulary_size, dims.width, dims.num_heads, dims.mlp_width, num_layers=2, null_token=True
        )


class PixArtConfig(DiTConfig):
    """A PixArt of any size. The defaults are PixArt-alpha XL/2 at 512 pixels."""

    display_name: ClassVar[str] = "text-conditional diffusion transformer"
    kind: Literal["pixart"] = "pixart"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_classes: int = 0
    block: PixArtBlockConfig = PixArtBlockConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    text_channels: int = Field(
        default=4096, ge=0, description="channels of the text encoder; 0: ids, which the network embeds (not PixArt's)"
    )
    text_tokens: PositiveInt = Field(default=120, description="text tokens in training: 120 (alpha), 300 (sigma)")
    position_base: PositiveInt = Field(default=32, description="side of the token grid of the pretraining")
    position_scale: PositiveFloat = Field(
        default=1.0, description="divisor of positions: 0.5 for 256 pixels (sigma), 1 for 512, 2 for 1024, 4 for 2048"
    )
    size_conditions: bool = Field(default=False, description="conditioned on height, width and ratio (alpha 1024)")
    null_embedding: bool = Field(default=True, description="an embedding of no text, which guidance needs")

    @model_validator(mode="after")
    def _check_pixart(self) -> "PixArtConfig":
        if self.size_conditions and self.hidden_size % 3:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by 3, as size_conditions needs")
        for name in ("compressed_layers", "window_layers"):
            layers = getattr(self.block, name)
            if any(not 0 <= layer < self.depth for layer in layers):
                raise ValueError(f"{name} {list(layers)}: expected numbers from 0 to {self.depth - 1} (depth)")
        return self

    @property
    def uses_text(self) -> bool:
        return True

    @property
    def condition_fields(self) -> tuple[str, ...]:
        return ("text", "text_mask", *(("size",) if self.size_conditions else ()))

    @property
    def null_fields(self) -> tuple[str, ...]:
        return ("text",) if self.null_embedding else ()

    @property
    def uniform_numbers(self) -> int:
        return 2 * self.depth if self.block.drop_path else 0

    def build(self) -> "PixArt":
        return PixArt(self)


@dataclass(frozen=True)
class PixArtContext(Context):
    """branch_scales: factors of the attention and the MLP of each block with stochastic depth, float32 [B, L, 2] or
    [B, 1, 2] of the block that runs: 0 where it is left out. Absent outside of training."""

    branch_scales: Tensor | None = None

    def for_block(self, number: int) -> Context:
        if self.branch_scales is None:
            return super().for_block(number)
        return replace(super().for_block(number), branch_scales=self.branch_scales[:, number : number + 1])  # pyright: ignore[reportCallIssue]


class PixArtAttention(Attention):
    """Self-attention with optional norms of queries and keys, compression of keys and values by 2 x 2 (sigma), windows,
    and decomposed relative positions.

    Windows and relative positions are those of ViTDet (Li et al. 2022, "Exploring plain vision transformer backbones
    for object detection"). PixArt-alpha's code has weights for them and does not use them. A grid that windows do not
    divide is filled up with zeros at its end, which are attended to like other tokens. Logits are
    q.k / sqrt(D / K) + q.R_row + q.R_column.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: bool,
        compression: Compression | None,
        window_size: int = 0,
        position_grid: tuple[int, ...] = (),
    ) -> None:
        """position_grid: (h, w) of the tables of relative positions, () for none"""
        super().__init__(width, num_heads)
        self.q_norm = nn.LayerNorm(width) if qk_norm else None
        self.k_norm = nn.LayerNorm(width) if qk_norm else None
        self.compression = compression
        self.sr = nn.Conv2d(width, width, 2, stride=2, groups=width) if compression == "conv" else None
        self.norm = nn.LayerNorm(width) if compression == "conv" else None
        self.window_size = window_size
        tables = [torch.empty(2 * side - 1, width // num_heads) for side in position_grid]
        self.rel_pos_h, self.rel_pos_w = map(nn.Parameter, tables) if tables else (None, None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh compression is the mean of 2 x 2 tokens; fresh relative positions have no effect."""
        if self.sr is not None:
            nn.init.constant_(self.sr.weight, 0.25)
            assert self.sr.bias is not None
            nn.init.zeros_(self.sr.bias)
        for table in (self.rel_pos_h, self.rel_pos_w):
            if table is not None:
                nn.init.zeros_(table)

    def forward(self, x: Tensor, grid: Sequence[int] = (), more: MoreKeys | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [B, N, D] on a token grid -> [B, N, D]. Windows attend to no more keys."""
        size = self.window_size
        if not size:
            return self._attend(x, grid[-2:], more)
        return from_windows(self._attend(to_windows(x, grid[-2:], size), (size, size)), grid[-2:], size)

    def _attend(self, x: Tensor, grid: Sequence[int], more: MoreKeys | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.compression is not None:
            k, v = self._compress(k, grid), self._compress(v, grid)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        offsets = self._position_logits(q, grid)
        return self._output(scaled_dot_product_attention(q, k, v, attn_mask=offsets), q, k, v, more)

    def _compress(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """[B, N, D] -> [B, N / 4, D], or half of the tokens if every second one stays"""
        if self.compression == "every":
            return tokens[:, ::2]
        image = tokens.transpose(1, 2).unflatten(2, tuple(grid))
        if self.sr is None or self.norm is None:
            return image[..., ::2, ::2].flatten(2).transpose(1, 2)
        return self.norm(self.sr(image).flatten(2).transpose(1, 2))

    def _position_logits(self, q: Tensor, grid: Sequence[int]) -> Tensor | None:
        """q.R_row + q.R_column of each query and key: q [B, K, N, D / K] -> [B, K, N, N]"""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return None
        q = q.unflatten(2, tuple(grid))
        rows = torch.einsum("bkhwc,hic->bkhwi", q, relative_positions(self.rel_pos_h, grid[0]))
        columns = torch.einsum("bkhwc,wjc->bkhwj", q, relative_positions(self.rel_pos_w, grid[1]))
        return (rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    def macs(self, tokens: int, grid: Sequence[int] = ()) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.window_size:
            return self._macs(tokens, grid[-2:])
        size = self.window_size
        return math.prod(-(-side // size) for side in grid[-2:]) * self._macs(size**2, (size, size))

    def _macs(self, tokens: int, grid: Sequence[int]) -> int:
        width = self.proj.in_features
        if self.compression is None:
            return super().macs(tokens) + (0 if self.rel_pos_h is None else tokens * sum(grid) * width)
        keys = tokens // (2 if self.compression == "every" else 4)
        convolutions = 0 if self.sr is None else 2 * keys * self.sr.weight.numel()
        return 4 * tokens * width**2 + 2 * tokens * keys * width + convolutions


def to_windows(x: Tensor, grid: Sequence[int], size: int) -> Tensor:
    """Split a token grid (h, w) into n windows of size x size tokens: [B, N, D] -> [B n, size size, D]"""
    image = x.unflatten(1, tuple(grid))
    image = pad(image, (0, 0, 0, -grid[1] % size, 0, -grid[0] % size))
    return image.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, grid: Sequence[int], size: int) -> Tensor:
    """The inverse of `to_windows`: [B n, size size, D] -> [B, N, D]"""
    rows, columns = (-(-side // size) for side in grid)
    image = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size)).transpose(2, 3)
    return image.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)


def relative_positions(table: Tensor, side: int) -> Tensor:
    """Rows of a table [2 s - 1, C] by query and key position: [side, side, C]; resized linearly if s is not side."""
    if len(table) != 2 * side - 1:
        table = interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    positions = torch.arange(side, device=table.device)
    return table[positions[:, None] - positions + side - 1]


class PixArtBlock(AdaLNZeroBlock):
    """x + gate * branch(norm(x) (1 + scale) + shift) for attention and MLP; between them x + cross(x, text), which has
    neither norm nor gate. Shift, scale and gate are those that all blocks share, plus a table."""

    def __init__(
        self, dims: BlockDims, config: PixArtBlockConfig, number: int = -1, grid: tuple[int, ...] = ()
    ) -> None:
        """number: of the block in the network, which may be compressed or have windows. grid: of its tokens"""
        compression = config.compression if number in config.compressed_layers else None
        window_size, position_grid = 0, ()
        if number in config.window_layers:
            window_size = config.window_size
            position_grid = (window_size, window_size) if window_size else grid[-2:]
        attn = PixArtAttention(
            dims.width,
            dims.num_heads,
            config.qk_norm,
            compression,
            window_size,
            position_grid if config.relative_positions else (),
        )
        super().__init__(dims, modulation=ScaleShiftTable, attn=attn, mlp=MLP(dims.width, dims.mlp_width))
        self.cross_attn = CrossAttention(dims.width, dims.num_heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.text [B, M, D] -> [B, N, D]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = context.modulation_params(self.adaLN_modulation).chunk(6, dim=-1)
        if isinstance(context, PixArtContext) and context.branch_scales is not None:
            scales = context.branch_scales[..., None]  # B 1 2 1
            gate1, gate2 = gate1 * scales[:, :, 0], gate2 * scales[:, :, 1]
        x = gated_residual(x, gate1, self.attend(modulate(self.norm1(x), shift1, scale1), context))
        x = self.attend_to_text(x, context)
        return gated_residual(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def attend(self, x: Tensor, context: Context) -> Tensor:
        return self.attn(x, context.grid, context.more_keys)

    def attend_to_text(self, x: Tensor, context: Context) -> Tensor:
        assert context.text is not None  # PixArt.embed_condition sets it
        return x + self.cross_attn(x, context.text, context.text_mask, context.own_text_keys)

    def text_keys(self, text: Tensor) -> Tensor:
        return self.cross_attn.kv_linear(text)

    def macs(self, tokens: int, cond_tokens: int, grid: Sequence[int] = ()) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert isinstance(self.attn, PixArtAttention)
        attention = self.attn.macs(tokens, grid) + self.cross_attn.macs(tokens, cond_tokens)
        return attention + self.mlp.macs(tokens)


class CaptionEmbedder(nn.Module):
    """An MLP from the text encoder to the width, after null rows were replaced by a fixed embedding."""

    y_embedding: Tensor | None

    def __init__(self, channels: int, width: int, tokens: int, null_embedding: bool) -> None:
        super().__init__()
        self.y_proj = MLP(channels, width)
        self.y_proj.fc2 = nn.Linear(width, width)
        # Random or the encoding of an empty text; never trained.
        embedding = torch.randn(tokens, channels) / channels**0.5 if null_embedding else None
        self.register_buffer("y_embedding", embedding)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.y_proj.fc1, self.y_proj.fc2):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """text [B, M, E], NaN in null rows -> [B, M, D]"""
        if self.y_embedding is not None:
            text = torch.where(text.isnan(), self.y_embedding[: text.shape[1]], text)
        return self.y_proj(text)


class SizeEmbedder(nn.Module):
    """Numbers [B, n] through sinusoids and an MLP, concatenated: [B, n D]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TimestepEmbedder.CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        channels = TimestepEmbedder.CHANNELS
        return self.mlp(sinusoidal_embedding(numbers, channels, channels // 2)).flatten(1)


class PixArtFinalLayer(nn.Module):
    """LayerNorm, modulated by the time embedding plus a table, and a linear map from a token to its patch."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, N, D], context.c [B, G, D] -> [B, N, p p O]"""
        shift, scale = (self.scale_shift_table[index] + context.c for index in (0, 1))
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return tokens * self.linear.weight.numel()


def position_table(grid: Sequence[int], base: int, scale: float, width: int) -> Tensor:
    """The position table of a token grid (h, w): float32 [N, D].

    Coordinates span 0 to base / scale on both axes, whatever their length.
    """
    rows, columns = (torch.arange(length, dtype=torch.float32) / (length / base) / scale for length in grid[-2:])
    row, column = torch.meshgrid(rows.double(), columns.double(), indexing="ij")
    return torch.cat((sincos(column.flatten(), width // 2), sincos(row.flatten(), width // 2)), dim=1).float()


class PixArt(DiT):
    """The network of PixArt-alpha and PixArt-sigma. `interop` maps parameter names to those of the official files."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__(config, reset=False)
        self.config: PixArtConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        width = config.hidden_size
        for number in (*config.block.compressed_layers, *config.block.window_layers):
            self.blocks[number] = PixArtBlock(self.dims, config.block, number, config.grid)
        if self.text_embedder is None:
            self.y_embedder = CaptionEmbedder(config.text_channels, width, config.text_tokens, config.null_embedding)  # pyright: ignore[reportAttributeAccessIssue]
        self.csize_embedder = SizeEmbedder(width // 3) if config.size_conditions else None
        self.ar_embedder = SizeEmbedder(width // 3) if config.size_conditions else None
        self.final_layer = PixArtFinalLayer(width, config.patch_size**2 * config.out_channels)  # pyright: ignore[reportAttributeAccessIssue]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights as the official code does: a fresh block is not the identity."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, ScaleShiftTable):
                nn.init.normal_(module.table, std=module.table.shape[1] ** -0.5)
            elif isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
        assert self.shared is not None
        assert self.shared.adaLN_modulation is not None
        nn.init.normal_(self.shared.adaLN_modulation.linear.weight, std=0.02)

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, ...]) -> Context:
        prepared = condition.prepared
        if not isinstance(prepared, PreparedText):
            prepared = self._embed_text(condition)
        c = self.t_embedder(t if t.ndim == 2 else t[:, None])
        if self.csize_embedder is not None and self.ar_embedder is not None:
            if condition.size is None:
                raise ValueError("this network is conditioned on height, width and ratio: pass Condition(size=...)")
            sizes = (self.csize_embedder(condition.size[:, :2]), self.ar_embedder(condition.size[:, 2:]))
            c = c + torch.cat(sizes, dim=1)[:, None]
        context = PixArtContext(
            c=c,
            cond_tokens=c[:, :0],
            grid=grid,
            text=prepared.text,
            text_mask=prepared.mask,
            text_keys=prepared.keys,
            branch_scales=self._branch_scales(condition.uniform),
        )
        return self._with_controls(context, condition)

    def _embed_text(self, condition: Condition) -> PreparedText:
        text, mask = condition.text, condition.text_mask
        if text is None:
            raise ValueError("this network is conditioned on text: pass Condition(text=..., text_mask=...)")
        if self.text_embedder is not None:
            return PreparedText(*self.text_embedder(text, mask))
        mask = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        return PreparedText(self.y_embedder(text), mask)  # pyright: ignore[reportOptionalCall]

    def _prepare_text(self, condition: Condition) -> Condition:
        prepared = self._embed_text(condition)
        keys = tuple(block.text_keys(prepared.text) for block in self.blocks if isinstance(block, PixArtBlock))
        return replace(condition, prepared=replace(prepared, keys=keys))

    def _branch_scales(self, uniform: Tensor | None) -> Tensor | None:
        """The factors of stochastic depth (Huang et al. 2016): random numbers [B, 2 L] -> [B, L, 2]"""
        if uniform is None or not self.config.block.drop_path:
            return None
        keep_rate = (
            1 - torch.linspace(0, self.config.block.drop_path, self.config.depth, device=uniform.device)[:, None]
        )
        return (uniform.unflatten(1, (-1, 2)) < keep_rate) / keep_rate

    def embed_image(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = self.x_embedder(x).to(x.dtype)
        return tokens + self.positions(self.grid(x)).to(tokens)

    def embed_patches(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        tokens = self._with_added(self.embed_image(x), context)
        assert self.shared is not None
        return tokens, self.shared(tokens, replace(context))

    def positions(self, grid: Sequence[int]) -> Tensor:
        """The position table of a token grid (h, w): float32 [N, D]"""
        config = self.config
        return position_table(grid, config.position_base, config.position_scale, config.hidden_size)

    def macs(self, size: Sequence[int] | None = None) -> int:
        config = self.config
        grid = config.token_grid(size or config.input_size)
        tokens = math.prod(grid)
        assert self.shared is not None
        embedders = [module for module in (self.csize_embedder, self.ar_embedder) if module is not None]
        sizes = sum(
            count * linear.weight.numel()
            for embedder, count in zip(embedders, (2, 1))
            for linear in embedder.mlp
            if isinstance(linear, nn.Linear)
        )
        blocks = [block.macs(tokens, config.text_tokens, grid) for block in self.blocks]  # pyright: ignore[reportCallIssue]
        text = config.text_tokens * (config.text_channels + config.hidden_size) * config.hidden_size
        if self.text_embedder is not None:
            text = self.text_embedder.macs(config.text_tokens)
        return (
            self.x_embedder.macs(tokens)
            + self.t_embedder.macs()
            + sizes
            + text
            + self.shared.macs(tokens)
            + sum(blocks)
            + self.final_layer.macs(tokens)
            + sum(control.macs(self, tokens, blocks) for control in self.controls.values())
        )
