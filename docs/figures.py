"""The figures of docs/studies and of benchmarks/tune.md, made again from the tables that stand beside them.

    python docs/figures.py              # writes the PNG files

Grids of samples are not in the tables: `tessera study` makes them.
"""

import csv
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tessera.files import atomic_write
from tessera.reporting.estimates import Estimate
from tessera.reporting.figures import COLORS, encode, new_figure, set_log_scale, style
from tessera.studies import figures
from tessera.studies.results import MemberResult, SamplingPoint, TrainingPoint
from tessera.studies.seed_aggregation import average_seeds
from tessera.studies.study import Study, read_study

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs/studies"
STUDY_METRICS = {
    "scaling": "fd",
    "iso-flops": "fd",
    "blocks": "fd",
    "unet": "fd",
    "unet-latents": "fd",
    "text": "alignment",
    "temporal": "law_occluded",
}
PLOTS = (
    figures.against_compute,
    figures.by_size,
    figures.against_gmacs,
    figures.over_steps,
    figures.sampling_compute,
    figures.comparison,
)
NUMBER = r"-?[\d.]+"
TRIAL = re.compile(  # settings, calls, seconds, speedup, FD
    rf"\| (.+?) \| {NUMBER} \| ({NUMBER}) \| \**{NUMBER}\** \| ({NUMBER}) \(({NUMBER}) to ({NUMBER})\) \|"
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def score(row: dict[str, str], metric: str) -> dict[str, Estimate]:
    """The main metric of a row of a table."""
    return {metric: Estimate(*(float(row[metric + end]) for end in ("", "_low", "_high")))}


def results(study: Study, name: str) -> list[MemberResult]:
    """The members of a study, from its tables."""
    metric, path = STUDY_METRICS[name], STUDIES / f"{name}-sampling.csv"
    sampled = rows(path) if path.exists() else []
    members = []
    for member, group in groupby(rows(STUDIES / f"{name}.csv"), key=lambda row: row["member"]):
        points = list(group)
        first = points[0]
        members.append(
            MemberResult(
                name=member,
                values={axis: first[axis] for axis in study.axes},
                seed=int(first["seed"]),
                state="done",
                error=None,
                parameters=int(first["parameters"]),
                macs=float(first["gmacs"]) * 1e9,
                planned_seconds=0.0,
                points=[
                    TrainingPoint(
                        int(row["step"]),
                        int(row["samples"]),
                        float(row["training_flops"]),
                        float(row["seconds"]),
                        score(row, metric),  # pyright: ignore[reportArgumentType]
                    )
                    for row in points
                ],
                sampling_points=[
                    SamplingPoint(
                        int(row["sampling_steps"]),
                        float(row["gmacs_per_image"]) * 1e9,
                        score(row, metric),  # pyright: ignore[reportArgumentType]
                    )
                    for row in sampled
                    if row["member"] == member
                ],
                sample_grid=None,
            )
        )
    return members


def study_figures(name: str) -> Iterator[figures.StudyFigure]:
    """The figures of a study that its page shows and that can be made from its tables."""
    page = (STUDIES / f"{name}.md").read_text(encoding="utf-8")
    study = read_study(ROOT / f"recipes/studies/{name}.yaml")
    settings = average_seeds(results(study, name), STUDY_METRICS[name])
    for plot in PLOTS:
        figure = plot(study, settings, STUDY_METRICS[name])
        if figure is not None and f"figures/{name}/{figure.name}.png" in page:
            yield figure


def trials() -> list[tuple[str, float, Estimate]]:
    """The rows of benchmarks/tune.md: settings, seconds per image and FD."""
    text = (ROOT / "benchmarks/tune.md").read_text(encoding="utf-8")
    return [
        (name.strip("*"), float(seconds), Estimate(float(value), float(low), float(high)))
        for name, seconds, value, low, high in TRIAL.findall(text)
    ]


def tuning_figure() -> bytes:
    """FD against seconds per image of the final comparison, as PNG."""
    (baseline, *finalists) = trials()
    with style():
        figure = new_figure(7.0, 3.2)
        axes = figure.subplots()
        axes.axhspan(baseline[2].low, baseline[2].high, color="0.93", zorder=0)
        for number, (name, seconds, fd) in enumerate([baseline, *finalists]):
            color = "0.15" if number == 0 else COLORS[number - 1]
            axes.vlines(seconds, fd.low, fd.high, color=color, linewidth=1.2, alpha=0.6)
            marker = "*" if number == 0 else figures.MARKERS[number - 1]
            size = 13 if number == 0 else 7
            axes.plot(seconds, fd.value, marker, color=color, markersize=size, markeredgecolor="white", label=name)
        axes.set(xlabel="seconds per image", ylabel="fd (lower is better)", ylim=(0, None))
        times = [seconds for _, seconds, _ in (baseline, *finalists)]
        set_log_scale(axes.xaxis, min(times) / 1.3, max(times) * 1.3)
        figure.legend(loc="outside lower left", fontsize=8, handlelength=1.2)
        return encode(figure, "png")


def main() -> None:
    for name in STUDY_METRICS:
        for figure in study_figures(name):
            path = STUDIES / "figures" / name / f"{figure.name}.png"
            atomic_write(path, figure.png)
            print(path.relative_to(ROOT))
    atomic_write(ROOT / "docs/figures/tune.png", tuning_figure())
    print("docs/figures/tune.png")


if __name__ == "__main__":
    main()
