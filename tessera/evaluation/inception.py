"""The Inception-v3 of the Fréchet Inception Distance: the TensorFlow graph of 2015-12-05, with its resize.

The module names are those of torchvision, so the weights of pytorch-fid (github.com/mseitzer/pytorch-fid) fit. It
differs from the published Inception-v3 (Szegedy et al. 2016) in its pools, its 1008 classes, and the missing auxiliary
head.

Shapes: B images, C channels, H W height and width.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tessera.bundle import check_state_dict
from tessera.checkpoint_files import read_pickle
from tessera.errors import TesseraError

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d"  # first digits of the file's hash

SIZE = 299  # pixels per side
ROW, COLUMN = (1, 7), (7, 1)  # kernels

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, Kernel]  # channels and a kernel; a last layer may have two


class Inception(nn.Module):
    """Features for FID, sFID, the Inception Score and similar metrics. Always computed in full float32.

    widths: of each kind of feature.
    name, weights, resize: what scores depend on; weights is the hash of the weights' file.
    """

    name = "inception-2015-12-05"
    resize = f"bilinear as in TensorFlow 1, to {SIZE} x {SIZE}"
    widths = {"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008}

    def __init__(self) -> None:
        super().__init__()
        self.weights = "random"
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = _fine(192, pooled=32)
        self.Mixed_5c = _fine(256, pooled=64)
        self.Mixed_5d = _fine(288, pooled=64)
        self.Mixed_6a = Mixed(
            288,
            nn.MaxPool2d(3, stride=2),
            stride=2,
            branch3x3=[(384, 3)],
            branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        )
        self.Mixed_6b = _middle(128)
        self.Mixed_6c = _middle(160)
        self.Mixed_6d = _middle(160)
        self.Mixed_6e = _middle(192)
        self.Mixed_7a = Mixed(
            768,
            nn.MaxPool2d(3, stride=2),
            stride=2,
            branch3x3=[(192, 1), (320, 3)],
            branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, 3)],
        )
        self.Mixed_7b = _coarse(1280, _average())
        self.Mixed_7c = _coarse(2048, nn.MaxPool2d(3, stride=1, padding=1))  # published with the average
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images uint8 [B, C, H, W], C 1 (gray) or 3 (RGB), any size -> float32:

        pool     [B, 2048]  the mean of the last maps, for FID, KID, precision and recall
        spatial  [B, 2023]  seven 17 x 17 maps of a middle layer, flattened in the order H, W, C like the sFID
                            statistics of guided diffusion (Dhariwal & Nichol 2021)
        logits   [B, 1008]  without the bias, as in the Inception Score (Salimans et al. 2016)

        Raises TesseraError for images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise TesseraError(
                f"Inception received {images.dtype} {list(images.shape)}; expected torch.uint8 [B, C, H, W] with C 1 "
                "(gray) or 3 (RGB)"
            )
        with full_float32(images.device):
            x = resize_like_tensorflow(images.float(), (SIZE, SIZE)).expand(-1, 3, -1, -1)
            x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = max_pool2d(x, 3, stride=2)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = max_pool2d(x, 3, stride=2)
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # the first maps of its first branch, mixed_6/conv
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
            pool = x.mean((2, 3))
            return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}

    def fused(self) -> "Inception":
        """Fold every batch norm into the convolution before it, in place: faster, and equal up to rounding."""
        for layer in self.modules():
            if isinstance(layer, Convolution):
                layer.fuse()
        return self


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, outputs: int, kernel: Kernel, stride: int = 1, padding: int | str = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Mixed(nn.ModuleDict):
    """Parallel towers of convolutions and a pool on one input; their outputs are concatenated along the channels.

    towers: the layers of each tower by name, in order.
    pooled: the channels of a 1 x 1 convolution after the pool, or 0 for none.
    stride: of the pool and of the last layer of every tower; layers with stride 1 keep the size.
    """

    def __init__(self, channels: int, pool: nn.Module, pooled: int = 0, stride: int = 1, **towers: list[Layer]) -> None:
        super().__init__()
        self.towers: list[list[list[str]]] = []  # for each tower its steps, for each step the names of its layers
        for tower, layers in towers.items():
            steps, width = [], channels
            for number, (outputs, *kernels) in enumerate(layers, 1):
                name = f"{tower}_{number}" if len(layers) > 1 else tower
                steps.append([name] if len(kernels) == 1 else [name + "a", name + "b"])
                same_size = stride == 1 or number < len(layers)
                for layer, kernel in zip(steps[-1], kernels):
                    padding = "same" if same_size else 0
                    self[layer] = Convolution(width, outputs, kernel, 1 if same_size else stride, padding)
                width = outputs
            self.towers.append(steps)
        self["pool"] = pool
        if pooled:
            self["branch_pool"] = Convolution(channels, pooled, 1)
        self.towers.append([["pool"], ["branch_pool"]] if pooled else [["pool"]])

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *first, last in self.towers:
            y = x
            for (layer,) in first:
                y = self[layer](y)
            outputs += [self[layer](y) for layer in last]
        return torch.cat(outputs, 1)


def _average() -> nn.Module:
    """The mean over the pixels inside the image only, as in TensorFlow."""
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _fine(channels: int, pooled: int) -> Mixed:
    """At 35 x 35."""
    return Mixed(
        channels,
        _average(),
        pooled,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
    )


def _middle(width: int) -> Mixed:
    """At 17 x 17."""
    return Mixed(
        768,
        _average(),
        192,
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), (width, ROW), (192, COLUMN)],
        branch7x7dbl=[(width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
    )


def _coarse(channels: int, pool: nn.Module) -> Mixed:
    """At 8 x 8."""
    return Mixed(
        channels,
        pool,
        192,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
        branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))],
    )


def resize_like_tensorflow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x float32 [B, C, H, W] -> [B, C, *size], bilinear, like tf.image.resize_bilinear of TensorFlow 1.

    Output i is interpolated between the two pixels around position i * (input / output): corners are aligned, not
    centers, and there is no antialiasing. Published numbers include the aliasing of downscaled images.
    """
    for axis, length in ((3, size[1]), (2, size[0])):
        input_length = x.shape[axis]
        scale = torch.tensor(input_length / length, dtype=torch.float32)  # single precision, as in the graph
        position = torch.arange(length, dtype=torch.float32) * scale
        low = position.long()
        weight = (position - low).unflatten(0, (-1,) + (1,) * (3 - axis)).to(x.device)
        indices = (low, (low + 1).clamp(max=input_length - 1))
        left, right = (x.index_select(axis, index.to(x.device)) for index in indices)
        x = left + (right - left) * weight
    return x


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable TF32, which is the default for convolutions on a GPU and changes an FID, and autocast."""
    backends: Any = torch.backends
    operators = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [operator.fp32_precision for operator in operators]
    try:
        for operator in operators:
            operator.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operator, precision in zip(operators, before):
            operator.fp32_precision = precision


def load(path: Path | None = None, sha256: str = SHA256) -> Inception:
    """The network with its weights, fused, on the CPU.

    path: the file of pytorch-fid's weights; by default in torch hub's cache, downloaded if it is missing.
    sha256: the first digits of the file's hash; all published numbers use the same file.
    Raises TesseraError if the file is not available, is another one, or is damaged.
    """
    path = _download() if path is None else Path(path)
    digest = _hash(path)
    if not digest.startswith(sha256):
        raise TesseraError(
            f"{path} has the sha256 {digest[:16]}…, expected {sha256}…: other weights give other scores; remove it and "
            f"download {URL}"
        )
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TesseraError(f"{path} does not hold a state dict; expected the file {URL}")
    with torch.device("meta"):  # skips initial weights, which are replaced anyway
        network = Inception()
    counters = [name for name in network.state_dict() if name.endswith(".num_batches_tracked")]
    tensors = {name: torch.zeros(()) for name in counters} | tensors  # unused, and missing in some files
    check_state_dict(network.state_dict(), tensors, str(path))
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.weights = digest[:16]
    return network.fused().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing overload)


def _download() -> Path:
    """The weights' file in torch hub's cache, downloaded if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), SHA256)
        except (OSError, RuntimeError) as error:  # no network, or the error page of a proxy
            raise TesseraError(
                f"cannot download the weights of Inception: {error}\n"
                f"copy {URL}\nto {path}, or give its path with --features; or train a small network on your own "
                "classes: tessera evaluate train-features"
            ) from None
    return path


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TesseraError(f"cannot read {path}: {error.strerror}; expected the file {URL}") from None
