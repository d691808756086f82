"""A thousand damaged data sets, images and checkpoints: no traceback, and nothing is lost without a word.

Damaged recipes and commands are in test_fuzz_cli.py. Everything is a function of the seed.
"""

import io
import json
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tessera import bundle
from tessera.data.files import FilesConfig
from tessera.data.images import ImagesConfig, InvalidSample, load_image
from tessera.errors import TesseraError
from tessera.interop import load

pytestmark = pytest.mark.slow

MODES = ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"]
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF"}


def encoded(chance: random.Random, suffix: str) -> bytes:
    """A small image of a random mode that the format can hold."""
    side = chance.randint(1, 20)
    pixels = np.random.default_rng(chance.randint(0, 2**32)).integers(0, 256, (side, side, 3), np.uint8)
    for mode in chance.sample(MODES, len(MODES)):
        buffer = io.BytesIO()
        try:
            Image.fromarray(pixels).convert("RGB" if mode.startswith("I;") else mode).save(buffer, FORMATS[suffix])
        except (OSError, ValueError, KeyError):
            continue
        return buffer.getvalue()
    raise AssertionError(f"no mode for {suffix}")


def damaged(chance: random.Random, content: bytes) -> bytes:
    """The content, cut, changed, doubled, emptied or replaced; sometimes unchanged."""
    kind = chance.randrange(7)
    if kind == 0:
        return content[: chance.randint(0, len(content))]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind == 2:
        start = chance.randrange(len(content))
        return content[:start] + chance.randbytes(chance.randint(1, 64)) + content[start:]
    if kind == 3:
        return chance.choice(
            [b"", b"\x00" * 100, b"<html>404</html>", chance.randbytes(200), b"PK\x03\x04", content * 2]
        )
    return content


def name_of(chance: random.Random, number: int, suffix: str) -> str:
    stem = chance.choice(
        ["a", "b c", "set #3", "ü", "x.y", "日本", "-n", "it's", '"q"', "007", "1e5", "[z]", "{k}", "%41"]
    )
    return f"{stem}{number}.{chance.choice([suffix, suffix.upper(), suffix])}"


def write_data_set(chance: random.Random, root: Path) -> set[str]:
    """A data set of a random layout with damaged parts. Returns the names of its images, as they appear in reports."""
    layout = chance.choice(["flat", "classes", "metadata.csv", "metadata.jsonl", "captions", "tar", "parquet"])
    suffixes = [chance.choice(list(FORMATS)) for _ in range(chance.randint(2, 7))]
    names = [name_of(chance, number, suffix) for number, suffix in enumerate(suffixes)]
    contents = [damaged(chance, encoded(chance, suffix)) for suffix in suffixes]
    root.mkdir(parents=True)
    if layout == "tar":
        with tarfile.open(root / "data.tar", "w") as archive:
            for name, content in zip(names, contents):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        if chance.random() < 0.3:
            (root / "data.tar").write_bytes(damaged(chance, (root / "data.tar").read_bytes()))
            return set()  # which members are left is not known
        return set(names)
    if layout == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        cells = [
            chance.choice([{"bytes": c, "path": n}, {"bytes": c, "path": None}, None]) for n, c in zip(names, contents)
        ]
        columns = {"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
        if chance.random() < 0.6:
            labels = [chance.choice([0, 1, 2, None]) for _ in cells]
            columns["label"] = pa.array(labels)
        pyarrow.parquet.write_table(pa.table(columns), root / "data.parquet")
        return {f"row {row}" for row in range(len(cells))}
    folder = {"classes": lambda: chance.choice(["cat", "dog", "2", "a,b"])}.get(layout, lambda: "")
    paths = [str(Path(folder()) / name) for name in names]
    for path, content in zip(paths, contents):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    if layout == "captions":
        for path in paths:
            if chance.random() < 0.7:
                text = chance.choice(["a cat", "", "caf\u00e9", "x" * 1000]).encode(
                    chance.choice(["utf-8", "cp1252", "utf-16"])
                )
                (root / path).with_suffix(".txt").write_bytes(text)
    if layout.startswith("metadata"):
        rows = [
            {"file_name": chance.choice([path, path, path, f"./{path}", None, "", "missing.png", path * 2]),
             "label": chance.choice([0, 1, "cat", True, None, -1, 2.0])}
            for path in paths if chance.random() < 0.9
        ]  # fmt: skip
        if layout == "metadata.jsonl":
            text = "\n".join(json.dumps(row) for row in rows)
        else:
            text = "file_name,label\n" + "\n".join(f"{row['file_name'] or ''},{row['label']}" for row in rows)
        content = text.encode()
        (root / layout).write_bytes(damaged(chance, content) if content and chance.random() < 0.3 else content)
    for junk in chance.sample(["Thumbs.db", ".DS_Store", "notes.md", "cat/.hidden.png"], chance.randint(0, 2)):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"junk")
    return set(names)


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or None and the reason why there is none. Any other exception is a failure of the test."""
    try:
        return function(), ""
    except (TesseraError, InvalidSample) as error:
        return None, str(error).strip() or "NO REASON"


@pytest.mark.parametrize("block", range(10))
def test_data_sets(block, tessera, tmp_path):
    """Each image is in the check's list of samples, or in a finding; training reads or skips each sample by name."""
    for seed in range(40 * block, 40 * block + 40):
        chance, root = random.Random(seed), tmp_path / f"data {seed}"
        names, out = write_data_set(chance, root), tmp_path / f"out {seed}"
        checked = tessera("data", "check", root, "--out", out, "--json")
        assert "Traceback" not in checked.err, (seed, checked.err[-500:])
        assert checked.code in (0, 1, 2), seed
        if not (out / "decisions.jsonl").exists():
            assert checked.err.strip(), seed  # one error with its reason
            continue
        decisions = [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]
        report = "\n".join([one["name"] for one in decisions] + [checked.out])
        for name in names:
            quoted = json.dumps(name)[1:-1]  # as JSON writes it
            assert name in report or quoted in report or json.dumps(quoted)[1:-1] in report, (seed, name)
        assert all(one["keep"] or one["reasons"] for one in decisions), seed
        config = FilesConfig(kind="folder", path=str(root), size=(4, 4), upscale=True)
        dataset, reason = attempt(config.open)
        assert reason != "NO REASON", seed
        if dataset is None:
            continue
        assert len(dataset) == len(decisions), seed
        for index in range(len(dataset)):
            pixels, reason = attempt(lambda: dataset.pixels(index))  # noqa: B023
            assert reason != "NO REASON", (seed, index)
            assert pixels is None or pixels.shape == (3, 4, 4)
            assert dataset.name(index)


