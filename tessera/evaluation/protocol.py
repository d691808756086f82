"""Scores with their protocol: two scores can be compared only if they were computed in the same way."""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from tessera import __version__
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.reporting.estimates import Estimate
from tessera.settings import InputSize, Settings, diff, validate

FORMAT = 2
PACKAGES = ("torch", "numpy", "pillow", "transformers")  # those that can change a score


class Protocol(Settings):
    """How a score was computed, apart from the model. Scores with the same protocol can be compared."""

    definition: dict[str, Any] = Field(description="the metric and its constants")
    features: dict[str, str] = Field(description="name, hash of the weights, resize")
    reference: dict[str, Any] = Field(description="hash and number of its images")
    samples: int
    size: InputSize = Field(description="height and width of the images in pixels; of clips, frames first")
    channels: int
    sampling: dict[str, Any] | None = Field(
        default=None,
        description="sampler, steps, guidance and its channels, seeds, class policy, precision; null: existing images",
    )

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of a hash of the protocol."""
        contents = self.model_dump(mode="json")
        contents["features"].pop("name", None)  # for display only: one network can have several paths
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:8]


class Score(Settings):
    """One metric value, its 95 % interval, and everything needed to compute it again."""

    model_config = ConfigDict(allow_inf_nan=True)  # values are saved as they were measured

    format: Literal[2] = FORMAT
    metric: str
    value: float
    low: float
    high: float
    fingerprint: str
    protocol: Protocol
    source: dict[str, Any] = Field(description="what was scored: its description, hash of its images, of its weights")
    environment: dict[str, str]

    @classmethod
    def from_estimate(
        cls, metric: str, estimate: Estimate, protocol: Protocol, source: dict[str, Any], device: str
    ) -> "Score":
        return cls(
            metric=metric,
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            fingerprint=protocol.fingerprint,
            protocol=protocol,
            source=source,
            environment=environment(device),
        )


def environment(device: str) -> dict[str, str]:
    """Versions and hardware. They are recorded, but scores that differ only in them can be compared."""
    versions = {"tessera": __version__, "python": platform.python_version(), "device": device}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        versions["gpu"] = torch.cuda.get_device_name(device)
    return versions


def save(scores: Sequence[Score], path: Path) -> None:
    atomic_write(path, json.dumps([score.model_dump(mode="json") for score in scores], indent=1) + "\n")


def load(path: Path) -> list[Score]:
    """The scores of a file, or of the folder of an evaluation. Raises TesseraError."""
    path = path / "scores.json" if path.is_dir() else path
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read scores from {path}: {error}") from None
    if not isinstance(contents, list):
        raise TesseraError(f"{path} does not hold a list of scores: expected what `tessera evaluate` writes")
    for score in contents:
        if isinstance(score, dict) and score.get("format", FORMAT) != FORMAT:
            writer = dict(score.get("environment") or {}).get("tessera", "of unknown version")
            raise TesseraError(
                f"{path} was written by Tessera {writer} in format {score['format']}; this version reads format "
                f"{FORMAT}, and its protocols differ: run `tessera evaluate` again"
            )
    return [validate(Score, score, str(path)) for score in contents]


def score_table(scores: Sequence[Score]) -> str:
    """The scores in aligned columns, for a terminal."""
    rows = [("metric", "value", "95 % interval", "fingerprint")]
    rows += [(s.metric, f"{s.value:.5g}", f"{s.low:.5g} to {s.high:.5g}", s.fingerprint) for s in scores]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def protocol_differences(first: Score, second: Score) -> list[str]:
    """How the protocols of two scores differ, for display; empty if the scores can be compared."""
    before, after = (score.protocol.model_dump(mode="json") for score in (first, second))
    return [f"{name}: {old} and {new}" for name, old, new in diff(before, after)]


def compare(first: Sequence[Score], second: Sequence[Score]) -> str:
    """A table of the metrics that both have, with a warning if their protocols differ."""
    left, right = ({score.metric: score for score in scores} for scores in (first, second))
    common = [metric for metric in left if metric in right]
    if not common:
        raise TesseraError(f"nothing to compare: the first has {', '.join(left)}, the second {', '.join(right)}")
    lines = [f"{'metric':<18}{'first':<12}{'second':<12}difference"]
    warnings: dict[tuple[str, ...], list[str]] = {}
    for metric in common:
        a, b = left[metric], right[metric]
        overlap = "intervals do not overlap" if a.high < b.low or b.high < a.low else "intervals overlap"
        lines.append(f"{metric:<18}{a.value:<12.5g}{b.value:<12.5g}{b.value - a.value:+.5g}, {overlap}")
        if differences := protocol_differences(a, b):
            warnings.setdefault(tuple(differences), []).append(metric)
    for differences, metrics in warnings.items():
        fingerprints = " and ".join(side[metrics[0]].fingerprint for side in (left, right))
        lines.append(
            f"warning: {', '.join(metrics)}: the protocols differ. The values are comparable only if this is what you "
            f"compare:\n  {fingerprints}"
        )
        lines += [f"  - {difference}" for difference in differences]
    return "\n".join(lines)
