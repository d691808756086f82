"""Given frames, schedules of frames, clips longer than those of the training, and guidance by the frames."""

import numpy as np
import pytest
import torch

from tessera import generation
from tessera.errors import TesseraError
from tessera.generation import SampleRequest
from tessera.generation.pipeline import ContinuousSampler, generate_steps
from tessera.sampling import SAMPLERS

FRAMES = 5
CAUSAL = [
    "causal",
    {"kind": "causal", "past": 2},
    "previous",
    {"kind": "previous", "first": True, "own": True},
    "spatial",
]


@pytest.fixture
def clip_model(make_model):
    def make(attention="full", diffusion=None, **changes):
        return make_model({"input_size": (FRAMES, 8, 8), "attention": attention, **changes}, diffusion)

    return make


def pixels(count: int, rows: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (count, 8, 8, 1) if rows is None else (rows, count, 8, 8, 1)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def latents(model, *inputs, **options) -> torch.Tensor:
    *_, last = generate_steps(model, *inputs, **options)
    return last.x


PLACES = pytest.mark.parametrize("indices", [[0], [-1], [0, 4], [0, 1, 2], [3, 1]], ids=str)
SCHEDULES = [
    "together",
    "pyramid",
    "autoregressive",
    {"kind": "autoregressive", "chunk": 2},
    {"kind": "sliding", "window": 3},
]


@PLACES
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("network", [{}, {"attention": "causal", "block": "rope-swiglu"}, {"kind": "unet"}], ids=str)
def test_given_frames_return_unchanged(make_model, schedule, indices, network):
    model, frames = make_model({"input_size": (FRAMES, 8, 8), **network}), pixels(len(indices))
    options = {"num_steps": 3, "frame_schedule": schedule}
    clips = generation.generate(model, [0, 1], [5, 6], given_frames=frames, given_indices=indices, **options)
    assert clips.shape == (2, FRAMES, 8, 8, 1)
    assert (clips[:, indices] == frames).all()
    others = [frame for frame in range(FRAMES) if frame not in [index % FRAMES for index in indices]]
    assert (clips[0, others] != clips[1, others]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    "process", [{}, {"kind": "flow", "prediction": "velocity"}, {"prediction": "epsilon"}], ids=str
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_frames_take_the_steps_of_a_clip(clip_model, sampler, process):
    """A network that sees single frames: the others are as without given frames, with every solver."""
    if sampler == "ancestral" and process.get("kind") == "flow":
        pytest.skip("ancestral sampling is for Gaussian diffusion")
    if sampler == "jump" and process.get("prediction") == "epsilon":
        pytest.skip("students predict velocities")
    sizes = {"out_channels": 1 if process.get("kind") == "flow" else 2, "step_size_embedding": sampler == "jump"}
    model = clip_model("spatial", process, **sizes)
    options = {"classes": [1], "seeds": [3], "sampler": sampler, "num_steps": 6}
    plain = latents(model, **options)
    given = latents(model, **options, given_frames=pixels(2), given_indices=[0, 3])
    torch.testing.assert_close(given[:, :, [1, 2, 4]], plain[:, :, [1, 2, 4]])
    exact = torch.from_numpy(pixels(2)).movedim(-1, 0)[None].float() / 127.5 - 1
    torch.testing.assert_close(given[:, :, [0, 3]], exact)


def test_other_frames_depend_on_given_frames(clip_model):
    model = clip_model()
    one, other = (
        generation.generate(model, [1], [3], given_frames=pixels(1, seed=seed), given_indices=[2]) for seed in (1, 2)
    )
    others = [0, 1, 3, 4]
    assert (one[:, others] != other[:, others]).any(axis=(0, 2, 3, 4)).all()


def test_the_network_gets_given_frames_clean_at_time_0(clip_model):
    model, frames = clip_model(), pixels(2)
    clean = torch.from_numpy(frames).movedim(-1, 0).float() / 127.5 - 1
    model.network.embed_condition = _recorded(model.network.embed_condition, inputs := [])
    model.network.embed_patches = _recorded(model.network.embed_patches, tokens := [])
    generation.generate(model, [1], [3], given_frames=frames, given_indices=[0, 4], guidance_scale=3.0)
    times = [args[0] for args in inputs if args[0].ndim == 2]
    assert len(times) == 6
    assert all((t[:, [0, 4]] == -1).all() and (t[:, 1:4] >= 0).all() for t in times)
    assert all(torch.equal(args[0][row][:, [0, 4]], clean) for args in tokens for row in range(2))


def _recorded(function, calls):
    def call(*args, **options):
        calls.append(args)
        return function(*args, **options)

    return call


def test_a_clip_does_not_depend_on_its_batch(clip_model):
    model, frames = clip_model(), pixels(2, rows=3)
    options = {"guidance_scale": 2.0, "given_indices": [0, -1]}
    together = generation.generate(model, [0, 1, 2], [5, 6, 7], given_frames=frames, batch_size=2, **options)
    alone = generation.generate(model, [1], [6], given_frames=frames[1], **options)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    selected = SampleRequest([5, 6, 7], {"label": [0, 1, 2]}, given_frames=frames, given_indices=[0, -1]).select([1])
    assert (selected.given_frames == frames[1:2]).all()


# Schedules


def test_one_chunk_of_all_frames_is_a_clip_at_once(clip_model):
    model = clip_model("causal")
    options = {"classes": [1], "seeds": [3], "guidance_scale": 2.0}
    plain = latents(model, **options)
    for cache in (False, True):
        schedule = {"kind": "autoregressive", "chunk": FRAMES, "cache": cache}
        torch.testing.assert_close(latents(model, **options, frame_schedule=schedule), plain, rtol=1e-4, atol=1e-5)
    sliding = {"kind": "sliding", "window": FRAMES}
    torch.testing.assert_close(latents(model, **options, frame_schedule=sliding), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", CAUSAL, ids=str)
@pytest.mark.parametrize("block", ["adaln-zero", "rope-swiglu"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpm++", "guidance_scale": 2.0},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"sampler": "heun"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_roll_out_with_a_cache_is_the_whole_network_with_a_mask(clip_model, attention, block, options, chunk):
    """Longer than the clips of the training, and from given frames, too."""
    model = clip_model(attention, block=block)
    options = {"classes": [1, 2], "seeds": [3, 4], "num_steps": 3, "size": (7, 8, 8), **options}
    for frames in ({}, {"given_frames": pixels(3), "given_indices": [0, 1, 4]}):
        whole, cached = (
            latents(
                model, **options, **frames, frame_schedule={"kind": "autoregressive", "chunk": chunk, "cache": cache}
            )
            for cache in (False, True)
        )
        assert whole.shape[2] == 7
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


def test_a_roll_out_with_a_cache_computes_new_frames_alone(clip_model):
    model, sizes = clip_model("causal"), []
    model.network.embed_patches = _recorded(model.network.embed_patches, sizes)
    generation.generate(model, [1], [3], num_steps=2, frame_schedule="autoregressive")
    assert [args[0].shape[2] for args in sizes] == [1] * (2 * FRAMES + FRAMES - 1)


def test_a_cache_keeps_the_frames_that_are_attended_to(clip_model):
    model, pasts = clip_model({"kind": "causal", "past": 2}), []
    model.network.run_blocks = _recorded(model.network.run_blocks, calls := [])
    generation.generate(model, [1], [3], num_steps=1, frame_schedule="autoregressive", size=(7, 8, 8))
    pasts = [args[1].past[0][0].shape[2] // 16 for args in calls if args[1].past]
    assert max(pasts) == 2
    assert len(pasts) == 11


LONG = [{"kind": "sliding"}, {"kind": "sliding", "window": 4, "overlap": 1}, {"kind": "autoregressive", "window": 3}]


@pytest.mark.parametrize("schedule", LONG, ids=str)
def test_longer_than_the_clips_of_the_training(clip_model, schedule):
    """The network never sees more frames than a window."""
    model = clip_model()
    model.network.embed_patches = _recorded(model.network.embed_patches, calls := [])
    options = {"given_frames": pixels(2), "given_indices": [0, 11]}
    clip = generation.generate(model, [1], [3], num_steps=2, size=(12, 8, 8), frame_schedule=schedule, **options)
    assert clip.shape == (1, 12, 8, 8, 1)
    assert (clip[0, [0, 11]] == pixels(2)).all()
    assert {args[0].shape[2] for args in calls} == {schedule.get("window", FRAMES)}


def test_steps_are_counted_over_all_stages(clip_model):
    states = list(generate_steps(clip_model("causal"), [1], [3], num_steps=3, frame_schedule="autoregressive"))
    assert [state.step for state in states] == list(range(16))
    assert {state.num_steps for state in states} == {15}


# Guidance by the frames


def test_guidance_by_the_frames(clip_model):
    """Against the formula, with the network called by hand: history guidance beside that of the class."""
    model, frames = clip_model(), pixels(2)
    options = {"given_frames": frames, "given_indices": [0, 3], "num_steps": 1, "sampler": "euler"}
    scales = {"guidance_scale": 3.0, "guidance_scales": {"frames": 2.5}}
    result = latents(model, [1], [4], **options, **scales)
    start = next(iter(generate_steps(model, [1], [4], **options))).x
    noise = next(iter(generate_steps(model, [1], [4], num_steps=1))).x
    t = torch.full((1, FRAMES), 999.0)
    t[:, [0, 3]] = -1
    masked = start.clone()
    masked[:, :, [0, 3]] = noise[:, :, [0, 3]]
    condition = model.config.network.condition_type([1])
    with torch.no_grad():
        cond = model.network(start, t, condition)[:, :1]
        unconditional = model.network(start, t, condition.null())[:, :1]
        without_frames = model.network(masked, torch.full((1, FRAMES), 999.0), condition)[:, :1]
    x0 = cond + 2.0 * (cond - unconditional) + 1.5 * (cond - without_frames)
    torch.testing.assert_close(result[:, :, [1, 2, 4]], x0[:, :, [1, 2, 4]], rtol=1e-4, atol=1e-4)


def test_guidance_by_frames_that_were_sampled(clip_model):
    model = clip_model()
    plain, guided = (
        latents(model, [1], [4], frame_schedule="autoregressive", num_steps=2, guidance_scales={"frames": scale})
        for scale in (1.0, 2.0)
    )
    torch.testing.assert_close(guided[:, :, 0], plain[:, :, 0])
    assert (guided[:, :, 1:] - plain[:, :, 1:]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3


# Together with other requests


@pytest.mark.parametrize("schedule", ["together", "pyramid"])
def test_continuous_batches(clip_model, schedule):
    model, frames = clip_model(), pixels(2)
    options = {"given_frames": frames, "given_indices": [0, 4], "settings": {"frame_schedule": schedule}}
    requests = [SampleRequest([5], {"label": [1]}, **options), SampleRequest([6], {"label": [2]})]
    sampler, results = ContinuousSampler(model), {}
    sampler.add(requests[0], ["given"])
    sampler.step()
    sampler.add(requests[1], ["plain"])
    while len(results) < 2:
        results |= sampler.step()
    for request, name in zip(requests, ("given", "plain")):
        alone = latents(model, [request.classes[0]], list(request.seeds), **(
            {"given_frames": frames, "given_indices": [0, 4], "frame_schedule": schedule} if name == "given" else {}
        ))  # fmt: skip
        torch.testing.assert_close(results[name], alone[0], rtol=1e-4, atol=1e-4)


def test_stages_are_sampled_alone(clip_model):
    sampler = ContinuousSampler(clip_model())
    request = SampleRequest([5], {"label": [1]}, settings={"frame_schedule": "autoregressive"})
    with pytest.raises(TesseraError, match="samples a clip in 5 stages, and so alone"):
        sampler.add(request, ["a"])


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given_frames": pixels(1), "given_indices": [5]}, "given_indices has 5, and the clip has frames 0 to 4"),
        ({"given_frames": pixels(2), "given_indices": [0, -5]}, "name a frame of 5 twice"),
        ({"given_frames": pixels(2), "given_indices": [0]}, "given_frames has 2 frames, and given_indices 1 numbers"),
        ({"given_frames": pixels(1)}, "given_frames has 1 frames, and given_indices 0 numbers"),
        ({"given_indices": [0]}, "need the frames: pass given_frames"),
        ({"given_frames": pixels(5), "given_indices": range(5)}, "nothing is left to sample"),
        ({"given_frames": pixels(1)[:, :4], "given_indices": [0]}, r"given_frames are uint8 \[B, F, 8, 8, 1\]"),
        ({"given_frames": pixels(1) / 255, "given_indices": [0]}, "got float64"),
        ({"given_frames": pixels(1)[0], "given_indices": [0]}, r"got uint8 \[8, 8, 1\]"),
        ({"given_frames": pixels(1), "given_indices": [0], "init_image": pixels(5)[None]}, "exclude each other"),
        ({"frame_schedule": "pyramid", "sampler": "dpm++"}, "pyramid needs a sampler that does not use earlier steps"),
        ({"guidance_scales": {"frames": 2.0}}, "guidance_scales.frames has no effect"),
        ({"frame_schedule": {"kind": "autoregressive", "chunk": 6}}, "chunk is 6, more than the 5 frames"),
        ({"frame_schedule": {"kind": "sliding", "overlap": 5}, "size": (9, 8, 8)}, "overlap is 5 of a window of 5"),
    ],
)  # fmt: skip
def test_impossible_requests(clip_model, options, message):
    with pytest.raises(TesseraError, match=message):
        generation.generate(clip_model(), [0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given_frames": pixels(1), "given_indices": [0]}, "given_frames needs a network for clips"),
        ({"frame_schedule": "sliding"}, "frame_schedule=sliding needs a network for clips"),
        ({"guidance_scales": {"frames": 2.0}}, "guidance_scales has frames"),
    ],
)
def test_image_models(tiny_model, options, message):
    with pytest.raises(TesseraError, match=message):
        generation.generate(tiny_model, [0], **options)
