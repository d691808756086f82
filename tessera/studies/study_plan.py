"""A study before it runs: every member's whole recipe, what it will take, and which shard it falls to.

OUTPUT/study.yaml   the study
OUTPUT/plan.json    each member's recipe, and what was planned for it before it began
"""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tessera.data.images import Dataset
from tessera.data.latents import LatentsDataset
from tessera.errors import TesseraError, bullet_list
from tessera.evaluation import suite
from tessera.evaluation.features import FeatureSet, Progress, load_extractor
from tessera.evaluation.reference import resolve_reference
from tessera.evaluation.sources import DatasetSource
from tessera.files import atomic_file
from tessera.interop import load
from tessera.models.network import parameter_count
from tessera.planning import hardware as machines
from tessera.planning.hardware import Hardware
from tessera.reporting.text import format_duration
from tessera.runtime import choose_device
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import Settings, diff, to_yaml, validate
from tessera.studies.study import Budget, Marks, Member, Study, members
from tessera.training import initialization
from tessera.training.plan_recipe import count_function_evaluations, plan_for_recipe
from tessera.training.recipe import Recipe, infer_pixel_channels, read_recipe, resolve_recipe
from tessera.training.run import open_data

PLAN, STUDY, MEMBERS, REFERENCE = "plan.json", "study.yaml", "members", "reference"
# Where a member runs and writes, not what it is.
WHERE = {"run_dir", "training.device", "training.num_workers", "training.tensorboard", "evaluation.reference_folder"}


class MemberPlan(Settings):
    """One member: what it is, and what it will take."""

    values: dict[str, str]
    seed: int
    recipe: Recipe
    parameters: int
    macs: float  # multiply-adds of a forward pass of one sample
    sampling_macs: dict[int, float]  # of one picture: all calls of the network, by the number of steps
    memory_bytes: int
    fits: bool
    seconds: float  # of training
    evaluation_seconds: float  # of drawing and scoring, at the marks and with other numbers of steps

    @property
    def steps(self) -> int:
        return self.recipe.training.steps

    @property
    def flops_per_step(self) -> float:
        """Of training: a multiply-add is two, forward and backward three."""
        return 6 * self.macs * self.recipe.training.global_batch_size

    @property
    def flops(self) -> float:
        return self.flops_per_step * self.steps

    @property
    def total_flops(self) -> float:
        """With the pictures drawn at the marks: what shards are balanced by, the same on every machine."""
        return self.flops + 2 * self.evaluation_macs

    @property
    def evaluation_macs(self) -> float:
        """Multiply-adds of all pictures that are drawn to be scored, at the marks and with other numbers of steps."""
        at_marks = self.sampling_macs[self.recipe.sampling.num_steps]
        each = sum(self.sampling_macs.values()) - at_marks + at_marks * len(self.recipe.evaluation.at)
        return each * self.recipe.evaluation.num_samples

    @property
    def total_seconds(self) -> float:
        return self.seconds + self.evaluation_seconds


class StudyPlan(Settings):
    """All members in the order in which they run."""

    format: Literal[1] = 1
    members: dict[str, MemberPlan]

    @property
    def seconds(self) -> float:
        """On one machine."""
        return sum(member.total_seconds for member in self.members.values())


# The members' recipes


@dataclass(frozen=True)
class ResolvedMember:
    """A member whose recipe is known to be possible."""

    member: Member
    recipe: Recipe
    parameters: int
    macs: float


