"""Fixed positions against their formula, one number at a time; any grid, width first."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.layers.positions import sincos_grid


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
