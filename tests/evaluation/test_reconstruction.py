"""PSNR and SSIM against torchmetrics, and the scores of codecs with a known effect."""

import math

import numpy as np
import pytest
import torch

from tessera.codecs import Codec, PixelsConfig
from tessera.data import ShapesConfig
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError
from tessera.evaluation.features import load_extractor
from tessera.evaluation.reconstruction import comparison_rows, psnr, reconstruct, ssim

CPU = torch.device("cpu")


def noisy(count: int = 3, height: int = 24, width: int = 17):
    """uint8 images with structure, and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.linspace(0, 9, height)[:, None].sin() * torch.linspace(0, 5, width).cos()
    pixels = 128 + 90 * waves.expand(count, 3, -1, -1) + 20 * torch.randn(count, 3, height, width, generator=generator)
    others = pixels + torch.randn(pixels.shape, generator=generator) * torch.tensor([3.0, 10.0, 40.0]).view(3, 1, 1, 1)
    return (image.round().clamp(0, 255).to(torch.uint8) for image in (pixels, others))


def test_psnr_is_that_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.image").peak_signal_noise_ratio
    pixels, others = noisy()
    expected = [theirs(one.double(), other.double(), data_range=255.0) for one, other in zip(others, pixels)]
    assert torch.allclose(psnr(pixels, others), torch.stack(expected), rtol=1e-6)
    assert psnr(pixels, pixels).isinf().all()


def test_ssim_is_that_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    pixels, others = noisy()
    options = {"sigma": 1.5, "data_range": 255.0, "reduction": "none", "return_full_image": True}
    _, everywhere = theirs(others.double(), pixels.double(), **options)
    inside = everywhere[..., 5:-5, 5:-5]  # torchmetrics reflects the image at its border
    assert torch.allclose(ssim(pixels, others), inside.mean(dim=(1, 2, 3)), rtol=0, atol=1e-6)
    assert torch.allclose(ssim(pixels, pixels), torch.ones(3, dtype=torch.float64))


def test_ssim_of_constant_images_is_the_formula():
    """Two constant gray levels: (2 x y + c1) / (x² + y² + c1)."""
    x, y, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    flat = torch.ones(1, 1, 12, 12)
    assert float(ssim(flat * x, flat * y)) == pytest.approx((2 * x * y + c1) / (x**2 + y**2 + c1), rel=1e-9)


def test_ssim_of_images_smaller_than_its_window_is_an_error():
    with pytest.raises(TesseraError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


class Darker(Codec):
    """Every pixel 8 levels darker."""

    pixel_channels = latent_channels = 3
    factor = 1

    def to(self, device):
        return self

    def moments(self, pixels):
        return torch.cat((pixels, torch.zeros_like(pixels)), dim=1)

    def decode(self, latents):
        return latents - 16 / 255

    def fingerprint(self):
        return "darker"


class Images:
    """Twenty color images in the middle of the range; number 3 is invalid."""

    class_names = ()

    def __len__(self):
        return 20

    def label(self, index):
        return 0

    def name(self, index):
        return str(index)

    def pixels(self, index):
        if index == 3:
            raise InvalidSample("truncated")
        return np.random.default_rng(index).integers(60, 200, (3, 16, 16), dtype=np.uint8)


def test_scores_of_a_codec_with_a_known_effect():
    calls = []
    result = reconstruct(Darker(), Images(), range(20), CPU, batch_size=6, progress=lambda *n: calls.append(n))
    assert result.count == 19
    assert calls[-1] == (19, 20)
    assert result.psnr.value == pytest.approx(20 * math.log10(255 / 8), abs=1e-9)
    assert result.fd is None
    assert (result.originals.astype(int) - result.reconstructions == 8).all()
    assert result.originals.shape == (16, 16, 16, 3)
    assert (result.originals[3].transpose(2, 0, 1) == Images().pixels(4)).all()
    numbers = np.stack([Images().pixels(index) for index in range(20) if index != 3]) / 127.5 - 1
    assert (result.latent_mean, result.latent_std) == pytest.approx((numbers.mean(), numbers.std(ddof=1)), abs=1e-6)
    rows = comparison_rows(result, columns=5)
    assert len(rows) == 2 * 20  # 16 in rows of 5, two sheets of each, the last row filled with white
    assert (rows[:5] == result.originals[:5]).all()
    assert (rows[5:10] == result.reconstructions[:5]).all()
    assert (rows[31:35] == 255).all()


def test_an_identity_codec_has_distance_zero():
    dataset = ShapesConfig(split="test", count=30).open()
    network = load_extractor("shapes", CPU)
    result = reconstruct(PixelsConfig().build(), dataset, range(30), CPU, network)
    assert result.fd is not None
    assert result.fd.value == pytest.approx(0, abs=1e-6)
    assert result.ssim.value == 1
    worse = reconstruct(Darker(), dataset, range(30), CPU, network)
    assert worse.fd is not None
    assert worse.fd.value > 0.01


def test_images_that_do_not_fit_are_an_error():
    with pytest.raises(TesseraError, match="it takes 1 channels"):
        reconstruct(PixelsConfig(channels=1).build(), Images(), range(4), CPU)
    with pytest.raises(TesseraError, match="none of 1 images"):
        reconstruct(Darker(), Images(), [3], CPU)
