"""The feed-forward layer and the steering of tokens, against their formulas in numpy."""

import math

import numpy as np
import torch

from tessera.layers.mlp import MLP
from tessera.layers.modulation import gated, modulate


def test_mlp_uses_the_tanh_form_of_gelu(randomise):
    mlp = randomise(MLP(6, 24).double())
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: value.numpy() for name, value in mlp.state_dict().items()}
    hidden = x.numpy() @ weights["fc1.weight"].T + weights["fc1.bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_modulation_with_as_many_rows_as_tokens_and_channels():
    """B = L = D: a wrong broadcast would give numbers, not an error."""
    generator = torch.Generator().manual_seed(2)
    x, branch = (torch.randn(4, 4, 4, generator=generator) for _ in range(2))
    shift, scale, gate = (torch.randn(4, 1, 4, generator=generator) for _ in range(3))
    steered, added = modulate(x, shift, scale), gated(x, gate, branch)
    for b in range(4):
        for token in range(4):
            for d in range(4):
                got = float(x[b, token, d])
                expected = got * (1 + float(scale[b, 0, d])) + float(shift[b, 0, d])
                assert abs(float(steered[b, token, d]) - expected) < 1e-5
                expected = got + float(gate[b, 0, d]) * float(branch[b, token, d])
                assert abs(float(added[b, token, d]) - expected) < 1e-5
