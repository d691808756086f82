"""Checks of data sets: parts by any number of processes, and findings that need more than one folder."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from tessera.data import check, index, processes
from tessera.data.check import findings, rules, scan
from tessera.data.check.scan import ScanShard
from tessera.data.files import FilesConfig
from tessera.errors import TesseraError


def png(number: int, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """Sixty images of two classes."""
    for number in range(60):
        path = tmp_path / f"data/{('cat', 'dog')[number % 2]}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "data"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(scan, "PART_SIZE", 8)


def counts(checked: check.CheckResult) -> dict[str, int]:
    return {finding.kind: finding.count for finding in checked.findings}


def test_shards_in_any_order_equal_a_whole_scan(data, tmp_path, small_parts):
    whole, shards = (
        check.CheckRequest(str(data), tmp_path / "whole"),
        check.CheckRequest(str(data), tmp_path / "shards"),
    )
    check.scan_data(whole)
    for shard in (2, 0, 1):
        with pytest.raises(TesseraError, match="of 8 parts in .* are missing"):
            check.report_findings(shards)
        check.scan_data(shards, shard=ScanShard(shard, 3))
    assert counts(check.report_findings(whole)) == counts(check.report_findings(shards)) == {}
    assert (tmp_path / "whole/decisions.jsonl").read_bytes() == (tmp_path / "shards/decisions.jsonl").read_bytes()
    for part in range(8):
        contents = [scan.part_path(folder / "parts", part).read_bytes() for folder in (whole.folder, shards.folder)]
        assert contents[0] == contents[1]


def test_several_processes_write_the_same_parts(data, tmp_path, monkeypatch):
    """In spawned processes, with parts of the usual size."""
    for number in range(60, 60 + 2000):  # links cost nothing
        os.link(data / "cat/00.png", data / f"cat/{number}.png")
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(scan, "MIN_SECONDS", 0)
    check.scan_data(check.CheckRequest(str(data), one), workers=1)
    calls = []
    check.scan_data(
        check.CheckRequest(str(data), two), workers=2, progress=lambda what: lambda *done: calls.append((what, *done))
    )
    assert calls[-1] == ("scanning", 2060, 2060)
    assert sorted(path.name for path in (two / "parts").iterdir()) == [f"part-00000{part}.arrow" for part in range(5)]
    for part in sorted((one / "parts").iterdir()):
        assert part.read_bytes() == (two / "parts" / part.name).read_bytes()


def test_only_new_and_changed_parts_are_scanned(data, tmp_path, small_parts, monkeypatch):
    request = check.CheckRequest(str(data), tmp_path / "out")
    scanned: list[str] = []
    measure = scan.measure_sample
    monkeypatch.setattr(
        scan, "measure_sample", lambda content, name, config: scanned.append(name) or measure(content, name, config)
    )
    check.scan_data(request, shard=ScanShard(0, 2))
    assert len(scanned) == 32
    scan.part_path(request.folder / "parts", 2).write_bytes(b"cut off")
    scanned.clear()
    check.scan_data(request)
    assert len(scanned) == 28 + 8
    scanned.clear()
    check.scan_data(request)
    assert scanned == []

    (data / "dog/59.png").write_bytes(b"")
    with pytest.raises(TesseraError, match="files have changed"):
        check.report_findings(request)
    check.scan_data(request)
    assert scanned == [f"dog/{number}.png" for number in (53, 55, 57, 59)]
    assert counts(check.report_findings(request)) == {"empty": 1}
    (data / "dog/59.png").write_bytes(png(59))
    check.scan_data(request)
    assert counts(check.report_findings(request)) == {}


def test_a_process_that_dies_is_an_error(data, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(scan, "MIN_SECONDS", 0)
    monkeypatch.setattr(processes, "_run_worker", os._exit)  # called with any arguments, it ends the process
    with pytest.raises(TesseraError, match=r"a worker process died.*fewer --workers than 2"):
        check.scan_data(check.CheckRequest(str(data), tmp_path / "out"), workers=2)


def test_the_index_of_accepted_samples_opens(data, tmp_path):
    (data / "cat/60.png").write_bytes((data / "cat/00.png").read_bytes())
    (data / "cat/61.png").write_bytes(b"")
    (data / "dog/62.jpg").write_bytes(png(62, 20))
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    request = check.CheckRequest(str(data), tmp_path / "out")
    check.scan_data(request)
    done = check.report_findings(request, write_index=tmp_path / "accepted.parquet")
    assert counts(done) == {"empty": 1, "duplicates": 1, "wrong-endings": 1}
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before

    source = FilesConfig(path=str(tmp_path / "accepted.parquet"), size=(16, 16)).open()
    assert len(source) == 61
    assert source.class_names == ("cat", "dog")
    whole = FilesConfig(path=str(data), size=(16, 16)).open()
    by_name = {whole.name(row): row for row in range(len(whole))}
    table = index.read(tmp_path / "accepted.parquet")
    for row in range(len(source)):
        same = by_name[source.name(row)]
        assert source.label(row) == whole.label(same)
        assert (source.pixels(row) == whole.pixels(same)).all()
        side = 20 if source.name(row).endswith(".jpg") else 32
        assert (table["height"][row].as_py(), table["width"][row].as_py()) == (side, side)
    assert table["digest"][0].as_py() == hashlib.sha256(png(0)).hexdigest()
    assert table["hash"].null_count == 0


def test_other_kinds_can_be_excluded(data, tmp_path):
    (data / "cat/60.png").write_bytes(png(60, 4))
    request = check.CheckRequest(str(data), tmp_path / "out")
    check.scan_data(request)
    assert check.report_findings(request).keep.sum() == 61
    assert check.report_findings(request, exclude=("small",)).keep.sum() == 60
    with pytest.raises(TesseraError, match=r"unknown kind 'smal'; did you mean 'small'\?"):
        check.report_findings(request, exclude=("smal",))


def test_images_smaller_than_the_size(data, tmp_path):
    (data / "cat/60.png").write_bytes(png(60, 24))
    for size, count in (((24, 24), 0), ((25, 25), 1), ((33, 32), 61)):
        request = check.CheckRequest(str(data), tmp_path / "out", size=size)
        check.scan_data(request)
        assert counts(check.report_findings(request)).get("small", 0) == count


def test_leaks_of_the_reference_data(data, tmp_path):
    other = tmp_path / "validation"
    other.mkdir()
    (other / "same.png").write_bytes(png(4))
    (other / "twice.png").write_bytes(png(7, 64))
    (other / "new.png").write_bytes(png(1000))
    request = check.CheckRequest(str(data), tmp_path / "out", reference=str(other))
    check.scan_data(request)
    done = check.report_findings(request)
    assert counts(done) == {"leaks": 1, "near-leaks": 1}
    assert not done.keep[list(done.findings[0].samples)].any()
    assert done.keep.sum() == 59
    decisions = [json.loads(line) for line in (tmp_path / "out/decisions.jsonl").read_text().splitlines()]
    reasons = {one["name"]: one["reasons"] for one in decisions if one["reasons"]}
    assert reasons == {
        "cat/04.png": [f"leaks: the same file as same.png in {other}"],
        "dog/07.png": [f"near-leaks: similar to twice.png in {other} (0 of 64 bits differ)"],
    }


def test_captions(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    request = check.CheckRequest(str(folder), tmp_path / "out")
    check.scan_data(request)
    assert counts(check.report_findings(request)) == {}

    (folder / "3.txt").unlink()
    (folder / "5.txt").write_text(" \n")
    (folder / "99.txt").write_text("without image")
    request = check.CheckRequest(str(folder), tmp_path / "out")
    check.scan_data(request)
    done = check.report_findings(request)
    rows = {finding.kind: [*finding.samples, *finding.names] for finding in done.findings}
    assert rows == {"missing-captions": [3], "empty-captions": [5], "captions-without-image": ["99.txt"]}


def test_metadata_of_a_file_that_does_not_exist(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    lines = [json.dumps({"file_name": f"{number}.png", "text": "a caption"}) for number in (0, 1, 7)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    request = check.CheckRequest(str(folder), tmp_path / "out")
    check.scan_data(request)
    done = check.report_findings(request)
    assert {finding.kind: [*finding.samples, *finding.names] for finding in done.findings} == {
        "missing": [2],
        "unlisted-images": ["2.png"],
    }


def test_rows_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    images = [png(number) for number in range(50)]
    images[3], images[5], images[7], images[9] = b"", b"text", None, images[8]
    table = pa.table({"image": [{"bytes": one} for one in images], "label": [number % 2 for number in range(50)]})
    parquet.write_table(table, tmp_path / "data.parquet")
    request = check.CheckRequest(str(tmp_path / "data.parquet"), tmp_path / "out")
    check.scan_data(request)
    done = check.report_findings(request, write_index=tmp_path / "accepted.parquet")
    rows = {finding.kind: tuple(finding.samples.tolist()) for finding in done.findings}
    assert rows == {"empty": (3, 7), "no-image": (5,), "duplicates": (9,), "conflicts": (8, 9)}
    dataset = FilesConfig(path=str(tmp_path / "accepted.parquet"), size=(16, 16)).open()
    assert len(dataset) == 46
    assert dataset.encoded(3) == images[4]


def test_a_file_without_permission(data, tmp_path, monkeypatch):
    """With a mock, as the tests may run as a user who can read everything."""

    class Locked(type(data)):
        def read_bytes(self):
            raise PermissionError(13, "Permission denied")

    stats = scan.measure_sample(Locked(data / "cat/00.png"), "cat/00.png", FilesConfig(path="", size=(8, 8)))
    assert (stats.fault, stats.detail) == ("unreadable", "no permission to read it")


def test_a_single_class_and_no_class_at_all(tmp_path):
    for name in ("a/1.png", "a/2.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(len(name) + ord(name[2])))
    request = check.CheckRequest(str(tmp_path / "data"), tmp_path / "out")
    check.scan_data(request)
    assert counts(check.report_findings(request)) == {"one-class": 1}
    request = check.CheckRequest(str(tmp_path / "data/a"), tmp_path / "out2")
    check.scan_data(request)
    assert counts(check.report_findings(request)) == {}


def test_embedded_data_has_no_files(tmp_path):
    with pytest.raises(TesseraError, match="embedded data"):
        check.scan_data(check.CheckRequest("digits", tmp_path))


def test_no_index_is_written_if_no_sample_is_accepted(data, tmp_path):
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    request = check.CheckRequest(str(data), tmp_path / "out")
    check.scan_data(request)
    with pytest.raises(TesseraError, match="no sample of .* is accepted"):
        check.report_findings(request, write_index=tmp_path / "accepted.parquet")
    assert not (tmp_path / "accepted.parquet").exists()
    assert (tmp_path / "out/report.html").exists()


def test_first_equal_equals_a_dictionary():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 6, (500, 2)).astype(np.uint64)
    among = generator.random(500) < 0.7
    first: dict[tuple[int, ...], int] = {}
    expected = [
        first.setdefault(tuple(row), index) if inside else index
        for index, (row, inside) in enumerate(zip(values.tolist(), among))
    ]
    assert findings.first_equal(values, among).tolist() == expected


def test_color_profiles_are_described_by_how_much_they_change():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert scan.describe_profile(srgb) == ("", "")
    exchanged = srgb.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")  # red and green
    name, problem = scan.describe_profile(exchanged)
    assert (name, problem) == ("sRGB built-in, up to 255 of 255 levels", "")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert scan.describe_profile(lab) == ("", "")
    for damaged in (b"no profile", srgb[:200]):
        name, problem = scan.describe_profile(damaged)
        assert name == ""
        assert problem.startswith("color profile: ")


def test_color_grids_stay_in_their_parts_and_are_read_by_row():
    pa = pytest.importorskip("pyarrow")
    cells = np.random.default_rng(0).integers(0, 256, (50, 3 * scan.CELLS**2), dtype=np.uint8)
    whole = pa.array([row.tobytes() for row in cells], "binary")
    tables = [pa.table({"color_grid": pa.chunked_array([whole[:7], whole[7:7], whole[7:30]])})]
    tables.append(pa.table({"color_grid": pa.chunked_array([whole[30:]])}))
    rows = np.random.default_rng(1).permutation(50)[:40]
    grids = findings.ColorGrids(tables, rows)
    assert len(grids) == 40
    for index_ in (np.arange(40), np.array([3, 3, 39, 0]), np.empty(0, np.int64)):
        np.testing.assert_array_equal(grids[index_], cells[rows][index_])


def test_groups_of_a_finding_begin_with_the_row_to_keep():
    rows, leaders = np.array([3, 5, 6, 9]), np.array([1, 0, 1, 9])
    finding = findings.Finding("conflicts", "error", "", samples=rows, leaders=leaders)
    assert list(finding.groups()) == [(0, 5), (1, 3, 6), (9,)]
    assert (finding.num_groups, finding.count) == (3, 4)
    assert list(findings.Finding("small", "note", "", samples=rows).groups()) == []


def test_findings_as_json_hold_rows_groups_and_reasons(data, tmp_path):
    (data / "cat/99.png").write_bytes(png(1))
    (data / "dog/99.png").write_bytes(b"")
    request = check.CheckRequest(str(data), tmp_path / "out")
    check.scan_data(request)
    checked = check.report_findings(request)
    content = json.loads((tmp_path / "out/findings.json").read_text())
    assert content["summary"] == dict(checked.summary)
    by_kind = {finding["kind"]: finding for finding in content["findings"]}
    assert set(by_kind) == {"empty", "duplicates", "conflicts"}
    names = [request.dataset.name(row).rpartition("data/")[2] for row in range(len(request.dataset))]
    copy, original, empty = (names.index(name) for name in ("dog/01.png", "cat/99.png", "dog/99.png"))
    assert by_kind["duplicates"]["samples"] == [copy]
    assert by_kind["duplicates"]["groups"] == by_kind["conflicts"]["groups"] == [[original, copy]]
    assert by_kind["duplicates"]["reasons"] == {str(copy): "the same file as cat/99.png"}
    reason = "the same file in 'cat' and 'dog'"
    assert by_kind["conflicts"]["reasons"] == {str(row): reason for row in (original, copy)}
    assert (by_kind["empty"]["samples"], by_kind["empty"]["count"]) == ([empty], 1)


def test_names_that_differ_only_in_case_across_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "CHUNK", 4)
    for number in range(10):
        path = tmp_path / f"data/{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(number))
    for name in ("A.png", "a.png", "Z.PNG", "z.png"):
        (tmp_path / "data" / name).write_bytes(png(20 + ord(name[0])))
    request = check.CheckRequest(str(tmp_path / "data"), tmp_path / "out")
    check.scan_data(request)
    names = {each.kind: each.names for each in check.report_findings(request).findings}
    assert sorted(names["case-names"]) == ["A.png, a.png", "Z.PNG, z.png"]
