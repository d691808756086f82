"""`tessera tune`: a table, a plot, and settings that `tessera sample` then draws with; errors in one message."""

import json
import shutil

import pytest

from tessera import bundle

pytest.importorskip("sklearn")
QUICK = ("--count", 50, "--search", "steps", "--budget", 60, "--baseline", "sampler=ancestral steps=20")


@pytest.fixture
def run(trained, tmp_path):
    """A run of one's own, to be written into."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_is_tuned_and_its_newest_checkpoint_draws_so(tessera, run, tmp_path):
    done = tessera("tune", run, *QUICK, "--choose", "best")
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
    chosen = next(each for each in results["checked"] if each["name"] == results["chosen"])
    assert config.sampling.model_dump(mode="json") == chosen["sampling"]
    assert config.origin["sampling"].startswith("by tessera tune")
    assert f"wrote into {checkpoint}" in done.out
    assert "later checkpoints" in done.out
    again = tessera("tune", run, "--count", 50, "--search", "steps", "--choose", "none")
    assert again.code == 0, again.err
    assert again.out.splitlines()[:3] == done.out.splitlines()[:3]
    again = tessera("tune", run, *QUICK, "--choose", "none")  # its baseline is not what was written
    assert again.code == 0, again.err


def test_a_new_bundle_for_what_is_none(tessera, trained, tmp_path):
    assert tessera("convert", trained, tmp_path / "model", "--to", "bundle").code == 0
    before = (tmp_path / "model/config.json").read_bytes()
    words = ("--save-to", tmp_path / "tuned", "--choose", "fastest-equal", "--margin", "1000")
    done = tessera("tune", tmp_path / "model", *QUICK, *words)
    assert done.code == 0, done.err
    assert (tmp_path / "model/config.json").read_bytes() == before
    assert (tmp_path / "tune-model/results.json").exists()
    chosen = json.loads((tmp_path / "tune-model/results.json").read_text())["chosen"]
    if chosen is not None:
        assert bundle.load(tmp_path / "tuned").config.origin["sampling"].startswith("by tessera tune")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--count", 10), "count: Input should be greater than or equal to 50 (got 10)"),
        (("--choose", "fastest"), "choose: Input should be 'fastest-equal', 'best' or 'none' (got 'fastest')"),
        (("--budget", 0), "budget: Input should be greater than 0"),
        (("--budget", 0.0001), "the baseline alone"),
        (("--search", "solvers"), "unknown search 'solvers'; did you mean 'solver'?"),
        (("--search", ","), "search: nothing to search"),
        (("--baseline", "steps=0"), "steps: Input should be greater than 0"),
        (("--baseline", "sampler=ancestor"), "unknown sampler 'ancestor'; did you mean 'ancestral'?"),
        (("--reference", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_message_and_leave_nothing_behind(tessera, run, words, message):
    done = tessera("tune", run, *words)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not (run / "tune").exists()


def test_a_model_that_is_none(tessera, tmp_path):
    assert "there is nothing at" in tessera("tune", tmp_path / "nothing").err
    (tmp_path / "empty").mkdir()
    assert "is no model that Tessera knows" in tessera("tune", tmp_path / "empty").err


def test_without_a_reference_one_is_asked_for(tessera, make_model, tmp_path):
    bundle.save(make_model(), tmp_path / "model")
    done = tessera("tune", tmp_path / "model")
    assert done.code == 1
    assert "give --reference DATA" in done.err


def test_a_pt_needs_a_place_for_its_settings(tessera, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    done = tessera("tune", tmp_path / "model.pt", "--reference", "digits")
    assert done.code == 1
    assert "give --save-to FOLDER" in done.err
