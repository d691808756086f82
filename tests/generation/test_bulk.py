"""Bulk sampling: the same images as `generate`, each generated once, and the .npz of the ADM suite."""

import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tessera import generation
from tessera.errors import TesseraError
from tessera.generation import SampleRequest, bulk, shards
from tessera.generation.bulk import BulkSamples, bulk_request, generate_shards, write_npz
from tessera.generation.shards import num_shards
from tessera.runtime import Distributed


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Shards of 20 images, so that few images have several shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 20)


def all_images(samples: BulkSamples) -> np.ndarray:
    return np.concatenate([samples.shard(index).images for index in range(num_shards(samples.count))])


def test_images_are_those_of_their_classes_and_seeds(tiny_model, small_shards, tmp_path):
    seeds, classes = [5, 9, 2, 30] * 12, [0, 1, 2, 1] * 12
    request = SampleRequest(seeds, {"label": classes}, settings={"num_steps": 3}, guidance_scale=2.0)
    samples = BulkSamples(tiny_model, request, tmp_path, batch_size=20)
    generate_shards(samples, Distributed())
    expected = generation.generate(
        tiny_model, request.classes, request.seeds, num_steps=3, guidance_scale=2.0, batch_size=20
    )
    np.testing.assert_array_equal(all_images(samples), expected)
    assert samples.shard(1).labels.tolist() == request.classes[20:40]
    assert samples.shard(1).indices.tolist() == list(range(20, 40))
    assert (samples.size, samples.channels, samples.count) == ((8, 8), 1, 48)


def test_a_model_without_classes_and_another_size(make_model, small_shards, tmp_path):
    model = make_model({"num_classes": 0})
    request = bulk_request(model, 25, "uniform", first_seed=7, size=(4, 8))
    assert (request.classes, request.policy, list(request.seeds)) == (None, "unconditional", list(range(7, 32)))
    samples = BulkSamples(model, request, tmp_path, batch_size=20)
    shard = samples.shard(1)
    assert (shard.labels, shard.images.shape) == (None, (5, 4, 8, 1))
    np.testing.assert_array_equal(shard.images, generation.generate(model, None, range(27, 32), size=(4, 8)))


def test_only_missing_shards_are_generated(tiny_model, small_shards, tmp_path, monkeypatch):
    request = bulk_request(tiny_model, 70, "balanced")
    generate_shards(BulkSamples(tiny_model, request, tmp_path / "whole"), Distributed())
    generate_shards(BulkSamples(tiny_model, request, tmp_path / "part"), Distributed())
    for name in ("000001.npy", "000003.npy"):
        (tmp_path / "part" / name).unlink()
    (tmp_path / "part/000003.npy.partial").write_text("half")
    seeds = []
    original = generation.generate_request
    monkeypatch.setattr(bulk, "generate_request", lambda *a: seeds.append(list(a[1].seeds)) or original(*a))
    progress = []
    generate_shards(BulkSamples(tiny_model, request, tmp_path / "part"), Distributed(), lambda *at: progress.append(at))
    assert seeds == [list(range(20, 40)), list(range(60, 70))]
    assert progress[-1] == (4, 4)
    for file in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "part" / file.name).read_bytes() == file.read_bytes()


def test_ranks_generate_their_own_shards_and_together_all_of_them(tiny_model, small_shards, tmp_path):
    request = bulk_request(tiny_model, 70, "balanced")

    class Alone(Distributed):
        def barrier(self):
            pass

    for rank in (0, 1):
        generate_shards(BulkSamples(tiny_model, request, tmp_path / "two"), Alone(rank, 2))
        assert len(list((tmp_path / "two").glob("*.npy"))) == 2 * (rank + 1)
    np.testing.assert_array_equal(
        all_images(BulkSamples(tiny_model, request, tmp_path / "two")),
        all_images(BulkSamples(tiny_model, request, tmp_path / "one")),
    )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"num_steps": 5}}, r"sampling\.num_steps was 6, is 5"),
        ({"guidance_scale": 3.0}, r"sampling\.guidance_scale was 1\.0, is 3\.0"),
        ({"settings": {"sampler": "ancestral"}}, r"sampling\.sampler\.kind was ddim, is ancestral"),
        ({"precision": "bfloat16"}, r"sampling\.precision was float32, is bfloat16"),
        ({"first_seed": 1}, r"sampling\.seeds was 0-29, is 1-30"),
        ({"size": (8, 4)}, r"size was \[8, 8\], is \[8, 4\]"),
    ],
)
def test_a_folder_of_another_request_is_refused(tiny_model, tmp_path, change, difference):
    request = bulk_request(tiny_model, 30, "balanced")
    BulkSamples(tiny_model, request, tmp_path).begin(Distributed())
    BulkSamples(tiny_model, request, tmp_path, batch_size=3).begin(Distributed())
    with pytest.raises(TesseraError, match=rf"holds other work: {difference}"):
        BulkSamples(tiny_model, bulk_request(tiny_model, 30, "balanced", **change), tmp_path).begin(Distributed())