def resolve_members(study: Study) -> list[ResolvedMember]:
    """Every member's whole recipe. Raises TesseraError that names each impossible one, or what is not scored alike."""
    opened: dict[str, Any] = {}
    found, faults = [], []
    for member in members(study):
        try:
            found.append(_prepared(study, member, opened))
        except TesseraError as error:
            faults.append(f"{member.name}: {error}")
    if faults:
        raise TesseraError(f"{len(faults)} of the study's members cannot be:{bullet_list(faults)}")
    names = [prepared.member.name for prepared in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TesseraError(f"two members would be called {twice[0]}: give the values of the axes other names")
    _check_scoring(study, found)
    return found


def _prepared(study: Study, member: Member, opened: dict[str, Any]) -> ResolvedMember:
    words = [f"{name}={json.dumps(value)}" for name, value in member.overrides.items()]
    folder = Path(study.output) / MEMBERS / member.name
    recipe = resolve(read_recipe(Path(study.recipe), [*words, f"run_dir={json.dumps(str(folder))}"]), opened)
    with torch.device("meta"):
        network = recipe.network.build()
    macs = network.macs()
    per_step = 6 * macs * recipe.training.global_batch_size
    steps = training_steps(study.budget, per_step)
    scored = {
        "every": None,
        "at": evaluation_steps(study.marks, per_step, steps),
        "reference_folder": str(Path(study.output) / REFERENCE),
    }
    recipe = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update={"steps": steps}),
            "evaluation": recipe.evaluation.model_copy(update=scored),
        }
    )
    process = recipe.diffusion.resolved(recipe.network.in_channels, recipe.network.input_size).build()
    for number in study.sampling_steps:
        timestep_grid(recipe.sampling.timestep_spacing, number, process)
    return ResolvedMember(member, recipe, parameter_count(network), macs)


def resolve(recipe: Recipe, opened: dict[str, Any]) -> Recipe:
    """A recipe with every size filled in. opened: what was opened before, by the data and the codec."""
    config = recipe.training
    if config.init_from is not None:
        if config.init_from not in opened:
            opened[config.init_from] = load.load(
                config.init_from, "cpu", num_heads=config.init_num_heads, checkpoint_type=config.init_type
            )
        recipe = initialization.inherit_settings(recipe, opened[config.init_from])
    recipe = infer_pixel_channels(recipe)
    key = recipe.data.model_dump_json() + recipe.codec.model_dump_json()
    if key not in opened:
        codec = recipe.codec.build()
        source: Dataset | LatentsDataset = open_data(recipe, codec)
        opened[key] = codec, source.class_names
    codec, class_names = opened[key]
    return resolve_recipe(recipe, class_names, codec)


def training_steps(budget: Budget, flops_per_step: float) -> int:
    """How long a member trains: the whole number of steps nearest to the budget, one at least."""
    if budget.steps is not None:
        return budget.steps
    assert budget.flops is not None
    return max(1, round(budget.flops / flops_per_step))


def evaluation_steps(marks: Marks, flops_per_step: float, steps: int) -> tuple[int, ...]:
    """The steps at which a member is scored, the last being its end.

    A mark of FLOPs is the step nearest to it, so a member may be half a step away; marks past the end are left out.
    """
    found = {*marks.steps, *(max(1, round(flops / flops_per_step)) for flops in marks.flops)}
    return (*sorted(step for step in found if step < steps), steps)


def evaluation_protocol(recipe: Recipe) -> dict[str, Any]:
    """How a member is scored, as far as recipes say it."""
    evaluation, data = recipe.evaluation.model_dump(mode="json"), recipe.data.model_dump(mode="json")
    for name in ("every", "at", "reference_folder"):
        del evaluation[name]
    return {
        "evaluation": {**evaluation, "reference": evaluation["reference"] or data},
        "sampling": recipe.sampling.model_dump(mode="json"),
    }


