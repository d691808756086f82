"""`tessera distill`: a student of a trained run, from the command line."""

import pytest

from tessera import bundle

pytestmark = pytest.mark.run


@pytest.fixture
def teacher(tessera, recipe, tmp_path):
    assert tessera("train", recipe, "diffusion=flow", "sampling.guidance_scale=1.5").code == 0
    return tmp_path / "run"


def test_a_student_is_trained_and_sampled_in_one_step(tessera, teacher, tmp_path):
    done = tessera("distill", teacher, "--to", tmp_path / "student", "training.steps=3")
    assert done.code == 0, done.err
    assert done.out.strip() == str(tmp_path / "student")
    student = bundle.load_config(bundle.checkpoints(tmp_path / "student")[0])
    assert (student.sampling.sampler.kind, student.sampling.num_steps, student.sampling.guidance_scale) == (
        "jump",
        2,
        1,
    )
    out = tmp_path / "digits.png"
    done = tessera("sample", tmp_path / "student", "--classes", "all", "--out", out, "num_steps=1")
    assert done.code == 0, done.err
    assert out.exists()


def test_a_dry_run_writes_nothing(tessera, teacher, tmp_path):
    done = tessera("distill", teacher, "--to", tmp_path / "student", "--dry-run")
    assert done.code == 0, done.err
    assert "peak memory" in done.out
    assert not (tmp_path / "student").exists()


def test_a_model_without_a_recipe_names_what_to_do(tessera, make_model, tmp_path):
    flow = {"kind": "flow", "prediction": "velocity"}
    bundle.save(make_model({"out_channels": 1}, flow), tmp_path / "m")
    done = tessera("distill", tmp_path / "m", "--to", tmp_path / "student")
    assert done.code == 1
    assert "does not say what it was trained on" in done.err
    assert "recipes/distill.yaml" in done.err


def test_jump_on_another_model_names_distill(tessera, teacher):
    done = tessera("sample", teacher, "sampler=jump")
    assert done.code == 1
    assert "tessera distill" in done.err
