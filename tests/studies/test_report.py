"""Reports of studies with known results: the sentences, the tables and the files agree with them."""

import csv
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image

from tessera.errors import TesseraError
from tessera.planning import scaling_law
from tessera.studies import figures, report
from tessera.studies.seed_aggregation import average_seeds, check_one_protocol, common_steps, final_points

FIGURES = {"compute", "gmacs", "steps", "sampling", "images"}


def check_figures(folder, names):
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")} == names
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 400
            low, high = image.convert("L").getextrema()
            assert low < 100 < high
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.fixture(scope="module")
def scaling(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    study = synthetic.scaling_study()
    results = synthetic.scaling_results(study, grids=folder / "sheets")
    (folder / "sheets" / "S-4.png").write_bytes(b"no image")
    return study, results, report.write(study, results, folder / "out")


def test_a_report_recovers_the_law_of_the_numbers(scaling):
    _, _, path = scaling
    text = path.read_text()
    assert path.name == "report.md"
    assert "8 of 8 members are done" in text
    assert "More GMACs go with a lower fd after 2,000 steps" in text
    exponent = float(text.split("fd follows GMACs^-")[1].split()[0])
    assert exponent == pytest.approx(0.4, abs=0.02)
    assert "for XL-2" in text.split("Held out:")[1].splitlines()[0]
    assert "inside the prediction interval" in text
    assert "| patch_size 4 | 4 |" in text
    assert "One seed" in text
    assert "(1.11 of the plan)" in text


def test_all_files_of_a_report_are_valid_and_agree(scaling, read_page, svg_text):
    study, results, path = scaling
    check_figures(path.parent / "figures", FIGURES)
    for name in FIGURES:
        assert f"](figures/{name}.png)" in path.read_text()
    html = (path.parent / "report.html").read_text()
    page = read_page(html)
    assert len(page.links) == len(FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|@import|url\(", html)
    text = svg_text((path.parent / "figures" / "compute.svg").read_bytes())
    assert {"S-4", "XL-2", "frontier", "fd (lower is better)"} <= set(text)
    rows = list(csv.DictReader((path.parent / "table.csv").open()))
    assert len(rows) == 8 * 4
    last, point = rows[-1], results[-1].points[-1]
    assert (last["member"], last["size"], last["patch_size"], last["step"]) == ("XL-2", "XL", "2", "2000")
    assert float(last["fd"]) == point.scores["fd"].value
    assert float(last["fd_high"]) == point.scores["fd"].high
    assert last["fd_fingerprint"] == point.scores["fd"].fingerprint
    assert float(last["training_flops"]) == point.flops
    sampling = list(csv.DictReader((path.parent / "sampling.csv").open()))
    assert len(sampling) == 8 * 3
    assert float(sampling[-1]["gmacs_per_image"]) == pytest.approx(64 * 1.2)
    law = scaling_law.read_law(path.parent)
    assert (law.metric, law.source, len(law.points)) == ("fd", study.question, 32)


def test_figures_are_reproducible(scaling):
    study, results, path = scaling
    figure = figures.against_compute(study, average_seeds(results, "fd"), "fd")
    assert figure.svg == (path.parent / "figures/compute.svg").read_bytes()


def test_members_that_end_at_equal_compute_are_rows(scaling, svg_text):
    study, results, _ = scaling
    ends = [replace(result, points=[replace(result.points[-1], flops=1e12)]) for result in results]
    settings = average_seeds(ends, "fd")
    figure = figures.against_compute(study, settings, "fd")
    assert "at 1e+12 training FLOPs each" in figure.caption
    text = svg_text(figure.svg)
    assert [line for line in text if line in {setting.name for setting in settings}] == [s.name for s in settings]
    assert "training FLOPs" not in " ".join(text)


@pytest.mark.parametrize(
    ("missing", "bars"),
    [
        ((), "means over seeds, bars from the lowest to the highest seed."),
        ((1, 2), "means over seeds, bars from the lowest to the highest seed, with one seed the metric's own 95 %"),
        (None, "one seed, bars the metric's own 95 % interval."),
    ],
)
def test_a_caption_states_what_the_bars_are(synthetic, missing, bars):
    """missing: the seeds that the first design does not have; None: all designs have one seed."""
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    first = next(iter(results[0].values.values()))
    remaining = [
        each
        for each in results
        if not (each.seed if missing is None else each.seed in missing and first in each.values.values())
    ]
    ends = [replace(each, points=[replace(each.points[-1], flops=1e12)]) for each in remaining]
    figure = figures.against_compute(study, average_seeds(ends, "fd"), "fd")
    assert bars in figure.caption


def test_a_comparison_names_the_best_design(synthetic, tmp_path):
    study = synthetic.design_study()
    text = report.write(study, synthetic.design_results(study), tmp_path).read_text()
    assert "At equal steps (1,000) adaln-zero has the best fd" in text
    assert "better at 95 %" in text
    assert "| cross-attention | 3 |" in text
    check_figures(tmp_path / "figures", {"comparison", "compute", "steps"})
    assert not (tmp_path / "law.json").exists()


def test_a_partial_study_names_what_is_missing(synthetic, tmp_path):
    study = synthetic.scaling_study(axes={"size": {size: {} for size in synthetic.SIZES}, "patch_size": {"2": {}}})
    results = synthetic.scaling_results(study)
    results[1] = replace(results[1], state="failed", error="out of memory\nand more", points=[], sampling_points=[])
    results[2] = replace(results[2], state="unfinished", points=results[2].points[:1], sampling_points=[])
    results[3] = replace(results[3], state="not started", points=[], sampling_points=[])
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "images.png").write_bytes(b"of an earlier report")
    (tmp_path / "law.json").write_text("of an earlier report")
    text = report.write(study, results, tmp_path).read_text()
    assert "1 of 4 members are done. Failed: B-2. Unfinished: L-2. Not started: XL-2." in text
    assert "- B-2 failed: out of memory\n" in text
    assert "at least 4 pairs, got 1" in text
    assert "No law: it needs at least 3 points, got 1." in text
    assert "no data yet for the figure “Samples”" in text
    assert "3 of 4 members are not done" in text
    assert not (tmp_path / "figures" / "images.png").exists()
    law = scaling_law.read_law(tmp_path)  # from the points that were scored so far
    assert {point.run for point in law.points} == {"S-2", "L-2"}


def test_a_study_without_a_law_names_the_best(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_figures", lambda *_: [])
    study = synthetic.scaling_study(law=None)
    text = report.write(study, synthetic.scaling_results(study), tmp_path).read_text()
    assert re.findall(r"^- Of size \w+, (\S+) has the best fd", text, re.MULTILINE) == ["S-2", "B-2", "L-2", "XL-2"]
    assert not (tmp_path / "law.json").exists()


def test_the_best_size_at_equal_compute_grows_as_the_numbers_do(synthetic, tmp_path, svg_text):
    """At 1e13 FLOPs the best size is below the smallest one; between the others it grows with the root of compute."""
    study = synthetic.equal_flops_study()
    text = report.write(study, synthetic.equal_flops_results(study), tmp_path).read_text()
    assert re.findall(r"At (\S+) training FLOPs (\S+) has the lowest fd", text) == [
        ("1e+13", "S"), ("1e+14", "B"), ("2e+14", "B"), ("1e+15", "L"),
    ]  # fmt: skip
    assert "the smallest size, so the best one may be smaller" in text
    assert [float(size) for size in re.findall(r"the minimum is at (\S+) GMACs", text)] == pytest.approx(
        [0.4 * flops**0.5 for flops in (0.1, 0.2, 1)], rel=0.02
    )
    assert re.search(r"The best GMACs follow compute\^0.50 .* samples compute\^0.50, by 3 minima", text)
    assert text.count("| 1e+14 | ") == 1
    check_figures(tmp_path / "figures", {"compute", "sizes", "steps"})
    assert {"1e+13", "1e+15", "fd (lower is better)"} <= set(svg_text((tmp_path / "figures/sizes.svg").read_bytes()))


def test_a_best_size_without_a_law_names_what_is_missing(synthetic, tmp_path):
    study = synthetic.equal_flops_study(marks={"flops": [1e13]})
    text = report.write(study, synthetic.equal_flops_results(study), tmp_path).read_text()
    assert "minimum between measured sizes at 1 of 2 training FLOPs, and a law needs 3" in text
    study = synthetic.equal_flops_study()
    text = report.write(study, synthetic.equal_flops_results(study, "authenticity"), tmp_path / "higher").read_text()
    assert "XL has the highest authenticity" in text
    assert "minimum" not in text.split("## Answer")[1].split("##")[0]


def test_a_study_that_has_not_started_has_a_report(synthetic, tmp_path):
    study = synthetic.design_study()
    results = [replace(result, state="not started", points=[]) for result in synthetic.design_results(study)]
    text = report.write(study, results, tmp_path).read_text()
    assert "0 of 9 members are done. Not started: in-context-seed0" in text
    assert "Nothing is scored yet" in text
    assert not (tmp_path / "figures").exists()


def test_scores_of_different_protocols_are_refused_by_name(synthetic, tmp_path):
    study = synthetic.scaling_study()
    results = synthetic.scaling_results(study)
    check_one_protocol(results)
    other = replace(results[5].points[0], scores={"fd": synthetic.score("fd", 3.0, features="ffff")})
    mixed = [*results[:5], replace(results[5], points=[other]), *results[6:]]
    with pytest.raises(TesseraError, match=r"S-4 \(.*\) and L-2 \(.*features.weights: abcd and ffff"):
        report.write(study, mixed, tmp_path)
    assert not list(tmp_path.iterdir())
    sampled = replace(
        results[5].sampling_points[0], scores={"fd": synthetic.score("fd", 3.0, steps=4, features="ffff")}
    )
    with pytest.raises(TesseraError, match="fd with other numbers of sampling steps: S-4"):
        check_one_protocol([*results[:5], replace(results[5], sampling_points=[sampled]), *results[6:]])


def test_seeds_are_averaged_at_the_steps_that_all_have(synthetic):
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    results[0] = replace(results[0], points=results[0].points[1:])  # in-context, seed 0, was not scored at 250
    averaged = average_seeds(results, "fd")
    assert [setting.name for setting in averaged] == ["in-context", "cross-attention", "adaln-zero"]
    assert [point.step for point in averaged[0].points] == [500, 1000]
    values = [result.points[-1].scores["fd"].value for result in results if result.values["design"] == "in-context"]
    score = averaged[0].points[-1].score
    assert (score.value, score.low, score.high) == pytest.approx((sum(values) / 3, min(values), max(values)))
    assert common_steps(averaged) == [500, 1000]
    assert final_points(averaged, "gmacs").x == [0.1, 0.12, 0.1]
    assert final_points(averaged, "flops").x == [setting.points[-1].flops for setting in averaged]


def test_scores_that_are_not_finite_are_left_out(synthetic):
    study = synthetic.design_study(seeds=[0])
    results = synthetic.design_results(study)
    not_finite = replace(results[0].points[-1], scores={"fd": synthetic.score("fd", float("nan"))})
    results[0] = replace(results[0], points=[*results[0].points[:-1], not_finite])
    assert [point.step for point in average_seeds(results, "fd")[0].points] == [250, 500]
