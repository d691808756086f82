"""`tessera doctor`: what is wrong with a run, read from the files it leaves, while it goes on or afterwards."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from tessera.monitoring.diagnostics import PROBES, RULES, Finding
from tessera.monitoring.history import History, finite, largest, read


def diagnose(run: Path) -> list[Finding]:
    """What is wrong with a run, the cause before what follows from it, the grave before the rest; nothing if healthy.

    Raises TesseraError if the folder holds no run.
    """
    history = read(run)
    found = [finding for rule in RULES if (finding := rule(history)) is not None]
    return sorted(found, key=lambda finding: finding.severity != "wrong")


def as_json(run: Path) -> str:
    """The findings and the facts, for programs. Raises TesseraError as `diagnose`."""
    told = {"findings": [asdict(finding) for finding in diagnose(run)], "facts": facts(run)}
    return json.dumps(told, indent=2)


def page(run: Path) -> str:
    """The findings, or what was looked at where there are none. Raises TesseraError as `diagnose`."""
    found = diagnose(run)
    if found:
        return "\n\n".join(f"{number}. {finding}" for number, finding in enumerate(found, start=1))
    looked = facts(run)
    width = max((len(name) for name in looked), default=0) + 2
    return "\n".join(["nothing wrong found", *(f"  {name:<{width}}{value}" for name, value in looked.items())])


def facts(run: Path) -> dict[str, str]:
    """What was looked at, in a handful of lines. Raises TesseraError as `diagnose`."""
    history = read(run)
    told = {"step": f"{history.step} of {history.recipe.training.steps}"}
    if history.late_loss is not None:
        told["mean squared error"] = (
            f"{history.late_loss:.3g}; guessing each number by itself {history.guesses.linear:.3g}, answering zero "
            f"{history.guesses.nothing:.3g}"
        )
    for words, name, records, shown in (
        ("gradient norm", "gradient_norm", history.log, "{:.3g}"),
        ("steps clipped", "clipped", history.log, "{:.0%}"),
        ("waiting for data", "stalled", history.log, "{:.0%} of the time"),
        ("utilisation", "utilisation", history.log, "{:.0%} of the peak"),
        ("data", "data_std", history.health, "standard deviation {:.3g}"),
    ):
        if values := history.late(records, name):
            told[words] = shown.format(mean(values))
    if found := largest(history.health, "attention_logits"):
        told["largest attention logit"] = f"{found[-1][1]:.3g}"
    if ratio := _against_probe(history, "loss_ema"):
        told["the average's loss"] = f"{ratio:.3f} of the weights'"
    if ratio := _against_probe(history, "loss_wrong_labels"):
        told["a wrong label costs"] = f"{ratio - 1:.1%} of the loss"
    if not history.health:
        told["health"] = "no records: training.health_every asks for them"
    return told


def _against_probe(history: History, name: str) -> float | None:
    """A loss of the last probes over that of the weights in the same ones."""
    pairs = [finite((record.get(name), record.get("loss_probe"))) for record in history.health[-PROBES:]]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[1] > 0]
    return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) if pairs else None
