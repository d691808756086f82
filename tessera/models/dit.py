"""The diffusion transformer (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

Shapes: B batch, C channels, O raw output channels, H W height and width, p patch size, (h, w) = (H / p, W / p) the
token grid, N = h w image tokens, M condition tokens, G conditioning vectors of an image, D width.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.layers.attention import RotaryAttention
from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder
from tessera.layers.modulation import Modulation, ScaleShiftTable, modulate
from tessera.layers.patches import PatchEmbed, unpatchify
from tessera.layers.positions import sincos_grid
from tessera.models.blocks import AdaLNZero, AnyBlock, Block, BlockDims, Context
from tessera.models.network import Network, NetworkConfig
from tessera.models.presets import PRESETS, UNET_PRESETS
from tessera.settings import expand_kind, unknown_name


class DiTConfig(NetworkConfig):
    """A DiT of any size. `preset: DiT-B/4` sets depth, hidden_size, num_heads and patch_size.

    The defaults are DiT-XL/2 for ImageNet latents.
    """

    display_name: ClassVar[str] = "diffusion transformer"
    kind: Literal["dit"] = "dit"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    patch_size: PositiveInt = 2
    depth: PositiveInt = 28
    hidden_size: PositiveInt = 1152
    num_heads: PositiveInt = 16
    mlp_ratio: PositiveFloat = 4.0
    block: Annotated[AnyBlock, BeforeValidator(expand_kind), Field(discriminator="kind")] = AdaLNZero()
    timestep_freq_divisor: PositiveInt = Field(
        default=128, description="divisor in the timestep frequencies; diffusers' DiT was trained with 127"
    )
    mlp_norm_eps: PositiveFloat = Field(
        default=1e-6, description="eps of the norm before the MLP; diffusers' DiT: 1e-5"
    )

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "preset" not in data:
            return data
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
        if "input_size" in self.model_fields_set:
            self.check_size(self.input_size)
        return self

    @property
    def size_multiple(self) -> int:
        return self.patch_size

    def check_size(self, size: tuple[int, int]) -> None:
        if size[0] % self.patch_size or size[1] % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide the size {size[0]} x {size[1]}")

    def summary(self) -> str:
        sizes = f"depth {self.depth}, width {self.hidden_size}, heads {self.num_heads}, patch {self.patch_size}"
        return f"DiT, {self.block.summary()}, {sizes}"

    def build(self) -> "DiT":
        return DiT(self)


class FinalLayer(nn.Module):
    """LayerNorm and a linear map from a token to its patch. In the adaLN designs, the norm is modulated by c."""

    def __init__(self, width: int, out_features: int, modulated: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = Modulation(width, 2) if modulated else None

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


class DiT(Network):
    """A transformer over patches, conditioned on the timestep and the class.

    Parameter names are those of the official checkpoints.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        config.check_size(config.input_size)
        width = config.hidden_size
        self.config: DiTConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        dims = BlockDims(width, config.num_heads, int(width * config.mlp_ratio), config.mlp_norm_eps)
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = TimestepEmbedder(width, config.timestep_freq_divisor)
        self.y_embedder = (
            LabelEmbedder(config.num_classes, width, config.learn_null_class) if config.num_classes else None
        )
        # A frozen parameter, not a buffer: official checkpoints contain it, and the paper's counts include it.
        table = torch.zeros(1, config.grid[0] * config.grid[1], width)
        self.pos_embed = nn.Parameter(table, requires_grad=False) if config.block.absolute_positions else None
        self.shared = config.block.shared(dims)
        blocks = [config.block.build(dims) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.appends_tokens = blocks[0].appends_tokens
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels, blocks[0].modulated_head)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights as the official code does: Xavier for every Linear, then the exceptions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_grid(self.config.grid, self.config.hidden_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # the fans of a linear layer
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in self.t_embedder.linears:
            nn.init.normal_(linear.weight, std=0.02)
        # With zero modulation, a new block with gates is the identity. With a zero head, a new network predicts zero.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, ScaleShiftTable):
                nn.init.zeros_(module.table)
            elif isinstance(module, RotaryAttention):
                module.reset_parameters()
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] in the units the network was trained in (0 to 999 in the paper) -> [B, O, H, W]

        H and W may differ from the configured size: positions are computed for any token grid.
        Raises ValueError if patch_size does not divide H and W, or if labels are missing.
        """
        tokens, context = self.embed(x, t, condition)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.head(tokens, context)

    def embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Context]:
        """Return the tokens [B, N, D] (N + M where the condition is appended) and the context of the blocks."""
        return self.embed_patches(x, self.embed_condition(t, condition, self.grid(x)))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Return the token grid (h, w) of x [B, C, H, W]."""
        self.config.check_size((x.shape[-2], x.shape[-1]))
        return x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size

    def embed_patches(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Like `embed`, with a context that `embed_condition` returned."""
        # Tokens in the dtype of the input: under autocast, residuals are then summed in float32.
        tokens = self.x_embedder(x).to(x.dtype)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(context.grid, self.pos_embed)
        if self.shared is not None:
            context = self.shared(tokens, context)
        return torch.cat((tokens, context.cond_tokens), dim=1) if self.appends_tokens else tokens, context

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, int]) -> Context:
        """Return what blocks and head need beside the image, for timesteps t [B] and a token grid (h, w)."""
        time = self.t_embedder(t)[:, None]  # one conditioning vector for each image: G = 1
        c, cond_tokens = time, [time]
        if self.y_embedder is not None:
            label = self.y_embedder(condition.label)[:, None]
            c, cond_tokens = time + label, [time, label]
        return Context(c=c, cond_tokens=torch.cat(cond_tokens, dim=1), grid=grid)

    def head(self, tokens: Tensor, context: Context) -> Tensor:
        """Map the tokens of the last block to the output: [B, N (+ M), D] -> [B, O, H, W]"""
        patches = self.final_layer(tokens[:, : context.grid[0] * context.grid[1]], context)
        return unpatchify(patches, self.config.patch_size, context.grid)

    def _positions(self, grid: tuple[int, int], table: Tensor) -> Tensor:
        return table if grid == self.config.grid else sincos_grid(grid, self.config.hidden_size).to(table)

    def macs(self, size: tuple[int, int] | None = None) -> int:
        height, width = size or self.config.input_size
        tokens = (height // self.config.patch_size) * (width // self.config.patch_size)
        cond_tokens = 1 if self.y_embedder is None else 2
        return (
            self.x_embedder.macs(tokens)
            + self.t_embedder.macs()
            + (0 if self.shared is None else self.shared.macs(tokens))
            + sum(block.macs(tokens, cond_tokens) for block in self.blocks if isinstance(block, Block))
            + self.final_layer.macs(tokens)
        )
