"""How much of a picture is left after a codec: PSNR, SSIM, and how far apart originals and reconstructions are.

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
from tessera.evaluation.features import Extractor, Progress
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.moments import Moments

PEAK = 255.0  # of 8-bit pixels
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels (Wang et al. 2004, section III.B)
K1, K2 = 0.01, 0.03
SHOWN = 16  # pictures on a sheet


@dataclass(frozen=True)
class Reconstruction:
    """psnr in dB and ssim: means over pictures; fd: of originals and reconstructions, None if no features were given.

    mean, std: of all numbers of the latents. originals and reconstructions: some of each, uint8 [n, H, W, C].
    """

    psnr: Estimate
    ssim: Estimate
    fd: Estimate | None
    count: int
    mean: float
    std: float
    originals: np.ndarray
    reconstructions: np.ndarray


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, pixels in 0 .. 255: [B, C, H, W] twice -> [B]; inf if equal."""
    error = (pixels.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / error)


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13) of each picture, pixels in 0 .. 255: [B, C, H, W] twice ->
    [B], the mean over channels and over places where the window lies inside the picture.

    Raises TesseraError for pictures smaller than the window of 11 pixels.
    """
    channels, height, width = pixels.shape[1:]
    if min(height, width) < WINDOW:
        raise TesseraError(f"SSIM needs pictures of at least {WINDOW} pixels a side, not {height} x {width}")
    places = torch.arange(WINDOW, dtype=torch.float64, device=pixels.device) - WINDOW // 2
    line = torch.exp(-(places**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def average(values: Tensor) -> Tensor:
        for kernel in (line[:, None], line[None, :]):  # the Gaussian window is separable
            values = functional.conv2d(values, kernel.expand(channels, 1, -1, -1), groups=channels)
        return values

    x, y = pixels.double(), others.double()
    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(dim=(1, 2, 3))


def reconstruct(
    codec: Codec,
    source: Dataset,
    chosen: Sequence[int],
    device: torch.device,
    network: Extractor | None = None,
    batch: int = 16,
    progress: Progress = None,
) -> Reconstruction:
    """Send the chosen pictures of a source through a codec, the posterior's mean, and compare.

    Unusable pictures are left out. network: whose features tell the Fréchet distance; a network of one size sees
    pictures reduced to it. Raises TesseraError if no picture is left, or they do not fit the codec.
    """
    ratios, similarities, latents = [], [], []
    looks: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    originals, reconstructions = [], []
    for pixels in _batches(source, chosen, batch):
        height, width = pixels.shape[-2:]
        if pixels.shape[1] != codec.pixel_channels or height % codec.factor or width % codec.factor:
            raise TesseraError(
                f"pictures of {pixels.shape[1]} channels, {height} x {width}, do not fit the codec: it takes "
                f"{codec.pixel_channels} channels, sides that are multiples of {codec.factor}"
            )
        encoded = codec.encode(pixels.to(device).float() / 127.5 - 1)
        again = ((codec.decode(encoded) + 1) * 127.5).round().clamp(0, PEAK).to(torch.uint8).cpu()
        ratios.append(psnr(pixels, again))
        similarities.append(ssim(pixels, again))
        latents.append(encoded.double().flatten())
        if network is not None:
            for found, seen in zip(looks, (pixels, again)):
                found.append(network(_reduced(seen, network.size), batch)["pool"])
        if len(originals) * batch < SHOWN:
            originals.append(pixels.permute(0, 2, 3, 1).numpy())
            reconstructions.append(again.permute(0, 2, 3, 1).numpy())
        if progress is not None:
            progress(sum(map(len, ratios)), len(chosen))
    if not ratios:
        raise TesseraError(f"none of {len(chosen)} pictures can be used")
    numbers = torch.cat(latents)
    return Reconstruction(
        psnr=_mean(torch.cat(ratios)),
        ssim=_mean(torch.cat(similarities)),
        fd=_distance(*map(np.concatenate, looks)) if network is not None else None,
        count=sum(map(len, ratios)),
        mean=float(numbers.mean()),
        std=float(numbers.std()),
        originals=np.concatenate(originals)[:SHOWN],
        reconstructions=np.concatenate(reconstructions)[:SHOWN],
    )


def sheet(found: Reconstruction, columns: int = 8) -> np.ndarray:
    """Pictures for `pictures.grid`, so many a row: a row of originals, the row of what became of them, and so on."""
    rows = []
    for start in range(0, len(found.originals), columns):
        for pictures in (found.originals, found.reconstructions):
            row = pictures[start : start + columns]
            blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
            rows.append(np.concatenate((row, blank)))
    return np.concatenate(rows)


def _batches(source: Dataset, chosen: Sequence[int], batch: int) -> Iterator[Tensor]:
    """uint8 [B, C, H, W], of usable pictures."""
    for start in range(0, len(chosen), batch):
        usable = []
        for index in chosen[start : start + batch]:
            try:
                usable.append(source.pixels(int(index)))
            except InvalidSample:
                continue
        if usable:
            yield torch.from_numpy(np.stack(usable))


def _reduced(pixels: Tensor, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [B, C, H, W] -> [B, h, w, C], each pixel the mean of those it stands for."""
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = functional.adaptive_avg_pool2d(pixels.float(), size).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _distance(originals: np.ndarray, reconstructions: np.ndarray) -> Estimate | None:
    if len(originals) < 2:
        return None
    return distances.frechet(reconstructions, Moments.of(reconstructions), Moments.of(originals))


def _mean(values: Tensor) -> Estimate:
    """Of pictures, with the interval that their spread gives."""
    if len(values) < 2:
        return Estimate(float(values[0]), -math.inf, math.inf)
    return Estimate.normal(float(values.mean()), float(values.std()) / math.sqrt(len(values)))
