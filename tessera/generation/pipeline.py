"""`generate`: network, diffusion process, condition and codec together produce images or clips.

Shapes: B images, C latent channels, T frames, H W height and width.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tessera import runtime
from tessera.acceleration.first_block_cache import CacheStats
from tessera.acceleration.frame_cache import EarlierFrames
from tessera.conditioning import Condition
from tessera.diffusion.process import Prediction
from tessera.errors import TesseraError
from tessera.generation.denoiser import AutocastFrameCache, BatchSettings, Terms, build_denoiser, takes_frame_cache
from tessera.generation.editing import edit_source, given_latents
from tessera.generation.request import FRAMES, SampleRequest, SampleRows, latent_size, sampling_config
from tessera.model import Model
from tessera.sampling import (
    ContinuousBatch,
    DenoiserRows,
    FrameSolver,
    MaskedMemory,
    MaskedSolver,
    RowDenoiser,
    RowState,
    SampleState,
    Stage,
    Stepper,
    Together,
    given_mask,
    sample_loop,
    sampling_noise,
    timestep_grid,
)
from tessera.sampling.loop import not_finite

REQUEST_FIELDS = {each.name for each in fields(SampleRequest)} - {"seeds", "condition", "settings", "policy"}


def make_request(
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    condition: dict[str, Sequence[Any]] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompts: Sequence[str] | None = None,
    **options: Any,
) -> SampleRequest:
    """The request of keyword arguments: fields of SampleRequest by name, others are changes of sampling settings.

    classes and prompts: the same as condition={"label": classes, "text": prompts}; negative_prompts: the same as
    negative={"text": negative_prompts}.
    """
    condition = dict(condition or {}) | ({} if classes is None else {"label": classes})
    condition |= {} if prompts is None else {"text": prompts}
    if negative_prompts is not None:
        options["negative"] = {**options.get("negative", {}), "text": negative_prompts}
    named = {name: value for name, value in options.items() if name in REQUEST_FIELDS}
    settings = {name: value for name, value in options.items() if name not in REQUEST_FIELDS}
    return SampleRequest(seeds, condition, settings=settings, **named)


@dataclass(frozen=True)
class _Start:
    """Everything that the first step of some rows needs."""

    x: Tensor
    times: Tensor  # [n + 1]
    solver: Stepper
    memory: Any
    grid: tuple[int, ...]
    noise: Tensor  # like x
    stages: list[Stage]  # of a clip whose frames have times of their own; otherwise empty


def _start(model: Model, rows: SampleRows) -> _Start:
    config, network, device = rows.config, model.config.network, model.device
    source = edit_source(model, rows)
    size = latent_size(model, rows.request.size) if source is None else tuple(source.x0.shape[2:])
    tokens = math.prod(network.token_grid(size))
    times = timestep_grid(config.timestep_spacing, config.num_steps, model.diffusion, tokens)
    noise = sampling_noise(rows.seed, torch.zeros_like(rows.seed), (network.in_channels, *size)).to(device)
    x, solver, memory = noise, config.sampler, None
    if source is not None:
        times = source.times_from_strength(times)
        x = source.initial_state(model.diffusion, noise, times[0])
        if source.mask is not None:
            solver, memory = MaskedSolver(config.sampler), MaskedMemory(source, noise)
    stages, frames = [], given_latents(model, rows)
    if len(size) == 3 and (frames is not None or not isinstance(config.frame_schedule, Together)):
        is_given = given_mask(size[0], () if frames is None else frames[1])
        stages = config.frame_schedule.stages(times, is_given, network.input_size[0])
        if frames is not None:
            x = x.index_copy(2, torch.tensor(frames[1], device=device), frames[0])
    return _Start(x, times, solver, memory, network.token_grid(size), noise, stages)


@torch.no_grad()
def sample_steps(model: Model, rows: SampleRows, cache_stats: CacheStats | None = None) -> Iterator[SampleState]:
    """Sample rows of a request as one batch, and yield every state."""
    device, config, start = model.device, rows.config, _start(model, rows)
    terms = Terms.of(config, rows.scale, rows.request.guidance_model)
    conditions = terms.conditions(model, rows.condition.to(device), rows.weak.to(device))
    frame_cache, grid = bool(start.stages) and takes_frame_cache(model, config, terms), start.grid
    settings = BatchSettings(
        config,
        model.diffusion.model_time(start.times[:-1]).to(device),
        (len(start.stages[0].sampled), *grid[1:]) if frame_cache else grid,
        len(rows),
        runtime.autocast_dtype(rows.request.precision, device),
        cache_stats,
        frame_cache,
    )
    denoiser = build_denoiser(model, conditions, terms, settings)
    noise_calls = 0

    def sample(
        solver: Stepper, frames: slice, x: Tensor, times: Tensor, memory: Any = None, states: Any = None
    ) -> Iterator[SampleState]:
        """The steps of x, which has these frames of the clip."""

        def noise() -> Tensor:
            nonlocal noise_calls
            noise_calls += 1
            return sampling_noise(rows.seed, torch.full_like(rows.seed, noise_calls), x.shape[1:]).to(device)

        frame_noise = terms.frame_noise(start.noise[:, :, frames])
        inputs = DenoiserRows.build(conditions, guidance, denoiser.networks, x, config.clipping, frame_noise)
        inputs = inputs if states is None else replace(inputs, states=states)
        return sample_loop(solver, _BatchDenoiser(denoiser, inputs), x, times, noise, memory)

    guidance = terms.guidance(config, rows.scale)
    if not start.stages:
        yield from sample(start.solver, slice(None), start.x, start.times, start.memory)
        return
    x, num_steps = start.x, sum(len(stage.times) - 1 for stage in start.stages)
    yield SampleState(x, float(start.times[0]), 0, num_steps)
    earlier = _EarlierFrames(denoiser, conditions) if frame_cache else None
    step = 0
    for stage in start.stages:
        if earlier is not None:
            frames = slice(stage.sampled[0], stage.sampled[-1] + 1)
            part, states = x[:, :, frames], earlier.states(x[:, :, : frames.start])
            steps = sample(config.sampler, frames, part, start.times, states=states)
        else:
            frames = slice(stage.start, stage.stop)
            steps = sample(FrameSolver(config.sampler), frames, x[:, :, frames], stage.times)
        for state in islice(steps, 1, None):
            step += 1
            x = torch.cat((x[:, :, : frames.start], state.x, x[:, :, frames.stop :]), dim=2)
            yield SampleState(x, state.t, step, num_steps)


class _EarlierFrames:
    """Keys and values of the finished frames of a clip, for each condition."""

    def __init__(self, denoiser: RowDenoiser, conditions: Sequence[Condition]) -> None:
        self.denoiser, self.conditions, self.frames = denoiser, conditions, 0
        self._states: list[EarlierFrames] = [EarlierFrames()] * len(conditions)

    def states(self, x: Tensor) -> tuple[EarlierFrames, ...]:
        """After the clean frames x [B, C, T, H, W], the first of which are known."""
        if x.shape[2] > self.frames:
            time = self.denoiser.diffusion.model_time(torch.zeros(len(x))).to(x.device)
            networks = zip(self.denoiser.networks, self.conditions, self._states)
            self._states = [
                cast(AutocastFrameCache, network).finish(x[:, :, self.frames :], time, condition, state)
                for network, condition, state in networks
            ]
            self.frames = x.shape[2]
        return tuple(self._states)


class _BatchDenoiser:
    """A `RowDenoiser` with its rows."""

    def __init__(self, denoiser: RowDenoiser, inputs: DenoiserRows) -> None:
        self.denoiser, self.inputs, self.diffusion = denoiser, inputs, denoiser.diffusion

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Prediction:
        prediction, self.inputs = self.denoiser(x, t, self.inputs, s)
        return prediction


def generate_steps(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    cache_stats: CacheStats | None = None,
    **options: Any,
) -> Iterator[SampleState]:
    """Generate one batch step by step and yield every SampleState; `decode(model, state.x)` makes images of one.

    Arguments as for `generate`.
    """
    yield from sample_steps(model, make_request(classes, seeds, **options).resolve(model), cache_stats)


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> np.ndarray:
    """latents [B, C, h, w] -> images uint8 [B, H, W, 3 or 1], or [B, C, T, h, w] -> clips uint8 [B, T, H, W, 3 or 1]"""
    pixels = model.codec.decode(latents.float())
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def generate(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    cache_stats: CacheStats | None = None,
    **options: Any,
) -> np.ndarray:
    """Generate images, uint8 [B, H, W, 3 or 1], or clips, uint8 [B, T, H, W, 3 or 1]: one for each pair of class and
    seed, `batch_size` at a time.

    classes and seeds are paired row by row; either may have one entry for all rows. Each seed determines its image,
    independent of the batch. prompts, negative_prompts: of a model of text, one per row or one for all. condition:
    other inputs by field of the model's condition, one per row or one for all.
    progress is called with (steps done, steps in total). cache_stats: counts what caching saves.

    options: guidance_scale, guidance_model, size, init_image, strength, mask, controls, given_frames, given_indices
    and precision, as described in `SampleRequest`; any other key of SamplingConfig; and `overrides`. Where a mask is 0
    the image is init_image, bit for bit. Raises TesseraError for a request that the model cannot fulfill.
    """
    return generate_request(model, make_request(classes, seeds, **options), batch_size, progress, cache_stats)


def generate_request(
    model: Model,
    request: SampleRequest,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    cache_stats: CacheStats | None = None,
) -> np.ndarray:
    """The images of a request, as `generate` returns them."""
    if batch_size < 1:
        raise TesseraError(f"batch_size is {batch_size}; use 1 or more")
    all_rows = request.resolve(model)
    results, num_batches = [], -(-len(all_rows) // batch_size)
    for number in range(num_batches):
        rows = all_rows[number * batch_size : (number + 1) * batch_size]
        latents = None
        for state in sample_steps(model, rows, cache_stats):
            latents = state.x
            if progress is not None:
                progress(number * state.num_steps + state.step, state.num_steps * num_batches)
        assert latents is not None  # sample_steps always yields
        images = decode(model, latents)
        if rows.frames is not None:
            images[:, request.given_numbers(model)] = rows.frames.numpy()
        if rows.image is not None and rows.mask is not None:
            images = np.where(rows.mask.numpy()[..., None], images, rows.image.numpy())
        results.append(images)
    return np.concatenate(results)


class ContinuousSampler:
    """Samples several requests to one model together. Requests may differ in all but caching, and join at any time.

    Each image is the one that the request has alone, up to the rounding of matrix products of another batch size. All
    requests have the same guidance model, precision and caching.
    """

    def __init__(
        self,
        model: Model,
        guidance_model: Model | None = None,
        precision: runtime.Precision = "float32",
        rows_per_call: int | None = None,
        **settings: Any,
    ) -> None:
        """settings: of sampling, of which only `caching` matters. rows_per_call: see `RowDenoiser`; then an image has
        equal bits, whatever is sampled with it."""
        self.model, self.precision, self.config = model, precision, sampling_config(model, **settings)
        self.terms = Terms.possible(model, guidance_model)
        dtype = runtime.autocast_dtype(precision, model.device)
        batch = BatchSettings(self.config, None, model.config.network.grid, 0, dtype)
        network = model.config.network
        empty = network.condition_type.example(network.condition_fields, 0, network)
        conditions = self.terms.conditions(model, empty, empty.null(network.null_fields))
        self.batch = ContinuousBatch(build_denoiser(model, conditions, self.terms, batch, rows_per_call))

    @torch.no_grad()
    def add(self, request: SampleRequest, names: Sequence[Any]) -> RowState:
        """Rows that join at the next step, each with a name; returns them. Raises TesseraError."""
        rows, model = request.resolve(self.model, joins=True), self.model
        guided = bool((rows.scale != 1).any())
        same = {
            "caching": rows.config.caching == self.config.caching,
            "precision": request.precision == self.precision,
            "guidance model": not guided or request.guidance_model is self.terms.guidance_model,
        }
        if not all(same.values()):
            different = " and ".join(name for name, is_same in same.items() if not is_same)
            raise TesseraError(f"requests that are sampled together need the same {different} as the sampler")
        if len(names) != len(rows):
            raise ValueError(f"{len(rows)} rows need as many names, not {len(names)}")
        if FRAMES in rows.config.guidance_scales:
            raise TesseraError("guidance_scales.frames needs a request that is sampled alone: leave it out")
        start, count = _start(model, rows), len(rows)
        times, solver = start.times, start.solver
        if start.stages:
            if len(start.stages) > 1:
                raise TesseraError(
                    f"frame_schedule={rows.config.frame_schedule.kind} samples a clip in {len(start.stages)} stages, "
                    "and so alone: use together or pyramid"
                )
            times, solver = start.stages[0].times, FrameSolver(rows.config.sampler)
        conditions = self.terms.conditions(model, rows.condition.to(model.device), rows.weak.to(model.device))
        guidance = self.terms.guidance(rows.config, rows.scale)
        inputs = DenoiserRows.build(conditions, guidance, self.batch.denoiser.networks, start.x, rows.config.clipping)
        state = RowState(
            name=list(names),
            x=start.x,
            x0=torch.zeros_like(start.x),
            times=times.expand(count, *times.shape),
            step=torch.zeros(count, dtype=torch.int64),
            num_steps=torch.full((count,), len(times) - 1),
            seed=rows.seed,
            noise_calls=torch.ones(count, dtype=torch.int64),
            inputs=inputs,
            memory=start.memory,
        )
        self.batch.add(solver, state)
        return state

    @torch.no_grad()
    def step(self, names: Collection[Any] | None = None) -> dict[Any, Tensor | TesseraError]:
        """One network call. Returns the latents [C, ...] of each row that is finished, by name.

        names: of the rows that advance (default: all), see `ContinuousBatch.step`. A row whose numbers are not finite
        has an error instead, and the others are not affected.
        """
        results: dict[Any, Tensor | TesseraError] = {}
        for state in self.batch.step(names):
            finite = state.x.flatten(1).sum(dim=1).isfinite().tolist()
            for name, x, is_finite in zip(state.name, state.x, finite, strict=True):
                results[name] = x if is_finite else not_finite(f"{name} contains", "at the last step")
        return results
