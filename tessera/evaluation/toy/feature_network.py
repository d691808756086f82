"""A small feature network of our own: for data that no pretrained network fits, and where none can be downloaded.

Two come with the package, for the embedded data sets; `tessera evaluate train-features` fits one to any labelled data.

Shapes: B pictures, C channels, H W height and width, D features, K classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from tessera import bundle, randomness
from tessera.data.images import Dataset
from tessera.data.loader import Loader
from tessera.errors import TesseraError
from tessera.files import atomic_folder
from tessera.settings import Settings, Size, validate

HELD_OUT = 10  # one picture of so many is kept from training, to tell the accuracy
SMALLEST = 4  # side of the last feature map, at least
LARGEST = 32  # side of the first feature map, at most: larger pictures are halved on entering
STREAM = 0x66656174  # of randomness: what is held out; how pictures are shifted and mirrored


class FeatureConfig(Settings):
    """What config.json of a feature network says."""

    format: Literal["tessera-features-1"] = "tessera-features-1"
    size: Size
    channels: Literal[1, 3]
    classes: PositiveInt
    width: PositiveInt = Field(
        default=24, multiple_of=8, description="channels of the first map; they double up to four times that"
    )
    origin: dict[str, Any] = Field(default_factory=dict, description="how it was trained")

    def build(self) -> "FeatureNetwork":
        return FeatureNetwork(self)


class FeatureNetwork(nn.Module):
    """Convolutions that halve the picture until it is 4 wide, then a mean over places and a linear classifier."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        side, width, widest = min(config.size), config.width, 4 * config.width
        stride = 1
        while side // stride > LARGEST:
            stride *= 2
        self.stem = nn.Conv2d(config.channels, width, max(3, 2 * stride - 1), stride, padding=max(1, stride - 1))
        side //= stride
        stages: list[nn.Module] = []
        while side // 2 >= SMALLEST:
            wider = min(2 * width, widest)
            stages.append(nn.Sequential(nn.Conv2d(width, wider, 3, 2, padding=1), Residual(wider)))
            width, side = wider, side // 2
        self.stages = nn.ModuleList(stages or [Residual(width)])
        self.norm = nn.GroupNorm(8, width)
        self.classify = nn.Linear(width, config.classes)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """uint8 [B, C, H, W] -> pool [B, D], spatial (7 channels of the first stage, flat) and logits [B, K]"""
        x = self.stem(pictures.float() / 127.5 - 1)
        spatial = None
        for stage in self.stages:
            x = stage(x)
            if spatial is None:
                spatial = functional.relu(x)[:, :7].flatten(1)
        assert spatial is not None  # there is a stage
        pool = functional.relu(self.norm(x)).mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": self.classify(pool)}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for norm, convolution in zip(self.norms, self.convolutions):
            branch = convolution(functional.gelu(norm(branch)))
        return x + branch


def is_saved_at(folder: Path) -> bool:
    """Whether a folder holds a network of this kind."""
    try:
        return json.loads((folder / bundle.CONFIG).read_text(encoding="utf-8")).get("format") == "tessera-features-1"
    except (OSError, ValueError, AttributeError):
        return False


def load(folder: Path) -> FeatureNetwork:
    """Raises TesseraError if the folder is incomplete or damaged."""
    try:
        told = json.loads((folder / bundle.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {folder / bundle.CONFIG}: {error}") from None
    network = validate(FeatureConfig, told, str(folder / bundle.CONFIG)).build()
    tensors = bundle.read_tensors(folder / bundle.WEIGHTS)
    bundle.fit(network, tensors, str(folder))
    network.load_state_dict(tensors)
    return network.eval()


def save(network: FeatureNetwork, folder: Path) -> None:
    """Raises TesseraError if the folder exists or cannot be written."""
    with atomic_folder(folder) as partial:
        told = json.dumps(network.config.model_dump(mode="json"), indent=2)
        (partial / bundle.CONFIG).write_text(told + "\n", encoding="utf-8")
        bundle.write_tensors(network.state_dict(), partial / bundle.WEIGHTS)


class Part:
    """Some of the samples of a source, as a source."""

    def __init__(self, source: Dataset, chosen: np.ndarray) -> None:
        self.source, self.chosen, self.class_names = source, chosen, source.class_names

    def __len__(self) -> int:
        return len(self.chosen)

    def label(self, index: int) -> int:
        return self.source.label(int(self.chosen[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.chosen[index]))

    def pixels(self, index: int) -> np.ndarray:
        return self.source.pixels(int(self.chosen[index]))


def train(
    source: Dataset,
    size: tuple[int, int],
    channels: Literal[1, 3],
    *,
    flip: bool,
    where: str,
    width: int = 24,
    steps: int = 2000,
    batch: int = 128,
    learning_rate: float = 3e-3,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureNetwork:
    """Fit a network to tell the classes of a data set apart; a tenth is held out, and its accuracy kept in `origin`.

    Pictures are shifted by up to an eighth and, if flip, mirrored. AdamW, one cycle of the learning rate (Smith 2018).
    Raises TesseraError without classes or with too few pictures.
    """
    if not source.class_names:
        raise TesseraError(f"{where} has no classes: features are learned by telling classes apart")
    if len(source) < 10 * HELD_OUT:
        raise TesseraError(f"{where} holds {len(source)} pictures; features need at least {10 * HELD_OUT}")
    order = randomness.permutation(0, STREAM, 0, len(source)).numpy()
    held_out, learned = Part(source, order[::HELD_OUT]), Part(source, np.delete(order, np.s_[::HELD_OUT]))
    torch.manual_seed(0)
    told = {"size": size, "channels": channels, "classes": len(source.class_names), "width": width}
    config = validate(FeatureConfig, told, "the feature network")
    network = config.build().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = Loader(learned, batch, seed=0).batches()
    for step in range(steps):
        told = next(batches)
        pictures = shifted(told.pixels, told.position, flip).to(device)
        loss = functional.cross_entropy(network(pictures)["logits"], told.label.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    batches.close()
    right = accuracy(network.eval(), held_out, device)
    origin = {"trained on": where, "pictures": len(learned), "steps": steps, "held-out accuracy": round(right, 4)}
    network.config = config.model_copy(update={"origin": origin})
    return network


@torch.no_grad()
def accuracy(network: FeatureNetwork, source: Dataset, device: torch.device | None = None) -> float:
    """The share of a source's pictures whose class the network names."""
    loader, right, seen = Loader(source, 100, seed=0), 0, 0
    for start in range(0, len(source), 100):
        told = loader.read(start)
        said = network(told.pixels.to(device))["logits"].argmax(1).cpu()
        count = min(100, len(source) - start)
        right, seen = right + int((said == told.label)[:count].sum()), seen + count
    return right / seen


def shifted(pixels: Tensor, position: Tensor, flip: bool) -> Tensor:
    """Each picture [B, C, H, W] moved by up to an eighth of its side, edges repeated, and mirrored at random."""
    height, width = pixels.shape[2:]
    reach = max(1, min(height, width) // 8)
    drawn = randomness.uniform(0, position, STREAM, 3)
    down, right = ((drawn[:, :2] * (2 * reach + 1)).long().clamp(max=2 * reach)).unbind(1)
    padded = functional.pad(pixels.float(), (reach,) * 4, mode="replicate").to(pixels.dtype)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = right[:, None] + torch.arange(width)
    if flip:
        columns = torch.where(drawn[:, 2:] < 0.5, columns, columns.flip(1))
    each = torch.arange(len(pixels))[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[None, :, None, None]
    return padded[each, channel, rows, columns[:, None, None, :]]