def _check_scoring(study: Study, found: Sequence[ResolvedMember]) -> None:
    """Raise TesseraError unless all members are scored alike, and can be."""
    first, *others = found
    for other in others:
        if differing := diff(evaluation_protocol(first.recipe), evaluation_protocol(other.recipe)):
            told = "; ".join(f"{name} is {old} and {new}" for name, old, new in differing)
            raise TesseraError(
                f"members {first.member.name} and {other.member.name} would be scored in two ways: {told}\n"
                "say evaluation and sampling in the recipe or in `set`, for all alike, and evaluation.reference "
                "where the data differ"
            )
    recipe = first.recipe
    evaluation, told = recipe.evaluation, recipe.evaluation.reference or recipe.data
    network = load_extractor(evaluation.features or suite.default_features(told), choose_device(recipe.training.device))
    reference = resolve_reference(told, DatasetSource(recipe.data), network)
    suite.check_metrics(
        evaluation.metrics, evaluation.num_samples, network, reference if isinstance(reference, FeatureSet) else None
    )


def sampling_macs(recipe: Recipe, macs: float, numbers: Iterable[int]) -> dict[int, float]:
    """Multiply-adds of all calls of the network for one picture, guidance included, with so many steps: the recipe's
    number and others. What caching saves is not taken off.
    """
    process = recipe.diffusion.resolved(recipe.network.in_channels, recipe.network.input_size).build()
    found = {}
    for steps in sorted({recipe.sampling.num_steps, *numbers}):
        drawn = recipe.sampling.model_copy(update={"num_steps": steps})
        found[steps] = macs * count_function_evaluations(recipe.model_copy(update={"sampling": drawn}), process)
    return found


# What it takes


def plan_study(
    study: Study,
    found: Sequence[ResolvedMember],
    before: StudyPlan | None = None,
    hardware: str | None = None,
    progress: Progress = None,
) -> StudyPlan:
    """What the members will take; those that stand in `before` keep what was planned for them before they began.

    hardware: as in `tessera plan`; None: this machine. Raises TesseraError if `before` is another study's plan.
    """
    if before is not None:
        check_same_study(Path(study.output), before, {each.member.name: each.recipe for each in found})
    device = choose_device(found[0].recipe.training.device).type
    machine = machines.find(hardware or ("cuda" if device == "cuda" else "cpu"))
    told: dict[str, MemberPlan] = {}
    alike: dict[str, MemberPlan] = {}
    for number, each in enumerate(found):
        if progress is not None:
            progress(number, len(found))
        member = each.member
        values = json.dumps(member.values)
        if before is not None and member.name in before.members:
            drawing = sampling_macs(each.recipe, each.macs, study.sampling_steps)
            changed = {"recipe": each.recipe, "drawing_macs": drawing}
            told[member.name] = before.members[member.name].model_copy(update=changed)
        elif values in alike:  # seeds cost alike
            told[member.name] = alike[values].model_copy(update={"seed": member.seed, "recipe": each.recipe})
        else:
            told[member.name] = _planned(study, each, machine)
        alike[values] = told[member.name]
    return StudyPlan(members=told)


def _planned(study: Study, prepared: ResolvedMember, hardware: Hardware) -> MemberPlan:
    recipe, macs = prepared.recipe, prepared.macs
    made, drawing = plan_for_recipe(recipe, hardware), sampling_macs(recipe, macs, study.sampling_steps)
    others = [drawing[steps] for steps in study.sampling_steps if steps != recipe.sampling.num_steps]
    drawn = made.call_seconds * sum(others) / macs + made.extract_seconds * len(others)  # of one picture each
    return MemberPlan(
        values=prepared.member.values,
        seed=prepared.member.seed,
        recipe=recipe,
        parameters=prepared.parameters,
        macs=macs,
        sampling_macs=drawing,
        memory_bytes=made.memory_bytes,
        fits=made.fits,
        seconds=made.seconds,
        evaluation_seconds=made.evaluation_seconds + drawn * recipe.evaluation.num_samples,
    )


