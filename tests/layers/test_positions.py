"""Fixed positions against their formula, one number at a time; any grid, width first."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.layers.positions import rotary_grid, rotate, sincos_grid


def formula(row: int, column: int, width: int) -> list[float]:
    """Sines then cosines of the column, then sines and cosines of the row, at frequencies 10000^(-i / (width / 4))."""
    values = []
    for place in (column, row):
        angles = [place * math.pow(10000.0, -i / (width / 4)) for i in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return values


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 20, 384]))
def test_positions_are_the_formula(height, width, channels):
    table = sincos_grid((height, width), channels)
    assert table.shape == (height * width, channels)
    assert table.dtype == torch.float32
    expected = [formula(row, column, channels) for row in range(height) for column in range(width)]
    np.testing.assert_allclose(table.numpy(), np.array(expected), rtol=0, atol=1e-6)


def test_the_column_comes_first():
    table = sincos_grid((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])  # the first half knows nothing of the row
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])  # the second half nothing of the column
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


def test_a_patch_has_one_position_on_every_grid():
    small, large = sincos_grid((3, 5), 16).view(3, 5, 16), sincos_grid((8, 7), 16).view(8, 7, 16)
    assert torch.equal(small, large[:3, :5])


def test_a_table_first_made_on_the_meta_device_holds_numbers():
    """Tables are kept between calls; one asked for while a network is built without memory must not spoil them."""
    with torch.device("meta"):
        sincos_grid((5, 11), 12)
    np.testing.assert_allclose(sincos_grid((5, 11), 12)[12].numpy(), formula(1, 1, 12), atol=1e-6)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32)])
def test_positions_are_those_of_diffusers(grid):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(384, grid[0], base_size=grid[0], output_type="pt")
    torch.testing.assert_close(sincos_grid(grid, 384), theirs.float(), rtol=0, atol=1e-6)


def turned_as_complex(x, grid):
    """x [h w, H]: each pair of channels a complex number, turned by e^(i place frequency), one at a time."""
    half, out = x.shape[1] // 4, np.empty_like(x)
    for token in range(len(x)):
        row, column = divmod(token, grid[1])
        for pair in range(2 * half):
            place = row if pair < half else column
            turn = cmath.exp(1j * place * 100 ** (-(pair % half) / half))
            number = complex(*x[token, 2 * pair : 2 * pair + 2]) * turn
            out[token, 2 * pair : 2 * pair + 2] = number.real, number.imag
    return out


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 20, 32]))
def test_rotary_is_a_product_of_complex_numbers(height, width, channels):
    grid = (height, width)
    x = torch.randn(height * width, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(height))
    table = rotary_grid(grid, channels)
    assert table.shape == (height * width, channels // 2, 2)
    got = rotate(x[None], table)[0]
    np.testing.assert_allclose(got.numpy(), turned_as_complex(x.numpy(), grid), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=1e-6)  # only turned


def test_products_of_turned_vectors_depend_on_their_offset_alone():
    """One query and one key at every place of a grid: the logits of two pairs with one offset agree."""
    h, w, channels = 5, 7, 16
    q, k = torch.randn(2, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rotary_grid((h, w), channels)
    places = (rotate(vector.expand(1, h * w, channels), table)[0].view(h, w, channels) for vector in (q, k))
    logits = torch.einsum("rch,sdh->rcsd", *places)
    for rows in range(h - 2):
        for columns in range(w - 3):
            difference = logits[rows, columns, rows + 2, columns + 3] - logits[0, 0, 2, 3]
            assert difference.abs() < 1e-5
    assert (logits[0, 0] - logits[0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-3  # rows and columns both tell


@pytest.mark.parametrize("heads", [1, 3])
def test_every_head_is_turned_alike_and_every_row_of_the_batch(heads):
    x = torch.randn(12, 12, 2, heads, 8, generator=torch.Generator().manual_seed(0))  # B = L
    table = rotary_grid((3, 4), 8)
    got = rotate(x, table)
    for which in range(2):
        for head in range(heads):
            torch.testing.assert_close(got[:, :, which, head], rotate(x[:, :, which, head].contiguous(), table))


def test_compiled_the_rotation_is_the_same():
    x, table = torch.randn(2, 12, 3, 8, generator=torch.Generator().manual_seed(0)), rotary_grid((3, 4), 8)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table))
