"""`generate`: network, diffusion process, condition and codec together produce images.

Shapes: B images, C latent channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import randomness, runtime
from tessera.acceleration.first_block_cache import CacheStats, check_caching
from tessera.conditioning import Condition
from tessera.generation.denoiser import BatchSettings, build_denoiser
from tessera.generation.editing import as_images, as_masks, edit_source
from tessera.generation.request import check_request, class_labels, latent_size, num_rows, sampling_config
from tessera.model import Model
from tessera.sampling import SampleState, sample_loop, timestep_grid

STREAM = 0x64726177  # random stream of sampling; training uses others


@torch.no_grad()
def generate_steps(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    size: tuple[int, int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_model: Model | None = None,
    init_image: np.ndarray | None = None,
    strength: float | None = None,
    mask: np.ndarray | None = None,
    precision: runtime.Precision = "float32",
    cache_stats: CacheStats | None = None,
    **settings: Any,
) -> Iterator[SampleState]:
    """Generate one batch step by step and yield every SampleState; `decode(model, state.x)` makes images of one.

    classes and seeds are paired row by row; either may have one entry for all rows. Each seed determines its image,
    independent of the batch. size: of the image in pixels (default: the trained size). guidance_scale: one number, or
    one per row. guidance_model: a weaker model with the same condition, instead of the model itself without condition
    (autoguidance). cache_stats: counts what caching saves. settings: any other key of SamplingConfig, and overrides.

    init_image: uint8 [B, H, W, C], or [H, W, C] for all rows, to begin from: noise is added up to the nearest time of
    the grid below strength (default 0.6; with a mask 1, which begins in noise alone). The size is that of the image.
    mask: [B, H, W] or [H, W], 1 where to generate and 0 where the image stays: there every state is the image with the
    row's own noise. A latent is generated if any of its pixels is; `generate` restores all other pixels.

    Raises TesseraError for a request that the model cannot fulfill.
    """
    config = sampling_config(model, **settings)
    scales = torch.as_tensor(config.guidance_scale if guidance_scale is None else guidance_scale, dtype=torch.float32)
    seeds = list(seeds)
    check_request(model, classes, seeds, scales, guidance_model)
    source = edit_source(model, init_image, strength, mask, size)
    labels = None if classes is None else class_labels(model, classes)
    rows = num_rows(
        {
            "classes": 1 if labels is None else len(labels),
            "seeds": len(seeds),
            "guidance scales": scales.numel(),
            "images or masks": 1 if source is None else source.rows,
        }
    )
    label = None if labels is None else torch.tensor(labels).expand(rows)
    seed = torch.tensor(seeds, dtype=torch.int64).expand(rows)
    network, device = model.config.network, model.device
    height, width = latent_size(model, size) if source is None else source.x0.shape[2:]
    noise_calls = 0

    def noise() -> Tensor:
        """The next noise of each row, from its own seed: first the initial state, then one for each stochastic step."""
        nonlocal noise_calls
        position = torch.full((rows,), noise_calls, dtype=torch.int64)
        noise_calls += 1
        return randomness.normal(seed, position, STREAM, (network.in_channels, height, width)).to(device)

    config.sampler.check(model.diffusion)
    check_caching(network, config.caching)
    times = timestep_grid(config.timestep_spacing, config.num_steps, model.diffusion)
    x, step = noise(), config.sampler
    if source is not None:
        times = source.times_from_strength(times)
        x, step = source.initial_state(model.diffusion, x, times[0]), source.masked_step(step, x)
    batch = BatchSettings(
        config,
        model.diffusion.model_time(times[:-1]).to(device),
        (height // network.size_multiple, width // network.size_multiple),
        runtime.autocast_dtype(precision, device),
        cache_stats,
    )
    denoise = build_denoiser(model, Condition(label=label).to(device), scales.expand(rows), guidance_model, batch)
    yield from sample_loop(step, denoise, x, times, noise)


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> np.ndarray:
    """latents [B, C, h, w] -> images uint8 [B, H, W, 3 or 1]"""
    pixels = model.codec.decode(latents.float())
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def generate(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    size: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
    guidance_model: Model | None = None,
    init_image: np.ndarray | None = None,
    strength: float | None = None,
    mask: np.ndarray | None = None,
    precision: runtime.Precision = "float32",
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    cache_stats: CacheStats | None = None,
    **settings: Any,
) -> np.ndarray:
    """Generate images, uint8 [B, H, W, 3 or 1]: one for each pair of class and seed, `batch_size` at a time.

    Arguments as for `generate_steps`. progress is called with (steps done, steps in total). Where a mask is 0 the
    image is init_image, bit for bit.
    """
    images = None if init_image is None else as_images(model, init_image)
    masks = None if mask is None else as_masks(mask)
    inputs = {"classes": classes, "seeds": seeds, "images": images, "masks": masks}
    rows = num_rows({name: 1 if values is None else len(values) for name, values in inputs.items()})
    results, num_batches = [], -(-rows // batch_size)
    for start in range(0, rows, batch_size):
        end = min(start + batch_size, rows)
        batch: dict[str, Any] = {
            name: values if values is None or len(values) == 1 else values[start:end] for name, values in inputs.items()
        }
        if len(seeds) == 1:
            batch["seeds"] = list(seeds) * (end - start)
        latents = None
        for state in generate_steps(
            model,
            batch["classes"],
            batch["seeds"],
            size=size,
            guidance_scale=guidance_scale,
            guidance_model=guidance_model,
            init_image=batch["images"],
            strength=strength,
            mask=batch["masks"],
            precision=precision,
            cache_stats=cache_stats,
            **settings,
        ):
            latents = state.x
            if progress is not None:
                progress(start // batch_size * state.num_steps + state.step, state.num_steps * num_batches)
        assert latents is not None  # generate_steps always yields
        generated = decode(model, latents)
        if images is not None and masks is not None:
            generated = np.where(batch["masks"][..., None] != 0, generated, batch["images"])
        results.append(generated)
    return np.concatenate(results)
