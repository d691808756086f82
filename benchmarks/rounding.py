"""What rounded weights change: the size of the file, and the images of equal requests, against the exact weights.

    python benchmarks/rounding.py runs/sprites
    python benchmarks/rounding.py emoji --prompts "red heart" "smiling cat"

A model that is rounded already, as the shipped ones are, is compared with itself.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import tessera
from tessera import bundle

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", help="of a text model; a class model shows every class")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("overrides", nargs="*", help="sampling settings, such as num_steps=20")
    options = parser.parse_intermixed_args()
    model = tessera.load(options.model)
    condition: list = options.prompts or list(range(model.config.network.num_classes))
    rows = len(condition)
    if not rows:
        raise SystemExit(f"{options.model} has no classes: give --prompts, or a model of classes or text")
    key = "prompts" if options.prompts else "classes"
    request = {key: condition * options.seeds, "seeds": np.repeat(np.arange(options.seeds), rows).tolist()}
    print("| weights | file | images: root mean square difference, levels | largest of an image |\n|---|---|---|---|")
    exact = None
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            bundle.save(model, Path(folder) / "model", dtype=dtype)
            size = (Path(folder) / "model" / bundle.WEIGHTS).stat().st_size
            rounded = tessera.load(Path(folder) / "model")
            images = tessera.generate(rounded, **request, overrides=options.overrides).astype(np.float32)
        exact = images if exact is None else exact
        squares = np.square(images - exact).reshape(len(images), -1).mean(axis=1)
        print(
            f"| {name} | {size / 1e6:.1f} MB | {np.sqrt(squares.mean()):.2f} | {np.sqrt(squares.max()):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
