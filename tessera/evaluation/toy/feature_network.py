"""A small feature network: for data that no pretrained network fits, and where none can be downloaded.

Some come with the package, for the embedded data sets; `tessera evaluate train-features` trains one on labeled data.

Shapes: B images or clips, C channels, T frames, H W height and width, D features, K classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tessera import bundle, randomness
from tessera.checkpoint_files import read_tensors, write_tensors
from tessera.data.images import Dataset
from tessera.data.loader import Loader
from tessera.errors import TesseraError
from tessera.files import atomic_folder
from tessera.settings import InputSize, Settings, validate

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

FORMAT = "tessera-features-2"
HELD_OUT = 10  # one image in this many is held out, to measure the accuracy
MIN_SIDE = 4  # of the last feature map
MAX_SIDE = 32  # of the first feature map: the stem halves larger images
STREAM = 0x66656174  # random stream: which images are held out; how images are shifted and flipped


class FeatureConfig(Settings):
    """config.json of a feature network."""

    format: Literal["tessera-features-2"] = FORMAT
    size: InputSize = Field(description="(H, W), or (T, H, W): a network of clips, with 3-D convolutions")
    channels: Literal[1, 3]
    num_classes: PositiveInt
    width: PositiveInt = Field(
        default=24, multiple_of=8, description="channels of the first map; they double, up to four times this"
    )
    origin: dict[str, Any] = Field(default_factory=dict, description="how it was trained")

    def build(self) -> "FeatureNetwork":
        return FeatureNetwork(self)

    def macs(self) -> float:
        """Multiply-adds for one image or clip."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.build()(torch.empty(1, self.channels, *self.size, dtype=torch.uint8))
        return counter.get_total_flops() / 2


class FeatureNetwork(nn.Module):
    """Convolutions that halve the image or clip until it is 4 wide, a mean over positions, and a linear classifier.

    A network of clips takes clips of any length, and single images.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        side, width, max_width = min(config.size[-2:]), config.width, 4 * config.width
        convolution = nn.Conv3d if self.is_of_clips else nn.Conv2d
        stride = 1
        while side // stride > MAX_SIDE:
            stride *= 2
        self.stem = convolution(config.channels, width, max(3, 2 * stride - 1), stride, padding=max(1, stride - 1))
        side //= stride
        stages: list[nn.Module] = []
        while side // 2 >= MIN_SIDE:
            out_width = min(2 * width, max_width)
            stages.append(
                nn.Sequential(convolution(width, out_width, 3, 2, padding=1), Residual(out_width, convolution))
            )
            width, side = out_width, side // 2
        self.stages = nn.ModuleList(stages or [Residual(width, convolution)])
        self.norm = nn.GroupNorm(8, width)
        self.classify = nn.Linear(width, config.num_classes)

    @property
    def is_of_clips(self) -> bool:
        return len(self.config.size) == 3

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, C, H, W], of clips [B, C, T, H, W] -> pool [B, D], spatial (7 channels of the first stage, flat)
        and logits [B, K]
        """
        if self.is_of_clips and images.ndim == 4:
            images = images[:, :, None]
        x = self.stem(images.float() / 127.5 - 1)
        spatial = None
        for stage in self.stages:
            x = stage(x)
            if spatial is None:
                spatial = functional.relu(x)[:, :7].flatten(1)
        assert spatial is not None  # there is at least one stage
        pool = functional.relu(self.norm(x)).mean(dim=tuple(range(2, x.ndim)))
        return {"pool": pool, "spatial": spatial, "logits": self.classify(pool)}


