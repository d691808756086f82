"""The Inception-v3 of the Fréchet Inception Distance: the TensorFlow graph of 2015-12-05, with its resize.

Names of modules are torchvision's, so that the weights of pytorch-fid (github.com/mseitzer/pytorch-fid) fit. It differs
from Inception-v3 as published (Szegedy et al. 2016) in its pools, in 1008 classes, and in having no auxiliary head.

Shapes: B pictures, C channels, H W height and width.
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

from tessera.bundle import fit
from tessera.errors import TesseraError
from tessera.interop.readers import read_pickle

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d"  # how the hash of the file begins

SIZE = 299  # pixels a side
ROW, COLUMN = (1, 7), (7, 1)  # kernels

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, Kernel]  # channels, and a kernel; or two beside each other, at a top


class Inception(nn.Module):
    """Features of pictures, for FID, sFID, the Inception Score and their kin. In float32 whatever the settings are.

    parts: the width of each kind of feature.
    name, weights, resize: what numbers made with it depend on; weights is the hash of the file they came from.
    """

    name = "inception-2015-12-05"
    resize = f"bilinear as in TensorFlow 1, to {SIZE} x {SIZE}"
    parts = {"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008}

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
    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """pictures uint8 [B, C, H, W], C 1 (grey) or 3 (RGB), any size -> float32:

        pool     [B, 2048]  the average of the last maps: what FID, KID, precision and recall compare
        spatial  [B, 2023]  seven maps of 17 x 17 from the middle, flat in the order H, W, C as the sFID statistics of
                            guided diffusion (Dhariwal & Nichol 2021) are
        logits   [B, 1008]  without the bias, as the Inception Score takes them since Salimans et al. 2016

        Raises TesseraError for pictures of another type or shape.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise TesseraError(
                f"Inception was given {pictures.dtype} {list(pictures.shape)}; expected torch.uint8 [B, C, H, W] "
                "with C 1 (grey) or 3 (RGB)"
            )
        with exact(pictures.device):
            x = resize_like_tensorflow(pictures.float(), (SIZE, SIZE)).expand(-1, 3, -1, -1)
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
        """Fold every batch norm into the convolution before it, here and for good: faster, equal to rounding."""
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
    """Towers of convolutions beside each other on one input, and a pool; their outputs joined along the channels.

    towers: for each name its layers, the top one last.
    pooled: the channels of a 1 x 1 convolution after the pool, or 0 for none.
    stride: of the pool and of the top of every tower; what has stride 1 keeps the size.
    """

    def __init__(self, channels: int, pool: nn.Module, pooled: int = 0, stride: int = 1, **towers: list[Layer]) -> None:
        super().__init__()
        self.towers: list[list[list[str]]] = []  # of each tower the steps, of each step the names of its layers
        for tower, layers in towers.items():
            steps, width = [], channels
            for number, (outputs, *kernels) in enumerate(layers, 1):
                name = f"{tower}_{number}" if len(layers) > 1 else tower
                steps.append([name] if len(kernels) == 1 else [name + "a", name + "b"])
                keeps = stride == 1 or number < len(layers)
                for layer, kernel in zip(steps[-1], kernels):
                    self[layer] = Convolution(width, outputs, kernel, 1 if keeps else stride, "same" if keeps else 0)
                width = outputs
            self.towers.append(steps)
        self["pool"] = pool
        if pooled:
            self["branch_pool"] = Convolution(channels, pooled, 1)
        self.towers.append([["pool"], ["branch_pool"]] if pooled else [["pool"]])

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *below, top in self.towers:
            y = x
            for (layer,) in below:
                y = self[layer](y)
            outputs += [self[layer](y) for layer in top]
        return torch.cat(outputs, 1)


def _average() -> nn.Module:
    """Over what lies inside the picture alone, as TensorFlow averages."""
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
    """x float32 [B, C, H, W] -> [B, C, *size] by bilinear interpolation, as tf.image.resize_bilinear of TensorFlow 1.

    Output i lies at i * (input / output) of the input, corner on corner and not centre on centre, between the two
    pixels about that place, however much smaller it is: what is made smaller aliases, and so do published numbers.
    """
    for axis, length in ((3, size[1]), (2, size[0])):
        given = x.shape[axis]
        scale = torch.tensor(given / length, dtype=torch.float32)  # in single precision, as the graph computes
        place = torch.arange(length, dtype=torch.float32) * scale
        low = place.long()
        share = (place - low).unflatten(0, (-1,) + (1,) * (3 - axis)).to(x.device)
        left, right = (x.index_select(axis, at.to(x.device)) for at in (low, (low + 1).clamp(max=given - 1)))
        x = left + (right - left) * share
    return x


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products of whole float32 numbers: TF32, which is the default of convolutions on a GPU, moves an FID."""
    backends: Any = torch.backends
    products = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for product, precision in zip(products, before):
            product.fp32_precision = precision


def load(path: Path | None = None, sha256: str = SHA256) -> Inception:
    """The network with its weights, fused, on the CPU.

    path: the file of pytorch-fid's weights; by default torch hub's cache, where it is downloaded to if it is missing.
    sha256: how the hash of the file must begin; all published numbers are of one file.
    Raises TesseraError if the file cannot be had, is another, or is damaged.
    """
    path = _downloaded() if path is None else Path(path)
    found = _hash(path)
    if not found.startswith(sha256):
        raise TesseraError(
            f"{path} has the sha256 {found[:16]}…, expected {sha256}…: other weights give other numbers; remove it and "
            f"download {URL}"
        )
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TesseraError(f"{path} holds no state dict; expected the file {URL}")
    with torch.device("meta"):  # no time spent on initial weights that are replaced at once
        network = Inception()
    counters = [name for name in network.state_dict() if name.endswith(".num_batches_tracked")]
    tensors = {
        name: torch.zeros(()) for name in counters
    } | tensors  # some files leave them out, and nothing reads them
    fit(network, tensors, str(path))
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.weights = found[:16]
    return network.fused().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing overload)


def _downloaded() -> Path:
    """Where torch hub keeps the weights, after fetching them if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), SHA256)
        except (OSError, RuntimeError) as error:  # no network; or a proxy's page in place of the file
            raise TesseraError(
                f"cannot download the weights of Inception: {error}\n"
                f"bring {URL}\nfrom a machine that can to {path}, or give its path by --features; "
                "or fit a small network to your own classes: tessera evaluate train-features"
            ) from None
    return path


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TesseraError(f"cannot read {path}: {error.strerror}; expected the file {URL}") from None
