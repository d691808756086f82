"""Position embeddings against their formulas in scalar arithmetic, and diffusers'."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.layers.positions import apply_rope, rope_grid, sincos_grid


def formula(row: int, column: int, width: int) -> list[float]:
    """Sines and cosines of the column, then of the row, at frequencies 10000^(-i / (width / 4))."""
    values = []
    for position in (column, row):
        angles = [position * math.pow(10000.0, -i / (width / 4)) for i in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return values


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 20, 384]))
def test_sincos_grid_matches_the_formula(height, width, channels):
    table = sincos_grid((height, width), channels)
    assert table.shape == (height * width, channels)
    assert table.dtype == torch.float32
    expected = [formula(row, column, channels) for row in range(height) for column in range(width)]
    np.testing.assert_allclose(table.numpy(), np.array(expected), rtol=0, atol=1e-6)


def test_the_first_half_encodes_the_column_and_the_second_the_row():
    table = sincos_grid((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


def test_a_patch_has_the_same_position_on_every_grid():
    small, large = sincos_grid((3, 5), 16).view(3, 5, 16), sincos_grid((8, 7), 16).view(8, 7, 16)
    assert torch.equal(small, large[:3, :5])


def test_a_table_first_made_on_the_meta_device_has_values():
    """Tables are cached. A network built on the meta device must not leave one without values in the cache."""
    with torch.device("meta"):
        sincos_grid((5, 11), 12)
    np.testing.assert_allclose(sincos_grid((5, 11), 12)[12].numpy(), formula(1, 1, 12), atol=1e-6)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32)])
def test_sincos_grid_matches_diffusers(grid):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(384, grid[0], base_size=grid[0], output_type="pt")
    torch.testing.assert_close(sincos_grid(grid, 384), expected.float(), rtol=0, atol=1e-6)


def rotate_as_complex(x, grid):
    """x [h w, E]: each pair of channels as a complex number, times e^(i position frequency)."""
    half, out = x.shape[1] // 4, np.empty_like(x)
    for token in range(len(x)):
        row, column = divmod(token, grid[1])
        for pair in range(2 * half):
            position = row if pair < half else column
            rotation = cmath.exp(1j * position * 100 ** (-(pair % half) / half))
            number = complex(*x[token, 2 * pair : 2 * pair + 2]) * rotation
            out[token, 2 * pair : 2 * pair + 2] = number.real, number.imag
    return out


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 20, 32]))
def test_rope_is_a_product_of_complex_numbers(height, width, channels):
    grid = (height, width)
    x = torch.randn(height * width, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(height))
    table = rope_grid(grid, channels)
    assert table.shape == (height * width, channels // 2, 2)
    result = apply_rope(x[None], table)[0]
    np.testing.assert_allclose(result.numpy(), rotate_as_complex(x.numpy(), grid), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=1e-6)


def test_products_of_rotated_vectors_depend_only_on_their_offset():
    """One query and one key at every position of a grid: two pairs with the same offset have the same logit."""
    h, w, channels = 5, 7, 16
    q, k = torch.randn(2, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rope_grid((h, w), channels)
    rotated = (apply_rope(vector.expand(1, h * w, channels), table)[0].view(h, w, channels) for vector in (q, k))
    logits = torch.einsum("rch,sdh->rcsd", *rotated)
    for rows in range(h - 2):
        for columns in range(w - 3):
            difference = logits[rows, columns, rows + 2, columns + 3] - logits[0, 0, 2, 3]
            assert difference.abs() < 1e-5
    assert (logits[0, 0] - logits[0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-3  # every other offset has another logit


@pytest.mark.parametrize("heads", [1, 3])
def test_all_heads_and_all_rows_of_the_batch_are_rotated_alike(heads):
    x = torch.randn(12, 12, 2, heads, 8, generator=torch.Generator().manual_seed(0))  # B = N
    table = rope_grid((3, 4), 8)
    result = apply_rope(x, table)
    for which in range(2):
        for head in range(heads):
            torch.testing.assert_close(result[:, :, which, head], apply_rope(x[:, :, which, head].contiguous(), table))


def test_the_compiled_rotation_is_the_same():
    x, table = torch.randn(2, 12, 3, 8, generator=torch.Generator().manual_seed(0)), rope_grid((3, 4), 8)
    compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), apply_rope(x, table))
