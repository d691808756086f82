"""Features on disk: resumed, never mixed, and independent of the number of processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation import features
from tessera.evaluation.features import compute_moments, extract, load_extractor
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource, subset_indices


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_all_features_of_all_images_in_order(digits, real, small_shards, tmp_path):
    features = extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path, batch_size=7)
    some = subset_indices(1000, 90)
    whole = digits(real[some], 90)
    assert set(features.rows) == {"pool", "spatial", "logits"}
    for kind, rows in features.rows.items():
        np.testing.assert_allclose(rows, whole[kind], atol=2e-5)
    assert features.indices.tolist() == list(range(90))
    assert features.labels.tolist() == DigitsConfig().open().labels[some].tolist()
    assert (features.count, features.num_invalid, features.size, features.channels) == (90, 0, (8, 8), 1)
    np.testing.assert_allclose(features.moments["pool"].mean, whole["pool"].mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(features.moments["pool"].cov, np.cov(whole["pool"].T), atol=2e-4)
    assert not list(tmp_path.glob("0*.npz"))


class Killed(Exception):
    pass


class Dies(DatasetSource):
    """A data set whose reader is killed at a shard."""

    at = 3

    def shard(self, index):
        if index == self.at:
            raise Killed
        return super().shard(index)


def test_a_killed_extraction_resumes_with_the_same_bytes(digits, small_shards, tmp_path):
    whole = extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path / "whole")
    with pytest.raises(Killed):
        extract(Dies(DigitsConfig(), 90), digits, tmp_path / "part")
    assert sorted(path.name for path in (tmp_path / "part").glob("0*")) == [f"{i:06d}.npz" for i in range(3)]
    (tmp_path / "part/000001.npz").unlink()
    (tmp_path / "part/000001.npz.partial").write_text("half")
    before = (tmp_path / "part/000000.npz").stat().st_mtime_ns
    calls = []

    def progress(done, total):
        calls.append((done, total, (tmp_path / "part/000000.npz").stat().st_mtime_ns == before))

    resumed = extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path / "part", progress=progress)
    assert calls == [(done, 5, True) for done in (3, 4, 5)]  # saved shards were not computed again
    assert resumed.hash == whole.hash
    assert arrays(tmp_path / "part") == arrays(tmp_path / "whole")


def test_an_extraction_killed_while_joining_resumes(digits, small_shards, tmp_path, monkeypatch):
    whole = extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path / "whole")
    write = features.atomic_write

    def killed(path, data, writer=""):
        if path.name == features.SUMMARY:
            raise Killed
        write(path, data, writer)

    with monkeypatch.context() as patch:
        patch.setattr(features, "atomic_write", killed)
        with pytest.raises(Killed):
            extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path / "part")
    assert (tmp_path / "part/pool.npy").exists()
    resumed = extract(DatasetSource(DigitsConfig(), 90), digits, tmp_path / "part")
    assert (resumed.hash, arrays(tmp_path / "part")) == (whole.hash, arrays(tmp_path / "whole"))


def test_saved_features_are_not_computed_again(digits, tmp_path):
    first = extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)
    blind = replace(digits, network=None)
    again = extract(DatasetSource(DigitsConfig(), 30), blind, tmp_path)
    assert again.hash == first.hash
    np.testing.assert_array_equal(again.rows["pool"], first.rows["pool"])


def test_other_work_in_the_folder_is_an_error_that_lists_the_differences(digits, tmp_path):
    extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)
    with pytest.raises(TesseraError, match=r"holds other work: source\.count was 30, is 31\. .*--out"):
        extract(DatasetSource(DigitsConfig(), 31), digits, tmp_path)
    with pytest.raises(TesseraError, match=r"source\.data\.split was model, is judge"):
        extract(DatasetSource(DigitsConfig(split="judge"), 30), digits, tmp_path)
    with pytest.raises(TesseraError, match=r"features\.weights was \w+, is other"):
        extract(DatasetSource(DigitsConfig(), 30), replace(digits, weights="other"), tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(TesseraError, match=r"cannot read .*plan\.json.*remove "):
        extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)


def test_a_damaged_summary_or_features_are_one_error(digits, tmp_path):
    extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)
    pool, summary = (tmp_path / "pool.npy").read_bytes(), (tmp_path / "summary.json").read_text()
    (tmp_path / "pool.npy").write_bytes(pool[:-5])
    with pytest.raises(TesseraError, match=r"pool\.npy is damaged"):
        extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)
    (tmp_path / "pool.npy").write_bytes(pool)
    (tmp_path / "summary.json").write_text(summary[:-5])
    with pytest.raises(TesseraError, match=r"summary\.json is damaged"):
        extract(DatasetSource(DigitsConfig(), 30), digits, tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_that_counts_them(digits, real, tmp_path, bad):
    def network(images):
        features = digits.network(images)
        pool = features["pool"].clone()
        pool[images[:, 0, 0, 3] > 100, 5] = bad
        return {**features, "pool": pool}

    wrong = int((real[subset_indices(1000, 60), 0, 3, 0] > 100).sum())
    assert 0 < wrong < 60
    message = rf"tessera/digits computed pool features that are not finite for {wrong} of 60 images"
    with pytest.raises(TesseraError, match=message):
        extract(DatasetSource(DigitsConfig(), 60), replace(digits, network=network), tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8, 8, 3), "has 3 channels, but the features tessera/digits take 1: choose other --features"),
        ((4, 8, 9, 1), "is 8 x 9, but the features tessera/digits take 8 x 8: choose other --features, or --size"),
    ],
)
def test_images_that_the_network_cannot_take_are_an_error(digits, make_npz, tmp_path, shape, message):
    with pytest.raises(TesseraError, match=message):
        extract(NpzSource(make_npz("s.npz", np.zeros(shape, np.uint8))), digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_valid_image_is_an_error(digits, tmp_path):
    from tessera.data import FilesConfig

    (tmp_path / "a.png").write_text("no image")
    data = DatasetSource(FilesConfig(path=str(tmp_path), size=(8, 8), channels=1))
    with pytest.raises(TesseraError, match="no image can be used"):
        extract(data, digits, tmp_path / "out")


def test_invalid_images_are_counted_and_have_no_row(digits, real, make_folder, small_shards, tmp_path):
    from tessera.data import FilesConfig

    path = make_folder("data", real[:50], ["a", "b"] * 25)
    config = FilesConfig(path=str(path), size=(8, 8), channels=1)
    whole = extract(DatasetSource(config), digits, tmp_path / "1")
    for file in sorted(path.rglob("*.png"))[:20]:  # a whole shard
        file.write_text("no image")
    features = extract(DatasetSource(config), digits, tmp_path / "2")
    assert (features.count, features.num_invalid) == (30, 20)
    assert features.indices.tolist() == list(range(20, 50))
    np.testing.assert_array_equal(features.rows["pool"], whole.rows["pool"][20:])
    np.testing.assert_array_equal(features.labels, whole.labels[20:])


def test_the_hash_depends_only_on_the_images(digits, real, make_folder, make_npz, tmp_path):
    some = real[subset_indices(1000, 40)]
    sources = (
        DatasetSource(DigitsConfig(), 40),
        FolderSource(make_folder("s", some)),
        NpzSource(make_npz("s.npz", some)),
    )
    hashes = [extract(source, digits, tmp_path / str(i)).hash for i, source in enumerate(sources)]
    assert len(set(hashes)) == 1
    other = some.copy()
    other[39, 7, 7] ^= 1
    assert extract(NpzSource(make_npz("o.npz", other)), digits, tmp_path / "o").hash != hashes[0]


def test_unknown_feature_networks_are_an_error(tmp_path):
    with pytest.raises(TesseraError, match="unknown features 'digitz'; did you mean 'digits'?"):
        load_extractor("digitz", torch.device("cpu"))
    with pytest.raises(TesseraError, match=r"gone\.pth"):
        load_extractor(str(tmp_path / "gone.pth"), torch.device("cpu"))


# Several processes

# Imports once, then forks the processes that torchrun would start. Each of them writes its results.
TOGETHER = """
import json, os, socket, sys, numpy, torch
from pathlib import Path
from tessera.evaluation import features, sources
from tessera.data import DigitsConfig
from tessera.generation import shards
from tessera.runtime import distributed_session
import sklearn.datasets
torch.set_num_threads(1)
features.ROWS, shards.SHARD_SIZE = 7, 20
rows = numpy.random.default_rng(0).normal(3, 2, (203, 11)).astype(numpy.float32)

