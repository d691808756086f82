"""A run as one page: where it stands, its curves, what it draws, how it is inside, what it was told to do.

`RUN/report.html` needs nothing beside it. It is made from the files a run leaves, while it goes on or afterwards; what
a run did not write down is left out, and the page says so.
"""

import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from tessera import __version__, bundle, images
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.monitoring.health import BINS
from tessera.monitoring.logger import HEALTH, LOG, format_duration, read_log
from tessera.monitoring.spikes import SKIPPED_STEPS
from tessera.reporting import charts
from tessera.reporting import page as page_html
from tessera.reporting.charts import Line, StepMarks, heat_map, line_chart, ramp, short
from tessera.settings import Settings, flat, read_yaml, validate
from tessera.training import scores
from tessera.training.recipe import Recipe
from tessera.training.run import RECIPE, SAMPLES, SKIPPED

REPORT = "report.html"
GRIDS = 12  # sample grids shown at most, the first and the last among them
GRID_WIDTH = 640  # pixels
LISTED = 30  # lines of a long list
SMOOTHED = 40  # a smoothed line is the mean over this part of the run: one fortieth

Record = dict[str, Any]


def write(run: Path, target: Path | None = None) -> Path:
    """Write the page of a run, to RUN/report.html if no target is given, and return where it is.

    Raises TesseraError if the folder holds no run or the page cannot be written.
    """
    target = target or run / REPORT
    atomic_write(target, page(run))
    return target


def page(run: Path) -> str:
    """The page of a run as HTML. Raises TesseraError if the folder holds no run."""
    if not (run / RECIPE).exists():
        raise TesseraError(
            f"{run} holds no run: there is no {RECIPE} in it. Give the folder that `tessera train` writes, "
            "which is the `output` of its recipe"
        )
    told = read_yaml(run / RECIPE)
    log, health = _records(run, LOG), _records(run, HEALTH)
    steps = [record for record in log if "loss" in record]
    parts = (
        _head(run, told, steps, log),
        _section("What the doctor says", _doctor(run)),
        _section("Curves", _curves(told, steps, log)),
        _section("What it draws", _samples(run)),
        _section("Inside the network", _health(health)),
        _section("What was passed over", _passed(run)),
        _section("Where it was made", _origin(run)),
        _section("Settings", _settings(told)),
    )
    name = run.resolve().name
    return page_html.document(f"{name}: a Tessera run", "\n".join(parts), charts.STYLE + _STYLE)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>"


