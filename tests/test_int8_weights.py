"""Weights in 8 bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tessera import bundle, int8_weights
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load


@given(
    shape=st.sampled_from([(1024,), (1025,), (33, 47), (8, 4, 6, 7), (2, 1023)]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=30)
def test_values_are_within_half_a_step_of_their_block(shape, spread, seed):
    """Compared with the definition, in NumPy and float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    stored = int8_weights.quantize({"w": weights})
    assert (stored["w"].dtype, stored["w"].shape) == (torch.int8, weights.shape)
    after = int8_weights.dequantize(stored, "file")["w"]
    assert (after.dtype, after.shape) == (torch.float32, weights.shape)
    values = weights.numpy().astype(np.float64).ravel()
    errors = np.abs(after.numpy().astype(np.float64).ravel() - values)
    for start in range(0, len(values), 128):
        block = slice(start, start + 128)
        assert errors[block].max() <= np.abs(values[block]).max() * 1 / 253


def test_even_steps_zeros_and_small_tensors_are_exact():
    steps = torch.arange(-127, 128).repeat(6)[:1280].clamp(-127, 127) * 0.5
    steps[::128] = 63.5  # each block has the largest step, so that its scale is 0.5
    state = {"steps": steps, "zeros": torch.zeros(40, 40), "bias": torch.randn(1023), "count": torch.arange(2000)}
    after = int8_weights.dequantize(int8_weights.quantize(state), "file")
    assert list(after) == list(state)
    for name, tensor in state.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weights = torch.ones(2000)
    weights[1999] = value
    with pytest.raises(TesseraError, match=r"head\.weight has weights that are not finite.*float32"):
        int8_weights.quantize({"head.weight": weights})


def test_a_bundle_in_8_bits_is_a_quarter_and_generates_nearly_the_same(make_model, tmp_path):
    model = make_model({"hidden_size": 64, "num_heads": 4})
    bundle.save(model, tmp_path / "model")
    message = load.convert(model, tmp_path / "small", "bundle", dtype=torch.int8)
    assert "rounded to int8" in message
    whole, small = (tmp_path / name / bundle.WEIGHTS for name in ("model", "small"))
    assert small.stat().st_size < 0.32 * whole.stat().st_size
    before, after = model.network, bundle.load(tmp_path / "small").network
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, Condition(torch.tensor([0, 1, 2, 1]))
    expected = before(*inputs)
    error = (after(*inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    assert bundle.weights_hash(after) != bundle.weights_hash(before)


def test_an_average_is_loaded_by_its_length(make_model, tmp_path):
    provenance = {"ema_length": 0.1, "steps": 100}
    model = make_model({"hidden_size": 64, "num_heads": 4}, provenance=provenance)
    bundle.save(model, tmp_path / "small", dtype=torch.int8)
    whole, by_length = bundle.load(tmp_path / "small"), bundle.load(tmp_path / "small", ema_length=0.1)
    assert bundle.weights_hash(by_length.network) == bundle.weights_hash(whole.network)


def test_scales_that_are_missing_are_named(make_model, tmp_path):
    bundle.save(make_model({"hidden_size": 64, "num_heads": 4}), tmp_path / "small", dtype=torch.int8)
    tensors = load_file(tmp_path / "small" / bundle.WEIGHTS)
    name = next(name for name in tensors if name.endswith(int8_weights.SCALE))
    del tensors[name]
    save_file(tensors, tmp_path / "small" / bundle.WEIGHTS)
    with pytest.raises(TesseraError, match=rf"{name.removesuffix('.scale')} is in 8 bits and needs \d+ scales"):
        bundle.load(tmp_path / "small")
