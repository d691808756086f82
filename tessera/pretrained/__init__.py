"""Models that come with the package. Each folder here is a bundle, and its name stands for it wherever a model is
read: `tessera sample dit-digits`. Their weights are in 8 bits."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the shipped models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find(path: str | Path) -> Path | None:
    """The folder of the shipped model of that name; None for other names, and where a file or folder has the name."""
    return FOLDER / path if str(path) in names() and not Path(path).exists() else None