def _said(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _charts(drawn: Sequence[str], otherwise: str) -> str:
    """Those charts that have something to show, or a sentence."""
    shown = "\n".join(filter(None, drawn))
    return f'<div class="charts">{shown}</div>' if shown else _said(otherwise)


# Reading


def _records(run: Path, name: str) -> list[Record]:
    """The records of one of a run's files, those that are of a step."""
    return [told for told in read_log(run, name) if isinstance(told, dict) and _number(told, "step") is not None]


def _number(record: Record, name: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _place(told: Record, *names: str) -> Any:
    """A value out of nested mappings, or None."""
    found: Any = told
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _line(name: str, records: Sequence[Record], key: str = "", factor: float = 1, **look: Any) -> Line:
    values = [_number(record, key or name) for record in records]
    scaled = [None if value is None else value * factor for value in values]
    return Line(name, [record["step"] for record in records], scaled, **look)


def _last(records: Sequence[Record], name: str) -> float | None:
    return next((value for record in reversed(records) if (value := _number(record, name)) is not None), None)


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Each number as the mean of those around it; the ends see fewer."""
    reach = len(values) // SMOOTHED // 2
    near = ([v for v in values[max(0, i - reach) : i + reach + 1] if v is not None] for i in range(len(values)))
    return [sum(told) / len(told) if told else None for told in near]


def _rises(records: Sequence[Record], name: str) -> list[float]:
    """The steps at which a count had grown."""
    found, before = [], 0.0
    for record in records:
        if (count := _number(record, name)) is not None:
            found += [record["step"]] if count > before else []
            before = count
    return found


# The head


def _head(run: Path, told: Record, steps: Sequence[Record], log: Sequence[Record]) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"<h1>{html.escape(run.resolve().name)}</h1>"
    planned = _place(told, "training", "steps")
    if not steps:
        return title + _said(f"No step is written down yet. Page of {written}, by Tessera {__version__}.")
    done = int(steps[-1]["step"])
    changed = datetime.fromtimestamp((run / LOG).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    spent, left = _times(told, steps)
    state = "All steps are done" if planned and done >= planned else "Not all steps are done"
    tiles = [("steps", f"{done:,}" + (f" of {planned:,}" if planned else ""), "")]
    tiles.append(("time in steps", format_duration(spent), f"about {format_duration(left)} left" if left else ""))
    loss = _smoothed([_number(record, "loss") for record in steps])[-1]
    tiles.append(("loss now", "not a number" if loss is None else f"{loss:.4g}", ""))
    if (speed := _last(steps, "images_per_second")) is not None:
        tiles.append(("images/s", short(speed), ""))
    if (used := _last(steps, "utilisation")) is not None:
        tiles.append(("utilisation", f"{used:.1%}", "of the device's peak"))
    for metric, line in _scored(log).items():
        better = max if metric in scores.HIGHER else min
        pairs = [(value, step) for step, value in zip(line.steps, line.values) if value is not None]
        if pairs:
            best, at = better(pairs, key=lambda pair: pair[0])
            tiles.append((metric, short(pairs[-1][0]), f"best {short(best)} at step {at:,}"))
        break  # the first decides
    for name, word in (("rollbacks", "rollbacks"), ("kept_out", "skipped steps"), ("skipped", "unusable images")):
        if (count := _last(steps, name)) is not None:
            tiles.append((word, f"{count:,.0f}", ""))
    drawn = "".join(
        f"<div><small>{html.escape(name)}</small><b>{html.escape(value)}</b><small>{html.escape(more)}</small></div>"
        for name, value, more in tiles
    )
    share = min(done / planned, 1.0) if planned else 1.0
    bar = f'<div class="bar"><div style="width:{share:.2%}"></div></div>'
    said = _said(f"{state}. Last record {changed}; page of {written}, by Tessera {__version__}.")
    return f'{title}{said}{bar}<div class="tiles">{drawn}</div>'


def _times(told: Record, steps: Sequence[Record]) -> tuple[float, float]:
    """Seconds spent in steps, by the images a second that were written down, and those left at the latest speed."""
    batch = _place(told, "training", "global_batch_size") or 0
    spent, before, latest = 0.0, 0.0, 0.0
    for record in steps:
        if speed := _number(record, "images_per_second"):
            latest = batch / speed
            spent += (record["step"] - before) * latest
        before = record["step"]
    return spent, max((_place(told, "training", "steps") or 0) - before, 0) * latest


# The doctor


def _doctor(run: Path) -> str:
    from tessera.monitoring.doctor import diagnose

    try:
        findings = sorted(diagnose(run), key=lambda finding: finding.severity != "wrong")
    except TesseraError as error:  # of another Tessera: the page shows what it can
        return _said(f"The doctor cannot read this run: {error}")
    if not findings:
        return _said("Nothing to remark.")
    return "".join(
        f'<div class="finding {"wrong" if finding.severity == "wrong" else "watch"}">'
        f"<p><b>{html.escape(finding.what)}</b> <small>{html.escape(finding.severity)}</small></p>"
        f"<p>{html.escape(finding.evidence)}</p><p>{html.escape(finding.change)}</p></div>"
        for finding in findings
    )


# Curves


def _curves(told: Record, steps: Sequence[Record], log: Sequence[Record]) -> str:
    happened = [StepMarks("rollback", _rises(steps, "rollbacks")), StepMarks("skipped step", _rises(steps, "kept_out"))]
    raw = _line("loss", steps)
    smooth = Line("loss", raw.steps, _smoothed(raw.values))
    behind = [Line("each record", raw.steps, raw.values, look="faint", colour="var(--c0)")]
    clip = _place(told, "training", "optimizer", "grad_clip_norm")
    levels = [(f"clip {short(clip)}", float(clip))] if isinstance(clip, int | float) else []
    clipped = [_line("clipped", steps, factor=100)] if levels else []
    norm = _line("norm", steps, "gradient_norm")
    bound = [_line("mse", steps), _line("vb", steps)] if any("vb" in record for record in steps) else []
    drawn = [
        line_chart("Loss", [*(behind if smooth.values != raw.values else []), smooth], "", "log", marks=happened),
        line_chart("Parts of the loss", bound, "mse and variational bound", "log"),
        line_chart("Gradient norm", [norm], "before clipping", "log", levels, happened),
        line_chart("Steps clipped", clipped, "% of the steps", "from zero"),
        line_chart("Learning rate", [_line("learning rate", steps, "learning_rate")]),
        *(
            line_chart(metric, [line], "with its 95 % interval", "log" if _wide(line) else "linear")
            for metric, line in _scored(log).items()
        ),
        line_chart("Speed", [_line("images a second", steps, "images_per_second")], "images/s", "from zero"),
        line_chart("Utilisation", [_line("used", steps, "utilisation", 100)], "% of the device's peak", "from zero"),
        line_chart("Waiting for data", [_line("waiting", steps, "stalled", 100)], "% of the time", "from zero"),
        line_chart("Memory", [_line("peak", steps, "memory", 2**-30)], "GiB at most on a device", "from zero"),
    ]
    return _charts(drawn, "There are no records to draw curves from yet.")


def _wide(line: Line) -> bool:
    """Whether numbers are better shown by their logarithms."""
    told = [value for value in (*line.values, *line.low) if value is not None]
    return bool(told) and min(told) > 0 and max(told) > 10 * min(told)


def _scored(log: Sequence[Record]) -> dict[str, Line]:
    """Evaluation scores by metric, with the ends of their intervals."""
    names = dict.fromkeys(name.removesuffix("_low") for record in log for name in record if name.endswith("_low"))
    found = {}
    for name in names:
        records = [record for record in log if name in record and f"{name}_high" in record]
        low, high = ([_number(record, f"{name}_{end}") for record in records] for end in ("low", "high"))
        found[name.replace("_", " ")] = _line(name, records, low=low, high=high)
    return found


# What it draws


def _samples(run: Path) -> str:
    grids = sorted((run / SAMPLES).glob("step-*.png"))
    count = min(GRIDS, len(grids))
    chosen = sorted({round(index * (len(grids) - 1) / max(count - 1, 1)) for index in range(count)})
    shown = []
    for path in (grids[index] for index in chosen):
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        try:
            shown.append(page_html.picture(images.limit_width(path, GRID_WIDTH), f"step {step}"))
        except (OSError, ValueError, SyntaxError):  # Pillow's word for a broken PNG
            continue
    if not shown:
        return _said("No grid of samples was drawn yet.")
    many = _said(f"{len(shown)} of {len(grids)} grids, from the same seeds.") if len(grids) > len(shown) else ""
    return f'{many}<div class="grids">{"".join(shown)}</div>'


# Health


def _health(health: Sequence[Record]) -> str:
    by_time = [
        Line(
            f"{n / BINS:g}",
            [record["step"] for record in health],
            _smoothed([_entry(record, "loss_by_time", n) for record in health]),
            colour=ramp(0.25 + 0.6 * n / (BINS - 1)),
        )
        for n in range(BINS)
    ]
    steps = [record["step"] for record in health]
    norms = [record.get("gradient_norms") for record in health]
    groups = list(dict.fromkeys(name for told in norms if isinstance(told, dict) for name in told))
    by_group = [[_number(told, name) if isinstance(told, dict) else None for name in groups] for told in norms]
    probe = [("weights", "loss_probe"), ("EMA", "loss_ema"), ("told wrong labels", "loss_wrong_labels")]
    data = [("mean", "data_mean"), ("deviation", "data_std"), ("between samples", "data_spread")]
    places = [("output", "dead_patches"), ("data", "still_patches")]
    tenths = "each line is a tenth of the times, from the number beside it"
    drawn = [
        line_chart("Loss by time", by_time, "mse; time from 0, data, to 1, noise", "log", about=tenths),
        line_chart("The same probe each time", [_line(name, health, key) for name, key in probe], "mse", "log"),
        line_chart("EMA away from the weights", [_line("distance", health, "ema_distance", 100)], "% of their norm"),
        line_chart("Places that hardly vary", [_line(name, health, key, 100) for name, key in places], "% of tokens"),
        line_chart("What the network sees", [_line(name, health, key) for name, key in data]),
        heat_map("Gradient norm by part", groups, steps, by_group, "before clipping", "log"),
        _by_depth("Attention logits by block", health, "attention_logits", "largest in magnitude", "log"),
        _by_depth("Activations by block", health, "activations", "rms of the tokens", "log"),
        _by_depth("Gates by block", health, "gates", "rms", "linear"),
        _by_depth("Scales by block", health, "scales", "rms", "linear"),
    ]
    return _charts(drawn, "This run wrote no health.jsonl: training.health_every asks for it.")


def _entry(record: Record, name: str, index: int) -> float | None:
    told = record.get(name)
    return _number({"": told[index]}, "") if isinstance(told, list) and index < len(told) else None


def _by_depth(title: str, health: Sequence[Record], name: str, unit: str, scale: charts.Scale) -> str:
    records = [record for record in health if isinstance(record.get(name), list)]
    depth = max((len(record[name]) for record in records), default=0)
    values = [[_entry(record, name, block) for block in range(depth)] for record in records]
    rows = [str(block) for block in range(depth)]
    return heat_map(title, rows, [record["step"] for record in records], values, unit, scale)


# What was passed over


def _passed(run: Path) -> str:
    batches = _records(run, SKIPPED_STEPS)
    path = run / SKIPPED
    images = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if not batches and not images:
        return _said("Nothing: every batch was learned from, every image could be used.")
    body = ""
    if batches:
        head = list(dict.fromkeys(name for record in batches for name in record))
        rows = [[_text(record.get(name)) for name in head] for record in batches[-LISTED:]]
        outcomes = Counter(str(record.get("outcome", "passed over")) for record in batches)
        many = f"; the last {LISTED} are listed" if len(batches) > LISTED else ""
        body += _said("Batches " + ", ".join(f"{what}: {count:,}" for what, count in outcomes.items()) + many + ".")
        body += page_html.table([name.replace("_", " ") for name in head], rows)
    if images:
        reasons = Counter(line.partition("\t")[2] or "no reason given" for line in images)
        body += _said(f"Images that could not be used: {len(images):,}.")
        body += page_html.table(("images", "why"), [(f"{n:,}", why) for why, n in reasons.most_common(LISTED)])
        more = [f"and {len(images) - LISTED:,} more"] if len(images) > LISTED else []
        names = html.escape("\n".join([line.partition("\t")[0] for line in images[:LISTED]] + more))
        body += f"<details><summary>Their names</summary><pre>{names}</pre></details>"
    return body


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(_text(inner) for inner in value[:8])
        return shown + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return short(value) if isinstance(value, float) else "" if value is None else str(value)


# Where it was made


def _origin(run: Path) -> str:
    for checkpoint in bundle.checkpoints(run):
        try:
            facts = bundle.load_config(checkpoint).origin
        except TesseraError:  # of another Tessera, or damaged
            continue
        return page_html.table((), [(name, _text(value)) for name, value in facts.items()])
    return _said("There is no checkpoint yet that tells hardware and versions.")


# Settings


def _settings(told: Record) -> str:
    try:
        recipe = validate(Recipe, told, "recipe")
    except TesseraError:  # written by another Tessera
        rows = [(name, _shown(value)) for name, value in flat(told).items()]
        note = "This Tessera does not read all of these settings, so it cannot tell which are the usual ones."
        return _said(note) + page_html.table(("setting", "value"), rows)
    sections: dict[str, list[str]] = {}
    for name, value, usual, about in _compared(recipe, PydanticUndefined):
        section, _, rest = name.partition(".")
        *parents, last = (rest or section).split(".")
        dim = f"<small>{html.escape('.'.join(parents))}.</small>" if parents else ""
        differs = usual is not PydanticUndefined and usual != value
        setting, shown = dim + html.escape(last), html.escape(_shown(value))
        sections.setdefault(section if rest else "", []).append(
            f'<tr title="{html.escape(about)}"{" class=told" if differs else ""}><td>{setting}</td><td>{shown}</td>'
            f"<td>{html.escape('instead of ' + _shown(usual)) if differs else ''}</td></tr>"
        )
    body = ""
    for section, rows in sections.items():
        table = f'<table class="settings">{"".join(rows)}</table>'
        body += f"<details open><summary>{html.escape(section or 'the run')}</summary>{table}</details>"
    return _said("In bold: what differs from the defaults.") + f'<div class="sections">{body}</div>'


def _compared(settings: Settings, usual: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Dotted name, value, default and description of every setting; PydanticUndefined where there is no default.

    usual: the settings that would stand here if nothing were said; of another kind, they tell of the kind alone.
    """
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if type(usual) is type(settings):
            default = getattr(usual, name)
        elif name == "kind" and isinstance(usual, Settings):
            default = getattr(usual, name, PydanticUndefined)
        else:
            default = field.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            yield from _compared(value, default, f"{prefix}{name}.")
        else:
            told = default if default is PydanticUndefined else to_jsonable_python(default)
            yield prefix + name, to_jsonable_python(value), told, field.description or ""


def _shown(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Settings):
        return _shown(value.model_dump(mode="json"))
    return json.dumps(value, ensure_ascii=False)


_STYLE = """
.bar { height: 5px; border-radius: 3px; background: var(--rule); margin: 1em 0 }
.bar div { height: 100%; border-radius: 3px; background: var(--c0) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9em, 1fr)); gap: .8em }
.tiles div { background: var(--panel); border-radius: 6px; padding: .55em .8em }
.tiles b { display: block; font-size: 1.15em; font-weight: 600 } .tiles small { display: block; color: var(--soft) }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19em), 1fr)); gap: 1em }
.grids img { width: 100%; border-radius: 3px; image-rendering: auto }
.finding { border-left: 4px solid var(--c1); background: var(--panel); padding: .5em 1em; margin: .7em 0 }
.finding.wrong { border-color: var(--m0) } .finding p { margin: .25em 0 } .finding small { color: var(--soft) }
details { margin: .5em 0 } summary { cursor: pointer; font-weight: 600 }
.sections { columns: 2 26em; column-gap: 2em }
.settings { width: 100%; table-layout: fixed; overflow-wrap: anywhere; font-size: .92em }
.settings tr { break-inside: avoid } .settings td:first-child { width: 41% } .settings td:last-child { width: 33% }
.settings small { color: var(--soft) } .settings .told td { font-weight: 600 }
.settings .told td:last-child { font-weight: 400; color: var(--soft) }
"""
