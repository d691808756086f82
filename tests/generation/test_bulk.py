"""Many pictures on disk: those that drawing.generate draws, each of them once, and packed as others take them."""

import json
import zipfile
from collections import Counter

import numpy as np
import pytest

from tessera.errors import TesseraError
from tessera.evaluation.sources import shards
from tessera.generation import bulk as module
from tessera.generation import pipeline
from tessera.generation.bulk import BulkRequest, BulkSamples, asked_by_policy, generate_shards, write_npz
from tessera.generation.resumable import begin_work
from tessera.runtime import Distributed


def pictures(drawn: BulkSamples) -> np.ndarray:
    return np.concatenate([drawn.shard(index).pictures for index in range(shards(drawn))])


def test_pictures_are_those_of_their_classes_and_seeds(tiny_model, small_shards, tmp_path):
    asked = BulkRequest([5, 9, 2, 30] * 12, [0, 1, 2, 1] * 12, settings={"steps": 3}, guidance=2.0)
    drawn = BulkSamples(tiny_model, asked, tmp_path, batch=20)
    generate_shards(drawn, Distributed())
    told = pipeline.generate(tiny_model, asked.classes, asked.seeds, steps=3, guidance=2.0, batch=20)
    np.testing.assert_array_equal(pictures(drawn), told)
    assert drawn.shard(1).label.tolist() == asked.classes[20:40]
    assert drawn.shard(1).row.tolist() == list(range(20, 40))
    assert (drawn.size, drawn.channels, drawn.count) == ((8, 8), 1, 48)


def test_a_model_without_classes_and_another_size(make_model, small_shards, tmp_path):
    model = make_model({"num_classes": 0})
    asked = asked_by_policy(model, 25, "uniform", first_seed=7, size=(4, 8))
    assert (asked.classes, asked.policy, list(asked.seeds)) == (None, "without classes", list(range(7, 32)))
    drawn = BulkSamples(model, asked, tmp_path, batch=20)
    shard = drawn.shard(1)
    assert (shard.label, shard.pictures.shape) == (None, (5, 4, 8, 1))
    np.testing.assert_array_equal(shard.pictures, pipeline.generate(model, None, range(27, 32), size=(4, 8)))


def test_drawing_goes_on_with_what_is_missing_alone(tiny_model, small_shards, tmp_path, monkeypatch):
    asked = asked_by_policy(tiny_model, 70, "balanced")
    generate_shards(BulkSamples(tiny_model, asked, tmp_path / "whole"), Distributed())
    generate_shards(BulkSamples(tiny_model, asked, tmp_path / "part"), Distributed())
    for name in ("000001.npy", "000003.npy"):
        (tmp_path / "part" / name).unlink()
    (tmp_path / "part/000003.npy.partial").write_text("half")
    asked_for = []
    original = pipeline.generate
    monkeypatch.setattr(pipeline, "generate", lambda *a, **k: asked_for.append(list(a[2])) or original(*a, **k))
    told = []
    generate_shards(
        BulkSamples(tiny_model, asked, tmp_path / "part"), Distributed(), lambda done, total: told.append((done, total))
    )
    assert asked_for == [list(range(20, 40)), list(range(60, 70))]
    assert told[-1] == (4, 4)
    for file in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "part" / file.name).read_bytes() == file.read_bytes()


def test_processes_draw_their_own_shards_and_together_all_of_them(tiny_model, small_shards, tmp_path):
    asked = asked_by_policy(tiny_model, 70, "balanced")

    class Alone(Distributed):
        def wait(self):
            pass

    for rank in (0, 1):
        generate_shards(BulkSamples(tiny_model, asked, tmp_path / "two"), Alone(rank, 2))
        assert len(list((tmp_path / "two").glob("*.npy"))) == 2 * (rank + 1)
    np.testing.assert_array_equal(
        pictures(BulkSamples(tiny_model, asked, tmp_path / "two")),
        pictures(BulkSamples(tiny_model, asked, tmp_path / "one")),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"steps": 5}}, r"drawing\.steps was 6, is 5"),
        ({"guidance": 3.0}, r"drawing\.guidance was 1\.0, is 3\.0"),
        ({"settings": {"sampler": "ancestral"}}, r"drawing\.sampler\.kind was ddim, is ancestral"),
        ({"precision": "bfloat16"}, r"drawing\.precision was float32, is bfloat16"),
        ({"first_seed": 1}, r"drawing\.seeds was 0-29, is 1-30"),
        ({"size": (8, 4)}, r"size was \[8, 8\], is \[8, 4\]"),
    ],
)
def test_pictures_drawn_otherwise_are_refused(tiny_model, tmp_path, change, said):
    asked = asked_by_policy(tiny_model, 30, "balanced")
    BulkSamples(tiny_model, asked, tmp_path).begin(Distributed())
    BulkSamples(tiny_model, asked, tmp_path, batch=3).begin(Distributed())
    with pytest.raises(TesseraError, match=rf"holds other work: {said}"):
        BulkSamples(tiny_model, asked_by_policy(tiny_model, 30, "balanced", **change), tmp_path).begin(Distributed())


def as_0_2_wrote(plan: dict) -> dict:
    """A plan without what 0.2 did not know: kinds of grids, most of guidance, caching, and two of the process."""
    told = json.loads(json.dumps(plan))
    drawn, process = told["drawing"], told["process"]
    drawn["spacing"] = drawn["spacing"]["kind"]
    for name in ("guidance_interval", "guidance_schedule", "guidance_rescale", "caching"):
        del drawn[name]
    for name in ("weighting", "zero_terminal_snr"):
        del process[name]
    return told


