"""adaln-single and rope-swiglu: their special cases, shared modules, and each component switched off alone."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tessera.bundle import load, save
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.layers.modulation import ScaleShiftTable
from tessera.model_card import describe, render
from tessera.models.blocks import Context
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import parameter_count
from tessera.settings import validate

OFF = {  # the paper's adaLN-Zero block
    "mlp": "gelu",
    "norm": "layer",
    "positions": "sincos",
    "modulation": "per-block",
    "qk_norm": False,
    "value_residual": False,
    "bias": True,
}
VARIANTS = {
    "adaln-single": {"kind": "adaln-single"},
    "rope-swiglu": {"kind": "rope-swiglu"},
    **{f"without-{name}": {"kind": "rope-swiglu", name: value} for name, value in OFF.items()},
    **{
        f"adaln-zero-with-{name}": {"kind": "rope-swiglu", **{key: value for key, value in OFF.items() if key != name}}
        for name in OFF
    },
}
each_variant = pytest.mark.parametrize("block", VARIANTS.values(), ids=VARIANTS)
SIZES = {
    "input_size": (8, 12),
    "in_channels": 3,
    "out_channels": 6,
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "num_classes": 5,
}
LABEL = [0, 1, 4, -1]


def build(block, **settings) -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTConfig.model_validate({**SIZES, "block": block, **settings}).build()


def inputs(size=(8, 12)):
    x = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.0, 17.0, 500.0, 999.0])


@each_variant
def test_new_network_predicts_zero_and_its_blocks_are_the_identity(block):
    network = build(block)
    x, t = inputs()
    assert not network(x, t, Condition(LABEL)).any()
    tokens, context = network.embed(x, t, Condition(LABEL))
    for block_module in network.blocks:
        assert torch.equal(block_module(tokens, context), tokens)


@each_variant
def test_gradients_reach_every_weight(block, randomise):
    network = randomise(build(block)).train()
    network(*inputs(), Condition(LABEL)).square().mean().backward()
    without_gradient = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without_gradient == []


@each_variant
def test_new_network_learns(block):
    """With zero-initialised gates and tables, a few steps still reduce the loss and change the blocks."""
    network = build(block)
    x, t = inputs()
    target = torch.randn(4, 6, 8, 12, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = (network(x, t, Condition(LABEL)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    tokens, context = network.embed(x, t, Condition(LABEL))
    assert all((block_module(tokens, context) - tokens).abs().max() > 1e-3 for block_module in network.blocks)


@each_variant
def test_rows_are_independent_at_any_size(block, randomise):
    network = randomise(build(block))
    for size in ((8, 12), (12, 8), (4, 20), (16, 16)):
        x, t = inputs(size)
        with torch.no_grad():
            together = network(x, t, Condition(LABEL))
            assert together.shape == (4, 6, *size)
            alone = [network(x[i : i + 1], t[i : i + 1], Condition(LABEL[i : i + 1])) for i in range(4)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@each_variant
def test_macs_match_pytorch_flop_counter(block):
    for settings in ({}, {"num_classes": 0, "patch_size": 4, "mlp_ratio": 3}):
        with torch.device("meta"):
            network = build(block, **settings)
            x, t = torch.empty(1, 3, 8, 12), torch.empty(1)
            label = torch.empty(1, dtype=torch.int64) if network.config.num_classes else None
        with FlopCounterMode(display=False) as counter:
            network(x, t, Condition(label))
        assert counter.get_total_flops() == 2 * network.macs()


@each_variant
def test_activation_checkpointing_gives_the_same_gradients(block, randomise):
    network = randomise(build(block))
    network(*inputs(), Condition(LABEL)).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    tokens, context = network.embed(*inputs(), Condition(LABEL))
    for block_module in network.blocks:
        tokens = checkpoint(block_module, tokens, context, use_reentrant=False)
    network.head(tokens, context).square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaln-single", "rope-swiglu"])
def test_compiled_network_gives_the_same_gradients(kind, randomise):
    """In one graph, for the configured size and another one."""
    network = randomise(build(kind, depth=2))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for size in ((8, 12), (12, 4)):
        x, t = inputs(size)
        gradients = []
        for forward in (network, compiled):
            network.zero_grad(set_to_none=True)
            forward(x, t, Condition(torch.tensor(LABEL))).square().mean().backward()
            gradients.append([parameter.grad for parameter in network.parameters() if parameter.requires_grad])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_residuals_are_float32_under_autocast(randomise):
    network = randomise(build("rope-swiglu"))
    with torch.no_grad():
        expected = network(*inputs(), Condition(LABEL))
        with torch.autocast("cpu", torch.bfloat16):
            tokens, context = network.embed(*inputs(), Condition(LABEL))
            assert tokens.dtype == torch.float32
            assert network.blocks[0](tokens, context).dtype == torch.float32
            output = network(*inputs(), Condition(LABEL))
    assert (output.float() - expected).norm() < 0.1 * expected.norm()


# Special cases


def test_rope_swiglu_with_all_components_off_is_adaln_zero(randomise):
    rope_swiglu, zero = build({"kind": "rope-swiglu", **OFF}), randomise(build("adaln-zero"))
    rope_swiglu.load_state_dict(zero.state_dict())
    with torch.no_grad():
        output, expected = rope_swiglu(*inputs(), Condition(LABEL)), zero(*inputs(), Condition(LABEL))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("single", ["adaln-single", {"kind": "rope-swiglu", **OFF, "modulation": "shared"}])
def test_shared_modulation_equals_adaln_zero_with_summed_biases(single, randomise):
    """shared(c) + table: in each block a layer of the shared weight, and as bias the shared one plus the table."""
    ours, zero = randomise(build(single)), build("adaln-zero")
    state = ours.state_dict()
    weight, bias = (state.pop(f"shared.adaLN_modulation.1.{name}") for name in ("weight", "bias"))
    for i in range(3):
        table = state.pop(f"blocks.{i}.adaLN_modulation.table")
        state[f"blocks.{i}.adaLN_modulation.1.weight"] = weight
        state[f"blocks.{i}.adaLN_modulation.1.bias"] = bias + table.flatten()
    zero.load_state_dict(state)
    with torch.no_grad():
        output, expected = ours(*inputs(), Condition(LABEL)), zero.eval()(*inputs(), Condition(LABEL))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_zero_value_residual_weight_equals_no_value_residual(randomise):
    with_values = randomise(build("rope-swiglu"))
    without = build({"kind": "rope-swiglu", "value_residual": False}).eval()
    for block in with_values.blocks:
        torch.nn.init.zeros_(block.attn.v_residual_lambda)
    state = with_values.state_dict()
    without.load_state_dict({k: v for k, v in state.items() if "v0_proj" not in k and "v_residual" not in k})
    with torch.no_grad():
        output, expected = with_values(*inputs(), Condition(LABEL)), without(*inputs(), Condition(LABEL))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


# Parameters


def test_parameter_counts():
    """Differences to adaLN-Zero: one modulation layer instead of one for each block, and tables; then biases,
    positions, a SwiGLU width of 88 (two thirds of 128, rounded up to a multiple of 8), qk_scale and v_residual_lambda
    in each block, and the linear map for v0."""
    depth, d, heads = 3, 32, 4
    zero = parameter_count(build("adaln-zero"))
    single = parameter_count(build("adaln-single"))
    assert zero - single == (depth - 1) * (6 * d * d + 6 * d) - depth * 6 * d
    rope_swiglu = parameter_count(build("rope-swiglu"))
    biases = depth * (3 * d + d + 4 * d + d)
    swiglu = depth * (3 * d * 88 - 2 * d * 128)
    assert rope_swiglu == single - biases - 24 * d + swiglu + depth * (heads + 1) + d * d


def test_rotary_positions_need_no_table():
    assert "pos_embed" not in build("rope-swiglu").state_dict()
    assert "pos_embed" in build({"kind": "rope-swiglu", "positions": "sincos"}).state_dict()


def test_all_initial_modulation_is_zero():
    """The tables and the shared layer: the gates are their sum."""
    network = build("rope-swiglu")
    assert all(not module.table.any() for module in network.modules() if isinstance(module, ScaleShiftTable))
    assert not network.shared.adaLN_modulation.linear.weight.any()
    assert not network.shared.adaLN_modulation.linear.bias.any()


@each_variant
def test_all_modulation_parameters_come_from_the_context(block, randomise):
    """A context that overrides `modulation_params` determines all modulation: no module reads c directly."""

    class Constant(Context):
        def modulation_params(self, modulation):
            return torch.zeros(4, 1, 32 * (2 if modulation is network.final_layer.adaLN_modulation else 6))

    network = randomise(build(block))
    x, t = inputs()
    original = network.embed_condition

    def embed_condition(*inputs):
        context = original(*inputs)
        return Constant(c=context.c, cond_tokens=context.cond_tokens, grid=context.grid)

    network.embed_condition = embed_condition
    with torch.no_grad():
        output = network(x, t, Condition(LABEL))
        assert torch.equal(output, network(x, t.flip(0), Condition([4, 3, 2, 1])))
        assert (output - network(x.flip(0), t, Condition(LABEL))).abs().max() > 1e-2


@each_variant
def test_bundle_round_trip(block, make_model, tmp_path):
    model = make_model(network={"block": block})
    save(model, tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert loaded.config == model.config
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        assert torch.equal(loaded.network(x, t, Condition([0, 2])), model.network(x, t, Condition([0, 2])))


def test_model_card_lists_the_design_and_changed_settings(make_model):
    model = make_model(network={"block": {"kind": "rope-swiglu", "mlp": "gelu", "qk_norm": False}})
    assert describe(model)["network"].startswith("DiT, rope-swiglu mlp=gelu qk_norm=False, depth 2")
    assert "rope-swiglu mlp=gelu qk_norm=False" in render(model)
    assert describe(make_model(network={"block": "rope-swiglu"}))["network"].startswith("DiT, rope-swiglu, depth 2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 40, "num_heads": 4, "block": "rope-swiglu"}, "10 channels per head"),
        ({"hidden_size": 40, "num_heads": 4, "block": "rope-swiglu"}, "block.positions=sincos"),
        ({"block": {"kind": "rope-swiglu", "qk_nrom": True}}, "did you mean 'qk_norm'?"),
        ({"block": {"kind": "rope-swiglu", "mlp": "relu"}}, "'swiglu' or 'gelu'"),
        ({"block": "rope-swiglo"}, "rope-swiglu"),
    ],
)
def test_invalid_configurations_are_errors(settings, message):
    with pytest.raises(TesseraError) as error:
        validate(DiTConfig, {**SIZES, **settings}, "the network")
    assert message in str(error.value)


def test_sincos_positions_allow_any_head_size():
    assert build({"kind": "rope-swiglu", "positions": "sincos"}, hidden_size=40, num_heads=4)
