"""Compute budgets (8h, 90m, 2d, $200, 64gpuh, 1e18 training FLOPs) and the best published model for one."""

import re
from dataclasses import dataclass
from typing import Literal

from tessera.errors import TesseraError
from tessera.planning import published

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """An amount of seconds, device hours, dollars or training FLOPs."""

    kind: Literal["seconds", "device hours", "dollars", "flops"]
    amount: float
    text: str  # as the user wrote it

    def seconds(self, devices: int, price: float) -> float | None:
        """Wall-clock seconds on this number of devices, each at `price` dollars per hour; None for a FLOPs budget.

        Raises TesseraError for dollars without a price.
        """
        if self.kind == "seconds":
            return self.amount
        if self.kind == "device hours":
            return 3600 * self.amount / devices
        if self.kind == "dollars":
            if not price:
                raise TesseraError(f"--budget {self.text} needs a price: give --price (dollars per device hour)")
            return 3600 * self.amount / (price * devices)
        return None


def parse(text: str) -> Budget:
    """Parse a budget. Raises TesseraError that lists the accepted forms."""
    number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    match = re.fullmatch(rf"(\$?)\s*{number}\s*(gpuh|min|[smhd])?", text.strip().lower())
    if match is None or (match[1] and match[3]):
        raise TesseraError(
            f"--budget {text} is not valid; write 8h, 90m or 2d (time), $200 (money), 64gpuh (device hours) or 1e18 "
            "(training FLOPs)"
        )
    dollars, amount, unit = match[1], float(match[2]), match[3]
    if not 0 < amount < float("inf"):
        raise TesseraError(f"--budget {text}: expected a finite number above zero")
    if dollars:
        return Budget("dollars", amount, text)
    if unit == "gpuh":
        return Budget("device hours", amount, text)
    if unit is not None:
        return Budget("seconds", amount * SECONDS[unit], text)
    if amount < 1e6:
        raise TesseraError(
            f"--budget {text} has no unit: write {text}h, {text}m, ${text} or {text}gpuh, or FLOPs as 1e18"
        )
    return Budget("flops", amount, text)


def best_published(flops: float) -> str:
    """The published model with the lowest FID for at most this training compute, in a sentence with its limits."""
    affordable = [model for model in (*published.MODELS, *published.XL_RUNS) if model.flops <= flops]
    if not affordable:
        smallest = min(published.MODELS, key=lambda model: model.flops)
        return f"the paper has no model for {flops:.3g} FLOPs: its smallest, {smallest.name}, took {smallest.flops:.3g}"
    best = min(affordable, key=lambda model: model.fid)
    return (
        f"of the paper's models with at most {flops:.3g} FLOPs, {best.name} after {best.steps:,} steps has the lowest "
        f"FID-50K, {best.fid:g} (latents of ImageNet at 256 px, most sizes at 400K steps only: this is not a scaling "
        "law; --law uses the law.json of a study)"
    )
