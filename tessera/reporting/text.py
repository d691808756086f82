"""Numbers as text."""


def format_duration(seconds: float) -> str:
    """Seconds in two units: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    for size, name, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller_size)} {smaller}"
    return f"{int(seconds)} s"
