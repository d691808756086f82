"""The feed-forward layers and the modulation, against their formulas in numpy."""

import math

import numpy as np
import pytest
import torch

from tessera.layers.mlp import MLP, SwiGLU
from tessera.layers.modulation import ScaleShiftTable, gated_residual, modulate


def test_mlp_uses_the_tanh_form_of_gelu(randomise):
    mlp = randomise(MLP(6, 24).double())
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: value.numpy() for name, value in mlp.state_dict().items()}
    hidden = x.numpy() @ weights["fc1.weight"].T + weights["fc1.bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_modulation_with_equal_batch_tokens_and_width():
    """B = N = D: a wrong broadcast gives wrong numbers, not an error."""
    generator = torch.Generator().manual_seed(2)
    x, branch = (torch.randn(4, 4, 4, generator=generator) for _ in range(2))
    shift, scale, gate = (torch.randn(4, 1, 4, generator=generator) for _ in range(3))
    modulated, residual = modulate(x, shift, scale), gated_residual(x, gate, branch)
    for b in range(4):
        for token in range(4):
            for d in range(4):
                value = float(x[b, token, d])
                expected = value * (1 + float(scale[b, 0, d])) + float(shift[b, 0, d])
                assert abs(float(modulated[b, token, d]) - expected) < 1e-5
                expected = value + float(gate[b, 0, d]) * float(branch[b, token, d])
                assert abs(float(residual[b, token, d]) - expected) < 1e-5


@pytest.mark.parametrize(("hidden", "inner"), [(24, 16), (768, 512), (25, 24), (4, 8)])
def test_swiglu_matches_the_formula(hidden, inner, randomise):
    """W2 (silu(W x) * V x); two thirds of the hidden width, rounded up to a multiple of 8."""
    mlp = randomise(SwiGLU(6, hidden).double())
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: value.numpy() for name, value in mlp.state_dict().items()}
    gate, up = np.split(x.numpy() @ weights["fc1.weight"].T + weights["fc1.bias"], 2, axis=-1)
    assert gate.shape[-1] == inner
    expected = (gate / (1 + np.exp(-gate)) * up) @ weights["fc2.weight"].T + weights["fc2.bias"]
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_scale_shift_table_is_added_to_the_shared_parameters():
    table = ScaleShiftTable(4, 3)
    with torch.no_grad():
        table.table.copy_(torch.arange(12.0).view(3, 4))
    shared = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(1))
    shift, scale, gate = table(shared).chunk(3, dim=-1)
    assert torch.equal(shift, shared[..., :4] + torch.arange(4.0))
    assert torch.equal(scale, shared[..., 4:8] + torch.arange(4.0, 8.0))
    assert torch.equal(gate, shared[..., 8:] + torch.arange(8.0, 12.0))
