"""Prompts of the command line: words, or a file with one prompt in each line."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError

COLUMNS = ("prompt", "negative_prompt", "guidance_scale", "seed")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a file may set for it alone."""

    prompt: str
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None


def read_prompts(words: Sequence[str], file: Path | None, negative: str | None) -> list[Prompt]:
    """The prompts of --prompt and --prompts. negative: of those that set none. Raises TesseraError."""
    prompts = [Prompt(word) for word in words] + ([] if file is None else _read_file(file))
    if negative is not None and not prompts:
        raise TesseraError("--negative-prompt needs a prompt: give --prompt TEXT or --prompts FILE")
    return [
        Prompt(
            each.prompt,
            negative if each.negative_prompt is None else each.negative_prompt,
            each.guidance_scale,
            each.seed,
        )
        for each in prompts
    ]


def _read_file(file: Path) -> list[Prompt]:
    """One prompt in each line of a .txt; in a .csv or .jsonl, the columns of COLUMNS."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TesseraError(f"cannot read --prompts {file}: {error}") from None
    lines = text.splitlines()
    match file.suffix.lower():
        case ".csv":
            rows: list[Any] = list(csv.DictReader(lines))
        case ".jsonl" | ".json":
            rows = [_json_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        case _:
            rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    prompts = [_prompt(row, f"{file}, prompt {number}") for number, row in enumerate(rows, start=1)]
    if not prompts:
        raise TesseraError(
            f"--prompts {file} has no prompt: expected one in each line, or a .csv or .jsonl with 'prompt'"
        )
    return prompts


def _json_row(file: Path, number: int, line: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TesseraError(f"--prompts {file}, line {number}: {error}; expected one JSON object in each line") from None
    return {"prompt": row} if isinstance(row, str) else row


def _prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or set(row) - set(COLUMNS):
        known = ", ".join(COLUMNS)
        raise TesseraError(f"{where}: got {row}; expected {known}, of which the first must be there")
    values: dict[str, Any] = {name: value for name, value in row.items() if value not in (None, "") or name == "prompt"}
    try:
        guidance_scale = float(values["guidance_scale"]) if "guidance_scale" in values else None
        seed = int(values["seed"]) if "seed" in values else None
    except (TypeError, ValueError) as error:
        raise TesseraError(f"{where}: {error}; guidance_scale is a number and seed a whole number") from None
    return Prompt(values["prompt"], values.get("negative_prompt"), guidance_scale, seed)
