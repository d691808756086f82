"""How well does a codec reconstruct images? Photographs at their own size, and emoji.

    python benchmarks/codecs.py photos CODEC [FOLDER]     scikit-learn's two photographs, and those of a folder
    python benchmarks/codecs.py emoji CODEC               those that a fit of recipes/codec-emoji.yaml holds out

CODEC: the folder of an autoencoder. Photographs are cropped to multiples of the codec's factor. Prints Markdown.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tessera import randomness
from tessera.codecs.resolve import resolve_codec
from tessera.data.resolve import resolve_data as named_data
from tessera.evaluation.features import load_extractor
from tessera.evaluation.reconstruction import Reconstruction, reconstruct
from tessera.training.codec import HELD_OUT_STREAM, CodecTrainingConfig

CPU = torch.device("cpu")
EMOJI = Path(__file__).parents[2] / "shared" / "data" / "emoji" / "train.parquet"


class Photographs:
    """Images of any size, as a data source."""

    class_names = ()

    def __init__(self, named: dict[str, np.ndarray], factor: int) -> None:
        self.names, self.factor, self.images = list(named), factor, list(named.values())

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return 0

    def name(self, index: int) -> str:
        return self.names[index]

    def pixels(self, index: int) -> np.ndarray:
        height, width = (side // self.factor * self.factor for side in self.images[index].shape[:2])
        return np.ascontiguousarray(self.images[index][:height, :width].transpose(2, 0, 1))


def photographs(folder: Path | None) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_sample_images

    images: dict[str, np.ndarray] = {}
    images |= zip(("china", "flower"), load_sample_images().images, strict=True)
    for path in sorted(folder.iterdir()) if folder else []:
        with Image.open(path) as image:
            images[path.stem] = np.asarray(image.convert("RGB"))
    return images


def row(name: str, size: str, results: Reconstruction) -> str:
    fd = "" if results.fd is None else f"{results.fd.value:.3g} ({results.fd.low:.2g} to {results.fd.high:.2g})"
    cells = [
        name,
        size,
        f"{results.psnr.value:.2f}",
        f"{results.ssim.value:.4f}",
        fd,
        f"{results.latent_mean:.3f}, {results.latent_std:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("photos", "emoji"))
    parser.add_argument("codec")
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args()
    codec = resolve_codec(options.codec).build()
    print("| images | size | PSNR, dB | SSIM | FD (shapes, at 32 x 32) | latents: mean, standard deviation |")
    print("|---|---|---|---|---|---|")
    if options.what == "emoji":
        source = named_data(str(EMOJI), (64, 64)).open()
        count = CodecTrainingConfig().num_held_out
        chosen = np.sort(randomness.permutation(0, HELD_OUT_STREAM, 0, len(source)).numpy()[:count])
        results = reconstruct(codec, source, chosen.tolist(), CPU, load_extractor("shapes", CPU))
        print(row(f"{results.count} emoji", "64 x 64", results))
        return
    photos = Photographs(photographs(options.folder), codec.factor)
    ratios = []
    for index, name in enumerate(photos.names):
        height, width = photos.pixels(index).shape[1:]
        results = reconstruct(codec, photos, [index], CPU)
        ratios.append(results.psnr.value)
        print(row(name, f"{height} x {width}", results))
    print(f"\nmean of {len(ratios)} photographs {np.mean(ratios):.2f} dB, lowest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
