"""The judge of sprites, benchmarks/sprites.py: exact on real clips; a still clip is not taken for a real one.

With sheets of the shared data; without them the tests are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tessera.errors import TesseraError

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


def test_a_model_is_judged_from_classes_and_from_first_frames(
    sprites, sheets, make_model, monkeypatch, tmp_path, capsys
):
    """A model that returns real clips of test characters is right throughout, and the sheet shows them."""
    import tessera

    network = {"input_size": (8, 64, 64), "in_channels": 3, "out_channels": 6, "num_classes": 9, "patch_size": 32}
    tessera.save(make_model(network, class_names=()), tmp_path / "model")
    held_out = list(sprites.characters(test=True))

    def real_clips(model, labels, seeds, batch_size, given_frames=None, given_indices=()):
        shown = [held_out[index] for index in np.random.default_rng(1).integers(len(held_out), size=len(labels))]
        clips = np.stack([sprites.as_uint8(sheets.compose(*each)) for each in motions(shown, labels)])
        assert given_frames is None or (given_frames == clips[:, :1]).all()
        return clips

    def motions(shown, labels):
        return [(character, *sprites.MOTIONS[label]) for character, label in zip(shown, labels)]

    monkeypatch.setattr(tessera, "generate", real_clips, raising=False)
    with pytest.raises(TesseraError, match="--count 18 or more"):
        sprites.judge(sheets, str(tmp_path / "model"), 9, tmp_path / "clips.webp")
    sprites.judge(sheets, str(tmp_path / "model"), 18, tmp_path / "new/clips.webp")
    lines = capsys.readouterr().out.splitlines()
    first, second = (index for index, line in enumerate(lines) if "18 clips" in line)
    assert "median distance 0.0" in lines[first]
    assert "test characters among the valid ones: 1.000" in "\n".join(lines[first:second])
    assert any("identity" in line and "1.000" in line for line in lines[second:])
    assert clip_shape(tmp_path / "new/clips.webp") == (8, 4 * 128, 9 * 128)


def clip_shape(path):
    from PIL import Image

    with Image.open(path) as clip:
        return (clip.n_frames, clip.height, clip.width)
