"""The four designs against their formulas, written out in numpy from the paper's figure 3."""

import math

import numpy as np
import pytest
import torch

from tessera.models.blocks import (
    AdaLN,
    AdaLNZero,
    BlockDims,
    Context,
    CrossAttend,
    InContext,
)

WIDTH, HEADS, HIDDEN = 12, 3, 20


def norm(x, eps=1e-6):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)


def attend(q, k, v):
    """Multi-head softmax(q k^T / sqrt(H)) v. q [B, L, D], k and v [B, M, D]"""
    split = [x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v)]
    logits = np.einsum("blkh,bmkh->bklm", *split[:2]) / math.sqrt(WIDTH // HEADS)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return np.einsum("bklm,bmkh->blkh", weights, split[2]).reshape(q.shape)


class NumpyBlock:
    """The layers of a block in numpy, with the weights of its state dict."""

    def __init__(self, block):
        self.weights = {name: value.numpy() for name, value in block.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def attention(self, x):
        return self.linear("attn.proj", attend(*np.split(self.linear("attn.qkv", x), 3, axis=-1)))

    def cross(self, x, tokens):
        k, v = np.split(self.linear("cross_attn.kv_linear", tokens), 2, axis=-1)
        return self.linear("cross_attn.proj", attend(self.linear("cross_attn.q_linear", x), k, v))

    def mlp(self, x):
        x = self.linear("mlp.fc1", x)
        return self.linear("mlp.fc2", 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))

    def modulation_params(self, c, count):
        return np.split(self.linear("adaLN_modulation.1", c / (1 + np.exp(-c))), count, axis=-1)


def in_context(e, x, c, tokens):
    x = x + e.attention(norm(x))
    return x + e.mlp(norm(x))


def cross_attention(e, x, c, tokens):
    x = x + e.attention(norm(x))
    x = x + e.cross(norm(x), tokens)
    return x + e.mlp(norm(x))


def adaln(e, x, c, tokens):
    shift1, scale1, shift2, scale2 = e.modulation_params(c, 4)
    x = x + e.attention(norm(x) * (1 + scale1) + shift1)
    return x + e.mlp(norm(x) * (1 + scale2) + shift2)


def adaln_zero(e, x, c, tokens):
    shift1, scale1, gate1, shift2, scale2, gate2 = e.modulation_params(c, 6)
    x = x + gate1 * e.attention(norm(x) * (1 + scale1) + shift1)
    return x + gate2 * e.mlp(norm(x) * (1 + scale2) + shift2)


@pytest.mark.parametrize(
    ("design", "formula"),
    [
        (InContext(), in_context),
        (CrossAttend(), cross_attention),
        (AdaLN(), adaln),
        (AdaLNZero(), adaln_zero),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_block_matches_its_formula(design, formula, randomise):
    block = randomise(design.build(BlockDims(WIDTH, HEADS, HIDDEN)).double())
    generator = torch.Generator().manual_seed(1)
    x, c, tokens = (
        torch.randn(4, length, WIDTH, dtype=torch.float64, generator=generator) for length in (4, 1, 2)
    )  # batch size = number of tokens, so a wrong broadcast gives wrong numbers, not an error
    with torch.no_grad():
        output = block(x, Context(c=c, cond_tokens=tokens, grid=(2, 2)))
    expected = formula(NumpyBlock(block), x.numpy(), c.numpy(), tokens.numpy())
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_mlp_norm_eps_applies_to_the_norm_before_the_mlp_only(eps, randomise):
    """x is small, so that eps has an effect, and stays small, because the attention branch is zero."""
    block = randomise(AdaLNZero().build(BlockDims(WIDTH, HEADS, HIDDEN, mlp_norm_eps=eps)).double())
    x = 1e-3 * torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c = torch.ones(2, 1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
        output = block(x, Context(c=c, cond_tokens=c, grid=(2, 2)))
    e = NumpyBlock(block)
    _, _, _, shift, scale, gate = e.modulation_params(c.numpy(), 6)
    expected = x.numpy() + gate * e.mlp(norm(x.numpy(), eps) * (1 + scale) + shift)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-10, atol=1e-10)
    assert block.norm1.eps == 1e-6
