"""The first Python example of the README makes the picture above it."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_first_example_makes_the_picture_above_it(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture, code = re.search(
        r"!\[[^]]+\]\((docs/figures/emoji[^)]+)\).*?```python\n(.*?)```", text, re.DOTALL
    ).groups()  # pyright: ignore
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    made, shown = (np.asarray(Image.open(path), np.int16) for path in (tmp_path / "emoji.png", ROOT / picture))
    assert made.shape == shown.shape
    assert np.abs(made - shown).mean() < 1  # of 255: processors round differently
