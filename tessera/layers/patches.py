"""Images to tokens and back.

Shapes: B batch, C channels, H W height and width, p patch size, (h, w) = (H / p, W / p) the token grid, N = h w tokens,
D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """x [B, C, H, W] -> [B, N, p p C], tokens in row-major order; the inverse of `unpatchify`."""
    x = x.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # B C (h p) (w q) -> B C h p w q
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # -> B (h w) (p q C)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """tokens [B, N, p p C] on a grid (h, w) -> [B, C, h p, w p]"""
    x = tokens.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # B (h w) (p q C) -> B h w p q C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # -> B C (h p) (w q)


class PatchEmbed(nn.Module):
    """Patch embedding: a convolution with stride p, computed as a matrix product."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, N, D]"""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # D C p q -> D (p q C), the order of patchify
        return linear(patchify(x, self.patch_size), weight, self.proj.bias)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample: p^2 C D for each token."""
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
