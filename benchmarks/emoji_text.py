"""Emoji from their names: a figure of samples with their nearest training images, for known and for new prompts.

    python benchmarks/emoji_text.py runs/emoji-text --data ../shared/data/emoji/train.parquet --out docs/figures

Writes emoji-text-known.png and emoji-text-new.png. A row is a prompt: samples with consecutive seeds, then the training
images nearest to the first sample (mean squared difference of pixels). Prompts that are names of training images are
checked to be, and new ones not to be. Prints the fraction of samples that are copies: nearer to a training image than
that image's own nearest neighbor is.
"""

import argparse
from pathlib import Path

import numpy as np

import tessera
from tessera import generation, images
from tessera.data.files import FilesConfig

KNOWN = (
    "smiling cat with heart-eyes", "red apple", "blue heart", "fire engine", "snowman", "octopus",
    "full moon", "birthday cake", "soccer ball", "sunflower", "rocket", "hamburger",
)  # fmt: skip
NEW = (
    "crying cat with heart-eyes", "blue apple", "smiling heart", "green car", "sad snowman", "purple octopus",
    "smiling moon", "chocolate cake", "red ball", "blue flower", "two rockets", "face with pizza",
)  # fmt: skip
SEEDS, NEIGHBORS = 6, 2


def nearest(image: np.ndarray, others: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and distances of the nearest of others float32 [N, D] to an image float32 [D]."""
    distances = np.square(others - image).mean(axis=1)
    order = np.argsort(distances)[:count]
    return order, distances[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="the parquet file of the training")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--known", nargs="+", default=KNOWN, help="prompts that are names of training images")
    parser.add_argument("--new", nargs="+", default=NEW, help="prompts that are not")
    parser.add_argument("overrides", nargs="*", help="sampling settings, such as guidance_scale=3")
    options = parser.parse_args()
    model = tessera.load(options.model)
    size = generation.image_size(model)
    dataset = FilesConfig(kind="parquet", path=options.data, caption="text", label=None, size=size).open()
    names = [dataset.caption(index) for index in range(len(dataset))]
    training = np.stack([dataset.pixels(index) for index in range(len(dataset))]).transpose(0, 2, 3, 1)
    flat = training.reshape(len(training), -1).astype(np.float32) / 255
    copies: list[bool] = []
    for kind, prompts in (("known", options.known), ("new", options.new)):
        for prompt in prompts:
            if (prompt in names) != (kind == "known"):
                raise SystemExit(f"'{prompt}' is {'not ' * (kind == 'known')}a name of a training image")
        rows = []
        for prompt in prompts:
            seeds = range(options.seeds)
            samples = tessera.generate(
                model, prompts=[prompt], seeds=seeds, batch_size=options.seeds, overrides=options.overrides
            )
            neighbors = []
            for number, sample in enumerate(samples):
                order, distances = nearest(sample.reshape(-1).astype(np.float32) / 255, flat, NEIGHBORS)
                own = nearest(flat[order[0]], flat, 2)[1][1]  # the first is the image itself
                copies.append(bool(distances[0] < own))
                if number == 0:
                    neighbors = [training[index] for index in order]
            rows.append(images.grid(np.stack([*samples, *neighbors]), len(samples) + len(neighbors)))
        images.save_png(options.out / f"emoji-text-{kind}.png", images.with_captions(rows, prompts))
    print(f"{np.mean(copies):.1%} of {len(copies)} samples are copies of training images")


if __name__ == "__main__":
    main()