@pytest.mark.parametrize("block", range(4))
def test_images(block):
    """Pixels or a reason, whatever the bytes are."""
    for seed in range(100 * block, 100 * block + 100):
        chance = random.Random(10_000 + seed)
        content = damaged(chance, encoded(chance, chance.choice(list(FORMATS))))
        config = ImagesConfig(size=(8, 8), channels=chance.choice([1, 3]), upscale=chance.random() < 0.7)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pixels, reason = attempt(lambda: load_image(content, config))  # noqa: B023
        assert reason != "NO REASON", seed
        if pixels is not None:
            assert (pixels.dtype, pixels.shape) == (np.uint8, (config.channels, 8, 8))


@pytest.mark.parametrize("kind", ["bundle", "official", "safetensors"])
def test_checkpoints(kind, make_model, tmp_path):
    """A model, or one error. Never a model with other weights than the file's."""
    model = make_model({"num_classes": 3, "in_channels": 3, "out_channels": 6})
    state = model.network.state_dict()
    bundle.save(model, tmp_path / "bundle")
    torch.save({"ema": state, "args": {"num_classes": 3}}, tmp_path / "official.pt")
    save_file(state, str(tmp_path / "plain.safetensors"))
    for seed in range(67):
        chance = random.Random(20_000 + seed)
        if kind == "bundle":
            folder = tmp_path / f"bundle {seed}"
            folder.mkdir()
            files = sorted(path for path in (tmp_path / "bundle").iterdir() if path.is_file())
            hurt = chance.choice(files)
            for path in files:
                content = path.read_bytes()
                if path != hurt or chance.random() < 0.9:
                    (folder / path.name).write_bytes(damaged(chance, content) if path == hurt else content)
            source = folder
        else:
            original = tmp_path / ("official.pt" if kind == "official" else "plain.safetensors")
            source = tmp_path / f"{seed}{original.suffix}"
            source.write_bytes(damaged(chance, original.read_bytes()))
        num_heads = None if kind == "bundle" else 2
        loaded, reason = attempt(lambda: load.load(str(source), "cpu", num_heads=num_heads))  # noqa: B023
        assert reason != "NO REASON", seed
        assert loaded is None or set(loaded.network.state_dict()) == set(state), seed
