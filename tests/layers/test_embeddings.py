"""Embeddings of timesteps and labels: the sinusoids against their formula and diffusers, and the null label."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder, sinusoidal_embedding


@pytest.mark.parametrize("divisor", [128, 127])
def test_sinusoidal_embedding_matches_the_formula(divisor):
    """Cosines, then sines, of t 10000^(-i / divisor), one number at a time in double precision."""
    t = [0.0, 1.0, 37.0, 500.5, 999.0]
    embedding = sinusoidal_embedding(torch.tensor(t), 256, divisor)
    assert embedding.shape == (5, 256)
    for row, time in enumerate(t):
        angles = [time * 10000 ** (-i / divisor) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # float32 angles up to 999 have errors of about 999 * 2^-23
        torch.testing.assert_close(embedding[row], torch.tensor(expected), rtol=0, atol=4e-4)


@pytest.mark.parametrize(("divisor", "shift"), [(128, 0), (127, 1)])
def test_sinusoidal_embedding_matches_diffusers(divisor, shift):
    t = torch.arange(1000)
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoidal_embedding(t, 256, divisor), expected, rtol=0, atol=2e-4)


def test_the_two_frequency_divisors_give_different_embeddings():
    first, second = (sinusoidal_embedding(torch.tensor([999.0]), 256, divisor) for divisor in (128, 127))
    assert (first - second).norm() / first.norm() > 0.1


def test_timestep_embedder_is_an_mlp_of_the_sinusoidal_embedding(randomise):
    embedder = randomise(TimestepEmbedder(12, freq_divisor=127))
    t = torch.tensor([0.0, 3.0, 999.0])
    first, _, last = embedder.mlp
    hidden = sinusoidal_embedding(t, 256, 127) @ first.weight.T + first.bias
    expected = hidden / (1 + torch.exp(-hidden)) @ last.weight.T + last.bias
    torch.testing.assert_close(embedder(t), expected)
    assert TimestepEmbedder(12).freq_divisor == 128  # by default the official form


def test_times_may_have_any_shape(randomise):
    embedder = randomise(TimestepEmbedder(8))
    t = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(embedder(t), embedder(t.flatten()).view(2, 3, 8))


def test_labels_select_rows_of_the_table(randomise):
    embedder = randomise(LabelEmbedder(5, 8))
    table = embedder.embedding_table.weight
    assert table.shape == (6, 8)  # the null label is row `num_classes`, as in the official checkpoints
    assert torch.equal(embedder(torch.tensor([4, 0, -1])), table[[4, 0, 5]])


def test_without_a_null_row_null_labels_are_rejected(randomise):
    embedder = randomise(LabelEmbedder(5, 8, learn_null_class=False))
    assert embedder.embedding_table.weight.shape == (5, 8)
    assert torch.equal(embedder(torch.tensor([4, 0])), embedder.embedding_table.weight[[4, 0]])
    with pytest.raises(ValueError, match="null label"):
        embedder(torch.tensor([4, -1]))


def test_labels_are_required():
    with pytest.raises(ValueError, match=r"5 classes: pass Condition\(label"):
        LabelEmbedder(5, 8)(None)
