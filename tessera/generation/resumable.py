"""Work that is saved in a folder and can be resumed, if it is the same work."""

import json
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError
from tessera.files import atomic_write, read_json, this_writer
from tessera.settings import diff

PLAN = "plan.json"


def claim_folder(folder: Path, plan: dict[str, Any], remedy: str = "Give another --out, or remove it") -> None:
    """Begin or resume work in a folder. plan: everything that decides its results, as JSON.

    Raises TesseraError with the remedy if the folder holds work of another plan.
    """
    path, plan = folder / PLAN, json.loads(json.dumps(plan))
    if not path.exists():
        atomic_write(path, json.dumps(plan, indent=1), this_writer())  # shards may start at the same time
        return
    saved = read_json(path, f"remove {folder} to start from scratch")
    if differences := diff(saved, plan):
        differing = "; ".join(f"{name} was {old}, is {new}" for name, old, new in differences)
        raise TesseraError(f"{folder} holds other work: {differing}. {remedy}")
