"""Features on disk: gone on with, never mixed, and the same whatever the number of processes."""

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
from tessera.evaluation.features import extract, extractor, moments_of
from tessera.evaluation.sources import Data, Folder, Npz, chosen
from tessera.runtime import Distributed


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_every_part_of_every_picture_in_order(digits, real, small_shards, tmp_path):
    found = extract(Data(DigitsConfig(), 90), digits, tmp_path, Distributed(), batch=7)
    some = chosen(1000, 90)
    whole = digits(real[some], 90)
    assert set(found.rows) == {"pool", "spatial", "logits"}
    for part, rows in found.rows.items():
        np.testing.assert_allclose(rows, whole[part], atol=2e-5)
    assert found.number.tolist() == list(range(90))
    assert found.label.tolist() == DigitsConfig().open().labels[some].tolist()
    assert (found.count, found.unusable, found.size, found.channels) == (90, 0, (8, 8), 1)
    np.testing.assert_allclose(found.moments["pool"].mean, whole["pool"].mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(found.moments["pool"].cov, np.cov(whole["pool"].T), atol=2e-4)
    assert not list(tmp_path.glob("0*.npz"))


class Killed(Exception):
    pass


class Dies(Data):
    """Data whose reader is killed at a shard."""

    at = 3

    def shard(self, index):
        if index == self.at:
            raise Killed
        return super().shard(index)


def test_a_killed_extraction_goes_on_to_the_same_bytes(digits, small_shards, tmp_path):
    whole = extract(Data(DigitsConfig(), 90), digits, tmp_path / "whole", Distributed())
    with pytest.raises(Killed):
        extract(Dies(DigitsConfig(), 90), digits, tmp_path / "part", Distributed())
    assert sorted(path.name for path in (tmp_path / "part").glob("0*")) == [f"{i:06d}.npz" for i in range(3)]
    (tmp_path / "part/000001.npz").unlink()
    (tmp_path / "part/000001.npz.partial").write_text("half")
    before = (tmp_path / "part/000000.npz").stat().st_mtime_ns
    seen = []

    def progress(done, total):
        seen.append((done, total, (tmp_path / "part/000000.npz").stat().st_mtime_ns == before))

    found = extract(Data(DigitsConfig(), 90), digits, tmp_path / "part", Distributed(), progress=progress)
    assert seen == [(done, 5, True) for done in (3, 4, 5)]  # what stood there was not looked at again
    assert found.hash == whole.hash
    assert arrays(tmp_path / "part") == arrays(tmp_path / "whole")


def test_an_extraction_killed_while_joining_goes_on(digits, small_shards, tmp_path, monkeypatch):
    whole = extract(Data(DigitsConfig(), 90), digits, tmp_path / "whole", Distributed())
    write = features.atomic_write

    def killed(path, data):
        if path.name == features.FACTS:
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_whole", killed)
        with pytest.raises(Killed):
            extract(Data(DigitsConfig(), 90), digits, tmp_path / "part", Distributed())
    assert (tmp_path / "part/pool.npy").exists()
    found = extract(Data(DigitsConfig(), 90), digits, tmp_path / "part", Distributed())
    assert (found.hash, arrays(tmp_path / "part")) == (whole.hash, arrays(tmp_path / "whole"))


def test_what_is_there_is_not_looked_at_again(digits, tmp_path):
    first = extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())
    blind = replace(digits, network=None)
    again = extract(Data(DigitsConfig(), 30), blind, tmp_path, Distributed())
    assert again.hash == first.hash
    np.testing.assert_array_equal(again.rows["pool"], first.rows["pool"])


def test_other_work_in_the_folder_is_refused_and_says_what_differs(digits, tmp_path):
    extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())
    with pytest.raises(TesseraError, match=r"holds other work: subject\.count was 30, is 31\. Give another --out"):
        extract(Data(DigitsConfig(), 31), digits, tmp_path, Distributed())
    with pytest.raises(TesseraError, match=r"subject\.data\.split was model, is judge"):
        extract(Data(DigitsConfig(split="judge"), 30), digits, tmp_path, Distributed())
    with pytest.raises(TesseraError, match=r"features\.weights was \w+, is other"):
        extract(Data(DigitsConfig(), 30), replace(digits, weights="other"), tmp_path, Distributed())
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(TesseraError, match=r"cannot read .*plan\.json.*remove .* to start afresh"):
        extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())


def test_facts_or_features_that_are_damaged_are_one_error(digits, tmp_path):
    extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())
    pool, facts = (tmp_path / "pool.npy").read_bytes(), (tmp_path / "facts.json").read_text()
    (tmp_path / "pool.npy").write_bytes(pool[:-5])
    with pytest.raises(TesseraError, match=r"pool\.npy is damaged"):
        extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())
    (tmp_path / "pool.npy").write_bytes(pool)
    (tmp_path / "facts.json").write_text(facts[:-5])
    with pytest.raises(TesseraError, match=r"facts\.json is damaged"):
        extract(Data(DigitsConfig(), 30), digits, tmp_path, Distributed())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_an_error_that_counts_them(digits, real, tmp_path, bad):
    def network(pictures):
        found = digits.network(pictures)
        pool = found["pool"].clone()
        pool[pictures[:, 0, 0, 3] > 100, 5] = bad
        return {**found, "pool": pool}

    wrong = int((real[chosen(1000, 60), 0, 3, 0] > 100).sum())
    assert 0 < wrong < 60
    said = rf"tessera/digits gives pool features that are not finite for {wrong} of 60 pictures"
    with pytest.raises(TesseraError, match=said):
        extract(Data(DigitsConfig(), 60), replace(digits, network=network), tmp_path, Distributed())


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 8, 8, 3), "has 3 channels, but the features tessera/digits are of 1: choose other --features"),
        ((4, 8, 9, 1), "is 8 x 9, but the features tessera/digits are of 8 x 8: choose other --features, or --size"),
    ],
)
def test_pictures_that_the_network_cannot_take(digits, make_npz, tmp_path, shape, said):
    with pytest.raises(TesseraError, match=said):
        extract(Npz(make_npz("s.npz", np.zeros(shape, np.uint8))), digits, tmp_path / "out", Distributed())
    assert not (tmp_path / "out").exists()