def work(count):
    with distributed_session() as group:
        network = features.load_extractor("digits", torch.device("cpu"))
        data = sources.DatasetSource(DigitsConfig(), 90)
        extracted = features.extract(data, network, Path(sys.argv[1], str(count)), group)
        moments = features.compute_moments(rows, group)
        result = {"ranks": [group.rank, group.world_size], "hash": extracted.hash, "mean": moments.mean.tolist(),
                  "cov": moments.cov.tolist(), "count": moments.count, "fd": extracted.moments["pool"].cov.tolist()}
        Path(sys.argv[1], f"{count}-{group.rank}.json").write_text(json.dumps(result))

for count in (1, 2, 4):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                work(count)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{count} processes: {codes}")
"""  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="forks beside torch")
def test_hash_features_and_moments_do_not_depend_on_the_number_of_processes(tmp_path, real):
    done = subprocess.run([sys.executable, "-c", TOGETHER, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = {
        (count, rank): json.loads((tmp_path / f"{count}-{rank}.json").read_text())
        for count in (1, 2, 4)
        for rank in range(count)
    }
    rows = np.random.default_rng(0).normal(3, 2, (203, 11)).astype(np.float32)
    single = compute_moments(rows)
    np.testing.assert_allclose(single.cov, np.cov(rows.astype(np.float64).T), rtol=1e-10)
    for (count, rank), result in results.items():
        assert result["ranks"] == [rank, count]
        assert result["count"] == 203
        assert result["hash"] == results[1, 0]["hash"]
        np.testing.assert_allclose(result["mean"], single.mean, rtol=1e-10)
        np.testing.assert_allclose(result["cov"], single.cov, rtol=1e-10, atol=1e-10 * np.abs(single.cov).max())
        scale = np.abs(results[1, 0]["fd"]).max()
        np.testing.assert_allclose(result["fd"], results[1, 0]["fd"], rtol=0, atol=1e-10 * scale)
    one, two, four = (_without_moments(arrays(tmp_path / str(count))) for count in (1, 2, 4))
    assert one == two == four != {}


def _without_moments(files: dict[str, bytes]) -> dict[str, bytes]:
    """Sums in another order differ in the last digits; they were compared above."""
    return {name: content for name, content in files.items() if not name.endswith(("mean.npy", "covariance.npy"))}
