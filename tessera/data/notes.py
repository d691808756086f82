"""What an index leaves out, or reads otherwise than its files state it: `train` prints it, `data check` reports it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Note:
    """One fact about the layout of a data set. `train` refuses data with an error, and prints warnings."""

    kind: str  # of the finding in `tessera data check`
    severity: Severity
    text: str  # a sentence with the number and what to do
    message: str = ""  # what the samples or names have in common, for a finding, which counts them
    names: tuple[str, ...] = ()  # of files, rows or columns that are not samples
    rows: dict[int, str] = field(default_factory=dict)  # samples, and what is wrong with each
    folder: Path | None = None  # that the names are relative to, where they are files

    def shifted(self, count: int) -> "Note":
        """The same for rows that `count` others precede."""
        rows = {row + count: reason for row, reason in self.rows.items()}
        return Note(self.kind, self.severity, self.text, self.message, self.names, rows, self.folder)


def about(
    kind: str,
    where: str | Path,
    message: str,
    names: Iterable[str],
    advice: str = "",
    severity: Severity = "warning",
    folder: Path | None = None,
) -> list[Note]:
    """A note about names as a list; empty without names."""
    names = tuple(names)
    if not names:
        return []
    text = f"{where}: {len(names):,} {message} (such as {names[0]})" + (f": {advice}" if advice else "")
    return [Note(kind, severity, text, message, names, folder=folder)]


def printable(name: str) -> str:
    """A name of the file system as text that can be printed and saved: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
