"""A budget in one word (8h, 90m, 2d, $200, 64gpuh, 1e18 training FLOPs), and what the paper favours for one."""

import re
from dataclasses import dataclass
from typing import Literal

from tessera.errors import TesseraError
from tessera.planning import published

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """So much of one thing: seconds by the clock, hours of devices, dollars, or training FLOPs."""

    kind: Literal["seconds", "device hours", "dollars", "flops"]
    amount: float
    text: str  # as it was asked for

    def seconds(self, devices: int, price: float) -> float | None:
        """By the clock on so many devices, each of which costs `price` dollars an hour; None for a budget of FLOPs.

        Raises TesseraError for dollars where the price is not known.
        """
        if self.kind == "seconds":
            return self.amount
        if self.kind == "device hours":
            return 3600 * self.amount / devices
        if self.kind == "dollars":
            if not price:
                raise TesseraError(
                    f"--budget {self.text} needs a price: give --price (dollars for a device and an hour)"
                )
            return 3600 * self.amount / (price * devices)
        return None


def parse(text: str) -> Budget:
    """Raises TesseraError with what is understood."""
    number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    found = re.fullmatch(rf"(\$?)\s*{number}\s*(gpuh|min|[smhd])?", text.strip().lower())
    if found is None or (found[1] and found[3]):
        raise TesseraError(
            f"--budget {text} is not understood; write 8h, 90m or 2d (time), $200 (money), 64gpuh (hours of devices) "
            "or 1e18 (training FLOPs)"
        )
    amount = float(found[2])
    if not 0 < amount < float("inf"):
        raise TesseraError(f"--budget {text}: expected more than nothing")
    if found[1]:
        return Budget("dollars", amount, text)
    if found[3] == "gpuh":
        return Budget("device hours", amount, text)
    if found[3] is not None:
        return Budget("seconds", amount * SECONDS[found[3]], text)
    if amount < 1e6:
        raise TesseraError(
            f"--budget {text} has no unit: write {text}h, {text}m, ${text} or {text}gpuh, or FLOPs as 1e18"
        )
    return Budget("flops", amount, text)


def favoured(flops: float) -> str:
    """Which published model has the lowest FID for at most so many training FLOPs, and what that does not say."""
    within = [one for one in (*published.MODELS, *published.LONGER) if one.flops <= flops]
    limits = "latents of ImageNet at 256 px, and each size at 400K steps alone: it is no law of the best size"
    if not within:
        least = min(published.MODELS, key=lambda one: one.flops)
        return f"the paper has no model for {flops:.3g} FLOPs: its smallest, {least.name}, took {least.flops:.3g}"
    best = min(within, key=lambda one: one.fid)
    return (
        f"of the paper's models that took no more than {flops:.3g} FLOPs, {best.name} after {best.steps:,} steps has "
        f"the lowest FID-50K, {best.fid:g} ({limits}; a study's law.json says more: --law)"
    )
