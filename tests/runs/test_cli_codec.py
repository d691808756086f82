"""`tessera codec`: output, and that its commands work together."""

import json

import pytest
from PIL import Image

pytest.importorskip("diffusers")

RECIPE = """
data: {kind: shapes, count: 30}
autoencoder: {channels: [8, 16], latent_channels: 2, groups: 4}
training: {steps: 2, global_batch_size: 4, num_held_out: 8, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n" + RECIPE)
    return path


def test_training_prints_scores_and_the_codec_setting(tessera, recipe, tmp_path):
    done = tessera("codec", "train", recipe)
    assert done.code == 0, done.err
    scores, line = done.out[: done.out.rindex("codec:")], done.out.splitlines()[-1]
    assert json.loads(scores)["images"] == 8
    assert line == f"codec: {{kind: autoencoder-kl, source: {tmp_path / 'run' / 'codec'}}}"
    assert "step 2/2" in done.err


def test_a_codec_is_scored_on_other_images(tessera, recipe, tmp_path):
    tessera("codec", "train", recipe)
    sheet = tmp_path / "sheet.png"
    done = tessera(
        *("codec", "score", tmp_path / "run", "shapes:test"),
        *("--num-samples", 5, "--features", "shapes", "--out", sheet, "--device", "cpu"),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "5 images"
    assert [line.split()[0] for line in lines[1:]] == ["psnr", "ssim", "fd", "latents"]
    with Image.open(sheet) as image:
        assert image.size == (8 * 34 - 2, 2 * 34 - 2)


def test_errors_are_one_line(tessera, recipe):
    done = tessera("codec", "train", recipe, "training.steps=0")
    assert (done.code, done.out) == (1, "")
    assert "training.steps" in done.err
    done = tessera("codec", "score", "nowhere/at/all", "shapes:test")
    assert done.code == 1
    assert done.err.startswith("error: no codec at nowhere/at/all")
