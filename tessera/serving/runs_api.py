"""Runs of training below one folder, for the studio: read-only, live while they train."""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

from tessera import bundle
from tessera.errors import TesseraError
from tessera.monitoring.doctor import as_json
from tessera.monitoring.history import read_history, series
from tessera.monitoring.logger import HEALTH, LOG
from tessera.serving.errors import ApiError
from tessera.serving.images_api import event, event_stream
from tessera.serving.models import parse_models
from tessera.serving.service import Service
from tessera.settings import read_yaml
from tessera.training import scores

POINTS = 500  # of a curve; longer ones are averaged
DEPTH = 3  # folders between the root and a run
LIVE_SECONDS = 60.0  # since the last change of a run that trains
POLL_SECONDS = 1.0
LOG_SERIES = ("loss", "learning_rate", "grad_norm", "mfu", "images_per_second", "data_wait")
HEALTH_SERIES = ("loss_probe", "loss_ema")
RunName = Annotated[str, Query(max_length=500, description="its folder, relative to the folder of --runs")]


class RunSummary(BaseModel):
    name: str
    step: int
    steps: int
    changed: float = Field(description="time of the last change, in seconds since 1970")
    live: bool


class RunList(BaseModel):
    data: list[RunSummary]


class Curve(BaseModel):
    steps: list[int]
    values: list[float]


class ScoreCurve(Curve):
    low: list[float]
    high: list[float]


class Samples(BaseModel):
    step: int
    files: list[str] = Field(description="grids of samples: an image, and for clips an animation")


class RunState(RunSummary):
    series: dict[str, Curve]
    baselines: dict[str, float] = Field(description="losses of predictions without a network")
    scores: dict[str, ScoreCurve] = Field(description="with their 95 % intervals")
    samples: list[Samples]
    checkpoints: list[int]
    classes: int = Field(description="of its models; 0: none")
    text: bool = Field(description="whether its models take prompts")
    recipe: str


class Finding(BaseModel):
    name: str
    severity: str
    what: str
    evidence: str
    change: str


class Diagnosis(BaseModel):
    findings: list[Finding]
    facts: dict[str, str]


class CheckpointModel(BaseModel):
    id: str = Field(description="the name of the checkpoint as a model")


