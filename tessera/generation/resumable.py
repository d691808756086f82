"""Work that is kept in a folder and can be gone on with, as long as it is the same work."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tessera.diffusion import AnyDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.models import AnyNetwork
from tessera.sampling import SamplingConfig
from tessera.settings import changes

PLAN = "plan.json"
SETTINGS: dict[str, Any] = {
    "drawing": SamplingConfig,
    "network": AnyNetwork,
    "diffusion": AnyDiffusionConfig,
}  # in a plan


def begin_work(folder: Path, plan: dict[str, Any], instead: str = "Give another --out, or remove it") -> None:
    """Begin work under a plan in a folder, or go on with it.

    Raises TesseraError if other work stands there, with what to do instead.
    """
    path = folder / PLAN
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {path}: {error}; remove {folder} to start afresh") from None
    told = json.dumps(plan, indent=1)
    if before is not None and (found := changes(_completed(before), json.loads(told))):
        differing = "; ".join(f"{name} was {old}, is {new}" for name, old, new in found)
        raise TesseraError(f"{folder} holds other work: {differing}. {instead}")
    if before != json.loads(told):  # else others may be reading it
        atomic_write(path, told)


def _completed(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan that an earlier Tessera wrote down, with the defaults of settings that were not there yet."""
    found = dict(plan)
    for name, value in plan.items():
        if name == "subject" and isinstance(value, dict):
            found[name] = _completed(value)
        if name not in SETTINGS or not isinstance(value, dict):
            continue
        kind = SETTINGS[name]
        known = {key: value[key] for key in value if kind is not SamplingConfig or key in SamplingConfig.model_fields}
        try:
            adapter = TypeAdapter(kind)
            found[name] = value | adapter.dump_python(adapter.validate_python(known), mode="json")
        except ValidationError:  # what is no such setting, or no longer one, differs as it stands
            continue
    return found
