"""Power-function averages of the weights, from which averages of any length are computed after training.

Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C. The average with exponent gamma after step t weighs the
weights of step s by p(s) = (gamma + 1) s^gamma / t^(gamma + 1), for 0 < s <= t. Its length is the standard deviation of
that profile divided by t (sigma_rel in the paper), so an average of length 0.1 covers the same fraction of every run. A
weighted sum of saved averages whose profile is near another profile is near the average of that other profile.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera.checkpoint_files import write_tensors
from tessera.errors import TesseraError
from tessera.files import atomic_file

SNAPSHOTS = "ema-snapshots"  # the folder in that of a run
MAX_LENGTH = 12**-0.5  # gamma = 0, the mean of all weights
MAX_ERROR = 0.05  # of the profile of an average that is computed from others, relative to that profile


class Profile(NamedTuple):
    """An average: after which step, and its length."""

    step: int
    length: float


class Stored(NamedTuple):
    """Where an average is stored: the tensors of a safetensors file whose names begin with a prefix."""

    path: Path
    prefix: str = ""


@lru_cache
def gamma(length: float) -> float:
    """The exponent of the average of a length, which is above 0 and below MAX_LENGTH (section 3.1)."""
    # length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic, whose largest root is the one above 0.
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def new_weight(length: float, step: int) -> float:
    """The weight of the current weights in the average after step number `step`, counted from 1 (section 3.1)."""
    return 1.0 if step == 1 else -math.expm1((gamma(length) + 1) * math.log1p(-1 / step))


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """The integrals of p_i(s) q_j(s) over s (appendix C): [len(first), len(second)]"""
    (steps, exponents), (other_steps, other_exponents) = _columns(first), _columns(second)
    steps, exponents = steps[:, None], exponents[:, None]
    # Of (g + 1) s^g / t^(g + 1) times (h + 1) s^h / u^(h + 1), for s up to the smaller of t and u.
    end = np.minimum(steps, other_steps)
    decays = (end / steps) ** (exponents + 1) * (end / other_steps) ** (other_exponents + 1)
    return decays * (exponents + 1) * (other_exponents + 1) / ((exponents + other_exponents + 1) * end)


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma(profile.length) for profile in profiles])


def fit(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """The factors of stored averages whose sum is nearest to another average (section 3.2), and how near it is.

    The factors [len(stored)] add up to 1, so that weights that do not change stay as they are. Among those they are the
    least squares of the difference of the profiles. The error is the norm of that difference over that of the target's
    profile; 0 for an average that is stored.
    """
    if target in stored:
        return np.array([float(profile == target) for profile in stored]), 0.0
    factors, errors = _least_squares(stored, [target])
    return factors[:, 0], float(errors[0])


def _least_squares(stored: Sequence[Profile], targets: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """The factors [len(stored), len(targets)] and the errors [len(targets)] of `fit`."""
    products, with_targets = inner_products(stored, stored), inner_products(stored, targets)
    norms = np.array([inner_products([target], [target])[0, 0] for target in targets])
    count, scale = len(stored), np.diag(products) ** -0.5  # profiles of norm 1, as the numbers differ in size
    # Stationary points of the squared difference with a Lagrange multiplier for the sum of the factors.
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = products * scale[:, None] * scale
    system[:count, count] = system[count, :count] = scale
    right = np.vstack((with_targets * scale[:, None], np.ones(len(targets))))
    factors = np.linalg.lstsq(system, right, rcond=1e-13)[0][:count] * scale[:, None]
    squared = (factors * (products @ factors - 2 * with_targets)).sum(0) + norms
    return factors, np.sqrt(np.maximum(squared, 0.0) / norms)


def possible_lengths(stored: Sequence[Profile], step: int) -> list[float]:
    """The lengths, in steps of 0.005, that can be computed after a step with an error of at most MAX_ERROR."""
    if not step:
        return []  # the weights have not changed yet
    lengths = [round(0.005 * number, 3) for number in range(1, 58)]
    _, errors = _least_squares(stored, [Profile(step, length) for length in lengths])
    return [length for length, error in zip(lengths, errors) if error <= MAX_ERROR]


def snapshot_path(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / f"step-{step:09d}.safetensors"


def write_snapshot(tensors: Mapping[float, Mapping[str, Tensor]], run: Path, step: int) -> None:
    """Save the averages of each length after a step, whole or not at all. Raises TesseraError."""
    named = {f"{length}/{name}": tensor for length, state in tensors.items() for name, tensor in state.items()}
    with atomic_file(snapshot_path(run, step)) as partial:
        write_tensors(named, partial)


def snapshot_files(run: Path) -> dict[int, Path]:
    """The whole snapshots of a run, by step."""
    files = sorted((run / SNAPSHOTS).glob("step-*"))
    return {step: path for path in files if (step := snapshot_step(path.name)) is not None}


def snapshot_step(name: str) -> int | None:
    """The step of a file of snapshots; None for other files."""
    match = re.fullmatch(r"step-(\d{9})\.safetensors", name)
    return None if match is None else int(match[1])


def delete_snapshots_after(run: Path, step: int) -> None:
    """Delete the snapshots of steps that a run will train again, maybe differently."""
    for snapshot, path in snapshot_files(run).items():
        if snapshot > step:
            path.unlink(missing_ok=True)


def snapshots(run: Path, before: int) -> dict[Profile, Stored]:
    """The averages that a run has saved before a step. Raises TesseraError if a file is damaged."""
    stored = {}
    for step, path in snapshot_files(run).items():
        if step < before:
            with _open(path) as file:
                lengths = {float(name.split("/")[0]) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stored |= {Profile(step, length): Stored(path, f"{length}/") for length in sorted(lengths)}
    return stored


def combine(stored: Mapping[Stored, float]) -> dict[str, Tensor]:
    """The sum of stored averages times their factors, in float64, rounded to float32: tensors by name.

    Raises TesseraError if a file is damaged, or holds other tensors than the first.
    """
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in dict.fromkeys(each.path for each in stored)}
        shapes = {
            each: {
                name[len(each.prefix) :]: files[each.path].get_slice(name).get_shape()
                for name in files[each.path].keys()  # noqa: SIM118 (no mapping)
                if name.startswith(each.prefix)
            }
            for each in stored
        }
        first = next(iter(stored))
        for each in stored:
            if shapes[each] != shapes[first]:
                raise TesseraError(f"{each.path} holds other weights than {first.path}: remove it, and try again")
        combined = {}
        for name in shapes[first]:
            total = torch.zeros(shapes[first][name], dtype=torch.float64)
            for each, factor in stored.items():
                total += factor * files[each.path].get_tensor(each.prefix + name).double()
            combined[name] = total.float()
        return combined


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or not a safetensors file: {error}; remove it, and try again") from None
