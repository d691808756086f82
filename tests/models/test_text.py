"""Text in the rope-swiglu block: keys beside those of the image, cross-attention, tokens in the sequence."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.models.dit import DiT, DiTConfig
from tessera.models.pixart import PixArtConfig
from tessera.settings import validate

DESIGNS = ("keys", "cross", "sequence")
each_design = pytest.mark.parametrize("text", DESIGNS)
SIZES = {
    "input_size": (6, 8), "in_channels": 2, "out_channels": 2, "num_classes": 0, "patch_size": 2, "depth": 3,
    "hidden_size": 32, "num_heads": 2,
}  # fmt: skip
TOKENS, CHANNELS, VOCABULARY = 5, 12, 20


def build(randomise, text: str, ids: bool = True, block: dict | None = None, **changes) -> DiT:
    encoder = {"vocabulary_size": VOCABULARY} if ids else {"text_channels": CHANNELS}
    block = {"kind": "rope-swiglu", "text": text, **(block or {})}
    sizes = {**SIZES, **encoder, "text_tokens": TOKENS, "block": block, **changes}
    return randomise(validate(DiTConfig, sizes, "network").build())


def texts(ids: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 3 and 5 tokens, and an unconditional row."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]], dtype=torch.bool)
    if ids:
        text = torch.randint(VOCABULARY, (3, TOKENS), generator=generator)
        return torch.where(torch.tensor([[False], [False], [True]]), -1, text), mask
    text = torch.randn(3, TOKENS, CHANNELS, generator=generator)
    text[2] = torch.nan
    return text, mask


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 2, 6, 8, generator=generator), torch.tensor([20.0, 500.0, 900.0])


@each_design
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeddings"])
@torch.no_grad()
def test_masked_tokens_change_no_bit_and_their_number_only_the_rounding(randomise, text, ids):
    network, (x, t), (tokens, mask) = build(randomise, text, ids), inputs(), texts(ids)
    output = network(x, t, Condition(text=tokens, text_mask=mask))
    assert output.isfinite().all()
    changed = tokens.clone()
    changed[0, 3:] = 7 if ids else torch.nan
    assert torch.equal(network(x, t, Condition(text=changed, text_mask=mask)), output)
    short = network(x[:1], t[:1], Condition(text=tokens[:1, :3], text_mask=mask[:1, :3]))
    torch.testing.assert_close(short, output[:1], rtol=1e-4, atol=1e-5)
    all_valid = network(x[1:2], t[1:2], Condition(text=tokens[1:2]))  # without a mask
    torch.testing.assert_close(all_valid, output[1:2], rtol=1e-4, atol=1e-5)


@each_design
@torch.no_grad()
def test_each_row_has_its_own_text(randomise, text):
    network, (x, t), (tokens, mask) = build(randomise, text), inputs(), texts()
    output = network(x, t, Condition(text=tokens, text_mask=mask))
    order = torch.tensor([2, 0, 1])
    permuted = network(x[order], t[order], Condition(text=tokens[order], text_mask=mask[order]))
    torch.testing.assert_close(permuted, output[order], rtol=1e-4, atol=1e-5)
    other = network(x, t, Condition(text=tokens[torch.tensor([1, 0, 2])], text_mask=mask[torch.tensor([1, 0, 2])]))
    change = (other - output).abs().amax(dim=(1, 2, 3))
    assert (change[:2] > 1e-3).all()
    assert change[2] < 1e-5
    swapped = tokens.clone()
    swapped[1, :2] = tokens[1, [1, 0]]
    order_matters = network(x, t, Condition(text=swapped, text_mask=mask))
    assert (order_matters[1] - output[1]).abs().max() > 1e-4


@each_design
@torch.no_grad()
def test_an_unconditional_row_depends_on_no_token_and_no_mask(randomise, text):
    network, (x, t), (tokens, mask) = build(randomise, text), inputs(), texts()
    condition = Condition(text=tokens, text_mask=mask)
    null = network(x, t, condition.null())
    assert (null - network(x, t, condition)).abs().amax(dim=(1, 2, 3))[:2].min() > 1e-4
    other = Condition(text=torch.full((3, 2), -1), text_mask=torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(network(x, t, other), null, rtol=1e-4, atol=1e-5)
    nothing = Condition(text=tokens, text_mask=torch.zeros_like(mask))  # a row without a valid token
    torch.testing.assert_close(network(x, t, nothing), null, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "is_equal"), [("keys", True), ("sequence", True), ("cross", False)])
@torch.no_grad()
def test_without_text_attention_is_that_of_the_image_alone(randomise, text, is_equal):
    """Cross-attention attends to a learned token instead."""
    network, (x, t), (tokens, mask) = build(randomise, text), inputs(), texts()
    plain = DiTConfig(**{**SIZES, "block": {"kind": "rope-swiglu"}}).build().eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    null = network(x, t, Condition(text=tokens, text_mask=mask).null())
    assert torch.allclose(null, plain(x, t, Condition()), rtol=1e-4, atol=1e-5) == is_equal


@pytest.mark.parametrize(("text", "offset"), [("cross", False), ("keys", True)])
@torch.no_grad()
def test_a_new_text_network_with_weights_of_one_without_text_is_the_same_function(randomise, text, offset):
    plain = randomise(DiTConfig(**{**SIZES, "block": {"kind": "rope-swiglu"}}).build())
    block = {"kind": "rope-swiglu", "text": text, "text_offset": offset}
    network = (
        DiTConfig(**{**SIZES, "block": block, "vocabulary_size": VOCABULARY, "text_tokens": TOKENS}).build().eval()
    )
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert all("text" in name or "cross_attn" in name for name in missing)
    assert not unexpected
    (x, t), (tokens, mask) = inputs(), texts()
    output = network(x, t, Condition(text=tokens, text_mask=mask))
    torch.testing.assert_close(output, plain(x, t, Condition()), rtol=0, atol=2e-6)


@each_design
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeddings"])
@torch.no_grad()
def test_prepared_text_gives_the_same_output(randomise, text, ids):
    network, (x, t), (tokens, mask) = build(randomise, text, ids), inputs(), texts(ids)
    condition = Condition(text=tokens, text_mask=mask)
    prepared = network.prepare(condition)
    torch.testing.assert_close(network(x, t, prepared), network(x, t, condition), rtol=1e-5, atol=1e-6)
    rows = Condition.cat((prepared, network.prepare(condition.null())))[torch.tensor([1, 3, 0])]
    assert rows.prepared is not None
    expected = torch.cat((network(x, t, condition), network(x, t, condition.null())))[[1, 3, 0]]
    x, t = x[torch.tensor([1, 0, 0])], t[torch.tensor([1, 0, 0])]
    torch.testing.assert_close(network(x, t, rows), expected, rtol=1e-4, atol=1e-5)


@each_design
def test_gradients_reach_the_text_and_every_weight(randomise, text):
    network, (x, t), (tokens, mask) = build(randomise, text, block={"text_offset": text == "keys"}), inputs(), texts()
    network(x, t, Condition(text=tokens, text_mask=mask)).square().mean().backward()
    without = [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None]
    assert not without
    assert network.text_embedder.embedding.weight.grad.abs().sum(dim=1)[tokens[0, :3]].min() > 0


@each_design
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeddings"])
def test_macs_are_those_that_pytorch_counts(randomise, text, ids):
    network = build(randomise, text, ids).to("meta")
    x, t, tokens = (each[:1].to("meta") for each in (*inputs(), texts(ids)[0]))
    with FlopCounterMode(display=False) as counter:
        network(x, t, Condition(text=tokens, text_mask=torch.empty(1, TOKENS, dtype=torch.bool, device="meta")))
    assert network.macs() == counter.get_total_flops() // 2


@pytest.mark.parametrize("text", ["keys", "cross"])
@torch.no_grad()
def test_frames_with_their_own_times(randomise, text):
    network, (tokens, mask) = build(randomise, text, input_size=(3, 6, 8), num_heads=2), texts()
    x, condition = torch.randn(3, 2, 3, 6, 8), Condition(text=tokens, text_mask=mask)
    t = torch.tensor([[1.0, 500.0, 900.0]]).expand(3, 3)
    output = network(x, t, condition)
    assert (network(x, t.flip(1), condition) - output).abs().max() > 1e-3
    equal = network(x, torch.full((3, 3), 500.0), condition)
    torch.testing.assert_close(equal, network(x, torch.full((3,), 500.0), condition), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_frames_with_their_own_times_and_text_in_the_sequence_are_an_error(randomise):
    network, (tokens, mask) = build(randomise, "sequence", input_size=(3, 6, 8)), texts()
    t = torch.tensor([[1.0, 500.0, 900.0]]).expand(3, 3)
    with pytest.raises(ValueError, match="need text=keys or text=cross"):
        network(torch.randn(3, 2, 3, 6, 8), t, Condition(text=tokens, text_mask=mask))


def test_settings_and_inputs_that_do_not_fit(randomise):
    with pytest.raises(TesseraError, match="text_offset has no effect with text=cross"):
        build(randomise, "cross", block={"text_offset": True})
    with pytest.raises(TesseraError, match="exclude each other"):
        build(randomise, "keys", text_channels=4)
    with pytest.raises(ValueError, match="conditioned on text"):
        build(randomise, "keys")(*inputs(), Condition())
    x, t = inputs()
    with pytest.raises(ValueError, match="the condition text has 2 rows"):
        build(randomise, "keys")(x, t, replace(Condition(), text=texts()[0][:2]))


@torch.no_grad()
def test_a_pixart_may_embed_ids_itself(randomise):
    sizes = {**SIZES, "text_channels": 0, "vocabulary_size": VOCABULARY, "text_tokens": TOKENS, "position_base": 4}
    network = randomise(validate(PixArtConfig, sizes, "network").build())
    (x, t), (tokens, mask) = inputs(), texts()
    condition = Condition(text=tokens, text_mask=mask)
    output = network(x, t, condition)
    changed = tokens.clone()
    changed[0, 3:] = 7
    assert torch.equal(network(x, t, Condition(text=changed, text_mask=mask)), output)
    torch.testing.assert_close(network(x, t, network.prepare(condition)), output, rtol=1e-5, atol=1e-6)
    assert (network(x, t, condition.null()) - output).abs().amax(dim=(1, 2, 3))[:2].min() > 1e-4
    network = network.to("meta")
    x, t, tokens = (each[:1].to("meta") for each in (x, t, tokens))
    with FlopCounterMode(display=False) as counter:
        network(x, t, Condition(text=tokens, text_mask=torch.empty(1, TOKENS, dtype=torch.bool, device="meta")))
    assert network.macs() == counter.get_total_flops() // 2
