"""Attention against the softmax written out (Vaswani et al. 2017, equation 1), head by head in numpy."""

import numpy as np
import pytest
import torch

from tessera.layers.attention import Attention, CrossAttention, RotaryAttention
from tessera.layers.positions import apply_rope, rope_grid


def attention_in_numpy(q, k, v, heads):
    """softmax(q k^T / sqrt(E)) v for every sample and head. q [B, N, D], k and v [B, M, D] -> [B, N, D]"""
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
def test_self_attention_matches_the_formula(width, heads, randomise):
    attention = randomise(Attention(width, heads).double())
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = np.split(affine(attention.qkv, x.numpy()), 3, axis=-1)
    expected = affine(attention.proj, attention_in_numpy(q, k, v, heads))
    np.testing.assert_allclose(attention(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_cross_attention_matches_the_formula(num_tokens, randomise):
    attention = randomise(CrossAttention(12, 3).double())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator)
    tokens = torch.randn(2, num_tokens, 12, dtype=torch.float64, generator=generator)
    k, v = np.split(affine(attention.kv_linear, tokens.numpy()), 2, axis=-1)
    expected = affine(attention.proj, attention_in_numpy(affine(attention.q_linear, x.numpy()), k, v, 3))
    np.testing.assert_allclose(attention(x, tokens).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def split_heads(x, heads=3):
    """x [B, N, D] -> [B, N, K, E]"""
    return x.reshape(*x.shape[:2], heads, -1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("value_residual", [False, True])
def test_rotary_attention_matches_the_formula(qk_norm, rope, value_residual, randomise):
    """torch.nn.RMSNorm, the scale, the rotation and the interpolation with the first values, one after the other."""
    attention = randomise(RotaryAttention(24, 3, True, qk_norm, value_residual).double())
    x, v0 = torch.randn(2, 2, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (torch.tensor(part) for part in np.split(affine(attention.qkv, x.numpy()), 3, axis=-1))
    with torch.no_grad():
        if qk_norm:
            norm = torch.nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)
            q = (norm(split_heads(q)) * attention.qk_scale[:, None]).flatten(2)
            k = norm(split_heads(k)).flatten(2)
        if rope:
            table = rope_grid((2, 3), 8)
            q, k = (apply_rope(split_heads(part), table).flatten(2) for part in (q, k))
        if value_residual:
            v = (1 - attention.v_residual_lambda) * v + attention.v_residual_lambda * v0
        result = attention(x, rope_grid((2, 3), 8) if rope else None, v0)
    expected = affine(attention.proj, attention_in_numpy(q.numpy(), k.numpy(), v.numpy(), 3))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_normalized_logits_do_not_grow_with_the_weights(randomise):
    attention = randomise(RotaryAttention(24, 3, False, True, False))
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = attention(x)
        attention.qkv.weight[:48] *= 1000
        torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_rotary_attention_without_its_options_is_attention(bias, randomise):
    rotary, plain = RotaryAttention(24, 3, bias, False, False), randomise(Attention(24, 3, bias))
    rotary.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotary(x), plain(x), rtol=1e-6, atol=1e-6)


def test_autocast_is_close_to_float32(randomise):
    attention = randomise(RotaryAttention(24, 3, False, True, True))
    x, v0 = torch.randn(2, 2, 6, 24, generator=torch.Generator().manual_seed(1))
    table = rope_grid((2, 3), 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = attention(x, table, v0.bfloat16())
    assert result.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(result.float(), attention(x, table, v0), rtol=0.05, atol=0.05)
