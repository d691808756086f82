"""The denoiser that a solver calls: x0 and eps at (x, t), with guidance applied.

Shapes: B batch, C channels, T frames, K terms of guidance.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tessera.conditioning import Condition, NetworkFunction
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Prediction
from tessera.errors import TesseraError
from tessera.rows import Rows
from tessera.sampling.clipping import AnyClipping, NoClipping, clipped
from tessera.sampling.guidance import AnyGuidanceSchedule, Guidance
from tessera.times import expand, shared_time

Noise = Callable[[], Tensor]  # returns a new standard normal tensor shaped like x at every call


class Denoise(Protocol):
    """What a solver needs. diffusion gives alpha, sigma and the reverse distribution at any time."""

    diffusion: DiffusionProcess

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Prediction:
        """x [B, C, ...], t [B] or [B, T] -> Prediction

        s: like t, the end of the step over which the prediction is the average; None: at t
        """
        ...


class CachedNetwork(ABC):
    """A network that reuses parts of earlier calls. Its state is kept with the rows that it belongs to."""

    @abstractmethod
    def empty_state(self, x: Tensor) -> Rows:
        """The state of rows that were not evaluated."""

    @abstractmethod
    def evaluate(self, x: Tensor, t: Tensor, condition: Condition, state: Any) -> tuple[Tensor, Any]:
        """x [B, C, ...], t [B] in the units of the network -> ([B, O, ...], the new state)"""


SamplingNetwork = NetworkFunction | CachedNetwork


@dataclass(frozen=True)
class GuidanceModel:
    """The network that guidance leads away from, and its condition.

    The same network without its condition is classifier-free guidance. A weaker network with the same condition is
    autoguidance.
    """

    network: SamplingNetwork
    condition: Condition


@dataclass(frozen=True)
class _Inputs(Rows):
    """Inputs of a network."""

    x: Tensor
    t: Tensor
    condition: Condition
    state: Any


@dataclass(frozen=True)
class DenoiserRows(Rows):
    """What the denoiser needs to know about each row beside x and t."""

    conditions: tuple[Condition, ...]  # the condition, then that of the weak output of each term of guidance
    guidance: Guidance
    states: tuple[Any, ...]  # of a network with a cache, one for each condition; else None
    clipping: list[AnyClipping]  # [B] of x0
    # For each condition: noise [B, C, T, H, W] that replaces clean frames, or None. With it a term of guidance leads
    # away from the output without the frames before and after (Song et al. 2025, "History-guided video diffusion").
    frame_noise: tuple[Tensor | None, ...] | None = None

    @staticmethod
    def build(
        conditions: Sequence[Condition],
        guidance: Guidance,
        networks: Sequence[SamplingNetwork],
        x: Tensor,
        clipping: AnyClipping | None = None,
        frame_noise: Sequence[Tensor | None] | None = None,
    ) -> "DenoiserRows":
        """Rows that were not evaluated. networks: of each condition; x: of the first evaluation"""
        states = [network.empty_state(x) if isinstance(network, CachedNetwork) else None for network in networks]
        noise = None if frame_noise is None else tuple(frame_noise)
        return DenoiserRows(tuple(conditions), guidance, tuple(states), [clipping or NoClipping()] * len(x), noise)


class RowDenoiser:
    """Networks under a diffusion process: x0 and eps of rows, each with its own time, condition and guidance.

    networks: the network, then that of each term of guidance; equal ones are called once, with the rows of all.
    separate_calls: evaluate each term in a call of its own. rows_per_call: every call has exactly this many rows; the
    last ones may be repetitions. Matrix products of one size give a row the same bits, whatever the other rows are. A
    term is evaluated only for rows whose scale is not 1 at their time. Times are CPU tensors, so no decision
    waits for the device.
    """

    def __init__(
        self,
        networks: Sequence[SamplingNetwork],
        diffusion: DiffusionProcess,
        separate_calls: bool = False,
        rows_per_call: int | None = None,
    ) -> None:
        if rows_per_call is not None and any(isinstance(network, CachedNetwork) for network in networks):
            raise TesseraError("caching evaluates a varying number of rows: leave it out where that number is fixed")
        self.networks, self.rows_per_call = list(networks), rows_per_call
        self.diffusion = diffusion
        self.separate_calls = separate_calls

    def __call__(
        self, x: Tensor, t: Tensor, rows: DenoiserRows, s: Tensor | None = None
    ) -> tuple[Prediction, DenoiserRows]:
        """x [B, C, ...], t [B] or [B, T] -> (Prediction, the rows with new states). s: see `Denoise`"""
        raw, rows = self.raw(x, t, rows, s)
        return clipped(self.diffusion.predict(raw, x, t), rows.clipping), rows

    def raw(self, x: Tensor, t: Tensor, rows: DenoiserRows, s: Tensor | None = None) -> tuple[Tensor, DenoiserRows]:
        """The network's raw output [B, O, ...], guided, and the rows with new states."""
        step_size = None if s is None else shared_time(t - s).to(x.device, torch.float32, non_blocking=x.is_cuda)
        t = shared_time(t)
        scales = rows.guidance.scales_at(t)
        terms: list[tuple[int, Tensor | None]] = [(0, None)]  # each term with its rows; None: all
        for number, scale in enumerate(scales, start=1):
            guided = (scale != 1).flatten(1).any(dim=1) if scale.ndim > 1 else scale != 1
            if guided.any():
                selected = None if guided.all() else guided.nonzero()[:, 0].to(x.device, non_blocking=x.is_cuda)
                terms.append((number, selected))
        outputs, rows = self._evaluate(x, t, rows, terms, step_size)
        if len(terms) == 1:
            return outputs[0], rows
        cond, weak = outputs[0], []
        for (_, selection), output in zip(terms[1:], outputs[1:]):
            # A row that was not evaluated has a scale of 1: any finite value works.
            weak.append(output if selection is None else cond.index_copy(0, selection, output))
        raw = rows.guidance.combine(cond, weak, [scales[number - 1] for number, _ in terms[1:]], x.shape[1])
        return raw, rows

    def _evaluate(
        self,
        x: Tensor,
        t: Tensor,
        rows: DenoiserRows,
        terms: list[tuple[int, Tensor | None]],
        step_size: Tensor | None,
    ) -> tuple[list[Tensor], DenoiserRows]:
        """The raw output of each term for its rows."""
        all_inputs = (
            _Inputs(*self._state(x, t, rows, number), condition, rows.states[number])
            for number, _ in terms
            for condition in [replace(rows.conditions[number], step_size=step_size)]
        )
        inputs = [each if selection is None else each[selection] for each, (_, selection) in zip(all_inputs, terms)]
        outputs: list[Tensor | None] = [None] * len(terms)
        states = list(rows.states)
        for group in self._groups([number for number, _ in terms]):
            network, joined = self.networks[terms[group[0]][0]], _Inputs.cat([inputs[index] for index in group])
            if isinstance(network, CachedNetwork):
                raw, state = network.evaluate(joined.x, joined.t, joined.condition, joined.state)
            else:
                raw, state = self._call(network, joined), None
            raw, start = raw.to(x.dtype), 0
            for index in group:
                part = slice(start, start + len(inputs[index].x))
                outputs[index], start = raw[part], part.stop
                number, selection = terms[index]
                if state is not None:
                    new = state[part] if len(group) > 1 else state
                    states[number] = new if selection is None else states[number].put(selection, new)
        return [output for output in outputs if output is not None], replace(rows, states=tuple(states))

    def _state(self, x: Tensor, t: Tensor, rows: DenoiserRows, number: int) -> tuple[Tensor, Tensor]:
        """x and the time that the network gets for a term of guidance."""
        noise = None if rows.frame_noise is None else rows.frame_noise[number]
        if noise is not None and t.ndim == 2:
            is_clean = t == 0
            x, t = torch.where(expand(is_clean, x).bool(), noise, x), torch.where(is_clean, 1, t)
        return x, self.diffusion.model_time(t).to(x.device, non_blocking=x.is_cuda)

    def _call(self, network: NetworkFunction, inputs: _Inputs) -> Tensor:
        count, size = len(inputs.x), self.rows_per_call
        if size is None:
            return network(inputs.x, inputs.t, inputs.condition)
        filled = inputs[torch.arange(-(-count // size) * size).clamp(max=count - 1)]
        parts = [filled[start : start + size] for start in range(0, len(filled.x), size)]
        return torch.cat([network(part.x, part.t, part.condition) for part in parts])[:count]

    def _groups(self, numbers: list[int]) -> list[list[int]]:
        """The indices of terms that are evaluated in one call."""
        if self.separate_calls:
            return [[index] for index in range(len(numbers))]
        by_network: dict[int, list[int]] = {}
        for index, number in enumerate(numbers):
            by_network.setdefault(id(self.networks[number]), []).append(index)
        return list(by_network.values())


class Denoiser:
    """A network under its diffusion process, with a condition and guidance: the denoiser of one batch.

    guidance_scale: weak + scale (cond - weak), one number or one per row [B]; 1 is off and costs nothing.
    guidance_channels: guide only the first so many mean channels; "all" suits any model, 3 repeats the official code.
    guidance_model: by default the network itself, unconditional, evaluated in one batch with the conditional half.
    guidance_interval: guide only at times low <= t <= high, and skip the guidance model elsewhere (Kynkaanniemi et al.
    2024, "Applying guidance in a limited interval").
    guidance_schedule: how the guidance scale changes over time.
    guidance_rescale: 0 to 1, how far each guided output gets the standard deviation of the conditional one (Lin et al.
    2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4).
    The variance is that of the conditional output. For several terms of guidance, see `RowDenoiser`.
    """

    def __init__(
        self,
        network: SamplingNetwork,
        diffusion: DiffusionProcess,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        guidance_channels: int | Literal["all"] = "all",
        *,
        guidance_model: GuidanceModel | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_schedule: AnyGuidanceSchedule | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        self.diffusion = diffusion
        weak = guidance_model or GuidanceModel(network, condition.null())
        self._denoiser = RowDenoiser([network, weak.network], diffusion)
        self._conditions = [condition, weak.condition]
        self._guidance_settings = (
            guidance_scale, guidance_interval, guidance_rescale, guidance_channels, guidance_schedule,
        )  # fmt: skip
        self._rows: DenoiserRows | None = None

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Prediction:
        """x [B, C, ...], t [B] or [B, T] -> Prediction. s: see `Denoise`"""
        return self.diffusion.predict(self.raw(x, t, s), x, t)

    def raw(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """The network's raw output [B, O, ...], guided."""
        if self._rows is None:
            guidance = Guidance.build(len(x), *self._guidance_settings)
            self._rows = DenoiserRows.build(self._conditions, guidance, self._denoiser.networks, x)
        raw, self._rows = self._denoiser.raw(x, t, self._rows, s)
        return raw