def test_no_usable_picture_at_all(digits, tmp_path):
    from tessera.data import FilesConfig

    (tmp_path / "a.png").write_text("no image")
    data = Data(FilesConfig(path=str(tmp_path), size=(8, 8), channels=1))
    with pytest.raises(TesseraError, match="no picture can be used"):
        extract(data, digits, tmp_path / "out", Distributed())


def test_unusable_pictures_are_counted_and_leave_no_row(digits, real, make_folder, small_shards, tmp_path):
    from tessera.data import FilesConfig

    path = make_folder("data", real[:50], ["a", "b"] * 25)
    whole = extract(
        Data(config := FilesConfig(path=str(path), size=(8, 8), channels=1)), digits, tmp_path / "1", Distributed()
    )
    for file in sorted(path.rglob("*.png"))[:20]:  # a whole shard
        file.write_text("no image")
    found = extract(Data(config), digits, tmp_path / "2", Distributed())
    assert (found.count, found.unusable) == (30, 20)
    assert found.number.tolist() == list(range(20, 50))
    np.testing.assert_array_equal(found.rows["pool"], whole.rows["pool"][20:])
    np.testing.assert_array_equal(found.label, whole.label[20:])


def test_the_hash_is_that_of_the_pictures_wherever_they_lie(digits, real, make_folder, make_npz, tmp_path):
    some = real[chosen(1000, 40)]
    subjects = (Data(DigitsConfig(), 40), Folder(make_folder("s", some)), Npz(make_npz("s.npz", some)))
    hashes = [extract(each, digits, tmp_path / str(i), Distributed()).hash for i, each in enumerate(subjects)]
    assert len(set(hashes)) == 1
    other = some.copy()
    other[39, 7, 7] ^= 1
    assert extract(Npz(make_npz("o.npz", other)), digits, tmp_path / "o", Distributed()).hash != hashes[0]


def test_networks_that_are_not_there(tmp_path):
    with pytest.raises(TesseraError, match="unknown features 'digitz'; did you mean 'digits'?"):
        extractor("digitz", torch.device("cpu"))
    with pytest.raises(TesseraError, match=r"gone\.pth"):
        extractor(str(tmp_path / "gone.pth"), torch.device("cpu"))


# Many processes

# Imports once, then forks so many processes as torchrun would start, each of which prints what it found.
TOGETHER = """
import json, os, socket, sys, numpy, torch
from pathlib import Path
from tessera.evaluation import features, subjects
from tessera.data import DigitsConfig
from tessera.runtime import ranks
import sklearn.datasets
torch.set_num_threads(1)
features.ROWS, subjects.SHARD = 7, 20
rows = numpy.random.default_rng(0).normal(3, 2, (203, 11)).astype(numpy.float32)

def work(count):
    with ranks() as group:
        network = features.extractor("digits", torch.device("cpu"))
        data = subjects.Data(DigitsConfig(), 90)
        found = features.extract(data, network, Path(sys.argv[1], str(count)), group)
        moments = features.moments_of(rows, group)
        told = {"ranks": [group.rank, group.count], "hash": found.hash, "mean": moments.mean.tolist(),
                "cov": moments.cov.tolist(), "count": moments.count, "fd": found.moments["pool"].cov.tolist()}
        Path(sys.argv[1], f"{count}-{group.rank}.json").write_text(json.dumps(told))

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
def test_hash_features_and_moments_are_the_same_from_one_two_and_four_processes(tmp_path, real):
    done = subprocess.run([sys.executable, "-c", TOGETHER, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = {
        (count, rank): json.loads((tmp_path / f"{count}-{rank}.json").read_text())
        for count in (1, 2, 4)
        for rank in range(count)
    }
    rows = np.random.default_rng(0).normal(3, 2, (203, 11)).astype(np.float32)
    alone = moments_of(rows)
    np.testing.assert_allclose(alone.cov, np.cov(rows.astype(np.float64).T), rtol=1e-10)
    for place, found in told.items():
        assert found["ranks"] == [place[1], place[0]]
        assert found["count"] == 203
        assert found["hash"] == told[1, 0]["hash"]
        np.testing.assert_allclose(found["mean"], alone.mean, rtol=1e-10)
        np.testing.assert_allclose(found["cov"], alone.cov, rtol=1e-10, atol=1e-10 * np.abs(alone.cov).max())
        scale = np.abs(told[1, 0]["fd"]).max()
        np.testing.assert_allclose(found["fd"], told[1, 0]["fd"], rtol=0, atol=1e-10 * scale)
    one, two, four = (_without_moments(arrays(tmp_path / str(count))) for count in (1, 2, 4))
    assert one == two == four != {}


def _without_moments(files: dict[str, bytes]) -> dict[str, bytes]:
    """Sums of floating-point numbers in another order differ in the last digits: they were compared above."""
    return {name: content for name, content in files.items() if not name.endswith(("mean.npy", "covariance.npy"))}
