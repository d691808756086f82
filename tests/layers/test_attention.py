"""Attention against the softmax written out (Vaswani et al. 2017, equation 1), head by head in numpy."""

import numpy as np
import pytest
import torch

from tessera.layers.attention import Attention, CrossAttention


def explicit(q, k, v, heads):
    """softmax(q k^T / sqrt(H)) v for every sample and head. q [B, L, D], k and v [B, M, D] -> [B, L, D]"""
    size = q.shape[-1] // heads
    out = np.zeros_like(q)
    for b in range(len(q)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[b, :, part] @ k[b, :, part].T / np.sqrt(size)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b, :, part] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, part]
    return out


def affine(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (12, 3), (12, 12)])
def test_self_attention_is_the_formula(width, heads, randomise):
    attention = randomise(Attention(width, heads).double())
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = np.split(affine(attention.qkv, x.numpy()), 3, axis=-1)
    expected = affine(attention.proj, explicit(q, k, v, heads))
    np.testing.assert_allclose(attention(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("told", [1, 2, 7])
def test_cross_attention_is_the_formula(told, randomise):
    attention = randomise(CrossAttention(12, 3).double())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator)
    tokens = torch.randn(2, told, 12, dtype=torch.float64, generator=generator)
    k, v = np.split(affine(attention.kv_linear, tokens.numpy()), 2, axis=-1)
    expected = affine(attention.proj, explicit(affine(attention.q_linear, x.numpy()), k, v, 3))
    np.testing.assert_allclose(attention(x, tokens).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
