"""The judge of sprites, benchmarks/sprites.py: exact on real clips; a still clip is not taken for a real one.

With sheets of the shared data; without them the tests are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("TESSERA_SHARED", ROOT.parent / "shared/data")) / "sprites"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"there are no sprites at {FOLDER}")


@pytest.fixture(scope="module")
def sprites():
    spec = importlib.util.spec_from_file_location("sprites", ROOT / "benchmarks/sprites.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sprites"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sheets(sprites):
    return sprites.Sprites(FOLDER)


def test_the_characters_of_the_test_are_apart(sprites):
    train, test = (set(sprites.characters(part)) for part in (False, True))
    assert (len(train), len(test)) == (1110, 186)
    assert not train & test


def test_real_clips_are_read_exactly_and_broken_ones_are_not_valid(sprites, sheets):
    character, motion = (1, 1, 0, 1), ("slash", "right")
    assert sprites.is_test(character)
    clip = sprites.as_uint8(sheets.compose(character, *motion))
    reading = sheets.read(clip)
    assert (reading.action, reading.direction, reading.character) == (*motion, character)
    assert reading.distance < 1
    noisy = np.clip(clip + np.random.default_rng(0).normal(0, 20, clip.shape), 0, 255).astype(np.uint8)
    assert sheets.read(noisy).character == character
    assert sheets.read(noisy).is_valid
    still = sheets.read(np.repeat(clip[2:3], 8, axis=0))
    assert not still.is_valid
    label = sprites.CLASSES.index("slash right")
    result = sprites.scores([reading, still], [label, label], [character, character])
    assert {estimate.value for estimate in result.values()} == {0.5}
    result = sprites.scores([reading, reading], [label, 0], [character, (0, 0, 0, 0)])
    assert [result[name].value for name in ("valid", "action", "identity")] == [1, 0.5, 0.5]
