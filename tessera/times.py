"""Times of samples, of each frame of a clip, or of each pixel, and numbers that depend on them.

A time t is [B], [B, T] where the frames of a clip x [B, C, T, H, W] have their own, or [B, 1, ...], like x with one
channel, where the pixels have their own. Shapes: B batch, C channels, T frames, H W height and width.
"""

import torch
from torch import Tensor


def expand(values: Tensor, x: Tensor) -> Tensor:
    """Values [B], or [B, T] for a clip, on the device and in the dtype of x and shaped to multiply x [B, C, ...].

    Values of the shape of x, or of one channel of it, keep their shape.

    Raises ValueError for other shapes, which could broadcast to a wrong result.
    """
    # Convert the dtype first, because some devices have no float64. The copy does not wait for a GPU.
    values = values.to(x.dtype).to(x.device, non_blocking=x.is_cuda)
    if values.shape == x.shape or (x.ndim > 2 and values.shape == (x.shape[0], 1, *x.shape[2:])):
        return values
    if values.shape == x.shape[:1]:
        return values.view(-1, *(1,) * (x.ndim - 1))
    if x.ndim == 5 and values.shape == (x.shape[0], x.shape[2]):
        return values.view(x.shape[0], 1, x.shape[2], 1, 1)
    raise ValueError(
        f"got values {list(values.shape)} for x {list(x.shape)}; expected one per row, [{x.shape[0]}]"
        + (f", or one per frame, [{x.shape[0]}, {x.shape[2]}]" if x.ndim == 5 else "")
    )


def shared_time(t: Tensor) -> Tensor:
    """Times [B, T] whose frames are equal in every row, as [B]; others, and times [B], unchanged. t: on the CPU"""
    if t.ndim == 2 and bool((t == t[:, :1]).all()):
        return t[:, 0]
    return t


def mean_like(x: Tensor, t: Tensor) -> Tensor:
    """The mean over everything but the axes of t: x [B, C, ...] -> [B], [B, T] for times of frames, or [B, 1, ...] for
    those of pixels"""
    if t.ndim == x.ndim:
        return x.mean(dim=1, keepdim=True)
    return row_mean(x) if t.ndim == 1 else x.mean(dim=(1, 3, 4))


def mean_of_frames(values: Tensor, frames: Tensor | None = None) -> Tensor:
    """Values [B] unchanged, or the means over the frames or pixels of values [B, T] or [B, 1, ...]: [B]

    frames: those that count, bool [B, T]; None: all. Where none counts, the mean is 0.
    """
    if values.ndim == 1 or frames is None:
        return values if values.ndim == 1 else row_mean(values)
    frames = frames.to(values.device, non_blocking=values.is_cuda)
    return torch.where(frames, values, 0).sum(dim=1) / frames.sum(dim=1).clamp(min=1)


def row_mean(x: Tensor) -> Tensor:
    """The mean over everything but the batch: [B, ...] -> [B]"""
    return x.flatten(1).mean(dim=1)
