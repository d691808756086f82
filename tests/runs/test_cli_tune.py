"""`tessera tune`: table, plot, the settings it writes, and errors."""

import json
import shutil

import pytest

from tessera import bundle

pytest.importorskip("sklearn")
QUICK = ("sampler=ancestral", "num_steps=20", "--num-samples", 50, "--search", "steps", "--budget", 60)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, to write into."""
    return shutil.copytree(trained, tmp_path / "run")


def test_the_settings_are_written_into_the_newest_checkpoint(tessera, run, tmp_path):
    done = tessera("tune", run, *QUICK, "--select", "best")
    assert done.code == 0, done.err
    folder = run / "tune" / bundle.checkpoints(run)[0].name
    results = json.loads((folder / "results.json").read_text())
    assert "baseline: ancestral, 20 steps, uniform" in done.out
    assert (folder / "frontier.png").exists()
    checkpoint = bundle.checkpoints(run)[0]
    config = bundle.load_config(checkpoint)
    if results["chosen"] is None:
        assert "nothing is written" in done.err
        return
    chosen = next(each for each in results["finalists"] if each["name"] == results["chosen"])
    assert config.sampling.model_dump(mode="json") == chosen["sampling"]
    assert config.provenance.sampling_chosen.startswith("by tessera tune")
    assert f"into {checkpoint}" in done.out
    assert "later checkpoints" in done.out
    again = tessera("tune", run, "--num-samples", 50, "--search", "steps", "--select", "none")
    assert again.code == 0, again.err
    assert again.out.splitlines()[:3] == done.out.splitlines()[:3]
    again = tessera("tune", run, *QUICK, "--select", "none")  # the baseline is the one of the first command
    assert again.code == 0, again.err


def test_the_settings_are_written_into_a_new_bundle(tessera, trained, tmp_path):
    assert tessera("convert", trained, tmp_path / "model", "--to", "bundle").code == 0
    before = (tmp_path / "model/config.json").read_bytes()
    words = ("--save-to", tmp_path / "tuned", "--select", "fastest-equal", "--tolerance", "1000")
    done = tessera("tune", tmp_path / "model", *QUICK, *words)
    assert done.code == 0, done.err
    assert (tmp_path / "model/config.json").read_bytes() == before
    assert (tmp_path / "tune-model/results.json").exists()
    chosen = json.loads((tmp_path / "tune-model/results.json").read_text())["chosen"]
    if chosen is not None:
        assert bundle.load(tmp_path / "tuned").config.provenance.sampling_chosen.startswith("by tessera tune")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-samples", 10), "num_samples: Input should be greater than or equal to 50 (got 10)"),
        (("--select", "fastest"), "select: Input should be 'fastest-equal', 'best' or 'none' (got 'fastest')"),
        (("--budget", 0), "budget: Input should be greater than 0"),
        (("--budget", 0.0001), "baseline"),
        (("--search", "solvers"), "unknown search 'solvers'; did you mean 'solver'?"),
        (("--search", ","), "search: "),
        (("num_steps=0",), "num_steps: Input should be greater than 0"),
        (("sampler=ancestor",), "unknown sampler 'ancestor'; did you mean 'ancestral'?"),
        (("--reference", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_message_and_write_nothing(tessera, run, words, message):
    done = tessera("tune", run, *words)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not (run / "tune").exists()


def test_a_path_that_is_not_a_model(tessera, tmp_path):
    assert str(tmp_path / "nothing") in tessera("tune", tmp_path / "nothing").err
    (tmp_path / "empty").mkdir()
    assert "is not a model that Tessera can read" in tessera("tune", tmp_path / "empty").err


def test_a_model_without_training_data_needs_a_reference(tessera, make_model, tmp_path):
    bundle.save(make_model(), tmp_path / "model")
    done = tessera("tune", tmp_path / "model")
    assert done.code == 1
    assert "give --reference DATA" in done.err


def test_a_pt_file_needs_a_new_bundle_for_its_settings(tessera, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    done = tessera("tune", tmp_path / "model.pt", "--reference", "digits")
    assert done.code == 1
    assert "give --save-to FOLDER" in done.err
