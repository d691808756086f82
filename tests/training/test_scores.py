"""Scores while a run goes on: written down, the best checkpoint kept, and the same after every interruption."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tessera import bundle
from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation import protocol, reference
from tessera.evaluation.features import extract, extractor
from tessera.evaluation.sources import Data
from tessera.monitoring.logger import read_log
from tessera.runtime import Distributed
from tessera.training import loop
from tessera.training.scores import EvaluationConfig, best, history

SCORED = (
    "training.steps=6",
    "training.ema.decay=0.5",
    "training.optimizer.learning_rate=0.01",
    "evaluation={every: 2, count: 40, batch: 40, metrics: [kid, fd, prdc]}",
    "evaluation.reference=digits:ceiling",
)


@pytest.fixture(autouse=True)
def needs_digits():
    pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(tiny, place) -> Path:
    """An uninterrupted run; not to be changed."""
    if not place.exists():
        shutil.copytree(loop.train(tiny("whole", *SCORED)), place)
    return place


def scores_of(run: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_log(run) if "fd" in record}


def test_scores_are_written_into_log_files_and_a_curve(whole):
    pytest.importorskip("matplotlib")
    run = whole
    found = scores_of(run)
    assert list(found) == [2, 4, 6]
    assert [record["step"] for record in read_log(run) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    names = ("kid", "fd", "precision", "recall", "density", "coverage")
    for step, record in found.items():
        assert set(record) == {"step", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))}
        told = protocol.load(run / f"evaluation/step-{step:09d}.json")
        assert {score.metric: score.value for score in told} == {name: record[name] for name in names}
        assert all(score.low == record[f"{score.metric}_low"] for score in told)
        assert {score.protocol.samples for score in told} == {40}
        assert {score.protocol.sampling["class policy"] for score in told} == {"balanced"}
    assert (
        len({score.fingerprint for step in found for score in protocol.load(run / f"evaluation/step-{step:09d}.json")})
        == 3
    )
    Image.open(run / "evaluation/curve.png").verify()
    left = {path.name for path in (run / "evaluation").iterdir()}
    left = {name.partition("reference-")[1] or name for name in left}
    assert left == {
        "plan.json",
        "reference-",
        "curve.png",
        *(f"step-{step:09d}.json" for step in found),
    }  # no pictures, no features


def test_scores_are_those_that_evaluate_gives_of_the_checkpoint(whole, digits_scores):
    told = digits_scores(bundle.checkpoints(whole)[0])
    assert {name: scores_of(whole)[6][name] for name in told} == told


@pytest.fixture
def digits_scores(tmp_path):
    """kid and fd of a checkpoint, by the suite itself."""
    import torch

    from tessera.evaluation import suite
    from tessera.evaluation.features import extractor
    from tessera.generation.bulk import BulkSamples, asked_by_policy

    def score(path: Path) -> dict[str, float]:
        model = bundle.load(path)
        drawn = BulkSamples(model, asked_by_policy(model, 40, "balanced"), tmp_path / path.name / "s", 40)
        network = extractor("digits", torch.device("cpu"))
        done = suite.evaluate(drawn, "digits:ceiling", network, tmp_path / path.name / "out", ["kid", "fd"], batch=40)
        return {each.metric: each.value for each in done.scores}

    return score


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, []),
        ({"every": 4}, [4, 8, 10]),
        ({"at": (3, 7)}, [3, 7, 10]),
        ({"at": (10,)}, [10]),
        ({"every": 5, "at": (3, 5, 30)}, [3, 5, 10]),
    ],
)
def test_a_run_is_scored_every_so_many_steps_at_those_that_are_named_and_at_its_end(words, expected):
    config = EvaluationConfig(**words)
    assert [step for step in range(11) if config.due(step, 10)] == expected
    assert config.scores == bool(expected)


def test_scores_at_named_steps_are_those_of_every_step_and_runs_may_share_their_reference(tiny, whole, tmp_path):
    shared = f"evaluation.reference_folder={tmp_path / 'shared'}"
    run = loop.train(tiny("run", *SCORED, "evaluation.every=null", "evaluation.at=[4]", shared))
    assert {step: scores_of(whole)[step] for step in (4, 6)} == scores_of(run)
    (kept,) = (tmp_path / "shared").iterdir()
    assert not list((run / "evaluation").glob("reference*"))
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    loop.train(tiny("other", *SCORED, "evaluation.every=null", "evaluation.at=[4]", shared))
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before


def test_a_run_killed_before_its_last_grid_draws_it_when_it_goes_on(tiny, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    grid = run / "samples/step-000000006.png"
    before = grid.read_bytes()
    grid.unlink()
    loop.train(tiny("run", *SCORED))
    assert grid.read_bytes() == before


def test_a_run_without_evaluation_writes_none_of_it(tiny):
    run = loop.train(tiny("run"))
    assert not (run / "evaluation").exists()
    assert not any(name.endswith("_low") for record in read_log(run) for name in record)


def test_scoring_changes_nothing_of_what_is_learned(tiny, whole, weights):
    plain = loop.train(tiny("plain", *SCORED, "evaluation.every=null"))
    for name, value in weights(plain).items():
        assert (weights(whole)[name] == value).all()


def test_the_best_checkpoint_is_kept_beyond_the_newest(tiny):
    changes = (*SCORED, "training.keep_last=1", "training.optimizer.learning_rate=1e-12")
    run = loop.train(tiny("run", *changes, "training.ema.decay=0"))
    found = scores_of(run)
    expected = min(found, key=lambda step: found[step]["kid"])
    kept = {int(path.name.removeprefix("step-")) for path in bundle.checkpoints(run)}
    assert kept == {expected, 6}
    step, score = best(history(run))
    assert (step, score.metric, score.value) == (expected, "kid", found[expected]["kid"])


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("fd", [3.0, 1.0, 2.0], 4),
        ("fd", [1.0, 1.0, 2.0], 2),
        ("precision", [0.1, 0.3, 0.2], 4),
        ("as asked", [0.1, 0.2, 0.9], 6),
        ("authenticity", [0.5, 0.4, 0.3], 2),
        ("impossible", [0.5, 0.4, 0.3], 6),
    ],
)
def test_which_value_is_the_best(metric, values, expected):
    scored = {2 * (i + 1): {metric: SimpleNamespace(value=value), "other": None} for i, value in enumerate(values)}
    assert best(scored) == (expected, scored[expected][metric])
    assert best({}) is None


def test_the_best_by_a_score_of_what_was_asked_for_is_kept(tiny):
    """Of the oracle the log says as_asked, of which more is better."""
    run = loop.train(tiny("run", *SCORED, "evaluation.metrics=[oracle, kid]", "evaluation.reference=digits"))
    found = {record["step"]: record["as_asked"] for record in read_log(run) if "as_asked" in record}
    assert list(found) == [2, 4, 6]
    kept = {int(path.name.removeprefix("step-")) for path in bundle.checkpoints(run)}
    assert max(found, key=lambda step: found[step]) in kept


def test_a_resumed_run_has_the_scores_of_an_uninterrupted_one(tiny, whole):
    for steps in (2, 4, 6):
        part = loop.train(tiny("part", *SCORED, f"training.steps={steps}"))
    assert scores_of(part) == scores_of(whole)
    for step in (2, 4, 6):
        name = f"evaluation/step-{step:09d}.json"
        ours, theirs = protocol.load(part / name), protocol.load(whole / name)
        assert [score.fingerprint for score in ours] == [score.fingerprint for score in theirs]
        assert [score.subject["pictures"] for score in ours] == [score.subject["pictures"] for score in theirs]


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_killed_between_a_checkpoint_and_its_scores_makes_them_when_it_goes_on(tiny, whole, at):
    part = loop.train(tiny("part", *SCORED, f"training.steps={at}"))
    kept = [record for record in read_log(part) if not ("fd" in record and record["step"] == at)]
    (part / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    (part / f"evaluation/step-{at:09d}.json").unlink()
    work = part / f"evaluation/step-{at:09d}.work/samples"  # half drawn
    work.mkdir(parents=True)
    (work / "000000.npy.partial").write_text("half")
    (work / "plan.json").write_text("{")
    loop.train(tiny("part", *SCORED))
    assert scores_of(part) == scores_of(whole)
    assert [record["step"] for record in read_log(part)] == [record["step"] for record in read_log(whole)]
    assert (part / f"evaluation/step-{at:09d}.json").exists()
    assert not list((part / "evaluation").glob("*.work"))
    loop.train(tiny("part", *SCORED))
    assert [record["step"] for record in read_log(part)] == [record["step"] for record in read_log(whole)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.metrics=[fd, kidd]", "unknown metric 'kidd'; did you mean 'kid'?"),
        ("evaluation.metrics=[]", "name at least one metric"),
        ("evaluation.num_samples=1", "evaluation.num_samples"),
        ("evaluation.evry=3", "did you mean 'every'?"),
    ],
)
def test_a_misspelling_is_an_error_when_the_recipe_is_read(tiny, change, said):
    with pytest.raises(TesseraError) as caught:
        tiny("run", *SCORED, change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.features=digitz", "unknown features 'digitz'; did you mean 'digits'?"),
        ("evaluation.reference=nowhere", "no data at nowhere"),
        ("evaluation.reference=nowhere.npz", r"nowhere\.npz"),
        ("evaluation.reference=shapes", "size differ"),
    ],
)
def test_what_cannot_be_scored_is_an_error_before_training_begins(tiny, tmp_path, change, said):
    with pytest.raises(TesseraError, match=said):
        loop.train(tiny("run", *SCORED, "evaluation.features=digits", change))
    assert not (tmp_path / "run").exists()


def test_another_reference_in_a_run_that_goes_on_is_one_error(tiny):
    run = loop.train(tiny("run", *SCORED, "training.steps=2"))
    with pytest.raises(TesseraError, match=r"evaluation holds other work: reference was digits:ceiling, is") as caught:
        loop.train(tiny("run", *SCORED, "evaluation.reference=digits:judge"))
    assert "Give the run another output=, or remove that folder" in str(caught.value)
    shutil.rmtree(run / "evaluation")
    loop.train(tiny("run", *SCORED, "evaluation.reference=digits:judge"))
    assert list(scores_of(run)) == [2, 4, 6]


def test_a_run_that_0_2_began_goes_on(tiny):
    """Whose plan does not know a grid by its kind, nor caching."""
    run = loop.train(tiny("run", *SCORED, "training.steps=2"))
    path = run / "evaluation/plan.json"
    plan = json.loads(path.read_text())
    plan["drawing"]["spacing"] = plan["drawing"]["spacing"]["kind"]
    del plan["drawing"]["caching"]
    path.write_text(json.dumps(plan))
    loop.train(tiny("run", *SCORED))
    assert list(scores_of(run)) == [2, 4, 6]


def test_scores_that_cannot_be_made_do_not_end_the_run(tiny, capsys, tmp_path, monkeypatch):
    """The reference has too few rows for precision, which is seen when both are there; one metric alone is an error."""
    changes = ("evaluation.metrics=[prdc]", "evaluation.reference=few.npz")
    monkeypatch.chdir(tmp_path)
    features = extractor("digits", torch.device("cpu"))
    reference.save(extract(Data(DigitsConfig(), 3), features, Path("few"), Distributed()), Path("few.npz"))
    run = loop.train(tiny("run", *SCORED, *changes))
    assert "step 2 could not be scored: " in capsys.readouterr().err
    assert read_log(run)[-1]["step"] == 6
    assert history(run) == {}


def test_a_last_step_is_scored_whatever_the_interval(tiny):
    run = loop.train(tiny("run", *SCORED, "evaluation.every=4"))
    assert list(history(run)) == [4, 6]


def test_scores_past_the_step_that_a_run_goes_on_from_are_made_again(tiny):
    run = loop.train(tiny("run", *SCORED))
    before = history(run)
    shutil.rmtree(bundle.checkpoints(run)[0])
    loop.train(tiny("run", *SCORED))
    assert list(history(run)) == list(before) == [2, 4, 6]
    assert history(run)[6]["kid"].value == before[6]["kid"].value
