"""What came of a study's members: where each stands, what it cost, how it scored on its way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessera.evaluation.protocol import Score


@dataclass(frozen=True)
class Point:
    """The scores of a member somewhere on its way."""

    step: int
    samples: int  # learned from so far
    flops: float  # of training so far: 6 x multiply-adds x samples
    seconds: float  # of training so far by the clock, without scoring, drawing and saving
    scores: dict[str, Score]  # by metric, the deciding one first


@dataclass(frozen=True)
class Drawn:
    """The scores of a finished member that draws with another number of steps."""

    steps: int
    macs: float  # multiply-adds for one picture: all calls of the network, guidance included
    scores: dict[str, Score]


@dataclass(frozen=True)
class Result:
    """One member. `points` are in the order of steps; the last is the end, if state is done."""

    name: str
    values: dict[str, str]  # axis: value
    seed: int
    state: Literal["done", "unfinished", "failed", "not begun"]
    fault: str | None  # why it failed, for people
    parameters: int
    macs: float  # multiply-adds of a forward pass of one sample
    planned_seconds: float  # of training, as planned before it began
    points: list[Point]
    drawn: list[Drawn]
    pictures: Path | None  # the last grid of samples, one column a class
