"""What a score must say of itself: a number without its protocol cannot be compared with another."""

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
from tessera.evaluation.intervals import Estimate
from tessera.files import atomic_write
from tessera.settings import Settings, changes, validate

PACKAGES = ("torch", "numpy", "pillow", "transformers")  # those that a score may depend on


class Protocol(Settings):
    """How a score was made, whatever was scored: two scores of one protocol can be compared."""

    definition: dict[str, Any] = Field(description="the metric and its constants")
    features: dict[str, str] = Field(description="name, hash of the weights, resize")
    reference: dict[str, Any] = Field(description="hash of its pictures, their number")
    samples: int
    size: tuple[int, int] = Field(description="height and width of the pictures in pixels")
    channels: int
    sampling: dict[str, Any] | None = Field(
        default=None,
        description="sampler, steps, guidance and its channels, seeds, class policy, precision; null: found",
    )

    @property
    def fingerprint(self) -> str:
        """Eight letters that stand for all of it."""
        facts = self.model_dump(mode="json")
        facts["features"].pop("name", None)  # for people: the same network goes by many paths
        told = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]


class Score(Settings):
    """One number, its 95 % interval, and everything needed to make it again."""

    model_config = ConfigDict(allow_inf_nan=True)  # a number is told as it was measured

    format: Literal[1] = 1
    metric: str
    value: float
    low: float
    high: float
    fingerprint: str
    protocol: Protocol
    subject: dict[str, Any] = Field(description="what was scored: where it was, hash of its pictures, of its weights")
    environment: dict[str, str]

    @classmethod
    def of(cls, metric: str, measured: Estimate, protocol: Protocol, subject: dict[str, Any], device: str) -> "Score":
        return cls(
            metric=metric,
            value=measured.value,
            low=measured.low,
            high=measured.high,
            fingerprint=protocol.fingerprint,
            protocol=protocol,
            subject=subject,
            environment=environment(device),
        )

    def __str__(self) -> str:
        return f"{self.metric:<18}{self.value:<12.5g}{f'{self.low:.5g} to {self.high:.5g}':<26}{self.fingerprint}"


def environment(device: str) -> dict[str, str]:
    """Versions and machine: they are told, but two scores that differ in them alone can be compared."""
    told = {"tessera": __version__, "python": platform.python_version(), "device": device}
    for package in PACKAGES:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        told["card"] = torch.cuda.get_device_name(device)
    return told


def save(scores: Sequence[Score], path: Path) -> None:
    atomic_write(path, json.dumps([score.model_dump(mode="json") for score in scores], indent=1) + "\n")


def load(path: Path) -> list[Score]:
    """The scores of a file, or of the folder of an evaluation. Raises TesseraError."""
    path = path / "scores.json" if path.is_dir() else path
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read scores from {path}: {error}") from None
    if not isinstance(told, list):
        raise TesseraError(f"{path} holds no list of scores: expected what `tessera evaluate` writes")
    return [validate(Score, score, str(path)) for score in told]


def differences(one: Score, other: Score) -> list[str]:
    """In what two scores' protocols differ, in words; empty if they can be compared."""
    before, after = (score.protocol.model_dump(mode="json") for score in (one, other))
    return [f"{name}: {old} and {new}" for name, old, new in changes(before, after)]


def compared(one: Sequence[Score], other: Sequence[Score]) -> str:
    """A table of the scores that both have, with a warning where their protocols differ."""
    left, right = ({score.metric: score for score in scores} for scores in (one, other))
    common = [metric for metric in left if metric in right]
    if not common:
        raise TesseraError(f"nothing to compare: one has {', '.join(left)}, the other {', '.join(right)}")
    lines = [f"{'metric':<18}{'first':<12}{'second':<12}difference"]
    warnings: dict[tuple[str, ...], list[str]] = {}
    for metric in common:
        a, b = left[metric], right[metric]
        apart = "intervals exclude each other" if a.high < b.low or b.high < a.low else "intervals overlap"
        lines.append(f"{metric:<18}{a.value:<12.5g}{b.value:<12.5g}{b.value - a.value:+.5g}, {apart}")
        if found := differences(a, b):
            warnings.setdefault(tuple(found), []).append(metric)
    for found, metrics in warnings.items():
        prints = " and ".join(side[metrics[0]].fingerprint for side in (left, right))
        lines.append(f"warning: {', '.join(metrics)}: the numbers were not made alike:\n  {prints}, which differ in")
        lines += [f"  - {difference}" for difference in found]
    return "\n".join(lines)
