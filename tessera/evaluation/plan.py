"""Work that is kept in a folder and can be gone on with, as long as it is the same work."""

import json
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError
from tessera.files import write_whole
from tessera.settings import changes

PLAN = "plan.json"


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Begin work under a plan in a folder, or go on with it. Raises TesseraError if other work stands there."""
    path = folder / PLAN
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {path}: {error}; remove {folder} to start afresh") from None
    told = json.dumps(plan, indent=1)
    if before is not None and (found := changes(before, json.loads(told))):
        differing = "; ".join(f"{name} was {old}, is {new}" for name, old, new in found)
        raise TesseraError(f"{folder} holds other work: {differing}. Give another --out, or remove it")
    write_whole(path, told)
