"""A folder of tiles, clean and damaged in every way: each damage is names_by_kind, and nothing else."""

import hashlib
import json
import os
import runpy
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tessera.data import check
from tessera.data.check import similarity

damages = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("damages.py"))))
SHARED = Path(os.environ.get("TESSERA_SHARED") or Path(__file__).parents[2] / "../shared/data")
FEW, ALL = 8, 1  # every eighth tile, some 490 with at least 24 of each class; every one
KINDS_OF_CLEAN = {"near-duplicates", "blank", "invisible", "low-information", "transparent", "profile"}


def unpacked(folder: Path, every: int) -> Path:
    archive = SHARED / "tiles/tiles.zip"
    if not archive.exists():
        pytest.skip("tiles.zip is absent: set TESSERA_SHARED to the folder of shared data")
    with zipfile.ZipFile(archive) as tiles:
        names = sorted(name for name in tiles.namelist() if name.endswith(".png"))
        tiles.extractall(folder, names[::every])
    return folder


def checked(data: Path, out: Path, **more) -> tuple[dict[str, set[str]], list[dict]]:
    """The names by kind of finding; the decisions."""
    request = check.CheckRequest(str(data), out, **more)
    check.scan_data(request)
    result = check.report_findings(request)
    decisions = [json.loads(line) for line in (out / check.DECISIONS).read_text().splitlines()]
    return {
        finding.kind: {decisions[row]["name"] for row in finding.samples}
        | {name.split(" (a ")[0] for name in finding.names}
        for finding in result.findings
    }, decisions


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def every(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def clean(every, tmp_path_factory) -> Path:
    return unpacked(tmp_path_factory.mktemp("clean"), every)


@pytest.fixture(scope="module")
def clean_check(clean, tmp_path_factory):
    return checked(clean, tmp_path_factory.mktemp("clean-check"))


def pixels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The image on white, float64 [H, W, 3], and alpha [H, W]; by arithmetic instead of Pillow."""
    rgba = np.asarray(Image.open(path)).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)), alpha[..., 0]


def span(image: np.ndarray) -> float:
    return np.ptp(image.reshape(-1, image.shape[-1]), axis=0).max()


def test_findings_of_the_clean_folder_are_true(clean, clean_check):
    names_by_kind, decisions = clean_check
    assert set(names_by_kind) <= KINDS_OF_CLEAN
    paths = sorted(path.relative_to(clean).as_posix() for path in clean.rglob("*.png"))
    assert sorted(one["name"] for one in decisions) == paths
    assert all(one["keep"] for one in decisions)
    generic = {path for path in paths if b"Generic RGB" in Image.open(clean / path).info.get("icc_profile", b"")}
    assert names_by_kind.get("profile", set()) == generic
    contents = [hashlib.sha256((clean / path).read_bytes()).digest() for path in paths]
    assert len(set(contents)) == len(paths)  # so there are no duplicates either

    truth = {"transparent": set(), "blank": set(), "invisible": set(), "low-information": set()}
    for path in paths:
        on_white, alpha = pixels(clean / path)
        if (alpha < 1).any():
            truth["transparent"].add(path)
        colors = Counter(map(tuple, on_white.reshape(-1, 3)))
        if span(on_white) <= 2:
            on_black = on_white - 255 * (1 - alpha[..., None])
            truth["invisible" if span(on_black) > 2 else "blank"].add(path)
        elif span(on_white) <= 16 or max(colors.values()) / alpha.size >= 0.99:
            truth["low-information"].add(path)
    assert {kind: names_by_kind.get(kind, set()) for kind in truth} == truth


def test_near_duplicates_agree_with_an_independent_computation(clean, clean_check):
    scipy_fft = pytest.importorskip("scipy.fft")
    names_by_kind, decisions = clean_check
    pairs = [
        (one["name"], reason.removeprefix("near-duplicates: similar to ").rsplit(" (", 1)[0])
        for one in decisions
        for reason in one["reasons"]
        if reason.startswith("near-duplicates")
    ]
    assert {first for first, _ in pairs} == names_by_kind.get("near-duplicates", set())
    for pair in pairs:
        (first, _), (second, _) = (pixels(clean / name) for name in pair)
        cells = [image.reshape(8, 4, 8, 4, 3).mean((1, 3)) for image in (first, second)]
        assert np.abs(cells[0] - cells[1]).max() <= similarity.LEVELS + 1
        bits = []
        for image in (first, second):
            grey = image @ [0.299, 0.587, 0.114]
            low = scipy_fft.dctn(grey, type=2)[:8, :8].ravel()
            bits.append(low[1:] > np.median(low[1:]))
        assert (bits[0] != bits[1]).sum() <= similarity.BITS + 2  # grey is rounded to 8 bits there, not here
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.7


def test_every_damage_is_found_and_nothing_else(every, clean_check, tmp_path):
    messy = unpacked(tmp_path / "messy", every)
    expected = damages.damage_all(messy)
    names_by_kind, decisions = checked(messy, tmp_path / "out")
    before, _ = clean_check
    more = {kind: names - before.get(kind, set()) for kind, names in names_by_kind.items()}
    more = {kind: names for kind, names in more.items() if names}
    imbalance = more.pop("imbalance")
    assert "Mon (1)" in imbalance
    assert more == expected
    assert len(damages.DAMAGES) >= 30

    excluded = {one["name"] for one in decisions if not one["keep"]}
    unusable = ("empty", "no-image", "truncated", "damaged", "unsupported", "too-large", "unreadable")
    assert excluded == set().union(*(expected.get(kind, set()) for kind in (*unusable, "duplicates")))
    assert all(one["reasons"] for one in decisions if not one["keep"])


@pytest.mark.parametrize("name", list(damages.DAMAGES))
def test_each_damage_by_itself(name, tmp_path):
    """Among fifty images in two classes: no damage hides another one, and none is found without it."""
    folder = tmp_path / "data"
    for number in range(50):
        damages.put(
            folder, f"{('mon', 'gui')[number % 2]}/{number}.png", damages.encoded(damages.image(1000 + number), "PNG")
        )
    assert not checked(folder, tmp_path / "clean")[0]
    (folder / "item").mkdir()
    expected = damages.DAMAGES[name](folder)
    if not list((folder / "item").iterdir()):
        (folder / "item").rmdir()
    names_by_kind, _ = checked(folder, tmp_path / "out")
    kinds = {kind for kind in names_by_kind if kind not in ("few-images", "imbalance", "folders-without-images")}
    assert kinds == set(expected) - {"few-images"}
    assert all(expected[kind] == names_by_kind[kind] for kind in kinds)
