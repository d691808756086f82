"""Adapters on networks: exact without effect, merged, removed, copied and stored; against PyTorch and closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from tessera import adapters
from tessera.adapters.layers import LowRank
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.layers.fused_linear import FusedLinear
from tessera.models import DiTConfig, PixArtConfig

CLASSES = ("a", "b", "c")
CONFIGS = {
    "lora": adapters.LoRAConfig(rank=4, alpha=8),
    "dora": adapters.LoRAConfig(rank=4, dora=True),
    "q, v": adapters.LoRAConfig(rank=4, projections=("q", "v")),
    "modulation": adapters.LoRAConfig(rank=2, where="adaLN_modulation|qkv"),
    "difffit": adapters.DiffFitConfig(),
    "classes": adapters.ClassesConfig(classes=("b",)),
}
SIZES = {"input_size": (8, 8), "in_channels": 2, "out_channels": 2, "hidden_size": 32, "num_heads": 2}
NETWORKS = {
    "adaln-zero": DiTConfig(patch_size=2, depth=2, num_classes=3, **SIZES),
    "rope-swiglu": DiTConfig(patch_size=2, depth=2, num_classes=3, block={"kind": "rope-swiglu"}, **SIZES),
}


@pytest.fixture(params=NETWORKS)
def network(request, randomise):
    return randomise(NETWORKS[request.param].build())


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    labels = Condition(label=torch.tensor([0, 1, -1]))
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([10.0, 500.0, 900.0]), labels


def fill(network, name: str) -> None:
    """Random values for an adapter."""
    generator = torch.Generator().manual_seed(2)
    for _, _, _, layer in adapters.adapter_layers(network, name):
        for key, parameter in layer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data.copy_(parameter + values.abs() if key == "magnitude" else values)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_an_adapter_without_effect_equals_the_base_bit_for_bit(network, inputs, config):
    before = network(*inputs)
    adapters.attach(network, "style", config.layers(network, CLASSES))
    assert torch.equal(network(*inputs), before)
    fill(network, "style")
    assert not torch.equal(network(*inputs), before)
    adapters.set_strengths(network, {"style": 0})
    assert torch.equal(network(*inputs), before)
    adapters.detach(network, "style")
    assert torch.equal(network(*inputs), before)
    assert not adapters.attached(network)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_merged_weights_give_the_same_output_and_unmerging_restores_every_bit(network, inputs, config):
    original = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = network(*inputs)
    adapters.attach(network, "style", config.layers(network, CLASSES))
    adapters.attach(network, "other", adapters.LoRAConfig(rank=2).layers(network, CLASSES))
    fill(network, "style")
    fill(network, "other")
    adapters.set_strengths(network, {"style": 0.7, "other": -0.4})
    adapted = network(*inputs)
    saved = adapters.merge(network)
    assert network.state_dict().keys() == original.keys()
    torch.testing.assert_close(network(*inputs), adapted, rtol=0, atol=2e-6)
    adapters.unmerge(network, saved)
    assert all(torch.equal(tensor, original[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(network(*inputs), before)


@torch.no_grad()
def test_merged_dora_alone_gives_the_same_output(network, inputs):
    adapters.attach(network, "style", CONFIGS["dora"].layers(network, CLASSES))
    fill(network, "style")
    adapters.set_strengths(network, {"style": 0.7})
    adapted = network(*inputs)
    adapters.merge(network)
    torch.testing.assert_close(network(*inputs), adapted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_an_adapter_is_restored_from_its_state_dict(network, inputs, config):
    base_names = set(network.state_dict())
    adapters.attach(network, "style", config.layers(network, CLASSES))
    fill(network, "style")
    output = network(*inputs)
    state = {name: tensor.clone() for name, tensor in adapters.adapter_state(network, "style").items()}
    assert set(adapters.base_state(network)) == base_names
    assert torch.equal(copy.deepcopy(network)(*inputs), output)
    like = adapters.build_like(network)
    like.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(like.eval()(*inputs), output)
    adapters.detach(network)
    adapters.attach(network, "again", adapters.layers_from_state(network, state, "the file"))
    assert torch.equal(network(*inputs), output)


@torch.no_grad()
def test_lora_and_dora_follow_their_equations():
    """W + alpha / r B A, and m (W + B A) / |W + B A| by rows, for one of three fused projections."""
    torch.manual_seed(0)
    module, x = FusedLinear(6, 8, num_projections=3), torch.randn(5, 6)
    for dora in (False, True):
        layer = LowRank(module, rank=2, scale=1.5, dora=dora, projection=1)
        layer.up.normal_()
        weight = module.weight.clone()
        changed = weight[8:16] + 1.5 * layer.up @ layer.down
        if layer.magnitude is not None:
            layer.magnitude.uniform_(0.5, 2)
            changed = layer.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        weight[8:16] = changed
        expected = nn.functional.linear(x, weight, module.bias)
        torch.testing.assert_close(layer(module, x, module(x)), expected, rtol=0, atol=2e-6)


def test_a_low_rank_change_recovers_a_low_rank_shift():
    """Trained on a base whose weight was shifted by a matrix of rank 3, a LoRA of rank 3 finds it; one of rank 2 the
    best of rank 2 (Eckart & Young 1936), for whitened inputs."""
    torch.manual_seed(0)
    base = nn.Linear(16, 12)
    singular = torch.tensor([3.0, 2.0, 1.0])
    left, right = torch.linalg.qr(torch.randn(12, 3))[0], torch.linalg.qr(torch.randn(16, 3))[0]
    shift = left * singular @ right.T
    x = torch.linalg.qr(torch.randn(64, 16))[0] * 8  # E[x x'] = I
    y = (base(x) + x @ shift.T).detach()
    base.requires_grad_(False)
    for rank, error in ((3, 0.0), (2, 1.0)):
        layer = LowRank(base, rank)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def closure(layer=layer, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (layer(base, x, base(x)) - y).square().sum() / 64
            loss.backward()
            return loss

        optimizer.step(closure)
        assert (layer.delta() - shift).norm().item() == pytest.approx(error, abs=2e-3)


def test_only_layers_of_blocks_are_adapted_by_default(network):
    names = set(adapters.LoRAConfig(rank=2).layers(network, ()))
    linears = {
        name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    assert names == {name for name in linears if "adaLN" not in name}


def test_the_size_of_an_adapter_is_a_closed_form():
    """PixArt-XL/2 of rank 16 on all maps of its blocks: 13.4 M weights."""
    config = PixArtConfig(hidden_size=1152, depth=28, num_heads=16, num_classes=0, text_channels=4096, text_tokens=120)
    with torch.device("meta"):
        network = config.build()
        fused = adapters.LoRAConfig(rank=16).layers(network, ())
        split = adapters.LoRAConfig(rank=16, projections=("q", "k", "v")).layers(network, ())
    fused, split = (
        sum(
            parameter.numel() for kinds in layers.values() for each in kinds.values() for parameter in each.parameters()
        )
        for layers in (fused, split)
    )
    width = 1152
    maps = [(1, 3), (1, 1), (1, 1), (1, 2), (1, 1), (1, 4), (4, 1)]  # self-attention, cross-attention, MLP: in, out
    assert fused == 28 * sum(16 * width * (inner + outer) for inner, outer in maps)
    maps = [(1, 1)] * 8 + [(1, 4), (4, 1)]  # each projection by itself, as in diffusers
    assert split == 28 * sum(16 * width * (inner + outer) for inner, outer in maps)
    assert math.isclose(split, 13.4e6, rel_tol=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (adapters.LoRAConfig(rank=33), "rank is 33, but in blocks.0.attn.qkv"),
        (adapters.LoRAConfig(where="nowhere"), "matches none of the"),
        (adapters.ClassesConfig(classes=("a", "z")), "has z; the model has the classes a, b, c"),
    ],
)
def test_settings_that_fit_no_layer_are_errors(network, config, message):
    with pytest.raises(TesseraError, match=message):
        config.layers(network, CLASSES)


@torch.no_grad()
def test_a_state_dict_that_does_not_fit_is_an_error_that_lists_all_faults(network, inputs):
    before = network(*inputs)
    adapters.attach(network, "style", adapters.LoRAConfig(rank=2).layers(network, CLASSES))
    state = adapters.adapter_state(network, "style")
    adapters.detach(network)
    qkv, proj = "blocks.0.attn.qkv.lora.", "blocks.0.attn.proj.lora."
    renamed = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in state.items()}
    wrong = {
        "missing": ({name: tensor for name, tensor in state.items() if name != f"{qkv}up"}, "blocks.0.attn.qkv.lora"),
        "renamed": (renamed, "unexpected blocks.7.attn.proj.lora.down"),
        "shape": (state | {f"{proj}up": torch.zeros(5, 2)}, "blocks.0.attn.proj.lora does not fit"),
        "not finite": (state | {f"{proj}up": torch.full((32, 2), torch.nan)}, f"{proj}up has numbers that are not"),
        "empty": ({}, "it holds no tensor"),
    }
    for state, message in wrong.values():
        with pytest.raises(TesseraError, match=f"the file is not an adapter for this model(.|\n)*{message}"):
            adapters.layers_from_state(network, state, "the file")
    assert torch.equal(network(*inputs), before)


@torch.no_grad()
def test_names_are_checked(network, inputs):
    config = adapters.LoRAConfig(rank=2)
    with pytest.raises(TesseraError, match="'a.b' cannot be the name"):
        adapters.attach(network, "a.b", config.layers(network, ()))
    with pytest.raises(TesseraError, match="'adapters' cannot be the name"):
        adapters.attach(network, "adapters", config.layers(network, ()))
    before = network(*inputs)
    for name in ("half", "keys", "to", "training", "values"):  # attributes of modules
        adapters.attach(network, name, config.layers(network, ()))
        fill(network, name)
    assert not torch.equal(network(*inputs), before)
    assert set(adapters.attached(network)) == {"half", "keys", "to", "training", "values"}
    adapters.detach(network)
    adapters.attach(network, "a", config.layers(network, ()))
    with pytest.raises(TesseraError, match="two adapters with the name 'a'"):
        adapters.attach(network, "a", config.layers(network, ()))
    with pytest.raises(TesseraError, match="unknown adapter 'b'"):
        adapters.set_strengths(network, {"b": 1})