class Residual(nn.Module):
    def __init__(self, width: int, convolution: type[nn.Conv2d] | type[nn.Conv3d]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(convolution(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for norm, convolution in zip(self.norms, self.convolutions):
            branch = convolution(functional.gelu(norm(branch)))
        return x + branch


def is_saved_at(folder: Path) -> bool:
    """Whether a folder holds a network of this kind."""
    try:
        config = json.loads((folder / bundle.CONFIG).read_text(encoding="utf-8"))
        return str(config.get("format")).startswith("tessera-features-")
    except (OSError, ValueError, AttributeError):
        return False


def read_config(folder: Path) -> FeatureConfig:
    """Raises TesseraError if the file is missing or damaged."""
    try:
        config = json.loads((folder / bundle.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {folder / bundle.CONFIG}: {error}") from None
    return validate(FeatureConfig, config, str(folder / bundle.CONFIG))


def load(folder: Path) -> FeatureNetwork:
    """Raises TesseraError if the folder is incomplete or damaged."""
    network = read_config(folder).build()
    tensors = read_tensors(folder / bundle.WEIGHTS)
    bundle.check_state_dict(network.state_dict(), tensors, str(folder))
    network.load_state_dict(tensors)
    return network.eval()


def save(network: FeatureNetwork, folder: Path) -> None:
    """Raises TesseraError if the folder exists or cannot be written."""
    with atomic_folder(folder) as partial:
        config = json.dumps(network.config.model_dump(mode="json"), indent=2)
        (partial / bundle.CONFIG).write_text(config + "\n", encoding="utf-8")
        write_tensors(network.state_dict(), partial / bundle.WEIGHTS)


class Subset:
    """Some samples of a data set, as a data set."""

    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self.dataset, self.indices, self.class_names = dataset, indices, dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> int:
        return self.dataset.label(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def pixels(self, index: int) -> np.ndarray:
        return self.dataset.pixels(int(self.indices[index]))


def train(
    dataset: Dataset,
    size: tuple[int, ...],
    channels: Literal[1, 3],
    *,
    hflip: bool,
    description: str,
    width: int = 24,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureNetwork:
    """Train a network to classify a data set. A tenth is held out; the accuracy on it is saved in `config.origin`.

    Images, but not clips, are shifted by up to an eighth of their side and, with hflip, flipped. AdamW, one cycle of
    the learning rate (Smith 2018). Raises TesseraError without classes or with too few images.
    """
    if len(dataset.class_names) < 2:
        raise TesseraError(
            f"{description} has {len(dataset.class_names) or 'no'} classes: features are trained by "
            "classification, of two or more"
        )
    if len(dataset) < 10 * HELD_OUT:
        raise TesseraError(f"{description} holds {len(dataset)} images; features need at least {10 * HELD_OUT}")
    order = randomness.permutation(0, STREAM, 0, len(dataset)).numpy()
    held_out, training = Subset(dataset, order[::HELD_OUT]), Subset(dataset, np.delete(order, np.s_[::HELD_OUT]))
    torch.manual_seed(0)
    settings = {"size": size, "channels": channels, "num_classes": len(dataset.class_names), "width": width}
    config = validate(FeatureConfig, settings, "the feature network")
    network = config.build().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = Loader(training, batch_size, seed=0).batches()
    for step in range(steps):
        batch = next(batches)
        is_images = batch.pixels.ndim == 4
        images = (random_shift(batch.pixels, batch.position, hflip) if is_images else batch.pixels).to(device)
        assert batch.condition.label is not None
        label = batch.condition.label.to(device)
        loss = functional.cross_entropy(network(images)["logits"], label, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    batches.close()
    network.eval()
    origin = {
        "trained_on": description,
        "images": len(training),
        "steps": steps,
        "held_out_accuracy": round(accuracy(network, held_out, device), 4),
    }
    network.config = config.model_copy(update={"origin": origin})
    return network


@torch.no_grad()
def accuracy(network: FeatureNetwork, dataset: Dataset, device: torch.device | None = None) -> float:
    """The fraction of a data set that the network classifies correctly."""
    loader, correct = Loader(dataset, 100, seed=0), 0
    for start in range(0, len(dataset), 100):
        batch = loader.load_batch(start)
        predictions = network(batch.pixels.to(device))["logits"].argmax(1).cpu()
        correct += int((predictions == batch.condition.label)[: len(dataset) - start].sum())
    return correct / len(dataset)


def random_shift(pixels: Tensor, position: Tensor, hflip: bool) -> Tensor:
    """Shift each image [B, C, H, W] by up to an eighth of its side, repeating its edges, and flip it at random."""
    height, width = pixels.shape[2:]
    reach = max(1, min(height, width) // 8)
    uniform = randomness.uniform(0, position, STREAM, 3)
    down, right = ((uniform[:, :2] * (2 * reach + 1)).long().clamp(max=2 * reach)).unbind(1)
    padded = functional.pad(pixels.float(), (reach,) * 4, mode="replicate").to(pixels.dtype)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = right[:, None] + torch.arange(width)
    if hflip:
        columns = torch.where(uniform[:, 2:] < 0.5, columns, columns.flip(1))
    sample = torch.arange(len(pixels))[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[None, :, None, None]
    return padded[sample, channel, rows, columns[:, None, None, :]]
