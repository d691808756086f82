"""The output of a tuning: a table, a plot (frontier.png), and settings written into a bundle."""

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
from tessera.reporting.figures import encode, new_figure
from tessera.sampling import SamplingConfig
from tessera.settings import validate
from tessera.studies.tuning.trials import Trial, frontier
from tessera.studies.tuning.tuner import TuningResult

PLOT = "frontier.png"
ACCURACY = "accuracy"  # the metric of a classifier, for data whose true labels are known


def find_bundle(path: Path) -> Path | None:
    """The bundle to write into: the path itself, or the newest checkpoint of a run."""
    config = path / bundle.CONFIG
    if config.exists():
        return path if "format" in read_json(config) else None
    return next(iter(bundle.checkpoints(path)), None) if path.is_dir() else None


def default_folder(path: Path) -> Path:
    """The folder of a model's tuning: inside a run for the checkpoint, beside any other model."""
    if path.is_dir() and not (path / bundle.CONFIG).exists() and (checkpoints := bundle.checkpoints(path)):
        return path / "tune" / checkpoints[0].name
    absolute = path.absolute()
    return absolute.with_name(f"tune-{absolute.stem if absolute.is_file() else absolute.name}")


def provenance_text(result: TuningResult) -> str:
    """How the settings were chosen, and the improvement."""
    baseline, chosen = result.finalists[0], result.chosen
    assert chosen is not None
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    features = chosen.scores[0].protocol.features["name"]
    return (
        f"by tessera tune {__version__}, {today}: fd {_format(chosen.fd)}, {chosen.seconds:.3g} s per image; before "
        f"({baseline.name}): fd {_format(baseline.fd)}, {baseline.seconds:.3g} s; {chosen.num_samples} samples, "
        f"features {features}, {result.config.select}"
    )


def write_settings(folder: Path, sampling: SamplingConfig, provenance: str, network: Network) -> None:
    """Write settings into config.json and the model card of a bundle. Raises TesseraError."""
    path = folder / bundle.CONFIG
    data = read_json(path)
    data["sampling"] = sampling.model_dump(mode="json")
    data["provenance"]["sampling_chosen"] = provenance
    config = validate(BundleConfig, data, str(path))
    atomic_write(path, json.dumps(data, indent=2) + "\n")
    atomic_write(folder / bundle.CARD, model_card.render(Model(config, network)))


def save_bundle(model: Model, folder: Path, sampling: SamplingConfig, provenance: str) -> None:
    """Write a new bundle with these settings. Raises TesseraError if the folder exists."""
    changes = {
        "sampling": sampling,
        "provenance": model.config.provenance.model_copy(update={"sampling_chosen": provenance}),
    }
    bundle.save(Model(model.config.model_copy(update=changes), model.network, model.loaded_codec), folder)


def format_result(result: TuningResult) -> str:
    """Two text tables: the frontier of the search, and the final comparison."""
    first = result.finalists[0]
    return "\n".join(
        [
            f"frontier of {len(result.trials)} trials, {result.baseline.num_samples} samples each",
            *_table([result.baseline, *frontier(result.trials)], None),
            "",
            f"final comparison: {first.num_samples} samples each with new seeds, timed in turns",
            *_table(result.finalists, result.chosen),
        ]
    )


def _table(trials: Sequence[Trial], chosen: Trial | None) -> list[str]:
    """The first trial is the baseline."""
    baseline = trials[0]
    has_accuracy = any(score.metric == ACCURACY for score in baseline.scores)
    header = f"{'calls':>6}  {'s/image':<10}{'speedup':<9}{'fd':<30}{'minus baseline':<34}"
    lines = [header + (f"{ACCURACY:<10}" if has_accuracy else "") + "settings"]
    for trial in trials:
        difference = trial.difference_to(baseline)
        difference_text = f"{difference.value:+.3g} ({difference.low:+.3g} to {difference.high:+.3g})"
        accuracy = next((f"{score.value:.1%}" for score in trial.scores if score.metric == ACCURACY), "")
        lines.append(
            f"{trial.calls:>6.4g}  {trial.seconds:<10.3g}{f'{baseline.seconds / trial.seconds:.3g}x':<9}"
            + f"{_format(trial.fd):<30}{'' if trial is baseline else difference_text:<34}"
            + (f"{accuracy:<10}" if has_accuracy else "")
            + ("baseline: " if trial is baseline else "chosen: " if trial is chosen else "")
            + trial.name
        )
    return lines


def _format(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def plot(result: TuningResult, path: Path) -> None:
    """fd against seconds per image: the trials on the left, the final comparison on the right.

    Finalists have a ring among the trials, and a number in the final comparison that a list explains.
    """
    figure = new_figure(15, 5)
    search, final = figure.subplots(1, 2)
    first, *others = result.finalists
    kinds = list(dict.fromkeys(trial.sampling.sampler.kind for trial in (*result.trials, *others)))
    _plot_trials(search, kinds, result.baseline, result.trials)
    names = {trial.name for trial in others}
    for trial in (trial for trial in result.trials if trial.name in names):
        search.plot(trial.seconds, trial.fd.value, "o", markersize=10, markerfacecolor="none", color="k")
    search.set_title(f"{len(result.trials)} trials, {result.baseline.num_samples} samples each; ring: finalist")
    _plot_trials(final, kinds, first, others)
    lines = [f"baseline: {first.name}"]
    for number, trial in enumerate(others, start=1):
        final.vlines(trial.seconds, trial.fd.low, trial.fd.high, color="0.6", linewidth=0.8, zorder=0)
        offset = (5, 6 if number % 2 else -15)  # neighbors are often close
        xy = trial.seconds, trial.fd.value
        final.annotate(str(number), xy, offset, textcoords="offset points", fontsize=11, weight="bold")
        lines.append(f"{number}: {trial.name}" + " (chosen)" * (trial is result.chosen))
    final.set_title(f"final comparison: {first.num_samples} samples each with new seeds, timed in turns")
    legend = "\n\n".join(textwrap.fill(line, 36, subsequent_indent="    ") for line in lines)
    final.text(1.03, 1, legend, transform=final.transAxes, va="top", fontsize=9)
    if kinds:
        search.legend(fontsize=8, loc="best")
    atomic_write(path, encode(figure, "png"))


def _plot_trials(axes, kinds: Sequence[str], baseline: Trial, trials: Sequence[Trial]) -> None:
    """Trials by solver, the frontier, and the baseline with its interval."""
    for number, kind in enumerate(kinds):
        points = [(trial.seconds, trial.fd.value) for trial in trials if trial.sampling.sampler.kind == kind]
        if points:
            axes.plot(*zip(*points), "o", markersize=4, color=f"C{number}", label=kind)
    steps = [(trial.seconds, trial.fd.value) for trial in frontier([*trials, baseline])]
    axes.step(*zip(*steps), where="post", color="0.5", zorder=0)
    axes.axhspan(baseline.fd.low, baseline.fd.high, color="0.93", zorder=-1)
    axes.plot(baseline.seconds, baseline.fd.value, "k*", markersize=14)
    axes.annotate("baseline", (baseline.seconds, baseline.fd.value), (0, 9), textcoords="offset points", ha="right")
    values = [trial.fd.value for trial in (*trials, baseline)]
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.set(xscale="log", xlabel="seconds per image", ylabel="fd")
    axes.grid(alpha=0.3, which="both")
