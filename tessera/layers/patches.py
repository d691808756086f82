"""Images and clips to tokens and back. A function takes two axes (H, W) or three (T, H, W) alike.

Shapes: B batch, C channels, T frames, H W height and width, p patch size, (h, w) = (H / p, W / p) the token grid of an
image, (t, h, w) that of a clip, whose patches are a x p x p with a = T / t, N = h w or t h w tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PatchSize = int | Sequence[int]  # of height and width, and of one frame; or of each axis


def patchify(x: Tensor, patch_size: PatchSize) -> Tensor:
    """x [B, C, H, W] -> [B, N, p p C], or x [B, C, T, H, W] -> [B, N, a p p C]; the inverse of `unpatchify`.

    Tokens are in row-major order, frame by frame.
    """
    axes = x.ndim - 2
    for axis, length in enumerate(_patch(patch_size, axes)):
        x = x.unflatten(2 + 2 * axis, (-1, length))  # B C (h p) (w q) -> B C h p w q
    grid, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.permute(0, *grid, *inside, 1).flatten(axes + 1).flatten(1, axes)  # -> B (h w) (p q C)


def unpatchify(tokens: Tensor, patch_size: PatchSize, grid: Sequence[int]) -> Tensor:
    """tokens [B, N, p p C] on a grid (h, w) -> [B, C, H, W], or [B, N, a p p C] on (t, h, w) -> [B, C, T, H, W]"""
    axes = len(grid)
    x = tokens.unflatten(1, tuple(grid)).unflatten(1 + axes, (*_patch(patch_size, axes), -1))  # -> B h w p q C
    order = [axis for pair in zip(range(1, 1 + axes), range(1 + axes, 1 + 2 * axes)) for axis in pair]
    x = x.permute(0, x.ndim - 1, *order)  # -> B C h p w q
    for axis in range(2, 2 + axes):
        x = x.flatten(axis, axis + 1)  # -> B C (h p) (w q)
    return x


def _patch(patch_size: PatchSize, axes: int) -> Sequence[int]:
    if not isinstance(patch_size, int):
        return patch_size[-axes:]
    return (1, patch_size, patch_size)[-axes:]


class PatchEmbed(nn.Module):
    """Patch embedding: a convolution whose stride is its kernel size, computed as a matrix product.

    temporal_patch_size: frames of a patch. With one frame, the weight is that of an image network.
    """

    def __init__(self, channels: int, patch_size: int, width: int, temporal_patch_size: int = 1) -> None:
        super().__init__()
        self.patch_size = (temporal_patch_size, patch_size, patch_size)
        if temporal_patch_size == 1:
            self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        else:
            self.proj = nn.Conv3d(channels, width, kernel_size=self.patch_size, stride=self.patch_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier, with the fans of a linear layer."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] or [B, C, T, H, W] -> [B, N, D]"""
        # D C p q -> D (p q C), the order of patchify
        weight = self.proj.weight.permute(0, *range(2, self.proj.weight.ndim), 1).flatten(1)
        return linear(patchify(x, self.patch_size), weight, self.proj.bias)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample: a p^2 C D for each token."""
        return tokens * self.proj.weight.numel()


def resample_patches(weight: Tensor, patch_size: int) -> Tensor:
    """The patch projection [D, C, p, p] for another patch size q: [D, C, q, q].

    The pseudo-inverse resize of FlexiViT (Beyer et al. 2023, equation 4). An image resized with its patches gets the
    same tokens as before: exactly when q > p, and in the least-squares sense otherwise.
    """
    resize = _resize_matrix(weight.shape[-1], patch_size)
    resampled = weight.double().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.unflatten(-1, (patch_size, patch_size)).to(weight.dtype)


def resample_head(weight: Tensor, channels: int, patch_size: int) -> Tensor:
    """The last layer's rows [p p C, ...] for another patch size q, [q q C, ...]: the output patch is resized."""
    rows = weight.double().unflatten(0, (-1, channels))  # (p p C) ... -> (p p) C ...
    resize = _resize_matrix(round(rows.shape[0] ** 0.5), patch_size)
    return torch.tensordot(resize, rows, dims=1).flatten(0, 1).to(weight.dtype)


def _resize_matrix(old: int, new: int) -> Tensor:
    """Bilinear resize of an old x old patch to new x new as a float64 matrix [new new, old old]."""
    basis = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    resized = nn.functional.interpolate(basis, size=(new, new), mode="bilinear", antialias=True)
    return resized.flatten(1).T
