"""The network as a whole: dependence on the inputs, gradients, sizes other than the trained one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.layers.positions import sincos_grid
from tessera.models.dit import DiT, DiTConfig
from tessera.settings import validate

DESIGNS = ["in-context", "cross-attention", "adaln", "adaln-zero"]
LATER_DESIGNS = ["adaln-single", "rope-swiglu"]


def config(**settings) -> DiTConfig:
    sizes = {
        "input_size": (8, 12),
        "in_channels": 3,
        "out_channels": 6,
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "num_classes": 5,
    }
    return DiTConfig.model_validate({**sizes, **settings})


def inputs(rows=4, size=(8, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, *size, generator=generator), torch.tensor([0.0, 17.0, 500.0, 999.0])[:rows]


@pytest.mark.parametrize("design", [*DESIGNS, *LATER_DESIGNS])
def test_gradients_reach_every_weight_of_every_block(design, randomise):
    network = randomise(config(block=design).build()).train()
    x, t = inputs()
    network(x, t, Condition(torch.tensor([0, 1, 4, -1]))).square().mean().backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    without_gradient = [
        name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without_gradient == []
    for block in network.blocks:
        assert all(parameter.grad.norm() > 1e-6 for parameter in block.parameters())


@pytest.mark.parametrize("design", [*DESIGNS, *LATER_DESIGNS])
def test_label_time_and_image_affect_only_their_own_row(design, randomise):
    network = randomise(config(block=design).build())
    x, t = inputs()
    label = torch.tensor([0, 1, 4, -1])
    with torch.no_grad():
        before = network(x, t, Condition(label))
        for row in range(4):
            mask = torch.zeros(4, dtype=torch.bool)
            mask[row] = True
            for changed in (
                network(x, t, Condition(torch.where(mask, 2, label))),
                network(x, torch.where(mask, 321.0, t), Condition(label)),
                network(torch.where(mask.view(4, 1, 1, 1), -x, x), t, Condition(label)),
            ):
                difference = (changed - before).abs().amax(dim=(1, 2, 3))
                assert difference[row] > 1e-2
                assert difference[~mask].max() < 1e-5


@pytest.mark.parametrize("design", [*DESIGNS, *LATER_DESIGNS])
def test_output_depends_on_patch_order(design, randomise):
    """Without positions a transformer would only permute its output with its input."""
    network = randomise(config(block=design, patch_size=4).build())
    x, t = inputs(2)
    with torch.no_grad():
        before = network(x, t, Condition([0, 1]))
        rolled = network(x.roll(4, dims=3), t, Condition([0, 1]))
    assert (rolled - before.roll(4, dims=3)).abs().max() > 1e-2


@pytest.mark.parametrize("classes", [1, 5, 1000])
def test_null_label_is_the_row_after_the_last_class(classes, randomise):
    network = randomise(config(num_classes=classes).build())
    x, t = inputs()
    rows = torch.full((4,), classes)
    with torch.no_grad():
        assert torch.equal(network(x, t, Condition(rows)), network(x, t, Condition(rows).null()))


@pytest.mark.parametrize("design", ["adaln-zero", "rope-swiglu"])
def test_the_standard_deviation_of_initial_labels_changes_nothing_else(design):
    networks = []
    for settings in ({}, {"label_init_std": 0.02}, {"label_init_std": 1.0}):
        torch.manual_seed(3)
        networks.append(config(block=design, num_classes=100, **settings).build().state_dict())
    default, small, large = networks
    table = "y_embedder.embedding_table.weight"
    assert all(torch.equal(default[name], small[name]) for name in default)
    assert all(torch.equal(default[name], large[name]) for name in default if name != table)
    torch.testing.assert_close(large[table], 50 * default[table])
    assert default[table].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("size", [(10, 6), (16, 24), (12, 8)])  # the last has as many patches as the trained size
@pytest.mark.parametrize("design", DESIGNS)
def test_other_sizes_use_positions_of_their_own_grid(design, size, randomise):
    """The same weights in a network configured for the other size give the same output."""
    trained, other = config(block=design).build(), config(block=design, input_size=size).build()
    randomise(trained)
    positions = sincos_grid((size[0] // 2, size[1] // 2), 32)[None]
    other.load_state_dict({**trained.state_dict(), "pos_embed": positions})
    x, t = inputs(size=size)
    label = Condition([0, 1, 2, 3])
    with torch.no_grad():
        assert torch.equal(trained(x, t, label), other.eval()(x, t, label))


@pytest.mark.parametrize("design", DESIGNS)
def test_output_patch_is_at_the_place_of_its_input_patch(design, randomise):
    """With zero branches the tokens pass unchanged, and the head is norm, modulation by c, linear."""
    network = randomise(config(block=design).build())
    x, t = inputs()
    with torch.no_grad():
        for block in network.blocks:
            for name in ("attn", "cross_attn"):
                if hasattr(block, name):
                    getattr(block, name).proj.weight.zero_()
                    getattr(block, name).proj.bias.zero_()
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
        output = network(x, t, Condition([0, 1, 4, -1]))
        c = network.t_embedder(t) + network.y_embedder.embedding_table.weight[[0, 1, 4, 5]]
        final = network.final_layer
        for i in range(4):
            for j in range(6):
                corner = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                token = network.x_embedder.proj(corner).flatten(1) + network.pos_embed[0, 6 * i + j]
                token = (token - token.mean(1, keepdim=True)) / (token.var(1, False, keepdim=True) + 1e-6).sqrt()
                if design in ("adaln", "adaln-zero"):
                    shift, scale = final.adaLN_modulation[1](c * c.sigmoid()).chunk(2, dim=1)
                    token = token * (1 + scale) + shift
                patch = final.linear(token).view(4, 2, 2, 6).permute(0, 3, 1, 2)  # rows, columns, then channels
                expected = output[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                torch.testing.assert_close(expected, patch, rtol=1e-4, atol=1e-4)


def test_stored_position_table_is_used_at_the_trained_size(randomise):
    network = randomise(config().build())
    x, t = inputs()
    with torch.no_grad():
        before = network(x, t, Condition([0, 1, 2, 3]))
        network.pos_embed.mul_(2.0)
        assert (network(x, t, Condition([0, 1, 2, 3])) - before).abs().max() > 1e-2


def test_size_not_divisible_by_patch_size_is_an_error():
    with pytest.raises(ValueError, match="patch_size 2 does not divide the size 7 x 12"):
        config().build()(*inputs(size=(7, 12)), Condition([0, 1, 2, 3]))


def test_missing_labels_are_an_error():
    with pytest.raises(ValueError, match="5 classes"):
        config().build()(*inputs(), Condition())


def test_unconditional_network_has_no_label_table(randomise):
    network = randomise(config(num_classes=0).build())
    assert network.y_embedder is None
    x, t = inputs()
    with torch.no_grad():
        assert network(x, t, Condition()).shape == (4, 6, 8, 12)


def test_activation_checkpointing_gives_the_same_gradients(randomise):
    """Blocks are called with (tokens, context) alone, so that they can be recomputed, compiled and sharded."""
    network = randomise(config().build())
    x, t = inputs()
    network(x, t, Condition([0, 1, 2, 3])).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    tokens, context = network.embed(x, t, Condition([0, 1, 2, 3]))
    for block in network.blocks:
        tokens = checkpoint(block, tokens, context, use_reentrant=False)
    network.head(tokens, context).square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not divisible by num_heads 4"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size 30 is not divisible by 4"),
        ({"input_size": 9}, "patch_size 2 does not divide the size 9 x 9"),
        ({"preset": "DiT-X/2"}, "did you mean 'DiT-"),
        ({"block": "adaln-one"}, "did you mean 'adaln-"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'?"),
    ],
)
def test_invalid_configurations_are_errors(settings, message):
    with pytest.raises(TesseraError) as error:
        validate(DiTConfig, settings, "the network")
    assert message in str(error.value)


def test_the_defaults_are_xl2_on_imagenet():
    assert DiTConfig() == DiTConfig.model_validate({"preset": "DiT-XL/2"})
    assert isinstance(config().build(), DiT)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_as_many_labels_as_inputs(rows):
    network = DiTConfig(input_size=(4, 4), depth=1, hidden_size=16, num_heads=2, num_classes=3).build()
    with pytest.raises(ValueError, match=f"label has {rows} rows, and the input has 4"):
        network(torch.zeros(4, 4, 4, 4), torch.zeros(4), Condition(torch.zeros(rows, dtype=torch.int64)))
