"""Token routing: which tokens skip which blocks, what it costs, and that it does not depend on the parts of a batch."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig
from tessera.errors import TesseraError
from tessera.models import DiTConfig
from tessera.models.blocks import AdaLNSingle, AdaLNZero, CrossAttend, InContext, RoPESwiGLU
from tessera.models.dit import DiT, Route
from tessera.training.loop import train
from tessera.training.objective import TrainingObjective, compute_loss
from tessera.training.recipe import TrainingConfig, read_recipe, training_macs
from tessera.training.token_routing import TokenRouting, TokenRoutingConfig
from tessera.training.token_times import DualTokenTimes

BLOCKS = [
    AdaLNZero(), AdaLNSingle(), CrossAttend(), InContext(), RoPESwiGLU(), RoPESwiGLU(text="keys"),
    RoPESwiGLU(text="cross"), RoPESwiGLU(text="sequence"),
]  # fmt: skip
SIZES = {
    "input_size": (8, 8), "in_channels": 3, "out_channels": 3, "patch_size": 2, "depth": 4, "hidden_size": 24,
    "num_heads": 2,
}  # fmt: skip


def trained_network(block=None) -> DiT:
    block = block or RoPESwiGLU()
    conditions = {"num_classes": 0, "vocabulary_size": 5, "text_tokens": 3} if block.uses_text else {"num_classes": 4}
    torch.manual_seed(3)
    network = DiTConfig(**SIZES, block=block, **conditions).build()
    for parameter in network.parameters():  # zeros of a new network would hide what depends on them
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def condition(network: DiT, rows: int) -> Condition:
    if not network.config.uses_text:
        return Condition(label=torch.arange(rows) % 4)
    mask = torch.ones(rows, 3, dtype=torch.bool)
    mask[0, 2:] = False
    return Condition(text=torch.arange(3 * rows).view(rows, 3) % 5, text_mask=mask)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.summary())
def test_a_route_that_no_token_takes_changes_nothing(block):
    network = trained_network(block)
    x, t, c = torch.randn(2, 3, 8, 8), torch.rand(2), condition(network, 2)
    output, features = network.training_forward(x, t, c, route=Route(1, 3, torch.arange(16)))
    assert features is None
    torch.testing.assert_close(output, network(x, t, c), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.summary())
def test_tokens_of_a_route_pass_its_blocks_alone_at_their_places(block):
    """The image without the other patches, at their positions: the same outputs of the blocks of the route."""
    network = trained_network(block)
    x, t, c = torch.randn(2, 3, 8, 8), torch.rand(2), condition(network, 2)
    rows, inputs, outputs = torch.tensor([1, 2, 7, 12]), [], []

    def record(module, args, output):
        inputs.append(args[0])
        outputs.append(output)

    for part in network.blocks:
        part.register_forward_hook(record)
    network.training_forward(x, t, c, route=Route(1, 3, rows))
    appended = inputs[0].shape[1] - 16
    passing = torch.cat((rows, 16 + torch.arange(appended)))
    skipping = [row for row in range(16) if row not in rows]
    assert [each.shape[1] for each in inputs] == [16 + appended, 4 + appended, 4 + appended, 16 + appended]
    torch.testing.assert_close(inputs[1], outputs[0][:, passing])
    torch.testing.assert_close(inputs[3][:, passing], outputs[2])
    assert torch.equal(inputs[3][:, skipping], outputs[0][:, skipping])
    # A permutation of the tokens that passes with its positions gives the permuted outputs.
    order = torch.tensor([3, 0, 2, 1])
    network.training_forward(x, t, c, route=Route(1, 3, rows[order]))
    torch.testing.assert_close(outputs[6][:, :4], outputs[2][:, :4][:, order], rtol=1e-5, atol=1e-5)


def objective(**settings) -> TrainingObjective:
    routing = TokenRouting(TokenRoutingConfig(), 8, 5)
    diffusion, codec = FlowMatchingConfig().build(), PixelsConfig().build()
    return TrainingObjective(diffusion, codec, False, 0.0, (), 5, None, patch_size=2, token_routing=routing, **settings)


@pytest.mark.parametrize("dual", [False, True])
def test_the_loss_does_not_depend_on_the_parts_of_a_batch(dual):
    network = trained_network()
    work = objective(**({"token_times": DualTokenTimes()} if dual else {}))
    x0, c, position = torch.rand(8, 3, 8, 8), condition(network, 8), torch.arange(8, 16)
    whole, _ = compute_loss(network, x0, c, position, work)
    parts = [compute_loss(network, x0[r], c[r], position[r], work)[0] for r in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat([part.mse for part in parts]), whole.mse)
    whole.total.sum().backward()
    assert all(parameter.grad is not None for parameter in network.blocks.parameters())


def test_steps_and_seeds_have_routes_of_their_own_and_all_tokens_skip_equally_often():
    network, counts = trained_network(), torch.zeros(16)
    for step in range(2000):
        route = TokenRouting(TokenRoutingConfig(), 8, 5).route(network, 16, torch.arange(8 * step, 8 * step + 8))
        assert (route.start, route.end, len(route.rows)) == (1, 3, 8)
        counts[route.rows] += 1
    torch.testing.assert_close(counts / 2000, torch.full((16,), 0.5), rtol=0, atol=0.05)
    other = TokenRouting(TokenRoutingConfig(), 8, 6).route(network, 16, torch.arange(8))
    assert not torch.equal(
        other.rows, TokenRouting(TokenRoutingConfig(), 8, 5).route(network, 16, torch.arange(8)).rows
    )


def test_the_multiply_adds_of_training_are_those_of_the_modules_that_run():
    """Counted by PyTorch, which does not know the fused attention of the CPU."""
    network = trained_network(AdaLNZero())
    x, t, c = torch.randn(1, 3, 8, 8), torch.rand(1), condition(network, 1)
    route = Route(1, 3, torch.arange(8))
    counts = []
    for each in (None, route):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network.training_forward(x, t, c, route=each)
        counts.append(counter.get_total_flops() / 2)
    saved = network.macs() - training_macs(TrainingConfig(token_routing=TokenRoutingConfig()), network)
    assert saved == counts[0] - counts[1] > 0


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"token_routing": {"start": 3, "end": 3}}, "has start 3 and end 3"),
        ({"token_routing": {"end": 9}}, "end at most the depth, 4"),
        ({"token_routing": {}, "alignment": {"kind": "self", "block": 2}}, "set training.alignment.block=1"),
        ({"token_routing": {"fraction": 1}}, "training.token_routing.fraction"),
    ],
)
def test_what_cannot_be_routed_is_an_error(training, message, tmp_path):
    network = {"patch_size": 2, "depth": 4, "hidden_size": 24, "num_heads": 2}
    settings = {"run_dir": str(tmp_path), "data": "digits", "network": network, "training": training}
    with pytest.raises(TesseraError, match=message):
        train(read_recipe(settings))


def test_a_network_trains_with_routes_and_features(tmp_path):
    run = train(
        read_recipe(
            {
                "run_dir": str(tmp_path),
                "data": "digits",
                "network": {"patch_size": 2, "depth": 4, "hidden_size": 24, "num_heads": 2, "block": "rope-swiglu"},
                "diffusion": "flow",
                "training": {
                    "token_routing": {}, "alignment": "self", "token_times": "dual", "steps": 2,
                    "global_batch_size": 8, "sample_every": 2, "sample_seeds": 1, "device": "cpu", "num_workers": 1,
                },
            }
        )
    )  # fmt: skip
    assert (run / "checkpoints" / "step-000000002").is_dir()