def test_work_that_0_2_began_goes_on(tiny_model, tmp_path):
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 30, "balanced"), tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(as_0_2_wrote(drawn.plan)))
    drawn.begin(Distributed())
    assert json.loads(plan.read_text()) == json.loads(json.dumps(drawn.plan))
    plan.write_text(json.dumps(as_0_2_wrote(drawn.plan)))
    cached = asked_by_policy(tiny_model, 30, "balanced", settings={"caching": "first-block"})
    with pytest.raises(TesseraError, match=r"other work: drawing\.caching\.kind was none, is first-block"):
        BulkSamples(tiny_model, cached, tmp_path).begin(Distributed())


def test_features_of_pictures_that_0_2_drew_go_on(tiny_model, tmp_path):
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 30, "balanced"), tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"subject": as_0_2_wrote(drawn.plan), "features": {"name": "x"}}))
    begin_work(tmp_path, {"subject": drawn.plan, "features": {"name": "x"}})


def test_pictures_of_another_model_or_of_other_classes_are_refused(make_model, tiny_model, tmp_path):
    asked = asked_by_policy(tiny_model, 30, "balanced")
    BulkSamples(tiny_model, asked, tmp_path).begin(Distributed())
    with pytest.raises(TesseraError, match="weights was"):
        BulkSamples(make_model(seed=1), asked, tmp_path).begin(Distributed())
    for other in (asked_by_policy(tiny_model, 30, "uniform"), BulkRequest(asked.seeds, [1] * 30)):
        with pytest.raises(TesseraError, match=r"drawing\.class policy was balanced"):
            BulkSamples(tiny_model, other, tmp_path).begin(Distributed())


def test_a_damaged_shard_is_one_error(tiny_model, tmp_path):
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 5, "balanced"), tmp_path)
    whole = (drawn.shard(0), drawn.path(0).read_bytes())[1]
    for length in (0, 20, len(whole) - 1):
        drawn.path(0).write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=r"000000\.npy is damaged: .*; remove it to have it made again"):
            drawn.shard(0)


# Policies


@pytest.mark.parametrize("count", [2, 30, 31, 32])
def test_balanced_classes_are_as_many_of_each(tiny_model, count):
    asked = asked_by_policy(tiny_model, count, "balanced", first_seed=3)
    counts = Counter(asked.classes)
    assert max(counts.values()) - min(counts[number] for number in range(3)) <= 1
    assert list(asked.seeds) == list(range(3, 3 + count))


def test_uniform_classes_are_drawn_evenly_and_by_their_seeds(make_model):
    model = make_model({"num_classes": 10})
    asked = asked_by_policy(model, 20_000, "uniform")
    counts = np.bincount(asked.classes, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # of chi squared with 9 degrees one in a thousand is more
    pairs = np.histogram2d(asked.classes[:-1], asked.classes[1:], bins=10)[0]
    assert ((pairs - 200) ** 2 / 200).sum() < 149  # 99 degrees
    later = asked_by_policy(model, 100, "uniform", first_seed=500)
    assert later.classes == asked.classes[500:600]


def test_a_protocol_tells_seeds_and_policy(tiny_model, tmp_path):
    def protocol(asked: BulkRequest) -> dict:
        return BulkSamples(tiny_model, asked, tmp_path).protocol

    told = protocol(asked_by_policy(tiny_model, 30, "uniform", settings={"steps": 4}, guidance=2.5))
    assert (told["seeds"], told["class policy"], told["steps"], told["guidance"]) == ("0-29", "uniform", 4, 2.5)
    assert told["sampler"] == {"kind": "ddim", "eta": 0.0}
    by_hand = [
        protocol(BulkRequest(seeds, classes))
        for seeds, classes in (([4, 2], [0, 1]), ([2, 4], [0, 1]), ([4, 2], [1, 0]))
    ]
    assert len({str(each) for each in by_hand}) == 3


# Packing


def test_a_pack_is_what_the_adm_suite_reads(tiny_model, small_shards, tmp_path):
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 45, "uniform"), tmp_path / "shards", batch=20)
    write_npz(drawn, tmp_path / "deep/samples.npz")
    with np.load(tmp_path / "deep/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], pictures(drawn))
        np.testing.assert_array_equal(file["arr_1"], drawn.asked.classes)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["samples.npz"]


def test_a_pack_without_classes_holds_no_labels(make_model, tmp_path):
    model = make_model({"num_classes": 0})
    write_npz(BulkSamples(model, asked_by_policy(model, 3, "uniform"), tmp_path / "shards"), tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert file.files == ["arr_0"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, TesseraError])
def test_a_pack_that_is_interrupted_leaves_no_half_file(tiny_model, small_shards, tmp_path, monkeypatch, fault):
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 45, "uniform"), tmp_path / "shards")
    generate_shards(drawn, Distributed())

    def full(path):
        if path.name == "000002.npy":
            raise fault("no more")
        return np.load(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_array", full)
        with pytest.raises(TesseraError if fault is OSError else fault):
            write_npz(drawn, tmp_path / "out/samples.npz")
    assert list((tmp_path / "out").iterdir()) == []
    write_npz(drawn, tmp_path / "out/samples.npz")
    assert zipfile.ZipFile(tmp_path / "out/samples.npz").testzip() is None


def test_a_pack_into_what_is_no_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    drawn = BulkSamples(tiny_model, asked_by_policy(tiny_model, 3, "uniform"), tmp_path / "shards")
    with pytest.raises(TesseraError, match="cannot write"):
        write_npz(drawn, tmp_path / "file/samples.npz")
