"""Patchify and its inverse, the patch embedding as a convolution, and resampling to other patch sizes."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from tessera.layers.patches import PatchEmbed, patchify, resample_head, resample_patches, unpatchify

sides = st.integers(1, 5)


def image(batch, channels, height, width, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


@given(sides, sides, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_unpatchify_inverts_patchify(h, w, patch, channels, batch):
    x = image(batch, channels, h * patch, w * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (batch, h * w, patch * patch * channels)
    assert torch.equal(unpatchify(tokens, patch, (h, w)), x)


@given(sides, sides, st.integers(1, 4), st.integers(1, 3))
def test_patchify_inverts_unpatchify(h, w, patch, channels):
    tokens = image(2, 1, h * w, patch * patch * channels)[:, 0]
    assert torch.equal(patchify(unpatchify(tokens, patch, (h, w)), patch), tokens)


def test_a_token_is_its_patch():
    """Token 5 of a 2 x 4 grid is row 1, column 1. Its values are in the order row, column, channel."""
    x = torch.arange(2 * 4 * 8.0).view(1, 2, 4, 8)
    expected = [float(x[0, c, 2 + row, 2 + column]) for row in range(2) for column in range(2) for c in range(2)]
    assert patchify(x, 2)[0, 5].tolist() == expected


@given(sides, sides, st.integers(1, 4), st.integers(1, 4))
def test_patch_embedding_is_a_convolution(h, w, patch, channels):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        embed = PatchEmbed(channels, patch, 6)
    x = image(2, channels, h * patch, w * patch)
    convolved = embed.proj(x)  # B D h w
    torch.testing.assert_close(embed(x), convolved.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def resized(tokens, channels, patch, new):
    """Each patch of tokens [B, N, p p C] resized bilinearly -> [B, N, q q C]"""
    patches = tokens.unflatten(2, (patch, patch, channels)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    resized_patches = interpolate(patches, size=(new, new), mode="bilinear", align_corners=False, antialias=new < patch)
    return resized_patches.unflatten(0, tokens.shape[:2]).permute(0, 1, 3, 4, 2).flatten(2)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 3))
def test_a_larger_patch_gets_the_same_tokens(patch, extra, channels):
    """FlexiViT, equation 4: <w', resize(patch)> = <w, patch> for every patch if the patch size grows."""
    new = patch + extra
    weight = image(5, channels, patch, patch, seed=1).double()
    x = image(2, channels, 3 * patch, 2 * patch).double()
    tokens = patchify(x, patch)
    before = torch.einsum("blk,dk->bld", tokens, weight.permute(0, 2, 3, 1).flatten(1))
    resampled = resample_patches(weight, new)
    assert resampled.shape == (5, channels, new, new)
    after = torch.einsum("blk,dk->bld", resized(tokens, channels, patch, new), resampled.permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_a_smaller_patch_is_the_least_squares_solution():
    """w' minimizes |R^T w' - w|^2 for the resize matrix R. numpy solves the same problem."""
    weight = image(3, 2, 4, 4).double()
    resize = resized(torch.eye(16, dtype=torch.float64)[None], 1, 4, 2)[0].T.numpy()  # each column is one resized pixel
    expected = np.linalg.lstsq(resize.T, weight.flatten(2).flatten(0, 1).numpy().T, rcond=None)[0].T
    result = resample_patches(weight, 2).flatten(2).flatten(0, 1).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_a_resampled_head_predicts_the_resized_patch(patch, new, channels):
    weight = image(1, 1, patch * patch * channels, 7, seed=1)[0, 0].double()
    bias = image(1, 1, 1, patch * patch * channels, seed=2).flatten().double()
    tokens = image(1, 2, 6, 7)[0].double()  # B = 2, N = 6
    expected = resized(tokens @ weight.T + bias, channels, patch, new)
    result = tokens @ resample_head(weight, channels, new).T + resample_head(bias, channels, new)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
