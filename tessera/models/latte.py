"""Latte (Ma et al. 2024, "Latte: latent diffusion transformer for video generation"): a DiT for clips whose blocks are
spatial and temporal by turns. `kind: latte` is for official checkpoints; a new network of this kind is a DiT with
`attention: alternating`.

It differs in the positions of frames: a table of sines and cosines, which is added once, after the first block. So it
takes no more frames than it was trained with. Shapes: B batch, T frames, S tokens of a frame, D width.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tessera.layers.frames import Alternating
from tessera.layers.positions import sincos
from tessera.models.blocks import Context
from tessera.models.dit import DiT, DiTConfig


class LatteConfig(DiTConfig):
    """A Latte of any size. The defaults are Latte-XL/2 for clips of 16 frames."""

    display_name: ClassVar[str] = "diffusion transformer for clips"
    kind: Literal["latte"] = "latte"  # pyright: ignore[reportIncompatibleVariableOverride]
    attention: Alternating = Alternating()  # pyright: ignore[reportIncompatibleVariableOverride]
    frame_positions: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride] (of its own kind)
    temporal_attention: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride]
    temporal_patch_size: Literal[1] = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def check_size(self, size: Sequence[int]) -> None:
        super().check_size(size)
        frames = size[0] if len(size) == 3 else 1
        if not 1 < frames <= self.input_size[0]:
            raise ValueError(
                f"this Latte has positions for clips of 2 to {self.input_size[0]} frames, and the size has {frames}"
            )

    def summary(self) -> str:
        sizes = f"depth {self.depth}, width {self.hidden_size}, heads {self.num_heads}, patch {self.patch_size}"
        return f"Latte, {self.block.summary()}, {sizes}, {self.input_size[0]} frames"

    def build(self) -> "Latte":
        return Latte(self)


class Latte(DiT):
    """A DiT with positions of frames that are added after the first block. Parameter names are the official ones."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__(config, reset=False)
        # A frozen parameter, as pos_embed: official checkpoints contain it, and counts include it.
        table = torch.zeros(1, config.input_size[0], config.hidden_size)
        self.temp_embed = nn.Parameter(table, requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        positions = torch.arange(self.temp_embed.shape[1], dtype=torch.float64, device="cpu")
        self.temp_embed.copy_(sincos(positions, self.temp_embed.shape[2]))

    def run_blocks(
        self,
        tokens: Tensor,
        context: Context,
        start: int = 0,
        end: int | None = None,
        residuals: Mapping[int, Tensor] | None = None,
        capture: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        frames, spatial = context.grid[0], tokens.shape[1] // context.grid[0]
        positions = self.temp_embed[0, :frames].repeat_interleave(spatial, 0).to(tokens.dtype)
        residuals = dict(residuals or {})
        residuals[0] = residuals[0] + positions if 0 in residuals else positions
        return super().run_blocks(tokens, context, start, end, residuals, capture)
