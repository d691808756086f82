"""The report of a run: progress, diagnostics, curves, samples, measurements of the network, settings, environment.

`RUN/report.html` is made from the files of a run, during the training or after it. What was not recorded is left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import PydanticUndefined, to_jsonable_python

from tessera import __version__, bundle, images
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.monitoring.health import BINS
from tessera.monitoring.logger import HEALTH, LOG, read_log
from tessera.monitoring.spikes import SKIPPED_STEPS
from tessera.reporting.document import (
    Block,
    Details,
    Document,
    Facts,
    Figure,
    Heading,
    Images,
    Notice,
    Paragraph,
    Table,
)
from tessera.reporting.figures import COLORS, Line, Scale, heat_map, is_finite, line_chart
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.reporting.text import format_duration, format_number
from tessera.settings import Settings, flatten, read_yaml, validate

REPORT, RECIPE, SAMPLES, SKIPPED_SAMPLES = "report.html", "recipe.yaml", "samples", "skipped_samples.txt"
MAX_GRIDS = 12  # of samples, the first and the last among them
GRID_WIDTH = 640  # pixels
MAX_ROWS = 30  # of a long list
SMOOTHING = 40  # a smoothed line is a moving mean over one fortieth of the records

Record = dict[str, Any]


def write(run: Path, recipe_type: type[Settings], target: Path | None = None) -> Path:
    """Write the report of a run to target, by default RUN/report.html, and return its path.

    recipe_type: the settings class of recipes, for defaults and descriptions. Raises TesseraError if the folder holds
    no run or the page cannot be written.
    """
    target = target or run / REPORT
    atomic_write(target, build_report(run, recipe_type).html())
    return target


def build_report(run: Path, recipe_type: type[Settings]) -> Document:
    """The report of a run. Raises TesseraError if the folder holds no run."""
    if not (run / RECIPE).exists():
        raise TesseraError(
            f"{run} holds no run: there is no {RECIPE} in it. Give the folder that `tessera train` writes, "
            "which is the `run_dir` of its recipe"
        )
    recipe = read_yaml(run / RECIPE)
    log, health = _records(run, LOG), _records(run, HEALTH)
    steps = [record for record in log if "loss" in record]
    sections = {
        "Diagnostics": _diagnostics(run),
        "Curves": _curves(recipe, steps, log),
        "Samples": _samples(run),
        "Internals": _internals(health),
        "Skipped batches": _skipped(run),
        "Environment": _environment(run),
        "Settings": _settings(recipe, recipe_type),
    }
    blocks = [*_progress(run, recipe, steps, log)]
    for title, section in sections.items():
        blocks += [Heading(title), *section]
    return Document(f"Run {run.resolve().name}", blocks)


# Records


def _records(run: Path, name: str) -> list[Record]:
    """The records of one file of a run that belong to a step."""
    return [
        record for record in read_log(run, name) if isinstance(record, dict) and _number(record, "step") is not None
    ]


def _number(record: Any, key: str | int) -> float | None:
    """A finite number from a record or a list, or None."""
    try:
        value = record[key]
    except (KeyError, IndexError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value) else None


def _get(nested: Any, *keys: str) -> Any:
    """A value from nested mappings, or None."""
    for key in keys:
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def _line(label: str, records: Sequence[Record], key: str = "", factor: float = 1, **options: Any) -> Line:
    values = [_number(record, key or label) for record in records]
    scaled = [None if value is None else value * factor for value in values]
    return Line(label, [record["step"] for record in records], scaled, **options)


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """The moving mean; None where the window holds no number."""
    if not values:
        return []
    window = np.ones(2 * (len(values) // SMOOTHING // 2) + 1)
    numbers = np.array([np.nan if value is None else value for value in values])
    sums = np.convolve(np.nan_to_num(numbers), window, "same")
    counts = np.convolve(np.isfinite(numbers), window, "same")
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.round().tolist())]


def _increases(records: Sequence[Record], key: str) -> list[float]:
    """The steps at which a counter had grown."""
    steps, previous = [], 0.0
    for record in records:
        if (count := _number(record, key)) is not None:
            steps += [record["step"]] if count > previous else []
            previous = count
    return steps


def _score_lines(log: Sequence[Record]) -> dict[str, Line]:
    """Evaluation scores by metric, with their intervals."""
    names = dict.fromkeys(key.removesuffix("_low") for record in log for key in record if key.endswith("_low"))
    lines = {}
    for name in names:
        records = [record for record in log if name in record and f"{name}_high" in record]
        low, high = ([_number(record, f"{name}_{end}") for record in records] for end in ("low", "high"))
        lines[name.replace("_", " ")] = _line(name, records, low=low, high=high)
    return lines


# Sections


def _progress(run: Path, recipe: Record, steps: Sequence[Record], log: Sequence[Record]) -> Iterator[Block]:
    written = f"Report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by Tessera {__version__}."
    if not steps:
        yield Paragraph(f"No step is recorded yet. {written}")
        return
    planned = _get(recipe, "training", "steps")
    step = int(steps[-1]["step"])
    state = "All steps are done" if planned and step >= planned else "Not all steps are done"
    changed = datetime.fromtimestamp((run / LOG).stat().st_mtime, UTC)
    yield Paragraph(f"{state}. Last record {changed:%Y-%m-%d %H:%M} UTC. {written}")
    spent, left = _times(recipe, steps)
    loss = _smooth([_number(record, "loss") for record in steps])[-1]
    facts = [
        ("steps", f"{step:,}" + (f" of {planned:,}" if planned else ""), ""),
        ("time in steps", format_duration(spent), f"about {format_duration(left)} left" if left else ""),
        ("loss", "not a number" if loss is None else f"{loss:.4g}", "moving mean"),
    ]
    for metric, line in [*_score_lines(log).items()][:1]:  # the first metric selects the best checkpoint
        pairs = [(value, step) for step, value in zip(line.steps, line.values) if value is not None]
        if pairs:
            best, at = (max if metric in HIGHER_IS_BETTER else min)(pairs, key=lambda pair: pair[0])
            facts.append((metric, format_number(pairs[-1][0]), f"best {format_number(best)} at step {at:,}"))
    for key, label, shape in (
        ("images_per_second", "images/s", format_number),
        ("mfu", "MFU", "{:.1%}".format),
        ("rollbacks", "rollbacks", "{:,.0f}".format),
        ("skipped_steps", "skipped steps", "{:,.0f}".format),
        ("invalid_samples", "invalid samples", "{:,.0f}".format),
    ):
        value = next((value for record in reversed(steps) if (value := _number(record, key)) is not None), None)
        if value is not None:
            facts.append((label, shape(value), ""))
    yield Facts(facts)


def _times(recipe: Record, steps: Sequence[Record]) -> tuple[float, float]:
    """Seconds spent in steps, from the recorded images per second, and seconds left at the latest speed."""
    batch_size = _get(recipe, "training", "global_batch_size") or 0
    spent, previous, step_time = 0.0, 0.0, 0.0
    for record in steps:
        if speed := _number(record, "images_per_second"):
            step_time = batch_size / speed
            spent += (record["step"] - previous) * step_time
        previous = record["step"]
    return spent, max((_get(recipe, "training", "steps") or 0) - previous, 0) * step_time


def _diagnostics(run: Path) -> Iterator[Block]:
    from tessera.monitoring.doctor import diagnose

    try:
        findings = diagnose(run)
    except TesseraError as error:  # of another version; the report still has the rest
        yield Paragraph(f"`tessera doctor` cannot read this run: {error}")
        return
    if not findings:
        yield Paragraph("No findings.")
    for finding in findings:
        yield Notice(finding.severity, finding.what, [Paragraph(finding.evidence), Paragraph(finding.change)])


CURVES: list[tuple[str, str, Scale, dict[str, str], float]] = [  # title, unit, scale, {label: key}, factor
    ("Parts of the loss", "mse and variational bound", "log", {"mse": "mse", "vb": "vb"}, 1),
    ("Steps clipped", "% of the steps", "from zero", {"clipped": "clipped"}, 100),
    ("Learning rate", "", "linear", {"learning rate": "learning_rate"}, 1),
    ("Speed", "images/s", "from zero", {"images/s": "images_per_second"}, 1),
    ("MFU", "% of the peak of the device", "from zero", {"MFU": "mfu"}, 100),
    ("Waiting for data", "% of the time", "from zero", {"waiting": "data_wait"}, 100),
    ("Memory", "GiB, peak of a device", "from zero", {"memory": "memory"}, 2**-30),
]
HEALTH_CURVES: list[tuple[str, str, Scale, dict[str, str], float]] = [
    ("Fixed probe batch", "mse", "log",
     {"weights": "loss_probe", "EMA": "loss_ema", "wrong labels": "loss_wrong_labels",
      "wrong captions": "loss_wrong_captions", "wrong controls": "loss_wrong_controls"}, 1),
    ("Cost of a wrong condition", "% of the loss", "linear",
     {"label": "cost_wrong_labels", "caption": "cost_wrong_captions", "control": "cost_wrong_controls"}, 100),
    ("Change of the output with a wrong condition", "% of its rms", "from zero",
     {"label": "change_wrong_labels", "caption": "change_wrong_captions", "control": "change_wrong_controls"}, 100),
    ("Norm of the conditioning vectors", "", "log", {"time": "norm_time", "label": "norm_labels"}, 1),
    ("EMA distance", "% of the norm of the weights", "linear", {"distance": "ema_distance"}, 100),
    ("Patches that hardly vary", "% of tokens", "linear", {"output": "dead_patches", "data": "still_patches"}, 100),
    ("Network input", "", "linear",
     {"mean": "data_mean", "standard deviation": "data_std", "between samples": "data_spread"}, 1),
]  # fmt: skip
MAPS: list[tuple[str, str, Scale]] = [  # lists by block in a health record
    ("attention_logits", "largest magnitude", "log"),
    ("activations", "rms of the tokens", "log"),
    ("gates", "rms", "linear"),
    ("scales", "rms", "linear"),
]


def _charts(figures: Iterable[Figure | None], otherwise: str) -> Iterator[Block]:
    available = [figure for figure in figures if figure is not None]
    yield Images(available) if available else Paragraph(otherwise)


def _curves(recipe: Record, steps: Sequence[Record], log: Sequence[Record]) -> Iterator[Block]:
    events = [("rollback", _increases(steps, "rollbacks")), ("skipped step", _increases(steps, "skipped_steps"))]
    raw = _line("loss", steps, faint=True, color=COLORS[0])
    smooth = Line("loss", raw.steps, _smooth(raw.values), color=COLORS[0])
    clip = _get(recipe, "training", "optimizer", "grad_clip_norm")
    levels = [(f"clip {format_number(clip)}", float(clip))] if isinstance(clip, int | float) else []
    norm = _line("grad_norm", steps)
    figures = [line_chart("Loss", [raw, smooth], "", "log", marks=events)]
    figures.append(line_chart("Gradient norm", [norm], "before clipping", "log", levels, events))
    for metric, line in _score_lines(log).items():
        values = [value for value in (*line.values, *line.low) if value is not None]
        scale: Scale = "log" if values and min(values) > 0 and max(values) > 10 * min(values) else "linear"
        figures.append(line_chart(metric, [line], "with its 95 % interval", scale))
    for title, unit, scale, keys, factor in CURVES:
        lines = [_line(label, steps, key, factor) for label, key in keys.items()]
        figures.append(line_chart(title, lines, unit, scale))
    yield from _charts(figures, "There are no records to plot yet.")


def _samples(run: Path) -> Iterator[Block]:
    paths = sorted((run / SAMPLES).glob("step-*.png"))
    figures = []
    for index in np.unique(np.linspace(0, len(paths) - 1, min(MAX_GRIDS, len(paths))).round().astype(int)):
        step = paths[index].stem.removeprefix("step-").lstrip("0") or "0"
        try:
            figures.append(
                Figure(images.limit_width(paths[index], GRID_WIDTH), f"step {step}", alt=f"samples, step {step}")
            )
        except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
            continue
    if not figures:
        yield Paragraph("There is no grid of samples yet.")
        return
    if len(paths) > len(figures):
        yield Paragraph(f"{len(figures)} of {len(paths)} grids, all from the same seeds.")
    yield Images(figures)


def _internals(health: Sequence[Record]) -> Iterator[Block]:
    steps = [record["step"] for record in health]
    by_timestep = []
    for index in range(BINS):
        losses = [_number(record.get("loss_by_timestep"), index) for record in health]
        shade = 0.15 + 0.6 * index / (BINS - 1)  # from blue, near the data, to red, near the noise
        by_timestep.append(Line(f"t≥{index / BINS:g}", steps, _smooth(losses), color=(shade, 0.3, 1 - shade)))
    unit = "mse in tenths of the time from 0, data, to 1, noise"
    figures = [line_chart("Loss by timestep", by_timestep, unit, "log")]
    for title, unit, scale, keys, factor in HEALTH_CURVES:
        lines = [_line(label, health, key, factor) for label, key in keys.items()]
        figures.append(line_chart(title, lines, unit, scale))
    norms = [record["grad_norms"] if isinstance(record.get("grad_norms"), dict) else {} for record in health]
    groups = list(dict.fromkeys(group for record in norms for group in record))
    values = [[_number(record, group) for group in groups] for record in norms]
    figures.append(heat_map("Gradient norm by part", groups, steps, values, "before clipping", "log"))
    errors = [record.get("average_velocity_error") or {} for record in health]
    if any(errors):  # of a student
        names = dict.fromkeys(name for record in errors for name in record)
        lines = [Line(name, steps, [_number(record, name) for record in errors]) for name in names]
        unit = "squared, relative to the teacher's, by the times of the step"
        figures.append(line_chart("Error of the average velocity", lines, unit, "log"))
    for key, unit, scale in MAPS:
        records = [record for record in health if isinstance(record.get(key), list)]
        blocks = range(max((len(record[key]) for record in records), default=0))
        values = [[_number(record[key], block) for block in blocks] for record in records]
        title = f"{key.replace('_', ' ').capitalize()} by block"
        figures.append(
            heat_map(title, [*map(str, blocks)], [record["step"] for record in records], values, unit, scale)
        )
    yield from _charts(figures, "This run has no health.jsonl. Set training.health_every to record these measurements.")


def _skipped(run: Path) -> Iterator[Block]:
    batches = _records(run, SKIPPED_STEPS)
    path = run / SKIPPED_SAMPLES
    invalid = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if not batches and not invalid:
        yield Paragraph("None: every batch was trained on and every image could be read.")
    if batches:
        head = list(dict.fromkeys(key for record in batches for key in record))
        outcomes = Counter(str(record.get("outcome", "skipped")) for record in batches)
        note = f"; the last {MAX_ROWS} are listed" if len(batches) > MAX_ROWS else ""
        yield Paragraph(f"Batches {', '.join(f'{name}: {count:,}' for name, count in outcomes.items())}{note}.")
        rows = [[_text(record.get(key)) for key in head] for record in batches[-MAX_ROWS:]]
        yield Table(rows, [key.replace("_", " ") for key in head])
    if invalid:
        reasons = Counter(line.partition("\t")[2] or "unknown" for line in invalid)
        yield Paragraph(f"Images that could not be used: {len(invalid):,}.")
        yield Table([(f"{count:,}", reason) for reason, count in reasons.most_common(MAX_ROWS)], ("images", "reason"))
        names = [(line.partition("\t")[0],) for line in invalid[:MAX_ROWS]]
        more = [(f"and {len(invalid) - MAX_ROWS:,} more",)] if len(invalid) > MAX_ROWS else []
        yield Details("Names of these images", [Table([*names, *more])])


def _text(value: Any) -> str:
    """A value of a record, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return format_number(value) if isinstance(value, float) else "" if value is None else str(value)


