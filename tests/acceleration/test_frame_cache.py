"""A causal network that continues a clip from keys and values of earlier frames."""

import pytest
import torch

from tessera.acceleration.frame_cache import EarlierFrames, FrameCache
from tessera.conditioning import Condition
from tessera.models import DiTConfig

FRAMES, LABEL = 6, torch.tensor([0, 2])
MODES = ["causal", {"kind": "causal", "past": 2}, "previous", {"kind": "previous", "first": True}, "spatial"]
BLOCKS = ["adaln", "adaln-zero", "adaln-single", "rope-swiglu", {"kind": "rope-swiglu", "positions": "sincos"}]


def config(**changes) -> DiTConfig:
    sizes = {"patch_size": 2, "depth": 3, "hidden_size": 32, "num_heads": 2, "num_classes": 3}
    return DiTConfig.model_validate({"input_size": (FRAMES, 4, 6), "in_channels": 2, **sizes, **changes})


@torch.no_grad()
@pytest.mark.parametrize("attention", MODES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("chunks", [[1] * FRAMES, [2, 1, 3], [FRAMES - 1, 1]], ids=str)
def test_chunk_by_chunk_is_the_whole_network_with_its_mask(randomise, attention, block, chunks):
    """Earlier frames are clean, at time 0; the frames of the chunk are noisy, at another time."""
    network = randomise(config(attention=attention, block=block).build())
    cache, state, start = FrameCache(network), EarlierFrames(), 0
    clean = torch.randn(2, 2, FRAMES, 4, 6, generator=torch.Generator().manual_seed(0))
    noisy = torch.randn(2, 2, FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))
    for count in chunks:
        chunk, times = slice(start, start + count), torch.tensor([[300.0], [700.0]])
        x, t = clean.clone(), torch.full((2, FRAMES), -1.0)
        x[:, :, chunk], t[:, chunk] = noisy[:, :, chunk], times
        whole = network(x, t, Condition(LABEL))[:, :, chunk]
        part, same = cache.evaluate(noisy[:, :, chunk], times[:, 0], Condition(LABEL), state)
        assert same is state
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
        state = cache.finish(clean[:, :, chunk], torch.full((2,), -1.0), Condition(LABEL), state)
        start += count
        assert state.frames == start


@pytest.mark.parametrize(
    ("changes", "is_causal"),
    [
        ({"attention": "causal"}, True),
        ({"attention": "spatial"}, True),
        ({"attention": "full"}, False),
        ({"attention": "alternating"}, False),
        ({"attention": "window"}, False),
        ({"attention": "causal", "temporal_attention": True}, False),
        ({"attention": "causal", "block": "cross-attention"}, False),
        ({"attention": "causal", "temporal_patch_size": 2}, False),
    ],
)
@torch.no_grad()
def test_which_networks_are_causal(randomise, changes, is_causal):
    """By the definition, too: whether a change of the last frame, or of its time, changes any other."""
    settings = config(**changes)
    assert settings.is_causal == is_causal
    network = randomise(settings.build())
    x, per_frame = torch.randn(2, 2, FRAMES, 4, 6), settings.frame_times_problem() is None
    t = torch.full((2, FRAMES) if per_frame else (2,), 300.0)
    other, later = x.clone(), t.clone()
    other[:, :, -1] += 1
    if per_frame:
        later[:, -1] += 100
    change = (network(other, later, Condition(LABEL)) - network(x, t, Condition(LABEL)))[:, :, :-1].abs().max()
    assert (change < 1e-5) == is_causal
