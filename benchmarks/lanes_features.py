"""Train the feature network of clips of lanes that comes with the package: 3-D convolutions, which classify color and
speed, and clips whose frames are shuffled.

    python benchmarks/lanes_features.py --out tessera/evaluation/weights/lanes
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tessera.data import LanesConfig
from tessera.data.lanes import COLORS, SPEEDS
from tessera.evaluation.toy import feature_network

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

SPEED_CLASSES = 3  # thirds of the range
SHUFFLED = 4  # one clip in this many has its frames in a random order


class ColorsAndSpeeds:
    """Clips of one lane; the class is the color of the disc, and a third of the range of speeds or "shuffled"."""

    class_names = tuple(f"{color} {motion}" for color in COLORS for motion in (*range(SPEED_CLASSES), "shuffled"))
    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None

    def __init__(self, count: int) -> None:
        self.lanes = LanesConfig(split="test", count=count).open()  # not what models are trained on

    def __len__(self) -> int:
        return len(self.lanes)

    def label(self, index: int) -> int:
        [disc] = self.lanes.discs(index)
        motion = int(SPEED_CLASSES * (disc.speed - SPEEDS[0]) / (SPEEDS[1] - SPEEDS[0]))
        return (SPEED_CLASSES + 1) * self.lanes.label(index) + (SPEED_CLASSES if self._is_shuffled(index) else motion)

    def name(self, index: int) -> str:
        return self.lanes.name(index)

    def pixels(self, index: int) -> np.ndarray:
        clip = self.lanes.pixels(index)
        order = np.random.default_rng(index).permutation(clip.shape[1])
        return clip[:, order] if self._is_shuffled(index) else clip

    @staticmethod
    def _is_shuffled(index: int) -> bool:
        return index // len(COLORS) % SHUFFLED == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the feature network of lanes.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--count", type=int, default=14_000, help="clips")
    arguments = parser.parse_args()
    config = LanesConfig()
    network = feature_network.train(
        ColorsAndSpeeds(arguments.count),
        (config.frames, *config.size),
        3,
        hflip=False,
        description="lanes, split test: color and third of the speed, or shuffled frames",
        width=16,
        steps=arguments.steps,
        batch_size=32,
        progress=lambda done, total: print(f"step {done}/{total}", flush=True) if done % 50 == 0 else None,
    )
    feature_network.save(network, arguments.out)
    print(network.config.origin)


if __name__ == "__main__":
    main()
