"""Alignment with captions of shapes: images with known faults, controls, and models that are sampled for captions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tessera.bundle import BundleConfig, Model
from tessera.data import ShapesConfig
from tessera.data.shapes import HELD_OUT, Object, Scene, render
from tessera.errors import TesseraError
from tessera.evaluation import alignment, captions, report, suite
from tessera.evaluation.features import load_extractor
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource
from tessera.generation.bulk import BulkSamples, bulk_request
from tessera.generation.shards import ImageShard
from tessera.images import save_png
from tessera.reporting.document import Table
from tessera.reporting.estimates import wilson
from tessera.reporting.metrics import HIGHER_IS_BETTER, MEANING

COUNT = 400


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    dataset = ShapesConfig(split="test", count=COUNT).open()
    return [dataset.scene(index) for index in range(COUNT)]


def rendered(scenes: list[Scene]) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 2, 3, 1)


def described(scenes: list[Scene]) -> list[str]:
    return [str(scene.description) for scene in scenes]


def lines_of(shown: list[Scene], expected: list[Scene], **options) -> dict[tuple[str, str], alignment.Line]:
    lines = alignment.measure(rendered(shown), described(expected), **options)
    return {(line.group, line.correct): line for line in lines}


def values(lines: dict[tuple[str, str], alignment.Line]) -> dict[str, float]:
    return {line.score: line.images.value for line in lines.values() if line.score}


def exchanged(scene: Scene) -> Scene:
    """With the colors of two objects exchanged."""
    if len(scene.objects) == 1:
        return scene
    one, other = scene.objects
    return replace(scene, objects=(replace(one, color=other.color), replace(other, color=one.color)))


# Known images


def test_real_images_show_their_captions_and_not_those_of_others(scenes):
    lines = lines_of(scenes, scenes)
    scores = values(lines)
    assert min(value for name, value in scores.items() if name != "swapped_colors") > 0.99
    assert scores["swapped_colors"] == 0
    for line in lines.values():
        if line.correct in ("whole", "binding"):
            assert line.chance.value < 0.2
            assert line.real is not None
            assert line.real.value > 0.99
    # One of 6 colors is right by chance, one of 5 shapes, one of 2 sizes.
    for word, chance in {"color": 1 / 6, "shape": 1 / 5, "size": 1 / 2}.items():
        assert lines["one object", word].chance.contains(chance)


def test_fractions_have_wilson_intervals_and_counts(scenes):
    single = [scene for scene in scenes if len(scene.objects) == 1][:40]
    wrong = [replace(scene, objects=(replace(scene.objects[0], size="small"),)) for scene in single]
    line = lines_of(wrong, single)["one object", "size"]
    hits = sum(scene.objects[0].size == "small" for scene in single)
    assert (line.count, line.images.value) == (40, hits / 40)
    assert (line.images.low, line.images.high) == wilson(hits / 40, 40)


def test_a_model_that_ignores_which_color_belongs_to_which_object_is_recognized(scenes):
    """Half of its images have the colors of the two objects exchanged."""
    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    lines = lines_of([exchanged(scene) if row % 2 else scene for row, scene in enumerate(pairs)], pairs)
    bound, swapped = (lines[alignment.EXCHANGED, correct].images for correct in ("binding", "swapped"))
    assert bound.value + swapped.value == pytest.approx(1)
    assert bound.contains(0.5)
    assert lines["two objects", "color"].images.value < lines["two objects", "shape"].images.value == 1
    assert 0.9 < lines["two objects", "relation"].images.value < 1  # objects of one shape and size change places


def test_a_model_that_ignores_the_order_of_the_objects_shows_half_of_the_relations(scenes):
    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    random = np.random.default_rng(0)
    mirrored = [  # the centers are exchanged, which inverts the relation
        replace(scene, objects=(replace(one, x=other.x, y=other.y), replace(other, x=one.x, y=one.y)))
        if random.random() < 0.5
        else scene
        for scene in pairs
        for one, other in [scene.objects]
    ]
    lines = lines_of(mirrored, pairs)
    relation = lines["two objects", "relation"].images
    assert relation.contains(0.5)
    assert lines["two objects", "binding"].images.value > 0.9
    by_name = [lines[name, "relation"] for name in ("left of", "right of", "above", "below")]
    assert sum(line.count for line in by_name) == len(pairs)
    assert sum(line.count * line.images.value for line in by_name) == pytest.approx(relation.value * len(pairs))


def test_held_out_combinations_are_apart(scenes):
    """Each held-out object is replaced by one of another color, as by a model that does not compose."""

    def known(item: Object) -> Object:
        return item if item.combination not in HELD_OUT else replace(item, color="cyan")

    lines = lines_of([replace(scene, objects=tuple(map(known, scene.objects))) for scene in scenes], scenes)
    assert lines[alignment.KNOWN, "whole"].images.value > 0.99
    assert lines[alignment.COMPOSED, "whole"].images.value == 0
    assert lines[f"{alignment.COMPOSED}, one object", "binding"].images.value == 0
    held_out = [any(item.combination in HELD_OUT for item in scene.objects) for scene in scenes]
    assert lines[alignment.COMPOSED, "whole"].count == sum(held_out)
    assert lines[alignment.KNOWN, "whole"].count == COUNT - sum(held_out)
    of_known = ShapesConfig(split="test", count=50, combinations="known").open()
    lines = lines_of(*[[of_known.scene(index) for index in range(50)]] * 2)
    assert (alignment.COMPOSED, "whole") not in lines


def test_captions_absent_from_the_training_data_are_apart(scenes):
    training_captions = {str(scene.description) for scene in scenes[::2]}
    lines = lines_of(scenes, scenes, training_captions=training_captions)
    unseen = [scene for scene in scenes if str(scene.description) not in training_captions]
    for number, name in ((1, "one object"), (2, "two objects")):
        count = sum(len(scene.objects) == number for scene in unseen)
        line = lines.get((f"{alignment.UNSEEN}, {name}", "whole"))
        assert (line.count if line else 0) == count
    assert not any(alignment.UNSEEN in group for group, _ in lines_of(scenes, scenes))


def test_images_that_cannot_be_read_are_counted_and_show_nothing(scenes):
    images = rendered(scenes[:20])
    images[:5] = 128
    lines = {(line.group, line.correct): line for line in alignment.measure(images, described(scenes[:20]))}
    assert lines["all captions", "invalid"].images.value == 0.25
    assert lines["all captions", "whole"].images.value == 0.75
    readable = [line for (group, correct), line in lines.items() if alignment.READABLE in group and correct == "whole"]
    assert sum(line.count for line in readable) == 15
    assert {line.images.value for line in readable} == {1}


def test_other_captions_have_as_many_objects_and_belong_to_other_images(scenes):
    own = described(scenes)
    others = alignment._other_captions(own)
    assert sorted(others) == sorted(own)
    assert all(one.count(" a ") == other.count(" a ") for one, other in zip(own, others))
    assert np.mean([one == other for one, other in zip(own, others)]) < 0.03
    assert alignment._other_captions(own[:1]) == own[:1]


def test_wrong_inputs_are_named(scenes):
    images = rendered(scenes[:2])
    with pytest.raises(TesseraError, match="2 images and 1 captions"):
        alignment.measure(images, ["a small red ring"])
    with pytest.raises(TesseraError, match="'a cat' is not a caption of shapes"):
        alignment.measure(images, ["a cat", "a small red ring"])


# In the suite


class Captioned:
    """Shapes with the captions of other ones, as a source of samples."""

    def __init__(self, shown: list[Scene], captions: list[str] | None) -> None:
        self.images, self.captions, self.count = rendered(shown), captions, len(shown)
        self.description, self.size, self.channels, self.class_names = "rendered scenes", (32, 32), 3, ()
        self.plan = {"captions": captions}

    def shard(self, index: int) -> ImageShard:
        rows = slice(250 * index, 250 * index + 250)
        images = self.images[rows]
        captions = None if self.captions is None else self.captions[rows]
        return ImageShard(images, np.arange(self.count)[rows], None, captions)


def evaluate(source, folder, **options) -> suite.Evaluation:
    extractor = load_extractor("shapes", torch.device("cpu"))
    return suite.evaluate(source, ShapesConfig(split="test", count=60), extractor, folder, **options)


def test_alignment_is_a_default_metric_of_captioned_images(scenes, tmp_path):
    evaluation = evaluate(Captioned(scenes, described(scenes)), tmp_path / "own")
    scores = {score.metric: score for score in evaluation.scores}
    assert scores["alignment"].value > 0.99
    assert scores["alignment"].protocol.definition["held out"] == ", ".join(HELD_OUT)
    assert any(note.startswith("alignment is 100.0%, with captions of other images") for note in evaluation.notes)
    assert scores.keys() <= MEANING.keys()
    others = evaluate(Captioned(scenes, described(scenes[::-1])), tmp_path / "other", metrics=["alignment"])
    assert others.scores[0].metric == "alignment"
    assert others.scores[0].value < 0.1
    assert others.scores[0].fingerprint != scores["alignment"].fingerprint  # other captions
    without = evaluate(Captioned(scenes, None), tmp_path / "none")
    assert "alignment" not in {score.metric for score in without.scores}
    assert not any("alignment" in note for note in without.notes)
    report.write(evaluation, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "two objects of different colors and shapes" in text
    assert "| captions of other images" in text


def test_every_score_of_alignment_has_a_direction():
    scores = {score for _, _, score in alignment.LINES if score}
    assert scores - HIGHER_IS_BETTER == {"swapped_colors"}


def test_data_have_their_own_captions(tmp_path):
    source = DatasetSource(ShapesConfig(split="test"), 30)
    assert source.shard(0).captions == [source.dataset.caption(int(row)) for row in source._rows]
    assert evaluate(source, tmp_path, metrics=["alignment"]).scores[0].value == 1


def test_a_folder_of_samples_has_the_prompts_of_its_files(scenes, tmp_path):
    for row, scene in enumerate(scenes[:30]):
        prompts = {"prompts": [str(scene.description)]}
        save_png(tmp_path / f"samples/{row:02d}.png", rendered([scene])[0], prompts)
    evaluation = evaluate(FolderSource(tmp_path / "samples"), tmp_path / "out", metrics=["alignment"])
    assert evaluation.scores[0].value == 1
    assert FolderSource(tmp_path / "samples", 5).shard(0).captions[0] in described(scenes[:30])


def test_features_of_the_reference_are_computed_only_for_metrics_that_compare_them(scenes, tmp_path):
    source = Captioned(scenes[:30], described(scenes[:30]))
    alone = evaluate(source, tmp_path, metrics=["alignment"])
    assert not list(tmp_path.glob("reference-*"))
    both = evaluate(source, tmp_path, metrics=["alignment", "kid"])
    assert list(tmp_path.glob("reference-*"))
    assert [score.fingerprint for score in alone.scores] == [score.fingerprint for score in both.scores[:-1]]
    assert "shapes, split test" in report.build_report(alone).markdown()


def test_missing_captions_are_errors(scenes, tmp_path, make_npz):
    with pytest.raises(TesseraError, match=r"alignment needs a caption for each image, and npz .* has none"):
        evaluate(NpzSource(make_npz("images.npz", rendered(scenes[:30]))), tmp_path, metrics=["alignment"])
    mixed = [*described(scenes[:299]), None]
    with pytest.raises(TesseraError, match="1 of 50 images have no caption"):
        evaluate(Captioned(scenes[:300], mixed), tmp_path, metrics=["alignment"])
    with pytest.raises(TesseraError, match="'photo' is not a caption of shapes"):
        evaluate(Captioned(scenes[:3], ["photo"] * 3), tmp_path, metrics=["alignment"])


# Models


class Words:
    """A text encoder that makes two tokens of each caption from its length."""

    def encode(self, captions, cut=False):
        lengths = torch.tensor([[float(len(caption))] for caption in captions])
        return (lengths[:, :, None] / 40 + torch.arange(2).view(1, 2, 1)).expand(-1, -1, 8), torch.ones(
            len(captions), 2, dtype=torch.bool
        )


@pytest.fixture
def text_model(monkeypatch, randomise) -> Model:
    """A small PixArt for images of 32 x 32 pixels, with random weights."""
    network = {
        "kind": "pixart", "input_size": 32, "in_channels": 3, "out_channels": 6, "patch_size": 8, "hidden_size": 32,
        "depth": 1, "num_heads": 2, "text_channels": 8, "text_tokens": 2, "position_base": 4,
    }  # fmt: skip
    config = BundleConfig.model_validate(
        {
            "network": network,
            "diffusion": {"prediction": "x0"},
            "codec": {"kind": "pixels"},
            "sampling": {"num_steps": 2, "guidance_scale": 1},
            "recipe": {"data": {"kind": "shapes", "count": 300}},
        }
    )
    monkeypatch.setattr(Model, "text_encoder", Words(), raising=False)
    return Model(config, randomise(config.network.build()))


def test_bulk_sampling_chooses_captions_of_the_data(text_model, tmp_path):
    data = ShapesConfig(split="test", count=90)
    every = [data.open().caption(index) for index in range(90)]
    balanced = bulk_request(text_model, 180, "balanced", data=data)
    assert sorted(balanced.prompts) == sorted(every * 2)
    assert balanced.prompts[:90] != every  # data are often sorted
    assert balanced.prompts[:20] == bulk_request(text_model, 20, "balanced", data=data.open()).prompts
    uniform = bulk_request(text_model, 200, "uniform", 5, data).prompts
    assert uniform[10:20] == bulk_request(text_model, 10, "uniform", 15, data).prompts
    assert set(uniform) <= set(every)
    assert 60 < len(set(uniform)) < 90
    samples = BulkSamples(text_model, bulk_request(text_model, 5, "uniform", data=data), tmp_path)
    assert samples.shard(0).captions == uniform[:0] + bulk_request(text_model, 5, "uniform", data=data).prompts
    hashes = {
        json.dumps(BulkSamples(text_model, request, tmp_path).sampling_protocol["condition"])
        for request in (balanced, bulk_request(text_model, 180, "balanced", data=ShapesConfig(count=90)))
    }
    assert len(hashes) == 2


class Sparse:
    """Every third sample has a caption."""

    def __init__(self, count: int, every: int = 3) -> None:
        self.count, self.every = count, every

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str | None:
        return None if self.every == 0 or index % self.every else f"caption {index}"


def test_samples_without_captions_are_replaced_by_others(text_model):
    prompts = bulk_request(text_model, 30, "balanced", data=Sparse(30)).prompts
    assert set(prompts) == {f"caption {index}" for index in range(0, 30, 3)}
    for data in (None, Sparse(5, 0), Sparse(0)):
        with pytest.raises(TesseraError, match="needs a prompt for each image"):
            bulk_request(text_model, 4, "uniform", data=data)


def test_a_model_is_scored_with_captions_of_the_reference(text_model, tmp_path):
    reference = ShapesConfig(split="test", count=60)
    data = captions.caption_data(None, reference, text_model)
    request = bulk_request(text_model, 40, "balanced", data=data)
    source = BulkSamples(text_model, request, tmp_path / "samples")
    evaluation = evaluate(source, tmp_path, metrics=["alignment", "kid"])
    assert [score.metric for score in evaluation.scores][:2] == ["alignment", "alignment_one_object"]
    assert {score.metric for score in evaluation.scores} >= {"alignment", "kid", "binding", "relation"}
    assert evaluation.scores[0].protocol.sampling["condition"].keys() == {"text"}
    [table] = [block for block in evaluation.details if isinstance(block, Table)]
    groups = {row[0] for row in table.rows}
    assert f"{alignment.UNSEEN}, two objects" in groups  # most captions are not among 300 of training
    direct = alignment.measure_model(text_model, request.prompts, settings={"num_steps": 2})
    values = [line.images.value for line in direct if line.score]
    assert values == [score.value for score in evaluation.scores if score.metric != "kid"]


def test_where_captions_come_from(text_model, tiny_model):
    assert captions.caption_data(None, "shapes:test", text_model) == ShapesConfig(split="test")
    assert captions.caption_data("shapes:test", "statistics.npz", text_model) == ShapesConfig(split="test")
    assert captions.caption_data(None, "statistics.npz", text_model) is None
    assert captions.caption_data(None, "shapes", tiny_model) is None
    with pytest.raises(TesseraError, match="takes no captions"):
        captions.caption_data("shapes", "shapes", tiny_model)
    with pytest.raises(TesseraError, match=r"list them, or name data with captions \(--captions"):
        bulk_request(text_model, 3, "uniform", data=None)