def test_a_folder_of_another_model_or_other_classes_is_refused(make_model, tiny_model, tmp_path):
    request = bulk_request(tiny_model, 30, "balanced")
    BulkSamples(tiny_model, request, tmp_path).begin(Distributed())
    with pytest.raises(TesseraError, match="weights was"):
        BulkSamples(make_model(seed=1), request, tmp_path).begin(Distributed())
    for other in (bulk_request(tiny_model, 30, "uniform"), SampleRequest(request.seeds, {"label": [1] * 30})):
        with pytest.raises(TesseraError, match=r"sampling\.class_policy was balanced"):
            BulkSamples(tiny_model, other, tmp_path).begin(Distributed())


def test_a_damaged_shard_is_one_error(tiny_model, tmp_path):
    samples = BulkSamples(tiny_model, bulk_request(tiny_model, 5, "balanced"), tmp_path)
    samples.shard(0)
    content = samples.path(0).read_bytes()
    for length in (0, 20, len(content) - 1):
        samples.path(0).write_bytes(content[:length])
        with pytest.raises(TesseraError, match=r"000000\.npy is damaged: .*; remove it to have it made again"):
            samples.shard(0)


# Policies


@pytest.mark.parametrize("count", [2, 30, 31, 32])
def test_balanced_classes_are_as_many_of_each(tiny_model, count):
    request = bulk_request(tiny_model, count, "balanced", first_seed=3)
    counts = Counter(request.classes)
    assert max(counts.values()) - min(counts[number] for number in range(3)) <= 1
    assert list(request.seeds) == list(range(3, 3 + count))


def test_uniform_classes_are_uniform_and_depend_on_their_seeds(make_model):
    model = make_model({"num_classes": 10})
    request = bulk_request(model, 20_000, "uniform")
    counts = np.bincount(request.classes, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # 99.9th percentile of chi squared with 9 degrees of freedom
    pairs = np.histogram2d(request.classes[:-1], request.classes[1:], bins=10)[0]
    assert ((pairs - 200) ** 2 / 200).sum() < 149  # 99 degrees of freedom
    later = bulk_request(model, 100, "uniform", first_seed=500)
    assert later.classes == request.classes[500:600]


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_classes_as_in_the_data_are_as_frequent_as_there(make_model, count):
    """Of any number of images, within one of the exact share for the ends of each class."""
    model = make_model({"num_classes": 4})
    counts = np.array([630, 3, 0, 367])
    model = replace(model, config=model.config.model_copy(update={"class_counts": tuple(counts.tolist())}))
    request = bulk_request(model, count, "data")
    drawn = np.bincount(request.classes, minlength=4)
    assert drawn[2] == 0
    assert (np.abs(drawn - count * counts / counts.sum()) < 3).all()
    assert bulk_request(model, 2 * count, "data").classes[:count] == request.classes


def test_a_model_that_does_not_know_its_class_counts(tiny_model):
    with pytest.raises(TesseraError, match="does not record how many images of each class"):
        bulk_request(tiny_model, 10, "data")


def test_the_protocol_records_seeds_and_class_policy(tiny_model, tmp_path):
    def protocol(request: SampleRequest) -> dict:
        return BulkSamples(tiny_model, request, tmp_path).sampling_protocol

    one = protocol(bulk_request(tiny_model, 30, "uniform", settings={"num_steps": 4}, guidance_scale=2.5))
    assert (one["seeds"], one["class_policy"]) == ("0-29", "uniform")
    assert (one["num_steps"], one["guidance_scale"]) == (4, 2.5)
    assert one["sampler"] == {"kind": "ddim", "eta": 0.0}
    listed = [
        protocol(SampleRequest(seeds, {"label": classes}))
        for seeds, classes in (([4, 2], [0, 1]), ([2, 4], [0, 1]), ([4, 2], [1, 0]))
    ]
    assert len({str(each) for each in listed}) == 3


# The .npz file


def test_the_npz_is_that_of_the_adm_suite(tiny_model, small_shards, tmp_path):
    samples = BulkSamples(tiny_model, bulk_request(tiny_model, 45, "uniform"), tmp_path / "shards", batch_size=20)
    write_npz(samples, tmp_path / "deep/samples.npz")
    with np.load(tmp_path / "deep/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], all_images(samples))
        np.testing.assert_array_equal(file["arr_1"], samples.request.classes)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["samples.npz"]


def test_an_npz_without_classes_has_no_labels(make_model, tmp_path):
    model = make_model({"num_classes": 0})
    write_npz(BulkSamples(model, bulk_request(model, 3, "uniform"), tmp_path / "shards"), tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert file.files == ["arr_0"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, TesseraError])
def test_an_interrupted_npz_leaves_no_partial_file(tiny_model, small_shards, tmp_path, monkeypatch, error):
    samples = BulkSamples(tiny_model, bulk_request(tiny_model, 45, "uniform"), tmp_path / "shards")
    generate_shards(samples, Distributed())

    def full(path):
        if path.name == "000002.npy":
            raise error("no more")
        return np.load(path)

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "read_array", full)
        with pytest.raises(TesseraError if error is OSError else error):
            write_npz(samples, tmp_path / "out/samples.npz")
    assert list((tmp_path / "out").iterdir()) == []
    write_npz(samples, tmp_path / "out/samples.npz")
    assert zipfile.ZipFile(tmp_path / "out/samples.npz").testzip() is None


def test_an_npz_in_a_path_that_is_not_a_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    samples = BulkSamples(tiny_model, bulk_request(tiny_model, 3, "uniform"), tmp_path / "shards")
    with pytest.raises(TesseraError, match="cannot write"):
        write_npz(samples, tmp_path / "file/samples.npz")
