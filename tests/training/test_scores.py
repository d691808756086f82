"""Scores during training: logged and saved, the best checkpoint kept, and the same after interruptions."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tessera import bundle
from tessera.cli import app
from tessera.data import DigitsConfig, ShapesConfig
from tessera.errors import TesseraError
from tessera.evaluation import protocol, reference
from tessera.evaluation.features import extract, load_extractor
from tessera.evaluation.sources import DatasetSource
from tessera.generation.bulk import bulk_request, hash_values
from tessera.monitoring.logger import read_log
from tessera.runtime import SINGLE
from tessera.training import loop
from tessera.training.recipe import Recipe
from tessera.training.scores import EvaluationConfig, best, history

SCORED = (
    "training.steps=6",
    "training.ema.decay=0.5",
    "training.optimizer.learning_rate=0.01",
    "evaluation={every: 2, num_samples: 40, batch_size: 40, metrics: [kid, fd, prdc]}",
    "evaluation.reference=digits:ceiling",
)


@pytest.fixture(autouse=True)
def needs_digits():
    pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def whole_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(tiny, whole_dir) -> Path:
    """An uninterrupted run. Tests must not change it."""
    if not whole_dir.exists():
        shutil.copytree(loop.train(tiny("whole", *SCORED)), whole_dir)
    return whole_dir


def scores_of(run: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_log(run) if "fd" in record}


def test_scores_are_in_the_log_in_files_and_in_a_plot(whole):
    pytest.importorskip("matplotlib")
    run = whole
    by_step = scores_of(run)
    assert list(by_step) == [2, 4, 6]
    assert [record["step"] for record in read_log(run) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    names = ("kid", "fd", "precision", "recall", "density", "coverage")
    for step, record in by_step.items():
        assert set(record) == {"step", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))}
        scores = protocol.load(run / f"evaluation/step-{step:09d}.json")
        assert {score.metric: score.value for score in scores} == {name: record[name] for name in names}
        assert all(score.low == record[f"{score.metric}_low"] for score in scores)
        assert {score.protocol.samples for score in scores} == {40}
        assert {score.protocol.sampling["class_policy"] for score in scores} == {"balanced"}
    assert (
        len(
            {score.fingerprint for step in by_step for score in protocol.load(run / f"evaluation/step-{step:09d}.json")}
        )
        == 3
    )
    Image.open(run / "evaluation/curve.png").verify()
    names = {path.name for path in (run / "evaluation").iterdir()}
    names = {name.partition("reference-")[1] or name for name in names}
    assert names == {
        "plan.json",
        "reference-",
        "curve.png",
        *(f"step-{step:09d}.json" for step in by_step),
    }  # no images, no features


def test_scores_are_those_of_evaluate_for_the_checkpoint(whole, digits_scores):
    expected = digits_scores(bundle.checkpoints(whole)[0])
    assert {name: scores_of(whole)[6][name] for name in expected} == expected


def test_scores_of_classes_as_frequent_as_in_the_data(tiny, tmp_path):
    """As `tessera evaluate --class-policy data`: the model records the images of each class."""
    run = loop.train(tiny("data", *SCORED, "evaluation.class_policy=data", "evaluation.every=6"))
    model = bundle.load(bundle.checkpoints(run)[0])
    labels = DigitsConfig().open().labels
    assert model.config.class_counts == tuple(np.bincount(labels).tolist())
    words = ["--reference", "digits:ceiling", "--metrics", "kid,fd", "--num-samples", "40", "--batch-size", "40"]
    words += ["--class-policy", "data", "--out", str(tmp_path / "scores")]
    assert CliRunner().invoke(app, ["evaluate", "score", str(run), *words]).exit_code == 0
    records = json.loads((tmp_path / "scores/scores.json").read_text())
    expected = {record["metric"]: record["value"] for record in records}
    assert {name: scores_of(run)[6][name] for name in expected} == expected


@pytest.fixture
def digits_scores(tmp_path):
    """kid and fd of a checkpoint by the evaluation suite."""
    from tessera.evaluation import suite
    from tessera.generation.bulk import BulkSamples, bulk_request

    def score(path: Path) -> dict[str, float]:
        model = bundle.load(path)
        samples = BulkSamples(model, bulk_request(model, 40, "balanced"), tmp_path / path.name / "s", 40)
        extractor, folder = load_extractor("digits", torch.device("cpu")), tmp_path / path.name / "out"
        result = suite.evaluate(samples, "digits:ceiling", extractor, folder, ["kid", "fd"], batch_size=40)
        return {score.metric: score.value for score in result.scores}

    return score


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"every": 4}, [4, 8, 10]),
        ({"at": (3, 7)}, [3, 7, 10]),
        ({"at": (10,)}, [10]),
        ({"every": 5, "at": (3, 5, 30)}, [3, 5, 10]),
    ],
)
def test_a_run_is_scored_at_regular_steps_at_listed_steps_and_at_its_end(settings, expected):
    config = EvaluationConfig(**settings)
    assert [step for step in range(11) if config.due(step, 10)] == expected
    assert config.enabled == bool(expected)


def test_listed_steps_have_the_same_scores_and_runs_may_share_their_reference(tiny, whole, tmp_path):
    shared = f"evaluation.reference_folder={tmp_path / 'shared'}"
    run = loop.train(tiny("run", *SCORED, "evaluation.every=null", "evaluation.at=[4]", shared))
    assert {step: scores_of(whole)[step] for step in (4, 6)} == scores_of(run)
    (reference_dir,) = (tmp_path / "shared").iterdir()
    assert not list((run / "evaluation").glob("reference*"))
    before = {path: path.stat().st_mtime_ns for path in reference_dir.iterdir()}
    loop.train(tiny("other", *SCORED, "evaluation.every=null", "evaluation.at=[4]", shared))
    assert {path: path.stat().st_mtime_ns for path in reference_dir.iterdir()} == before


def test_a_run_killed_before_its_last_grid_samples_it_on_resumption(tiny, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    grid = run / "samples/step-000000006.png"
    before = grid.read_bytes()
    grid.unlink()
    loop.train(tiny("run", *SCORED))
    assert grid.read_bytes() == before


def test_a_run_without_evaluation_writes_no_scores(tiny):
    run = loop.train(tiny("run"))
    assert not (run / "evaluation").exists()
    assert not any(name.endswith("_low") for record in read_log(run) for name in record)


def test_scoring_does_not_change_the_training(tiny, whole, weights):
    plain = loop.train(tiny("plain", *SCORED, "evaluation.every=null"))
    for name, value in weights(plain).items():
        assert (weights(whole)[name] == value).all()


def test_the_best_checkpoint_is_kept_beside_the_newest(tiny):
    changes = (*SCORED, "training.keep_last=1", "training.optimizer.learning_rate=1e-12")
    run = loop.train(tiny("run", *changes, "training.ema.decay=0"))
    by_step = scores_of(run)
    expected = min(by_step, key=lambda step: by_step[step]["kid"])
    steps = {int(path.name.removeprefix("step-")) for path in bundle.checkpoints(run)}
    assert steps == {expected, 6}
    step, score = best(history(run))
    assert (step, score.metric, score.value) == (expected, "kid", by_step[expected]["kid"])


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("fd", [3.0, 1.0, 2.0], 4),
        ("fd", [1.0, 1.0, 2.0], 2),
        ("precision", [0.1, 0.3, 0.2], 4),
        ("accuracy", [0.1, 0.2, 0.9], 6),
        ("authenticity", [0.5, 0.4, 0.3], 2),
        ("invalid", [0.5, 0.4, 0.3], 6),
    ],
)
def test_which_value_is_the_best(metric, values, expected):
    scored = {2 * (i + 1): {metric: SimpleNamespace(value=value), "other": None} for i, value in enumerate(values)}
    assert best(scored) == (expected, scored[expected][metric])
    assert best({}) is None


def test_the_checkpoint_with_the_best_oracle_accuracy_is_kept(tiny):
    """Of accuracy, higher is better."""
    run = loop.train(tiny("run", *SCORED, "evaluation.metrics=[oracle, kid]", "evaluation.reference=digits"))
    accuracy = {record["step"]: record["accuracy"] for record in read_log(run) if "accuracy" in record}
    assert list(accuracy) == [2, 4, 6]
    steps = {int(path.name.removeprefix("step-")) for path in bundle.checkpoints(run)}
    assert max(accuracy, key=lambda step: accuracy[step]) in steps


def test_a_resumed_run_has_the_scores_of_an_uninterrupted_one(tiny, whole):
    for steps in (2, 4, 6):
        part = loop.train(tiny("part", *SCORED, f"training.steps={steps}"))
    assert scores_of(part) == scores_of(whole)
    for step in (2, 4, 6):
        name = f"evaluation/step-{step:09d}.json"
        ours, theirs = protocol.load(part / name), protocol.load(whole / name)
        assert [score.fingerprint for score in ours] == [score.fingerprint for score in theirs]
        assert [score.source["images"] for score in ours] == [score.source["images"] for score in theirs]


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_killed_between_a_checkpoint_and_its_scores_computes_them_on_resumption(tiny, whole, at):
    part = loop.train(tiny("part", *SCORED, f"training.steps={at}"))
    records = [record for record in read_log(part) if not ("fd" in record and record["step"] == at)]
    (part / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (part / f"evaluation/step-{at:09d}.json").unlink()
    work = part / f"evaluation/step-{at:09d}.work/samples"  # partly sampled
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
    ("change", "message"),
    [
        ("evaluation.metrics=[fd, kidd]", "unknown metric 'kidd'; did you mean 'kid'?"),
        ("evaluation.metrics=[]", "name at least one metric"),
        ("evaluation.num_samples=1", "evaluation.num_samples"),
        ("evaluation.evry=3", "did you mean 'every'?"),
    ],
)
def test_an_invalid_evaluation_setting_is_an_error_of_the_recipe(tiny, change, message):
    with pytest.raises(TesseraError) as caught:
        tiny("run", *SCORED, change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.features=digitz", "unknown features 'digitz'; did you mean 'digits'?"),
        ("evaluation.reference=nowhere", "no data at nowhere"),
        ("evaluation.reference=nowhere.npz", r"nowhere\.npz"),
        ("evaluation.reference=shapes", "size differ"),
    ],
)
def test_an_impossible_evaluation_is_an_error_before_training_begins(tiny, tmp_path, change, message):
    with pytest.raises(TesseraError, match=message):
        loop.train(tiny("run", *SCORED, "evaluation.features=digits", change))
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_reference_is_one_error(tiny):
    run = loop.train(tiny("run", *SCORED, "training.steps=2"))
    with pytest.raises(TesseraError, match=r"evaluation holds other work: reference was digits:ceiling, is") as caught:
        loop.train(tiny("run", *SCORED, "evaluation.reference=digits:judge"))
    assert "Give the run another run_dir=, or remove that folder" in str(caught.value)
    shutil.rmtree(run / "evaluation")
    loop.train(tiny("run", *SCORED, "evaluation.reference=digits:judge"))
    assert list(scores_of(run)) == [2, 4, 6]


def test_scores_that_cannot_be_computed_do_not_end_the_run(tiny, capsys, tmp_path, monkeypatch):
    """The reference has too few rows for precision, which is found while scoring; a single metric is then an error."""
    changes = ("evaluation.metrics=[prdc]", "evaluation.reference=few.npz")
    monkeypatch.chdir(tmp_path)
    extractor = load_extractor("digits", torch.device("cpu"))
    features = extract(DatasetSource(DigitsConfig(), 3), extractor, Path("few"), SINGLE)
    reference.save_statistics(features, Path("few.npz"))
    run = loop.train(tiny("run", *SCORED, *changes))
    assert "step 2 could not be scored: " in capsys.readouterr().err
    assert read_log(run)[-1]["step"] == 6
    assert history(run) == {}


def test_the_last_step_is_always_scored(tiny):
    run = loop.train(tiny("run", *SCORED, "evaluation.every=4"))
    assert list(history(run)) == [4, 6]


def test_scores_after_the_resumed_step_are_computed_again(tiny):
    run = loop.train(tiny("run", *SCORED))
    before = history(run)
    shutil.rmtree(bundle.checkpoints(run)[0])
    loop.train(tiny("run", *SCORED))
    assert list(history(run)) == list(before) == [2, 4, 6]
    assert history(run)[6]["kid"].value == before[6]["kid"].value


TEXT_RUN = {
    "data": {"kind": "shapes", "combinations": "known", "count": 100},
    "network": {
        "patch_size": 8,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "block": {"kind": "rope-swiglu", "text": "keys"},
    },
    "diffusion": {"kind": "flow"},
    "sampling": {"num_steps": 2, "guidance_scale": 1},
    "training": {"steps": 2, "global_batch_size": 4, "device": "cpu", "sample_every": 2, "checkpoint_every": 2},
    "evaluation": {"every": 1, "num_samples": 20, "metrics": ["alignment"], "captions": "shapes:test"},
}


def text_recipe(run_dir: Path, **evaluation) -> Recipe:
    settings = {**TEXT_RUN, "evaluation": {**TEXT_RUN["evaluation"], **evaluation}, "run_dir": str(run_dir)}
    return Recipe.model_validate(settings)


def test_a_text_model_is_scored_by_alignment_with_captions_of_named_data(tmp_path):
    run = loop.train(text_recipe(tmp_path / "run"))
    scores = history(run)
    assert list(scores) == [1, 2]
    assert {name: next(iter(by_name)) for name, by_name in scores.items()} == {1: "alignment", 2: "alignment"}
    assert not list((run / "evaluation").glob("reference-*"))  # nothing is compared with it
    names = {"alignment", "binding", "relation", "composition"}
    assert names <= scores[2].keys()
    assert names <= read_log(run)[-1].keys()
    model = bundle.load(bundle.checkpoints(run)[0])
    prompts = bulk_request(model, 20, "balanced", data=ShapesConfig(split="test")).prompts
    assert scores[2]["alignment"].protocol.definition["captions"] == hash_values(prompts)
    with pytest.raises(TesseraError, match=r"condition\.text was"):
        loop.train(text_recipe(tmp_path / "run", captions="shapes:train"))


def test_captions_that_cannot_be_used_are_reported_before_training(tiny, tmp_path):
    with pytest.raises(TesseraError, match="takes no captions"):
        loop.train(tiny("classes", "evaluation={every: 1, num_samples: 20, captions: shapes}"))
    with pytest.raises(TesseraError, match="alignment needs a caption for each image"):
        loop.train(tiny("none", "evaluation={every: 1, num_samples: 20, metrics: [alignment]}"))
    with pytest.raises(TesseraError, match="needs a prompt for each image"):
        loop.train(text_recipe(tmp_path / "digits", captions="digits"))
    with pytest.raises(TesseraError, match="clip_score and the folder of a CLIP network"):
        loop.train(text_recipe(tmp_path / "clip", metrics=["clip_score"]))