def check_limits(study: Study, planned: StudyPlan) -> None:
    """Raise TesseraError, with the plan that says why, for members that do not fit and a study that takes too long."""
    large = [name for name, member in planned.members.items() if not member.fits]
    if large:
        raise TesseraError(
            f"{format_plan(planned)}\nthese members do not fit in memory: {', '.join(large)}\n"
            "lower set.training.micro_batch_size, set training.activation_checkpointing, or leave them out"
        )
    limit = study.limit_minutes
    if limit is not None and planned.seconds > 60 * limit:
        raise TesseraError(
            f"{format_plan(planned)}\nthe study takes about {format_duration(planned.seconds)} on one machine, and limit_minutes is "
            f"{limit:g}: lower the budget, the sizes or evaluation.num_samples, or raise limit_minutes"
        )


def format_plan(planned: StudyPlan) -> str:
    """The plan, for people."""
    width = max(6, *map(len, planned.members))
    lines = [
        f"{'member':<{width}}  {'parameters':>12}  {'GMACs':>9}  {'steps':>8}  {'FLOPs':>9}  {'memory':>10}  "
        f"{'training':>12}  {'scoring':>12}"
    ]
    for name, member in planned.members.items():
        lines.append(
            f"{name:<{width}}  {member.parameters:>12,}  {member.macs / 1e9:>9.4g}  {member.steps:>8,}  "
            f"{member.flops:>9.3g}  {member.memory_bytes / 2**20:>6,.0f} MiB  {format_duration(member.seconds):>12}  "
            f"{format_duration(member.evaluation_seconds):>12}" + ("" if member.fits else "  does not fit")
        )
    flops = sum(member.flops for member in planned.members.values())
    lines.append(
        f"{len(planned.members)} members, {flops:.4g} FLOPs of training, about {format_duration(planned.seconds)} in all"
    )
    return "\n".join(lines)


# Kept in the folder


def read_plan(folder: Path) -> StudyPlan | None:
    """The plan that a study's folder holds, if it was begun. Raises TesseraError if it is damaged."""
    path = folder / PLAN
    try:
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {path}: {error}; remove it to have it made again") from None
    return None if told is None else validate(StudyPlan, told, str(path))


def write_plan(study: Study, planned: StudyPlan) -> None:
    """Write the study and its plan down. Raises TesseraError if that cannot be done."""
    folder, writer = Path(study.output), f"{platform.node()}-{os.getpid()}"
    told = json.dumps(planned.model_dump(mode="json"), indent=1) + "\n"
    for path, text in ((folder / STUDY, to_yaml(study)), (folder / PLAN, told)):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with atomic_file(path, writer) as partial:
                partial.write_text(text, encoding="utf-8")


def check_same_study(folder: Path, before: StudyPlan, recipes: dict[str, Recipe]) -> None:
    """Raise TesseraError unless every member that a folder holds is in the study, and as it was."""
    instead = "give the study another output=, or remove that folder"
    if gone := [name for name in before.members if name not in recipes]:
        raise TesseraError(
            f"{folder} holds another study: {', '.join(gone[:4])} {'is' if len(gone) == 1 else 'are'} not in "
            f"this one, whose members are {', '.join(list(recipes)[:4])} …; {instead}"
        )
    for name, member in before.members.items():
        one, other = (recipe.model_dump(mode="json") for recipe in (member.recipe, recipes[name]))
        differing = [f"{place} was {old}, is {new}" for place, old, new in diff(one, other) if place not in WHERE]
        if differing:
            raise TesseraError(f"{folder} holds another study: of {name} {'; '.join(differing)}; {instead}")


# Split over machines


def shard_members(planned: StudyPlan, shard: tuple[int, int]) -> list[str]:
    """The members of shard (index from 0, count): the most expensive first, each to the shard with the least so far.

    By FLOPs, not by seconds: every machine must come to the same split.
    """
    index, count = shard
    loads, shards = [0.0] * count, [set[str]() for _ in range(count)]
    for name in sorted(planned.members, key=lambda name: -planned.members[name].total_flops):
        least = loads.index(min(loads))
        loads[least] += planned.members[name].total_flops
        shards[least].add(name)
    return [name for name in planned.members if name in shards[index]]
