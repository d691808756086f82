"""Numbers as text."""

import math
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """Seconds in two units: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    if not math.isfinite(seconds):
        return "unknown"
    for size, name, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller_size)} {smaller}"
    return f"{int(seconds)} s"


def format_number(value: float) -> str:
    """Three significant digits: 0.0123, 4.56, 12.3k, 3e-05."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    for size, divisor, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / divisor:.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_bytes(count: float) -> str:
    """Three significant digits: 512 B, 1.5 KiB, 24.4 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def join_names(names: Sequence[str]) -> str:
    """The text that `split_names` of the command line splits into these names."""
    special = [name in ("", "all") or name != name.strip() or any(c in name for c in ',"\r\n') for name in names]
    return ",".join('"' + name.replace('"', '""') + '"' if quote else name for name, quote in zip(names, special))
