"""From pictures to scores: the same twice, in the right order, and honest about what cannot be had."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation import reference, suite
from tessera.evaluation.features import extract
from tessera.evaluation.sources import Data, Npz
from tessera.evaluation.suite import evaluate
from tessera.generation.bulk import BulkSamples, asked_by_policy
from tessera.runtime import Distributed


@pytest.fixture
def scored(digits, make_npz, tmp_path):
    """Evaluate an array of digits, with labels or without; everything into tmp_path / out."""

    def run(pictures, labels=None, told="digits", out: str = "out", **more) -> suite.Evaluation:
        arrays = [pictures] if labels is None else [pictures, labels]
        return evaluate(Npz(make_npz(f"{out}.npz", *arrays)), told, digits, tmp_path / out, **more)

    return run


@pytest.fixture
def statistics(digits, tmp_path):
    """Statistics of the real digits, with so many rows."""

    def save(kept: int) -> str:
        found = extract(Data(DigitsConfig()), digits, tmp_path / "work", Distributed())
        reference.save(found, tmp_path / f"stats-{kept}.npz", kept)
        return str(tmp_path / f"stats-{kept}.npz")

    return save


def values(done: suite.Evaluation) -> dict[str, float]:
    return {score.metric: score.value for score in done.scores}


def prints(done: suite.Evaluation) -> dict[str, str]:
    return {score.metric: score.fingerprint for score in done.scores}


def blurred(pictures: np.ndarray) -> np.ndarray:
    each = [Image.fromarray(picture[..., 0]).filter(ImageFilter.GaussianBlur(0.7)) for picture in pictures]
    return np.stack([np.asarray(image) for image in each])[..., None]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


NAMES = {"fd", "kid", "precision", "recall", "density", "coverage", "authenticity"}


def test_the_usual_scores_twice_are_the_same_numbers_of_the_same_protocol(scored, real):
    first, second = (scored(real[500:700], out=out) for out in ("a", "b"))
    assert set(values(first)) == NAMES  # no oracle without labels
    assert values(first) == values(second)
    assert prints(first) == prints(second)
    for score in first.scores:
        assert score.low <= score.value <= score.high
        assert score.subject["pictures"] == first.samples.hash
        assert score.protocol.samples == 200
        assert score.protocol.reference["hash"] == first.reference.hash
        assert score.protocol.features["name"] == "tessera/digits"
        assert score.protocol.drawing is None


def test_a_second_evaluation_in_the_folder_goes_on_with_what_is_there(scored, real, tmp_path, digits):
    first = scored(real[:60], metrics=["fd"])
    again = evaluate(Npz(tmp_path / "out.npz"), "digits", digits, tmp_path / "out", ["fd", "kid"])
    assert values(again)["fd"] == values(first)["fd"]
    assert prints(again)["fd"] == prints(first)["fd"]
    assert len(set(prints(again).values())) == 2


def test_halves_of_the_real_digits_are_nearer_than_blurred_ones_and_noise_is_farthest(scored, real, digits, tmp_path):
    order = np.random.default_rng(0).permutation(1000)
    half, other = real[order[:500]], real[order[500:]]
    np.savez(tmp_path / "half.npz", half)
    told = {"told": str(tmp_path / "half.npz"), "metrics": ["fd", "sfid", "kid", "prdc"]}
    sets = {"real": other, "blurred": blurred(other), "noise": noise(500)}
    found = {name: values(scored(pictures, out=name, **told)) for name, pictures in sets.items()}
    for metric in ("fd", "sfid", "kid"):
        real_one, blurry, noisy = (found[name][metric] for name in sets)
        assert real_one < 0.5 * blurry < 0.5 * noisy, metric
    assert found["real"]["precision"] > found["blurred"]["precision"] > found["noise"]["precision"]
    assert found["real"]["coverage"] > 0.9 > 0.1 > found["noise"]["coverage"]


def test_a_set_against_itself_is_at_no_distance_and_all_copied(scored, real):
    found = values(scored(real, metrics=["fd", "prdc", "authenticity"]))
    assert abs(found["fd"]) < 1e-4
    assert (found["precision"], found["recall"], found["coverage"], found["authenticity"]) == (1, 1, 1, 0)


def test_every_metric_of_enough_samples(scored, real):
    done = scored(real[:250], metrics=["fd", "fd_inf", "sfid", "kid", "is", "prdc", "authenticity"])
    found = values(done)
    assert set(found) == NAMES | {"fd_inf", "sfid", "is"}
    assert found["fd_inf"] < found["fd"]
    assert 4 < found["is"] <= 10
    assert len(set(prints(done).values())) == 7  # one a metric; those of prdc share theirs


# What cannot be had


def test_statistics_alone_leave_out_what_needs_rows_and_say_so(scored, real, statistics):
    path = statistics(0)
    done = scored(real[:100], told=path)
    assert set(values(done)) == {"fd"}
    for name in ("kid", "prdc", "authenticity"):
        assert any(note.startswith(f"{name} compares row by row") for note in done.notes)
        with pytest.raises(
            TesseraError, match=f"{name} compares row by row, but the reference .* holds statistics only"
        ):
            scored(real[:100], told=path, metrics=[name], out=name)


def test_statistics_of_another_program_lack_what_they_lack(scored, real, digits, tmp_path):
    rows = digits(real, 100)["pool"]
    np.savez(tmp_path / "fid.npz", mu=rows.mean(axis=0, dtype=np.float64), sigma=np.cov(rows.T.astype(np.float64)))
    told = str(tmp_path / "fid.npz")
    assert values(scored(real, told=told))["fd"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(TesseraError, match="sfid needs the moments of spatial features, which the reference .* lacks"):
        scored(real, told=told, metrics=["sfid"], out="asked")


def test_an_oracle_without_known_truth_or_labels(scored, real, tmp_path):
    np.savez(tmp_path / "real.npz", real)
    with pytest.raises(TesseraError, match="oracle needs data whose truth is known"):
        scored(real[:50], np.zeros(50, int), told=str(tmp_path / "real.npz"), metrics=["oracle"])
    with pytest.raises(TesseraError, match="oracle needs to know which class each sample was asked for"):
        scored(real[:50], metrics=["oracle"], out="unlabelled")
    assert not any("oracle" in note for note in scored(real[:50], out="unasked").notes)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_too_few_samples_for_a_metric_leave_it_out_and_say_so(scored, real, count):
    done = scored(real[:count])
    found = set(values(done))
    assert found == {"authenticity"} | ({"fd", "kid"} if count >= 2 else set()) | (
        {"precision", "recall", "density", "coverage"} if count >= 4 else set()
    )
    for name in ("fd", "kid") if count < 2 else ():
        assert any(note.startswith(f"{name} with 48 features needs at least 2 samples") for note in done.notes)
    if count < 4:
        assert any(note.startswith("prdc with 48 features needs at least 4 samples") for note in done.notes)
        with pytest.raises(TesseraError, match="needs at least 4 samples"):
            scored(real[:count], metrics=["prdc"], out="asked")


@pytest.mark.parametrize(("name", "least"), [("is", 20), ("fd_inf", 192)])
def test_too_few_samples_for_a_metric_that_is_asked_for_are_an_error(scored, real, name, least):
    with pytest.raises(TesseraError, match=f"needs at least {least} samples"):
        scored(real[: least - 1], metrics=[name])
    assert name in values(scored(real[:least], metrics=[name], out="enough"))


def test_a_note_where_samples_are_too_few_for_the_frechet_distance(scored, real):
    assert any("too few for the Fréchet distance" in note for note in scored(real[:40]).notes)
    assert not any("too few for the Fréchet" in note for note in scored(real[:40], out="kid", metrics=["kid"]).notes)
    assert not any("too few for the Fréchet" in note for note in scored(real[:200], out="many").notes)


def test_pictures_that_are_all_alike_have_finite_scores(scored):
    done = scored(np.full((60, 8, 8, 1), 128, np.uint8), metrics=["fd", "sfid", "kid", "is", "prdc", "authenticity"])
    for score in done.scores:
        assert np.isfinite([score.value, score.low, score.high]).all(), score
    found = values(done)
    assert found["is"] == pytest.approx(1)
    assert found["recall"] == 0


def test_a_metric_that_does_not_exist():
    assert suite.wanted("fd, kid,fd") == ["fd", "kid"]
    assert suite.wanted(None) is None
    with pytest.raises(TesseraError, match="unknown metric 'authentic'; did you mean 'authenticity'?"):
        suite.wanted("fd,authentic")
    for nothing in ("", " , "):
        with pytest.raises(TesseraError, match="name at least one metric"):
            suite.wanted(nothing)


# Classes


def test_labels_give_a_kid_for_each_class_and_an_oracle(scored, real):
    labels = DigitsConfig().open().labels
    done = scored(real, labels)
    assert set(done.classes) == set("0123456789")
    assert all(each.low < 1e-6 for each in done.classes.values())
    assert values(done)["as asked"] > 0.95
    mixed = scored(real, np.where(labels == 3, 8, np.where(labels == 8, 3, labels)), out="mixed")
    assert sorted(mixed.classes, key=lambda name: -mixed.classes[name].value)[:2] in (["3", "8"], ["8", "3"])
    assert values(mixed)["as asked"] == pytest.approx(
        values(done)["as asked"] - np.isin(labels, (3, 8)).mean(), abs=0.04
    )


def test_a_class_of_few_pictures_is_left_out(scored, real):
    labels = DigitsConfig().open().labels
    order = np.argsort(labels, kind="stable")
    kept = np.concatenate([order[labels[order] != 4], order[labels[order] == 4][: suite.FEWEST - 1]])
    assert set(scored(real[kept], labels[kept]).classes) == set("012356789")


def test_class_folders_are_asked_for_by_their_names_not_by_their_order(digits, real, make_folder, tmp_path):
    """Folders 3 and 7 hold digits 3 and 7, though they are the first and the second folder."""
    from tessera.evaluation.sources import Folder

    labels = DigitsConfig().open().labels
    some = np.flatnonzero(np.isin(labels, (3, 7)))[:60]
    folder = Folder(make_folder("samples", real[some], labels[some]))
    done = evaluate(folder, "digits", digits, tmp_path / "out", ["oracle", "kid"])
    assert values(done)["as asked"] > 0.9
    foreign = Folder(make_folder("foreign", real[some], ["cat", "dog"] * 30))
    with pytest.raises(TesseraError, match="oracle needs to know which class"):
        evaluate(foreign, "digits", digits, tmp_path / "foreign-out", ["oracle"])


# Protocols


def test_how_many_rows_a_reference_keeps_is_part_of_what_needs_rows_alone(scored, real, statistics):
    whole = prints(scored(real[:100], metrics=["fd", "kid", "prdc"]))
    all_rows = scored(real[:100], metrics=["fd", "kid", "prdc"], told=statistics(10_000), out="all")
    few_rows = scored(real[:100], metrics=["fd", "kid", "prdc"], told=statistics(100), out="few")
    assert prints(all_rows) == whole
    assert prints(few_rows)["fd"] == whole["fd"]
    assert prints(few_rows)["kid"] != whole["kid"]
    assert prints(few_rows)["recall"] != whole["recall"]


def test_what_a_model_draws_is_scored_with_how_it_was_drawn(tiny_model, digits, tmp_path, small_shards):
    asked = asked_by_policy(tiny_model, 50, "balanced", settings={"steps": 2})
    done = evaluate(
        BulkSamples(tiny_model, asked, tmp_path / "s", where="tiny"), "digits", digits, tmp_path / "out", ["fd"]
    )
    (score,) = done.scores
    assert score.protocol.sampling["steps"] == 2
    assert score.subject["weights"] == BulkSamples(tiny_model, asked, tmp_path / "s").weights
    other = asked_by_policy(tiny_model, 50, "balanced", settings={"steps": 3})
    again = evaluate(BulkSamples(tiny_model, other, tmp_path / "t"), "digits", digits, tmp_path / "out2", ["fd"])
    assert again.scores[0].fingerprint != score.fingerprint


def test_unusable_pictures_are_noted(digits, real, make_folder, tmp_path):
    from tessera.data import FilesConfig

    path = make_folder("data", real[:60])
    (path / "00007.png").write_text("no image")
    done = evaluate(
        Data(FilesConfig(path=str(path), size=(8, 8), channels=1)), "digits", digits, tmp_path / "out", ["kid"]
    )
    assert done.notes == ["unusable pictures left out: 1 of the samples, 0 of the reference"]
    assert done.scores[0].protocol.samples == 59
