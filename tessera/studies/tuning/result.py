"""What a tuning found: a table, a plot (frontier.png), and settings written into a bundle."""

import io
import json
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tessera import __version__, bundle, model_card
from tessera.bundle import BundleConfig, Model
from tessera.files import atomic_write, read_json
from tessera.models.network import Network
from tessera.reporting.estimates import Estimate
from tessera.sampling import SamplingConfig
from tessera.settings import validate
from tessera.studies.tuning.trials import Trial, frontier
from tessera.studies.tuning.tuner import TuningResult

PLOT = "frontier.png"
JUDGED = "accuracy"  # the score of an oracle, where the truth is known


# In a bundle


def find_bundle(path: Path) -> Path | None:
    """The bundle whose settings are to be written: a bundle itself, or the newest checkpoint of a run."""
    config = path / bundle.CONFIG
    if config.exists():
        return path if "format" in read_json(config) else None
    return next(iter(bundle.checkpoints(path)), None) if path.is_dir() else None


def default_folder(path: Path) -> Path:
    """Where the tuning of a model is kept: in a run's own folder by the checkpoint, beside anything else."""
    if path.is_dir() and not (path / bundle.CONFIG).exists() and (found := bundle.checkpoints(path)):
        return path / "tune" / found[0].name
    whole = path.absolute()
    return whole.with_name(f"tune-{whole.stem if whole.is_file() else whole.name}")


def provenance_text(outcome: TuningResult) -> str:
    """What a bundle says of its settings: by what they were found, and what they cost."""
    baseline, chosen = outcome.finalists[0], outcome.chosen
    assert chosen is not None
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    score = chosen.scores[0].protocol
    return (
        f"by tessera tune {__version__}, {today}: fd {_shown(chosen.fd)}, {chosen.seconds:.3g} s a picture; before "
        f"({baseline.name}): fd {_shown(baseline.fd)}, {baseline.seconds:.3g} s; {chosen.num_samples} pictures, features "
        f"{score.features['name']}, {outcome.config.select}"
    )


def write_settings(folder: Path, sampling: SamplingConfig, said: str, network: Network) -> None:
    """Write settings into a bundle's config.json and card, each whole or not at all. Raises TesseraError."""
    path = folder / bundle.CONFIG
    told = read_json(path)
    told["sampling"] = sampling.model_dump(mode="json")
    told["provenance"]["sampling_chosen"] = said
    config = validate(BundleConfig, told, str(path))
    atomic_write(path, json.dumps(told, indent=2) + "\n")
    atomic_write(folder / bundle.CARD, model_card.render(Model(config, network)))


def save_bundle(model: Model, folder: Path, sampling: SamplingConfig, said: str) -> None:
    """Write a new bundle with these settings. Raises TesseraError if the folder exists."""
    provenance = model.config.provenance.model_copy(update={"sampling_chosen": said})
    config = model.config.model_copy(update={"sampling": sampling, "provenance": provenance})
    bundle.save(Model(config, model.network, model.loaded_codec), folder)


# For people


def format_result(outcome: TuningResult) -> str:
    """Two plain tables: the frontier of the search, and the check."""
    first = outcome.finalists[0]
    return "\n".join(
        [
            f"frontier of {len(outcome.trials)} trials, {outcome.baseline.num_samples} pictures each",
            *_table([outcome.baseline, *frontier(outcome.trials)], None),
            "",
            f"check: {first.num_samples} pictures each from fresh seeds, timed in turns",
            *_table(outcome.finalists, outcome.chosen),
        ]
    )


