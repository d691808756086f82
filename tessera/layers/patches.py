"""Images to tokens and back.

Shapes: B batch, C channels, H and W height and width, p patch side, h = H / p and w = W / p the token grid,
L = h w tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def patchify(x: Tensor, patch: int) -> Tensor:
    """x [B, C, H, W] -> [B, L, p p C], rows of the grid first; the inverse of `unpatchify`."""
    x = x.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # B C (h p) (w q) -> B C h p w q
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # -> B (h w) (p q C)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """tokens [B, L, p p C] on a grid (h, w) -> [B, C, h p, w p]"""
    x = tokens.unflatten(1, grid).unflatten(3, (patch, patch, -1))  # B (h w) (p q C) -> B h w p q C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # -> B C (h p) (w q)


class PatchEmbed(nn.Module):
    """One vector for each patch: a convolution with stride p, computed as the matrix product that it is."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, L, D]"""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # D C p q -> D (p q C), as patchify orders them
        return linear(patchify(x, self.patch), weight, self.proj.bias)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample: p^2 C D for each token."""
        return tokens * self.proj.weight.numel()


def resample_patches(weight: Tensor, patch: int) -> Tensor:
    """The patch projection [D, C, p, p] for another patch size, [D, C, q, q].

    The pseudo-inverse resize of FlexiViT (Beyer et al. 2023, equation 4): an image resized like its patches
    gets the same tokens as before, exactly when q > p and in the least-squares sense otherwise.
    """
    old = weight.shape[-1]
    resize = _resize_matrix(old, patch)
    return (weight.double().flatten(2) @ torch.linalg.pinv(resize)).unflatten(-1, (patch, patch)).to(weight.dtype)


def resample_head(weight: Tensor, channels: int, patch: int) -> Tensor:
    """The last layer's rows [p p C, ...] for another patch size, [q q C, ...]: the output patch is resized."""
    rows = weight.double().unflatten(0, (-1, channels))  # (p p C) ... -> (p p) C ...
    resize = _resize_matrix(round(rows.shape[0] ** 0.5), patch)
    return torch.tensordot(resize, rows, dims=1).flatten(0, 1).to(weight.dtype)


def _resize_matrix(old: int, new: int) -> Tensor:
    """Bilinear resize of a p x p patch as a float64 matrix [q q, p p]."""
    basis = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    resized = nn.functional.interpolate(basis, size=(new, new), mode="bilinear", antialias=True)
    return resized.flatten(1).T
