"""Reconstruction quality of a codec: PSNR, SSIM, and the Fréchet distance of originals and reconstructions.

Shapes: B batch, C channels, H W height and width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tessera.codecs import Codec
from tessera.data.images import Dataset, InvalidSample
from tessera.errors import TesseraError
from tessera.evaluation import distances
from tessera.evaluation.features import FeatureExtractor, Progress
from tessera.evaluation.moments import Moments
from tessera.reporting.estimates import Estimate

PEAK = 255.0  # of 8-bit pixels
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels (Wang et al. 2004, section III.B)
K1, K2 = 0.01, 0.03
GRID_IMAGES = 16  # images in a comparison grid


@dataclass(frozen=True)
class Reconstruction:
    """psnr in dB and ssim: means over images; fd: of originals and reconstructions, None without a feature network.

    latent_mean, latent_std: of all latents. originals and reconstructions: some of each, uint8 [B, H, W, C].
    """

    psnr: Estimate
    ssim: Estimate
    fd: Estimate | None
    count: int
    latent_mean: float
    latent_std: float
    originals: np.ndarray
    reconstructions: np.ndarray


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, pixels in 0 .. 255: [B, C, H, W] twice -> [B]; inf if equal."""
    error = (pixels.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / error)


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13) of each image, pixels in 0 .. 255: [B, C, H, W] twice ->
    [B], the mean over channels and over the positions where the window lies inside the image.

    Raises TesseraError for images smaller than the window of 11 pixels.
    """
    channels, height, width = pixels.shape[1:]
    if min(height, width) < WINDOW:
        raise TesseraError(f"SSIM needs images of at least {WINDOW} pixels per side, not {height} x {width}")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=pixels.device) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()

    def average(values: Tensor) -> Tensor:
        for kernel in (window[:, None], window[None, :]):  # the Gaussian window is separable
            values = functional.conv2d(values, kernel.expand(channels, 1, -1, -1), groups=channels)
        return values

    x, y = pixels.double(), others.double()
    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(dim=(1, 2, 3))


def reconstruct(
    codec: Codec,
    dataset: Dataset,
    indices: Sequence[int],
    device: torch.device,
    extractor: FeatureExtractor | None = None,
    batch_size: int = 16,
    progress: Progress = None,
) -> Reconstruction:
    """Encode images of a data set to the mean of the posterior, decode them, and compare.

    Invalid images are skipped. extractor: the feature network of the Fréchet distance; images are reduced to its size
    if it has a fixed one. Raises TesseraError if no image is valid, or if the images do not fit the codec.
    """
    psnrs, ssims, latents = [], [], []
    features: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    originals, reconstructions = [], []
    for pixels in _batches(dataset, indices, batch_size):
        height, width = pixels.shape[-2:]
        if pixels.shape[1] != codec.pixel_channels or height % codec.factor or width % codec.factor:
            raise TesseraError(
                f"images of {pixels.shape[1]} channels, {height} x {width}, do not fit the codec: it takes "
                f"{codec.pixel_channels} channels and sides that are multiples of {codec.factor}"
            )
        encoded = codec.encode(pixels.to(device).float() / 127.5 - 1)
        decoded = ((codec.decode(encoded) + 1) * 127.5).round().clamp(0, PEAK).to(torch.uint8).cpu()
        psnrs.append(psnr(pixels, decoded))
        ssims.append(ssim(pixels, decoded))
        latents.append(encoded.double().flatten())
        if extractor is not None:
            for rows, images in zip(features, (pixels, decoded)):
                rows.append(extractor(_reduce(images, extractor.size), batch_size)["pool"])
        if len(originals) * batch_size < GRID_IMAGES:
            originals.append(pixels.permute(0, 2, 3, 1).numpy())
            reconstructions.append(decoded.permute(0, 2, 3, 1).numpy())
        if progress is not None:
            progress(sum(map(len, psnrs)), len(indices))
    if not psnrs:
        raise TesseraError(f"none of {len(indices)} images can be used")
    all_latents = torch.cat(latents)
    return Reconstruction(
        psnr=_mean(torch.cat(psnrs)),
        ssim=_mean(torch.cat(ssims)),
        fd=_frechet(*map(np.concatenate, features)) if extractor is not None else None,
        count=sum(map(len, psnrs)),
        latent_mean=float(all_latents.mean()),
        latent_std=float(all_latents.std()),
        originals=np.concatenate(originals)[:GRID_IMAGES],
        reconstructions=np.concatenate(reconstructions)[:GRID_IMAGES],
    )


def comparison_rows(result: Reconstruction, columns: int = 8) -> np.ndarray:
    """Images for `images.grid`: a row of originals, the row of their reconstructions, and so on."""
    rows = []
    for start in range(0, len(result.originals), columns):
        for images in (result.originals, result.reconstructions):
            row = images[start : start + columns]
            blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
            rows.append(np.concatenate((row, blank)))
    return np.concatenate(rows)


def _batches(dataset: Dataset, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    """uint8 [B, C, H, W], of valid images."""
    for start in range(0, len(indices), batch_size):
        images = []
        for index in indices[start : start + batch_size]:
            try:
                images.append(dataset.pixels(int(index)))
            except InvalidSample:
                continue
        if images:
            yield torch.from_numpy(np.stack(images))


def _reduce(pixels: Tensor, size: tuple[int, ...] | None) -> np.ndarray:
    """uint8 [B, C, H, W] -> [B, h, w, C] by average pooling."""
    if size is not None and pixels.shape[-2:] != size[-2:]:
        height, width = size[-2:]
        pixels = functional.adaptive_avg_pool2d(pixels.float(), (height, width)).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _frechet(originals: np.ndarray, reconstructions: np.ndarray) -> Estimate | None:
    if len(originals) < 2:
        return None
    return distances.frechet(reconstructions, Moments.from_rows(reconstructions), Moments.from_rows(originals))


def _mean(values: Tensor) -> Estimate:
    """The mean over images, with the interval that follows from their spread."""
    if len(values) < 2:
        return Estimate(float(values[0]), -math.inf, math.inf)
    return Estimate.normal(float(values.mean()), float(values.std()) / math.sqrt(len(values)))