class Runs:
    """The runs below a folder. Methods wait for the disk."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise TesseraError(f"--runs {root} is not a folder: give the folder that holds runs of `tessera train`")
        self.root = root.resolve()

    def list(self) -> list[RunSummary]:
        patterns = ["/".join([*["*"] * depth, "recipe.yaml"]) for depth in range(DEPTH + 1)]
        folders = [path.parent for pattern in patterns for path in self.root.glob(pattern)]
        inside = [folder for folder in folders if folder.resolve().is_relative_to(self.root)]
        return sorted((self.summary(folder) for folder in inside), key=lambda run: -run.changed)

    def folder(self, name: str) -> Path:
        """The folder of a run. Raises ApiError 404 for everything else."""
        try:
            path = (self.root / name).resolve()
            if path.is_relative_to(self.root) and (path / "recipe.yaml").is_file():
                return path
        except (OSError, ValueError):
            pass
        raise ApiError(404, f"there is no run '{name[:100]}' in the folder of --runs", "run_not_found", "run")

    def summary(self, folder: Path) -> RunSummary:
        changed = max(_time(folder / name) for name in ("recipe.yaml", LOG, HEALTH))
        try:
            steps = int(read_yaml(folder / "recipe.yaml")["training"]["steps"])
        except (TesseraError, KeyError, TypeError, ValueError):
            steps = 0
        step = _last_step(folder / LOG)
        return RunSummary(
            name=folder.relative_to(self.root).as_posix(),
            step=step,
            steps=steps,
            changed=changed,
            live=step < steps and time.time() - changed < LIVE_SECONDS,
        )

    def state(self, name: str) -> RunState:
        """Everything that is shown of a run. Raises ApiError and TesseraError."""
        folder = self.folder(name)
        history = read_history(folder)
        curves = {key: series(history.log, key) for key in LOG_SERIES}
        curves |= {key: series(history.health, key) for key in HEALTH_SERIES}
        try:
            baselines = {"zero": history.baselines.zero, "linear": history.baselines.linear}
        except (TesseraError, KeyError, TypeError):
            baselines = {}  # not a run of a diffusion model
        return RunState(
            **self.summary(folder).model_dump(),
            series={key: curve(pairs) for key, pairs in curves.items() if pairs},
            baselines={key: value for key, value in baselines.items() if math.isfinite(value)},
            scores=_scores(folder),
            samples=_samples(folder),
            checkpoints=[int(path.name.removeprefix("step-")) for path in reversed(bundle.checkpoints(folder))],
            classes=int((history.recipe.get("network") or {}).get("num_classes") or 0),
            text=bool(history.recipe.get("text")),
            recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        )

    def signature(self, name: str) -> tuple[int, ...]:
        """Changes whenever the state of a run does."""
        folder = self.folder(name)
        parts = ("recipe.yaml", LOG, HEALTH, "samples", "checkpoints", scores.FOLDER)
        return tuple(path.stat().st_mtime_ns if (path := folder / part).exists() else 0 for part in parts)

    def sample_file(self, name: str, file: str) -> Path:
        """A grid of samples. Raises ApiError 404."""
        folder = self.folder(name) / "samples"
        path = next((path for path in folder.glob("step-*") if path.name == file), None)
        if path is None or not path.resolve().is_relative_to(self.root):
            raise ApiError(404, f"the run has no samples '{file[:100]}'", "no_samples")
        return path

    def checkpoint(self, name: str, step: int) -> Path:
        path = self.folder(name) / "checkpoints" / f"step-{step:09d}"
        if not path.is_dir() or not path.resolve().is_relative_to(self.root):
            raise ApiError(404, f"the run has no checkpoint of step {step}: it was deleted", "no_checkpoint", "step")
        return path


def runs_router(service: Service, root: Path, responses: dict[int | str, Any]) -> APIRouter:
    """Raises TesseraError if root is not a folder."""
    router = APIRouter(prefix="/v1/runs", responses=responses)
    runs = Runs(root)

    @router.get("", response_model=RunList)
    async def list_runs() -> RunList:
        """The runs below the folder, the one that changed last first."""
        return RunList(data=await asyncio.to_thread(runs.list))

    @router.get("/state", response_model=RunState)
    async def run_state(run: RunName) -> RunState:
        return await asyncio.to_thread(runs.state, run)

    @router.get("/findings", response_model=Diagnosis)
    async def run_findings(run: RunName) -> Diagnosis:
        """What `tessera doctor` reports."""
        folder = await asyncio.to_thread(runs.folder, run)
        return Diagnosis(**json.loads(await asyncio.to_thread(as_json, folder)))

    @router.get("/samples/{file}", response_class=FileResponse, responses={200: {"content": {"image/*": {}}}})
    async def run_samples(run: RunName, file: str) -> FileResponse:
        return FileResponse(await asyncio.to_thread(runs.sample_file, run, file))

    @router.get("/events", response_class=StreamingResponse, include_in_schema=False)
    async def run_events(request: Request, run: RunName) -> StreamingResponse:
        """Server-sent events: the state of the run, now and after every change."""
        await asyncio.to_thread(runs.folder, run)
        return event_stream(_events(service, runs, run))

    @router.post("/models", response_model=CheckpointModel)
    async def serve_checkpoint(run: RunName, step: Annotated[int, Query(ge=0, lt=10**9)]) -> CheckpointModel:
        """Make a checkpoint one of /v1/models; it is loaded when a job needs it."""
        path = await asyncio.to_thread(runs.checkpoint, run, step)
        name = f"{'run' if run == '.' else run}-{step}".replace("@", "-")
        name = "".join(
            letter if (letter.isascii() and letter.isalnum()) or letter in "._-" else "-" for letter in name
        ).strip("._-")[-100:]
        entry = service.pool.entries.get(name)
        if entry is not None and entry.path != str(path):  # another run, whose name has the same letters
            name = f"{name[-91:].strip('._-')}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if name not in service.pool.entries:
            (entry,) = await asyncio.to_thread(parse_models, [f"{name}={path}"])
            service.pool.entries[name] = entry
        return CheckpointModel(id=name)

    return router


async def _events(service: Service, runs: Runs, run: str) -> AsyncIterator[bytes]:
    shown = None
    while not service.draining:
        try:
            signature = await asyncio.to_thread(runs.signature, run)
            if signature != shown:
                state = await asyncio.to_thread(runs.state, run)
                shown = signature
                yield event("state", state.model_dump(mode="json"))
        except (TesseraError, ApiError) as error:
            yield event("error", {"message": str(getattr(error, "detail", error))})
            return
        await asyncio.sleep(POLL_SECONDS)


def curve(pairs: Sequence[tuple[int, float]], points: int = POINTS) -> Curve:
    """At most `points` points: means of consecutive values, at the step of the last of them."""
    size = math.ceil(len(pairs) / points)
    groups = [pairs[first : first + size] for first in range(0, len(pairs), size)] if pairs else []
    return Curve(
        steps=[group[-1][0] for group in groups], values=[mean(value for _, value in group) for group in groups]
    )


def _scores(folder: Path) -> dict[str, ScoreCurve]:
    try:
        history = scores.history(folder)
    except (TesseraError, ValueError):
        return {}  # of another version
    curves: dict[str, ScoreCurve] = {}
    for step, by_metric in history.items():
        for metric, score in by_metric.items():
            if all(map(math.isfinite, (score.value, score.low, score.high))):
                values = curves.setdefault(metric, ScoreCurve(steps=[], values=[], low=[], high=[]))
                values.steps.append(step)
                values.values.append(score.value)
                values.low.append(score.low)
                values.high.append(score.high)
    return curves


def _samples(folder: Path) -> list[Samples]:
    files: dict[int, list[str]] = {}
    for path in sorted((folder / "samples").glob("step-*")):
        digits = path.stem.removeprefix("step-")
        if digits.isdigit() and path.suffix in (".png", ".webp", ".gif"):
            files.setdefault(int(digits), []).append(path.name)
    return [Samples(step=step, files=names) for step, names in sorted(files.items())]


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_step(path: Path, size: int = 2**14) -> int:
    """The step of the last record of a log, read from its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
