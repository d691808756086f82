"""`tessera doctor`: problems of a run, found in its files, during the training or after it."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from tessera.monitoring.diagnostics import MIN_PROBES, RULES, Finding
from tessera.monitoring.history import History, finite, read_history, series_max


def diagnose(run: Path) -> list[Finding]:
    """The findings of a run: errors first, and causes before their consequences; empty if it is healthy.

    Raises TesseraError if the folder is not a run.
    """
    history = read_history(run)
    findings = [finding for rule in RULES if (finding := rule(history)) is not None]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def as_json(run: Path) -> str:
    """The findings and the facts, for programs. Raises TesseraError like `diagnose`."""
    return json.dumps({"findings": [asdict(finding) for finding in diagnose(run)], "facts": facts(run)}, indent=2)


def as_text(run: Path) -> str:
    """The findings, or the facts if there are none. Raises TesseraError like `diagnose`."""
    if findings := diagnose(run):
        return "\n\n".join(f"{number}. {finding}" for number, finding in enumerate(findings, start=1))
    checked = facts(run)
    width = max((len(name) for name in checked), default=0) + 2
    return "\n".join(["no problems found", *(f"  {name:<{width}}{value}" for name, value in checked.items())])


def facts(run: Path) -> dict[str, str]:
    """A summary of what was checked. Raises TesseraError like `diagnose`."""
    history = read_history(run)
    summary = {"step": f"{history.step} of {history.recipe.training.steps}"}
    if history.late_loss is not None:
        summary["mean squared error"] = (
            f"{history.late_loss:.3g}; linear baseline {history.baselines.linear:.3g}, zero baseline "
            f"{history.baselines.zero:.3g}"
        )
    for label, name, records, template in (
        ("gradient norm", "grad_norm", history.log, "{:.3g}"),
        ("clipped steps", "clipped", history.log, "{:.0%}"),
        ("waiting for data", "data_wait", history.log, "{:.0%} of the time"),
        ("GPU utilization", "mfu", history.log, "{:.0%} MFU"),
        ("data", "data_std", history.health, "standard deviation {:.3g}"),
    ):
        if values := history.late(records, name):
            summary[label] = template.format(mean(values))
    if logits := series_max(history.health, "attention_logits"):
        summary["largest attention logit"] = f"{logits[-1][1]:.3g}"
    if ratio := _ratio_to_probe(history, "loss_ema"):
        summary["EMA loss"] = f"{ratio:.3f} times the loss of the weights"
    for name in ("labels", "captions", "controls"):
        if ratio := _ratio_to_probe(history, f"loss_wrong_{name}"):
            change = history.late(history.health, f"change_wrong_{name}")
            response = f", and change the output by {mean(change):.1%}" if change else ""
            summary[f"wrong {name}"] = f"raise the loss by {ratio - 1:.1%}{response}"
    if not history.health:
        summary["health"] = "no records: set training.health_every"
    return summary


def _ratio_to_probe(history: History, name: str) -> float | None:
    """A loss of the last probes over the loss of the weights in the same probes."""
    pairs = [finite((record.get(name), record.get("loss_probe"))) for record in history.health[-MIN_PROBES:]]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[1] > 0]
    return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) if pairs else None
