"""The diffusion transformer (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

Shapes: B batch, C channels, O raw output channels, H W height and width, p patch side, (h, w) = (H / p, W / p) the
token grid, L = h w tokens, M condition tokens, G condition vectors, D width.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.layers.attention import ModernAttention
from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder
from tessera.layers.modulation import Modulation, Offsets, modulate
from tessera.layers.patches import PatchEmbed, unpatchify
from tessera.layers.positions import sincos_grid
from tessera.models.blocks import AdaLNZero, AnyBlock, Block, BlockConfig, Context
from tessera.models.network import Network, NetworkConfig
from tessera.models.presets import PRESETS, UNETS
from tessera.settings import by_kind, unknown


class DiTConfig(NetworkConfig):
    """A DiT of any size; `preset: DiT-B/4` fills depth, width, heads and patch. The defaults: DiT-XL/2 on ImageNet."""

    title: ClassVar[str] = "diffusion transformer"
    kind: Literal["dit"] = "dit"  # pyright: ignore[reportIncompatibleVariableOverride] (nobody writes it)
    patch: PositiveInt = 2
    depth: PositiveInt = 28
    width: PositiveInt = 1152
    heads: PositiveInt = 16
    mlp_ratio: PositiveFloat = 4.0
    block: Annotated[AnyBlock, BeforeValidator(by_kind), Field(discriminator="kind")] = AdaLNZero()
    time_divisor: PositiveInt = Field(
        default=128, description="of the time frequencies; diffusers' DiT was made with 127"
    )
    mlp_norm_eps: PositiveFloat = Field(default=1e-6, description="of the norm before the MLP; diffusers' DiT has 1e-5")

    @classmethod
    def expand(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "preset" not in data:
            return data
        name = str(data["preset"])
        if name in UNETS:
            raise ValueError(f"{name} is a U-Net: say network.kind=unet, too")
        if name not in PRESETS:
            raise ValueError(unknown("preset", name, PRESETS))
        return {**PRESETS[name], **{key: value for key, value in data.items() if key != "preset"}}

    @model_validator(mode="after")
    def _fits(self) -> "DiTConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4, as 2-D sin-cos positions need")
        self.block.check(self.width, self.heads)
        if "size" in self.model_fields_set:
            self.check_size(self.size)
        return self

    @property
    def unit(self) -> int:
        return self.patch

    def check_size(self, size: tuple[int, int]) -> None:
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the size {size[0]} x {size[1]}")

    def words(self) -> str:
        return (
            f"DiT, {self.block.words()}, depth {self.depth}, width {self.width}, heads {self.heads}, patch {self.patch}"
        )

    def build(self) -> "DiT":
        return DiT(self)


class FinalLayer(nn.Module):
    """LayerNorm and a linear map from a token to its patch; steered by the condition in the adaLN designs."""

    def __init__(self, width: int, outputs: int, modulated: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2) if modulated else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, p p O]"""
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = context.steering(self.adaLN_modulation).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        steering = 0 if self.adaLN_modulation is None else self.adaLN_modulation.macs()
        return tokens * self.linear.weight.numel() + steering


class DiT(Network):
    """A transformer over patches, told the time and the class. Parameters are named as in the official checkpoints."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        config.check_size(config.size)
        self.config: DiTConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (nobody writes it)
        block = BlockConfig(config.width, config.heads, int(config.width * config.mlp_ratio), config.mlp_norm_eps)
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width, config.time_divisor)
        self.y_embedder = LabelEmbedder(config.classes, config.width, config.null_class) if config.classes else None
        # Frozen, yet a parameter: official checkpoints hold it and the paper's counts include it.
        table = torch.zeros(1, config.grid[0] * config.grid[1], config.width)
        self.pos_embed = nn.Parameter(table, requires_grad=False) if config.block.absolute_positions else None
        self.shared = config.block.shared(block)
        blocks = [config.block.build(block) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.appends_tokens = blocks[0].appends_tokens
        self.final_layer = FinalLayer(config.width, config.patch**2 * config.outputs, blocks[0].modulated_readout)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The official initial weights, in one place: every Linear Xavier, then the exceptions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_grid(self.config.grid, self.config.width))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the matrix it is
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in self.t_embedder.linears:
            nn.init.normal_(linear.weight, std=0.02)
        # Zero modulation makes a fresh block with gates the identity; a zero readout makes a fresh network draw zero.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, Offsets):
                nn.init.zeros_(module.table)
            elif isinstance(module, ModernAttention):  # a sharpness of 1; half of the values from the first
                if module.sharpness is not None:
                    nn.init.ones_(module.sharpness)
                if module.value_mix is not None:
                    nn.init.constant_(module.value_mix, 0.5)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] in the units the network was trained in (0 .. 999 for the paper's) -> [B, O, H, W]

        H and W may differ from the configured size: positions are made for any grid the patch divides.
        Raises ValueError if the patch does not divide the size, or labels are missing.
        """
        tokens, context = self.embed(x, t, condition)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.readout(tokens, context)

    def embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Context]:
        """The picture as tokens [B, L, D] (L + M where the condition is appended) and what the blocks are told."""
        return self.enter(x, self.tell(t, condition, self.grid(x)))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """The token grid (h, w) of x [B, C, H, W]."""
        self.config.check_size((x.shape[-2], x.shape[-1]))
        return x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch

    def enter(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """As `embed`, where the time and the condition are told already."""
        # As precise as the picture: under autocast the residuals are summed here.
        tokens = self.x_embedder(x).to(x.dtype)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(context.grid, self.pos_embed)
        if self.shared is not None:
            context = self.shared(tokens, context)
        return torch.cat((tokens, context.tokens), dim=1) if self.appends_tokens else tokens, context

    def tell(self, t: Tensor, condition: Condition, grid: tuple[int, int]) -> Context:
        """What the blocks and the readout are told of a time and a condition: all of it that no picture is needed for.

        t [B], a token grid (h, w).
        """
        time = self.t_embedder(t)[:, None]  # one condition vector a picture: G = 1
        c, told = time, [time]
        if self.y_embedder is not None:
            if condition.label is None:
                raise ValueError(f"this network knows {self.config.classes} classes: give Condition(label=...)")
            label = self.y_embedder(condition.label)[:, None]
            c, told = time + label, [time, label]
        return Context(c=c, tokens=torch.cat(told, dim=1), grid=grid)

    def readout(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [B, L (+ M), D] -> [B, O, H, W]"""
        drawn = self.final_layer(tokens[:, : context.grid[0] * context.grid[1]], context)
        return unpatchify(drawn, self.config.patch, context.grid)

    def _positions(self, grid: tuple[int, int], table: Tensor) -> Tensor:
        return table if grid == self.config.grid else sincos_grid(grid, self.config.width).to(table)

    def macs(self, size: tuple[int, int] | None = None) -> int:
        height, width = size or self.config.size
        tokens = (height // self.config.patch) * (width // self.config.patch)
        told = 1 if self.y_embedder is None else 2
        return (
            self.x_embedder.macs(tokens)
            + self.t_embedder.macs()
            + (0 if self.shared is None else self.shared.macs(tokens))
            + sum(block.macs(tokens, told) for block in self.blocks if isinstance(block, Block))
            + self.final_layer.macs(tokens)
        )