def _environment(run: Path) -> Iterator[Block]:
    for checkpoint in bundle.checkpoints(run):
        try:
            facts = bundle.load_config(checkpoint).provenance.facts()
        except TesseraError:  # damaged, or of another version
            continue
        yield Table([(name, _text(value)) for name, value in facts.items()])
        return
    yield Paragraph("There is no checkpoint yet. Hardware and versions are recorded in checkpoints.")


# Settings


def _settings(data: Record, recipe_type: type[Settings]) -> Iterator[Block]:
    try:
        recipe = validate(recipe_type, data, "recipe")
    except TesseraError:  # of another version
        yield Paragraph(
            "This version of Tessera cannot read all of these settings, so they are not compared with defaults."
        )
        yield Table([(name, _yaml(value)) for name, value in flatten(data).items()], ("setting", "value"))
        return
    rows = [*_compare(recipe, PydanticUndefined)]
    changed = [row for row in rows if row[2] is not PydanticUndefined and row[1] != row[2]]
    if changed:
        yield Paragraph("Settings that differ from their defaults:")
        yield Table(
            [(name, _yaml(value), _yaml(default)) for name, value, default, _ in changed],
            ("setting", "value", "default"),
        )
    else:
        yield Paragraph("All settings have their default values.")
    every = Table([(name, _yaml(value), about) for name, value, _, about in rows], ("setting", "value", "meaning"))
    yield Details("All settings", [every])


def _compare(settings: Settings, defaults: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Dotted name, value, default and description of every setting; PydanticUndefined where there is no default.

    defaults: the settings that would be used if the recipe did not set these. If their kind differs, each setting is
    compared with the defaults of its own kind.
    """
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if type(defaults) is type(settings) or (name == "kind" and isinstance(defaults, Settings)):
            default = getattr(defaults, name, PydanticUndefined)
        else:
            default = field.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            yield from _compare(value, default, f"{prefix}{name}.")
        else:
            default = default if default is PydanticUndefined else to_jsonable_python(default)
            yield prefix + name, to_jsonable_python(value), default, field.description or ""


def _yaml(value: Any) -> str:
    """A value as it stands in a recipe."""
    return value if isinstance(value, str) else json.dumps(to_jsonable_python(value), ensure_ascii=False)
