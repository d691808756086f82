"""From images to scores: deterministic, in the right order, with a reason for what cannot be computed."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tessera.data import DigitsConfig, FilesConfig
from tessera.errors import TesseraError
from tessera.evaluation import reference, suite
from tessera.evaluation.features import extract, load_extractor
from tessera.evaluation.sources import DatasetSource, NpzSource
from tessera.evaluation.suite import evaluate
from tessera.generation.bulk import BulkSamples, bulk_request


@pytest.fixture
def scored(digits, make_npz, tmp_path):
    """Evaluate an array of digits, with or without labels, in tmp_path / out."""

    def run(images, labels=None, reference="digits", out: str = "out", **options) -> suite.Evaluation:
        arrays = [images] if labels is None else [images, labels]
        return evaluate(NpzSource(make_npz(f"{out}.npz", *arrays)), reference, digits, tmp_path / out, **options)

    return run


@pytest.fixture
def statistics(digits, tmp_path):
    """Statistics of the real digits, with a number of rows."""

    def save(num_rows: int) -> str:
        features = extract(DatasetSource(DigitsConfig()), digits, tmp_path / "work")
        reference.save_statistics(features, tmp_path / f"stats-{num_rows}.npz", num_rows)
        return str(tmp_path / f"stats-{num_rows}.npz")

    return save


def values(evaluation: suite.Evaluation) -> dict[str, float]:
    return {score.metric: score.value for score in evaluation.scores}


def fingerprints(evaluation: suite.Evaluation) -> dict[str, str]:
    return {score.metric: score.fingerprint for score in evaluation.scores}


def blurred(images: np.ndarray) -> np.ndarray:
    results = [Image.fromarray(image[..., 0]).filter(ImageFilter.GaussianBlur(0.7)) for image in images]
    return np.stack([np.asarray(image) for image in results])[..., None]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


NAMES = {"fd", "kid", "precision", "recall", "density", "coverage", "authenticity"}


def test_the_default_scores_are_deterministic(scored, real):
    first, second = (scored(real[500:700], out=out) for out in ("a", "b"))
    assert set(values(first)) == NAMES  # no oracle without labels
    assert values(first) == values(second)
    assert fingerprints(first) == fingerprints(second)
    for score in first.scores:
        assert score.low <= score.value <= score.high
        assert score.source["images"] == first.samples.hash
        assert score.protocol.samples == 200
        assert score.protocol.reference["hash"] == first.reference.hash
        assert score.protocol.features["name"] == "tessera/digits"
        assert score.protocol.sampling is None


def test_a_second_evaluation_in_the_folder_reuses_its_features(scored, real, tmp_path, digits):
    first = scored(real[:60], metrics=["fd"])
    again = evaluate(NpzSource(tmp_path / "out.npz"), "digits", digits, tmp_path / "out", ["fd", "kid"])
    assert values(again)["fd"] == values(first)["fd"]
    assert fingerprints(again)["fd"] == fingerprints(first)["fd"]
    assert len(set(fingerprints(again).values())) == 2


def test_distances_rank_real_digits_blurred_digits_and_noise(scored, real, digits, tmp_path):
    order = np.random.default_rng(0).permutation(1000)
    half, other = real[order[:500]], real[order[500:]]
    np.savez(tmp_path / "half.npz", half)
    options = {"reference": str(tmp_path / "half.npz"), "metrics": ["fd", "sfid", "kid", "prdc"]}
    sets = {"real": other, "blurred": blurred(other), "noise": noise(500)}
    results = {name: values(scored(images, out=name, **options)) for name, images in sets.items()}
    for metric in ("fd", "sfid", "kid"):
        of_real, of_blurred, of_noise = (results[name][metric] for name in sets)
        assert of_real < 0.5 * of_blurred < 0.5 * of_noise, metric
    assert results["real"]["precision"] > results["blurred"]["precision"] > results["noise"]["precision"]
    assert results["real"]["coverage"] > 0.9 > 0.1 > results["noise"]["coverage"]


def test_a_set_has_distance_zero_to_itself_and_is_all_copies(scored, real):
    result = values(scored(real, metrics=["fd", "prdc", "authenticity"]))
    assert abs(result["fd"]) < 1e-4
    assert (result["precision"], result["recall"], result["coverage"], result["authenticity"]) == (1, 1, 1, 0)


def test_every_metric_with_enough_samples(scored, real):
    evaluation = scored(real[:250], metrics=["fd", "fd_inf", "sfid", "kid", "is", "prdc", "authenticity"])
    result = values(evaluation)
    assert set(result) == NAMES | {"fd_inf", "sfid", "is"}
    assert result["fd_inf"] < result["fd"]
    assert 4 < result["is"] <= 10
    assert len(set(fingerprints(evaluation).values())) == 7  # one a metric; those of prdc share theirs


# Metrics that cannot be computed


def test_metrics_that_need_rows_are_skipped_for_statistics(scored, real, statistics):
    path = statistics(0)
    evaluation = scored(real[:100], reference=path)
    assert set(values(evaluation)) == {"fd"}
    for name in ("kid", "prdc", "authenticity"):
        assert any(note.startswith(f"{name} compares row by row") for note in evaluation.notes)
        with pytest.raises(
            TesseraError, match=f"{name} compares row by row, but the reference .* holds statistics only"
        ):
            scored(real[:100], reference=path, metrics=[name], out=name)


def test_metrics_without_their_moments_are_an_error(scored, real, digits, tmp_path):
    rows = digits(real, 100)["pool"]
    np.savez(tmp_path / "fid.npz", mu=rows.mean(axis=0, dtype=np.float64), sigma=np.cov(rows.T.astype(np.float64)))
    path = str(tmp_path / "fid.npz")
    assert values(scored(real, reference=path))["fd"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(TesseraError, match="sfid needs the moments of spatial features, which the reference .* lacks"):
        scored(real, reference=path, metrics=["sfid"], out="sfid")


def test_an_oracle_without_ground_truth_or_labels(scored, real, tmp_path):
    np.savez(tmp_path / "real.npz", real)
    with pytest.raises(TesseraError, match="oracle needs data with a known ground truth"):
        scored(real[:50], np.zeros(50, int), reference=str(tmp_path / "real.npz"), metrics=["oracle"])
    with pytest.raises(TesseraError, match="oracle needs the class of each sample"):
        scored(real[:50], metrics=["oracle"], out="unlabelled")
    assert not any("oracle" in note for note in scored(real[:50], out="default").notes)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_default_metrics_with_too_few_samples_are_skipped_with_a_note(scored, real, count):
    evaluation = scored(real[:count])
    result = set(values(evaluation))
    assert result == {"authenticity"} | ({"fd", "kid"} if count >= 2 else set()) | (
        {"precision", "recall", "density", "coverage"} if count >= 4 else set()
    )
    for name in ("fd", "kid") if count < 2 else ():
        assert any(note.startswith(f"{name} with 48 features needs at least 2 samples") for note in evaluation.notes)
    if count < 4:
        assert any(note.startswith("prdc with 48 features needs at least 4 samples") for note in evaluation.notes)
        with pytest.raises(TesseraError, match="needs at least 4 samples"):
            scored(real[:count], metrics=["prdc"], out="prdc")


@pytest.mark.parametrize(("name", "minimum"), [("is", 20), ("fd_inf", 192)])
def test_a_requested_metric_with_too_few_samples_is_an_error(scored, real, name, minimum):
    with pytest.raises(TesseraError, match=f"needs at least {minimum} samples"):
        scored(real[: minimum - 1], metrics=[name])
    assert name in values(scored(real[:minimum], metrics=[name], out="enough"))


def test_a_note_if_samples_are_too_few_for_the_frechet_distance(scored, real):
    assert any("too few for the Fréchet distance" in note for note in scored(real[:40]).notes)
    assert not any("too few for the Fréchet" in note for note in scored(real[:40], out="kid", metrics=["kid"]).notes)
    assert not any("too few for the Fréchet" in note for note in scored(real[:200], out="many").notes)


def test_equal_images_have_finite_scores(scored):
    evaluation = scored(
        np.full((60, 8, 8, 1), 128, np.uint8), metrics=["fd", "sfid", "kid", "is", "prdc", "authenticity"]
    )
    for score in evaluation.scores:
        assert np.isfinite([score.value, score.low, score.high]).all(), score
    result = values(evaluation)
    assert result["is"] == pytest.approx(1)
    assert result["recall"] == 0


def test_unknown_metrics_are_an_error():
    assert suite.parse_metrics("fd, kid,fd") == ["fd", "kid"]
    assert suite.parse_metrics(None) is None
    with pytest.raises(TesseraError, match="unknown metric 'authentic'; did you mean 'authenticity'?"):
        suite.parse_metrics("fd,authentic")
    for empty in ("", " , "):
        with pytest.raises(TesseraError, match="name at least one metric"):
            suite.parse_metrics(empty)


# Classes


def test_labels_add_the_kid_of_each_class_and_the_oracle(scored, real):
    labels = DigitsConfig().open().labels
    evaluation = scored(real, labels)
    assert set(evaluation.kid_by_class) == set("0123456789")
    assert all(kid.low < 1e-6 for kid in evaluation.kid_by_class.values())
    assert values(evaluation)["accuracy"] > 0.95
    mixed = scored(real, np.where(labels == 3, 8, np.where(labels == 8, 3, labels)), out="mixed")
    assert sorted(mixed.kid_by_class, key=lambda name: -mixed.kid_by_class[name].value)[:2] in (["3", "8"], ["8", "3"])
    assert values(mixed)["accuracy"] == pytest.approx(
        values(evaluation)["accuracy"] - np.isin(labels, (3, 8)).mean(), abs=0.04
    )


def test_a_class_of_few_images_is_skipped(scored, real):
    labels = DigitsConfig().open().labels
    order = np.argsort(labels, kind="stable")
    indices = np.concatenate([order[labels[order] != 4], order[labels[order] == 4][: suite.MIN_CLASS_IMAGES - 1]])
    assert set(scored(real[indices], labels[indices]).kid_by_class) == set("012356789")


def test_class_folders_are_matched_by_name_not_by_order(digits, real, make_folder, tmp_path):
    """Folders 3 and 7 hold digits 3 and 7, though they are the first and the second folder."""
    from tessera.evaluation.sources import FolderSource

    labels = DigitsConfig().open().labels
    some = np.flatnonzero(np.isin(labels, (3, 7)))[:60]
    folder = FolderSource(make_folder("samples", real[some], labels[some]))
    evaluation = evaluate(folder, "digits", digits, tmp_path / "out", ["oracle", "kid"])
    assert values(evaluation)["accuracy"] > 0.9
    foreign = FolderSource(make_folder("foreign", real[some], ["cat", "dog"] * 30))
    with pytest.raises(TesseraError, match="oracle needs the class of each sample"):
        evaluate(foreign, "digits", digits, tmp_path / "foreign-out", ["oracle"])


# Protocols


def test_the_rows_of_a_reference_are_part_of_the_protocol_only_if_used(scored, real, statistics):
    whole = fingerprints(scored(real[:100], metrics=["fd", "kid", "prdc"]))
    all_rows = scored(real[:100], metrics=["fd", "kid", "prdc"], reference=statistics(10_000), out="all")
    few_rows = scored(real[:100], metrics=["fd", "kid", "prdc"], reference=statistics(100), out="few")
    assert fingerprints(all_rows) == whole
    assert fingerprints(few_rows)["fd"] == whole["fd"]
    assert fingerprints(few_rows)["kid"] != whole["kid"]
    assert fingerprints(few_rows)["recall"] != whole["recall"]


def test_the_protocol_of_a_model_has_its_sampling_settings(tiny_model, digits, tmp_path, small_shards):
    request = bulk_request(tiny_model, 50, "balanced", settings={"num_steps": 2})
    evaluation = evaluate(
        BulkSamples(tiny_model, request, tmp_path / "s", description="tiny"), "digits", digits, tmp_path / "out", ["fd"]
    )
    (score,) = evaluation.scores
    assert score.protocol.sampling["num_steps"] == 2
    assert score.source["weights"] == BulkSamples(tiny_model, request, tmp_path / "s").weights
    other = bulk_request(tiny_model, 50, "balanced", settings={"num_steps": 3})
    again = evaluate(BulkSamples(tiny_model, other, tmp_path / "t"), "digits", digits, tmp_path / "out2", ["fd"])
    assert again.scores[0].fingerprint != score.fingerprint


def test_invalid_images_are_noted(digits, real, make_folder, tmp_path):
    from tessera.data import FilesConfig

    path = make_folder("data", real[:60])
    (path / "00007.png").write_text("no image")
    evaluation = evaluate(
        DatasetSource(FilesConfig(path=str(path), size=(8, 8), channels=1)), "digits", digits, tmp_path / "out", ["kid"]
    )
    assert evaluation.notes == ["invalid images skipped: 1 of the samples, 0 of the reference"]
    assert evaluation.scores[0].protocol.samples == 59


def test_metrics_that_compare_no_features_need_no_inception():
    data = FilesConfig(path="images", size=8)
    assert suite.default_features(data) == suite.default_features(data, ["fd", "clip_score"]) == "inception"
    assert suite.default_features(data, ["clip_score", "alignment"]) == "mean"
    assert suite.default_features("shapes", ["alignment"]) == "mean"
    extractor = load_extractor("mean", torch.device("cpu"))
    images = np.stack([np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 200, np.uint8)])
    np.testing.assert_array_equal(extractor(images, 1)["pool"], [[0], [200]])


# Clips


def test_a_still_clip_has_good_frames_but_no_motion(scored, real, digits, make_npz, tmp_path):
    """Clips of shuffled digits; still copies of their first frames; and noise."""
    clips = real[:600].reshape(100, 6, 8, 8, 1)
    reference = str(make_npz("reference.npz", clips[50:]))
    metrics = ["fd", "frame_fd"]
    moving, still, bad = (
        values(scored(samples, reference=reference, out=out, metrics=metrics))
        for out, samples in (
            ("moving", clips[:50]),
            ("still", np.repeat(clips[:50, :1], 6, axis=1)),
            ("bad", noise(300).reshape(50, 6, 8, 8, 1)),
        )
    )
    assert moving.keys() == {"fd", "motion", "frame_fd"}  # motion always beside a distance of clips
    assert moving["motion"] < 3 < 30 < still["motion"]
    assert still["frame_fd"] < bad["frame_fd"] / 4


def test_frames_are_compared_of_clips_only(scored, real):
    with pytest.raises(
        TesseraError, match="frames are compared of clips, and the reference .* has images or statistics"
    ):
        scored(real[:60], metrics=["frame_fd"])