def _table(trials: Sequence[Trial], chosen: Trial | None) -> list[str]:
    """The first is the baseline of the others."""
    baseline = trials[0]
    judged = any(score.metric == JUDGED for score in baseline.scores)
    lines = [
        f"{'calls':>6}  {'s/picture':<10}{'faster':<8}{'fd':<26}{'minus baseline':<28}"
        + (f"{JUDGED:<10}" if judged else "")
        + "settings"
    ]
    for trial in trials:
        apart, own = trial.difference_to(baseline), trial is baseline
        difference = "" if own else f"{apart.value:+.3g} ({apart.low:+.3g} to {apart.high:+.3g})"
        share = next((f"{score.value:.1%}" for score in trial.scores if score.metric == JUDGED), "")
        lines.append(
            f"{trial.calls:>6.4g}  {trial.seconds:<10.3g}{f'{baseline.seconds / trial.seconds:.3g}x':<8}"
            + f"{_shown(trial.fd):<26}{difference:<28}"
            + (f"{share:<10}" if judged else "")
            + ("baseline: " if own else "chosen: " if trial is chosen else "")
            + trial.name
        )
    return lines


def _shown(measured: Estimate) -> str:
    return f"{measured.value:.4g} ({measured.low:.4g} to {measured.high:.4g})"


def plot(outcome: TuningResult, path: Path) -> None:
    """fd against seconds a picture, the trials and the check side by side, where matplotlib is installed.

    The settings that were checked have a ring among the trials; in the check a number, which a list explains.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(15, 5), layout="constrained")
    search, check = figure.subplots(1, 2)
    first, *others = outcome.finalists
    kinds = list(dict.fromkeys(trial.sampling.sampler.kind for trial in (*outcome.trials, *others)))
    _panel(search, kinds, outcome.baseline, outcome.trials)
    names = {trial.name for trial in others}
    for trial in (trial for trial in outcome.trials if trial.name in names):
        search.plot(trial.seconds, trial.fd.value, "o", markersize=10, markerfacecolor="none", color="k")
    search.set_title(f"{len(outcome.trials)} trials, {outcome.baseline.num_samples} pictures each; ringed: checked")
    _panel(check, kinds, first, others)
    for number, trial in enumerate(others, start=1):
        check.vlines(trial.seconds, trial.fd.low, trial.fd.high, color="0.6", linewidth=0.8, zorder=0)
        place, beside = (trial.seconds, trial.fd.value), (5, 6 if number % 2 else -15)  # neighbours often stand close
        check.annotate(str(number), place, beside, textcoords="offset points", fontsize=11, weight="bold")
    check.set_title(f"check: {first.num_samples} pictures each from fresh seeds, timed in turns")
    listed = [f"baseline: {first.name}"]
    for number, trial in enumerate(others, start=1):
        listed.append(f"{number}: {trial.name}" + " (chosen)" * (trial is outcome.chosen))
    wrapped = [textwrap.fill(line, 36, subsequent_indent="    ") for line in listed]
    check.text(1.03, 1, "\n\n".join(wrapped), transform=check.transAxes, va="top", fontsize=9)
    if kinds:
        search.legend(fontsize=8, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(path, buffer.getvalue())


def _panel(axes, kinds: Sequence[str], baseline: Trial, trials: Sequence[Trial]) -> None:
    """Trials by solver, the frontier, and the baseline with its interval."""
    for number, kind in enumerate(kinds):
        of_kind = [trial for trial in trials if trial.sampling.sampler.kind == kind]
        if of_kind:
            places = [trial.seconds for trial in of_kind], [trial.fd.value for trial in of_kind]
            axes.plot(*places, "o", markersize=4, color=f"C{number}", label=kind)
    edge = frontier([*trials, baseline])
    line = [trial.seconds for trial in edge], [trial.fd.value for trial in edge]
    axes.step(*line, where="post", color="0.5", zorder=0)
    axes.axhspan(baseline.fd.low, baseline.fd.high, color="0.93", zorder=-1)
    axes.plot(baseline.seconds, baseline.fd.value, "k*", markersize=14)
    axes.annotate("baseline", (baseline.seconds, baseline.fd.value), (0, 9), textcoords="offset points", ha="right")
    values = [trial.fd.value for trial in (*trials, baseline)]
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.set(xscale="log", xlabel="seconds a picture", ylabel="fd")
    axes.grid(alpha=0.3, which="both")
