"""Continuous batching: rows with different solvers, times and guidance share network calls, and join between steps.

Rows that are at the same point of the same solver advance as one group; all groups share one network call. So a row can
join while others are half done. Its image is the one that it has alone, up to the rounding of matrix products of
another batch size. Shapes: B rows, n steps.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tessera import randomness
from tessera.diffusion.process import Prediction
from tessera.rows import Rows, pad, structure
from tessera.sampling.denoiser import DenoiserRows, RowDenoiser
from tessera.sampling.solver import Point, Step, Stepper, start_step

STREAM = 0x64726177  # random stream of sampling; training uses others


def sampling_noise(seed: Tensor, calls: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise number `calls` [B] of each seed [B]; number 0 is the initial state: float32 [B, *shape] on the CPU"""
    return randomness.normal(seed, calls, STREAM, tuple(shape))


@dataclass(frozen=True)
class RowState(Rows):
    """Rows during sampling, between two steps. Everything but x is on the CPU."""

    name: list[Any]  # [B] of the row, for the caller
    x: Tensor  # [B, C, ...]
    x0: Tensor  # [B, C, ...] as last predicted; before the first prediction, any value
    times: Tensor = field(metadata=pad(0))  # float64 [B, n + 1], or [B, n + 1, T] of frames
    step: Tensor  # int64 [B] steps done
    num_steps: Tensor  # int64 [B]
    seed: Tensor  # int64 [B]
    noise_calls: Tensor  # int64 [B] noises used
    inputs: DenoiserRows
    memory: Any  # of the solver

    def time(self, offset: int) -> Tensor:
        """The time of each row, `offset` steps ahead: float64 [B], or [B, T] of frames"""
        return self.times[torch.arange(len(self.step)), self.step + offset]

    @property
    def finished(self) -> Tensor:
        return self.step >= self.num_steps


@dataclass
class _Group:
    """Rows that advance together, between steps or within one."""

    solver: Stepper
    state: RowState
    running: Step[Any] | None = None
    point: Point | None = None  # where the running step needs a prediction
    noises: int = 0  # used in the running step
    leaving: set[Any] = field(default_factory=set)  # names of rows that are removed after the running step

    def begin(self, denoiser: RowDenoiser) -> None:
        state, self.noises = self.state, 0
        self.running = start_step(
            self.solver, denoiser.diffusion, state.x, state.time(0), state.time(1), state.memory, self._noise
        )
        self.point = next(self.running)

    def advance(self, prediction: Prediction, inputs: DenoiserRows) -> None:
        assert self.running is not None
        self.state = replace(self.state, inputs=inputs, x0=prediction.x0)
        try:
            self.point = self.running.send(prediction)
        except StopIteration as end:
            x, memory = end.value
            state = self.state
            self.state = replace(
                state, x=x, memory=memory, step=state.step + 1, noise_calls=state.noise_calls + self.noises
            )
            self.running = self.point = None

    def leave(self) -> None:
        """Take out the rows that are leaving."""
        if self.leaving:
            self.state = self.state[torch.tensor([name not in self.leaving for name in self.state.name])]
            self.leaving = set()

    def split(self, names: Collection[Any]) -> "tuple[_Group | None, _Group | None]":
        """The rows with these names, and the others. A group within a step stays whole: its rows advance together."""
        chosen = torch.tensor([name in names for name in self.state.name])
        if chosen.all() or (self.running is not None and chosen.any()):
            return self, None
        if not chosen.any():
            return None, self
        return replace(self, state=self.state[chosen]), replace(self, state=self.state[~chosen])

    def _noise(self) -> Tensor:
        state, number = self.state, self.noises
        self.noises += 1
        return sampling_noise(state.seed, state.noise_calls + number, state.x.shape[1:]).to(state.x.device)


class ContinuousBatch:
    """Rows that are sampled together. `add` rows at any time; each `step` makes one network call for every size."""

    def __init__(self, denoiser: RowDenoiser) -> None:
        self.denoiser = denoiser
        self._groups: list[_Group] = []

    @property
    def num_rows(self) -> int:
        return sum(len(group.state.x) for group in self._groups)

    @property
    def states(self) -> list[RowState]:
        """The rows in groups, in no order; those that leave at the end of their step included."""
        return [group.state for group in self._groups]

    @property
    def within_step(self) -> set[Any]:
        """Names of rows whose step needs more predictions. They advance with the others of their group."""
        return {name for group in self._groups if group.running is not None for name in group.state.name}

    def add(self, solver: Stepper, state: RowState) -> None:
        """Rows that join at the next step. Raises ValueError if two rows have the same name."""
        names = [name for group in self._groups for name in group.state.name if name not in group.leaving] + state.name
        if len(set(names)) < len(names):
            raise ValueError(f"rows that are sampled together need different names; got {state.name}")
        self._groups.append(_Group(solver, state))

    def remove(self, names: set[Any]) -> None:
        """Rows that leave without being finished: at once, or at the end of the step that they are in."""
        for group in self._groups:
            group.leaving |= names & set(group.state.name)
            if group.running is None or group.leaving.issuperset(group.state.name):
                group.leave()
        self._groups = [group for group in self._groups if len(group.state.x)]

    def step(self, names: Collection[Any] | None = None) -> list[RowState]:
        """One network call for every size of x. Returns the rows that are finished.

        names: of the rows that advance, with those that are within a step together with them (default: all rows)
        """
        waiting: list[_Group] = []
        if names is not None:
            parts = [group.split(names) for group in self._groups]
            self._groups = [chosen for chosen, _ in parts if chosen is not None]
            waiting = [other for _, other in parts if other is not None]
        for group in self._groups:
            if group.running is None:
                group.begin(self.denoiser)
        by_size: dict[Any, list[_Group]] = {}
        for group in self._groups:
            by_size.setdefault(group.state.x.shape[1:], []).append(group)
        for groups in by_size.values():
            points = [group.point for group in groups if group.point is not None]
            x, (t, s) = torch.cat([x for x, *_ in points]), _joined_times(points)
            prediction, inputs = self.denoiser(x, t, DenoiserRows.cat([group.state.inputs for group in groups]), s)
            start = 0
            for group in groups:
                rows = slice(start, start + len(group.state.x))
                group.advance(prediction[rows], inputs[rows])
                start = rows.stop
        self._groups += waiting
        return self._regroup()

    def _regroup(self) -> list[RowState]:
        """Take out finished rows, and join groups of the same solver whose memories have the same structure."""
        finished, waiting, running = [], {}, []
        for group in self._groups:
            if group.running is not None:
                running.append(group)
                continue
            group.leave()
            state = group.state
            done = state.finished
            if done.any():
                finished.append(state[done])
                state = state[~done]
            if len(state.x):
                waiting.setdefault((group.solver, state.x.shape[1:], structure(state)), []).append(state)
        self._groups = running + [_Group(key[0], RowState.cat(states)) for key, states in waiting.items()]
        return finished


def _joined_times(points: Sequence[Point]) -> tuple[Tensor, Tensor | None]:
    """The times t and s of all points: [B], or [B, T] if those of some are [B, T]. s: None if no point has one; a point
    without predicts at t itself, over a step of length 0"""
    times = [(x, t, rest[0] if rest else t) for x, t, *rest in points]
    if any(t.ndim == 2 for _, t, _ in times):
        times = [
            (x, *(each if each.ndim == 2 else each[:, None].expand(-1, x.shape[2]) for each in (t, s)))
            for x, t, s in times
        ]
    has_end = any(len(point) == 3 for point in points)
    return torch.cat([t for _, t, _ in times]), torch.cat([s for _, _, s in times]) if has_end else None
