"""Times and labels as vectors: the sinusoid against its formula and against diffusers, the null class."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder, sinusoid


@pytest.mark.parametrize("divisor", [128, 127])
def test_sinusoid_is_the_formula(divisor):
    """Cosines, then sines, of t 10000^(-i / divisor), one number at a time in Python's double precision."""
    t = [0.0, 1.0, 37.0, 500.5, 999.0]
    got = sinusoid(torch.tensor(t), 256, divisor)
    assert got.shape == (5, 256)
    for row, time in enumerate(t):
        angles = [time * 10000 ** (-i / divisor) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # float32 angles up to 999 are known to about 999 * 2^-23
        torch.testing.assert_close(got[row], torch.tensor(expected), rtol=0, atol=4e-4)


@pytest.mark.parametrize(("divisor", "shift"), [(128, 0), (127, 1)])
def test_sinusoid_is_that_of_diffusers(divisor, shift):
    t = torch.arange(1000)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoid(t, 256, divisor), theirs, rtol=0, atol=2e-4)


def test_divisors_differ_by_more_than_rounding():
    t = torch.tensor([999.0])
    assert (sinusoid(t, 256, 128) - sinusoid(t, 256, 127)).norm() / sinusoid(t, 256, 128).norm() > 0.1


def test_time_embedder_is_linear_silu_linear_of_the_sinusoid(randomise):
    embedder = randomise(TimestepEmbedder(12, divisor=127))
    t = torch.tensor([0.0, 3.0, 999.0])
    first, _, last = embedder.mlp
    hidden = sinusoid(t, 256, 127) @ first.weight.T + first.bias
    expected = hidden / (1 + torch.exp(-hidden)) @ last.weight.T + last.bias
    torch.testing.assert_close(embedder(t), expected)
    assert TimestepEmbedder(12).divisor == 128  # the official form unless told otherwise


def test_times_may_have_any_shape(randomise):
    embedder = randomise(TimestepEmbedder(8))
    t = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(embedder(t), embedder(t.flatten()).view(2, 3, 8))


def test_label_rows(randomise):
    embedder = randomise(LabelEmbedder(5, 8))
    table = embedder.embedding_table.weight
    assert table.shape == (6, 8)  # the null class is row `classes`, as in the official checkpoints
    assert torch.equal(embedder(torch.tensor([4, 0, -1])), table[[4, 0, 5]])


def test_forced_drop(randomise):
    embedder = randomise(LabelEmbedder(5, 8))
    got = embedder(torch.tensor([4, 0, 2]), drop=torch.tensor([True, False, True]))
    assert torch.equal(got, embedder.embedding_table.weight[[5, 0, 5]])


def test_without_a_null_row_nothing_can_be_dropped(randomise):
    embedder = randomise(LabelEmbedder(5, 8, learn_null_class=False))
    assert embedder.embedding_table.weight.shape == (5, 8)
    assert torch.equal(embedder(torch.tensor([4, 0])), embedder.embedding_table.weight[[4, 0]])
    with pytest.raises(ValueError, match="null label"):
        embedder(torch.tensor([4, -1]))
    with pytest.raises(ValueError, match="null label"):
        embedder(torch.tensor([4, 1]), drop=torch.tensor([False, True]))
