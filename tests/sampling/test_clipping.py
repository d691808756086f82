"""Limits of the predicted x0: per row, in every way of sampling."""

import pytest
import torch

from tessera import generation
from tessera.diffusion.process import Prediction
from tessera.generation import ContinuousSampler, SampleRequest
from tessera.sampling import DynamicThresholding, NoClipping, RangeClipping, SamplingConfig
from tessera.sampling.clipping import clipped

CLIPPINGS = [NoClipping(), RangeClipping(range=0.4), DynamicThresholding(quantile=0.8, max_value=2.0)]


def predictions(rows: int) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    return Prediction(*(2 * torch.randn(rows, 3, 5, 4, generator=generator) for _ in range(2)))


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_the_quantile_of_each_row(quantile):
    x0 = predictions(4).x0 * torch.tensor([0.1, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    s = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(1, 3).view(4, 1, 1, 1)
    limited = DynamicThresholding(quantile=quantile, max_value=3.0).limit(x0)
    torch.testing.assert_close(limited, torch.minimum(torch.maximum(x0, -s), s) / s, rtol=1e-6, atol=1e-6)


def test_each_row_has_its_own_limit_and_the_noise_is_unchanged():
    prediction, settings = predictions(6), [CLIPPINGS[row % 3] for row in range(6)]
    result = clipped(prediction, settings)
    assert torch.equal(result.eps, prediction.eps)
    for row, clipping in enumerate(settings):
        alone = clipped(prediction[row : row + 1], [clipping])
        assert torch.equal(result.x0[row], alone.x0[0])
    assert clipped(prediction, [NoClipping()] * 6) is prediction


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "unipc", "heun"])
def test_rows_with_different_clipping_share_calls_and_equal_each_alone(make_model, sampler):
    model, batch, latents = make_model({}, {"prediction": "epsilon"}), [], {}
    continuous = ContinuousSampler(model)
    for row, clipping in enumerate(CLIPPINGS * 2):
        settings = {"sampler": sampler, "num_steps": 4 + row // 3, "clipping": clipping.model_dump()}
        batch.append(SampleRequest([row], {"label": [row % 3]}, 2.0, settings=settings))
        continuous.add(batch[-1], [row])
    while continuous.batch.num_rows:
        latents |= continuous.step()
    for row, request in enumerate(batch):
        *_, last = generation.sample_steps(model, request.resolve(model))
        torch.testing.assert_close(latents[row], last.x[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(latents[0], latents[1], rtol=1e-1, atol=1e-1)


def test_a_clipped_image_stays_within_the_range(make_model):
    model = make_model({}, {"prediction": "epsilon"})
    *_, last = generation.generate_steps(model, [0, 1], [1, 2], clipping="range", guidance_scale=1.0)
    assert last.x.abs().max() <= 1
    *_, free = generation.generate_steps(model, [0, 1], [1, 2], guidance_scale=1.0)
    assert free.x.abs().max() > 1


def test_the_summary_names_the_clipping():
    assert "clipping range, range 0.4" in SamplingConfig(clipping=CLIPPINGS[1]).summary()
