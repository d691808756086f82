"""A frozen base in fewer bits: against closed forms, against its dequantized weights in float32, and through a run."""

import copy

import pytest
import torch
from torch import nn

from tessera import adapters, bundle
from tessera.adapters.quantized_base import (
    NF4_LEVELS,
    QuantizedFusedLinear,
    QuantizedLinear,
    base_format_of,
    dequantize,
    quantize,
    quantize_base,
)
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.layers.fused_linear import FusedLinear
from tessera.models import DiTConfig, PixArtConfig, UNetConfig
from tessera.runtime import autocast

FORMATS = ("bfloat16", "int8", "nf4")
SIZES = {"input_size": (8, 8), "in_channels": 2, "out_channels": 2}
WIDTH = {"patch_size": 2, "depth": 2, "hidden_size": 32, "num_heads": 2}
NETWORKS = {
    "adaln-zero": DiTConfig(num_classes=3, **SIZES, **WIDTH),
    "rope-swiglu": DiTConfig(num_classes=3, block={"kind": "rope-swiglu"}, **SIZES, **WIDTH),
    "pixart": PixArtConfig(num_classes=0, text_channels=6, text_tokens=3, **SIZES, **WIDTH),
    "unet": UNetConfig(
        num_classes=3, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(2,), **SIZES
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request, randomise):
    return randomise(NETWORKS[request.param].build())


def inputs(network):
    generator = torch.Generator().manual_seed(1)
    condition = Condition(label=torch.tensor([0, 1, -1]))
    if network.config.uses_text:
        text = torch.randn(3, 3, 6, generator=generator)
        condition = Condition(text=text, text_mask=torch.ones(3, 3, dtype=torch.bool))
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([10.0, 500.0, 900.0]), condition


def adapted(network, config):
    """The network with a trained adapter that has an effect."""
    network.requires_grad_(False)
    torch.manual_seed(0)
    layers = config.layers(network, ())
    quantize_base(network, config.base_weights)
    adapters.attach(network, "style", layers)
    for _, _, _, layer in adapters.adapter_layers(network, "style"):
        for name, parameter in layer.named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape) * (name != "magnitude")
    return network


def in_float32(network):
    """A copy whose weights are the dequantized ones, in layers of PyTorch."""
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight
            del module.codes, module.scales
            module.__class__ = FusedLinear if isinstance(module, QuantizedFusedLinear) else nn.Linear
            module.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def gradients(network, dtype=None):
    with autocast(dtype, torch.device("cpu")):
        output = network(*inputs(network))
    output.float().square().sum().backward()
    return output.detach(), {name: each.grad for name, each in network.named_parameters() if each.requires_grad}


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """Eight negative and nine positive ones with one zero in common, scaled to -1..1 (Dettmers et al. 2023, section
    3). The outermost is at the mean of 1 - 1/32 and 1 - 1/30, as in their code."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))
    levels = torch.cat((negative[:-1], torch.zeros(1, dtype=torch.float64), positive[:-1].flip(0))) / positive[0]
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(64, 128), (7, 9), (1, 1)])
def test_a_dequantized_weight_is_the_nearest_one_that_the_format_has(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = {name: dequantize(*quantize(weight, name), shape) for name in FORMATS}
    assert all(value.dtype == torch.float32 and value.shape == shape for value in values.values())
    assert torch.equal(values["bfloat16"], weight.bfloat16().float())
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((values["int8"] - weight).abs() <= step * 0.5001).all()
    torch.testing.assert_close(values["int8"] / step, (values["int8"] / step).round(), rtol=0, atol=1e-4)
    flat, blocks = values["nf4"].flatten(), weight.flatten().split(64)
    for block, value in zip(blocks, flat.split(64)):
        levels = torch.tensor(NF4_LEVELS) * block.abs().max()
        distances = (block[:, None] - levels).abs()
        torch.testing.assert_close((block - value).abs(), distances.amin(dim=1), rtol=0, atol=1e-6)


def test_zero_weights_stay_zero():
    for name in FORMATS:
        assert not dequantize(*quantize(torch.zeros(4, 64), name), (4, 64)).any()


@pytest.mark.parametrize("base_format", FORMATS)
def test_a_quantized_base_is_its_dequantized_weights_in_float32(network, base_format):
    """Outputs, and the gradients of an adapter, which flow through the frozen weights to earlier layers."""
    network = adapted(network, adapters.LoRAConfig(rank=2, base_weights=base_format))
    assert base_format_of(network) == base_format
    plain = in_float32(network)
    assert base_format_of(plain) == "float32"
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.1)):
        output, actual = gradients(copy.deepcopy(network), dtype)
        expected_output, expected = gradients(copy.deepcopy(plain), dtype)
        torch.testing.assert_close(output, expected_output, rtol=tolerance, atol=tolerance)
        assert actual.keys() == expected.keys() != set()
        for name, gradient in expected.items():
            difference = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert difference < tolerance, name


def test_names_and_kinds_of_layers_stay(network):
    before = dict(network.named_modules())
    names = set(network.state_dict())
    quantize_base(network, "nf4")
    assert dict(network.named_modules()) == before
    linears = {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert linears
    changed = {f"{name}.{part}" for name in linears for part in ("codes", "scales")}
    assert set(network.state_dict()) == names - {f"{name}.weight" for name in linears} | changed
    assert all(name.startswith(("blocks.", "down", "middle", "up")) or "block" in name for name in linears)
    for name in linears:
        module = network.get_submodule(name)
        assert module.weight.shape == (module.out_features, module.in_features)
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_dequantized_weight_is_not_held_for_the_backward_pass(network):
    network = adapted(network, adapters.LoRAConfig(rank=2, base_weights="nf4"))
    weights = [module.weight for module in network.modules() if isinstance(module, QuantizedLinear)]

    def held(network) -> bool:
        """Whether a weight, or its transpose, is held."""
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensors.append(tensor) or tensor, lambda x: x):
            network(*inputs(network))
        assert tensors
        return any(
            torch.equal(each, weight)
            for each in tensors
            if each.ndim == 2
            for weight in (*weights, *map(torch.t, weights))
        )

    assert not held(network)
    assert held(in_float32(network))


@pytest.mark.parametrize("base_format", FORMATS)
def test_copies_of_a_quantized_network_give_the_same_output(network, base_format):
    network = adapted(network, adapters.LoRAConfig(rank=2, dora=True, base_weights=base_format))
    with torch.no_grad():
        output = network(*inputs(network))
        assert torch.equal(copy.deepcopy(network)(*inputs(network)), output)
        like = adapters.build_like(network)
        like.load_state_dict(network.state_dict(), assign=True)
        torch.testing.assert_close(like.eval()(*inputs(network)), output, rtol=0, atol=1e-6)


def test_an_adapter_is_not_merged_into_a_quantized_base(network):
    network = adapted(network, adapters.LoRAConfig(rank=2, base_weights="int8"))
    with pytest.raises(TesseraError, match="cannot be merged into weights in int8: load its base in float32"):
        adapters.merge(network)


def test_the_fingerprint_of_the_base_is_that_of_its_float32_weights(network):
    from tessera.training.recipe import read_recipe
    from tessera.training.run import add_adapter

    data = {"run_dir": "unused", "data": {"kind": "digits"}, "training": {"init_from": "unused"}}
    recipe = read_recipe({**data, "adapter": {"kind": "lora", "rank": 2, "base_weights": "nf4"}})
    expected = bundle.weights_hash(network)
    assert add_adapter(recipe, network, ()).base == expected
    assert base_format_of(network) == "nf4"
