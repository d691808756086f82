"""The plan of a study before it runs: the resolved recipe and the cost of every member, and the shard it is in.

OUTPUT/study.yaml   the study
OUTPUT/plan.json    the recipe of each member, and its cost as planned before it started
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tessera.errors import TesseraError, bullet_list
from tessera.evaluation import suite
from tessera.evaluation.features import FeatureSet, Progress
from tessera.files import atomic_file, read_json, this_writer
from tessera.models.network import parameter_count
from tessera.planning import FLOPS_PER_MAC
from tessera.planning.hardware import Hardware, find
from tessera.reporting.text import format_duration
from tessera.runtime import choose_device
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import Settings, diff, to_yaml, validate
from tessera.studies.study import Budget, Marks, Member, Study, members
from tessera.studies.worker import load_reference
from tessera.training import initialization
from tessera.training.plan_recipe import count_function_evaluations, plan_for_recipe
from tessera.training.recipe import (
    Recipe,
    infer_pixel_channels,
    inherit_text,
    read_recipe,
    resolve_recipe,
    training_macs,
)
from tessera.training.run import load_init_model, measure_text, open_data

PLAN, STUDY, MEMBERS, REFERENCE = "plan.json", "study.yaml", "members", "reference"
# Settings that do not change the results of a member.
RUNTIME_SETTINGS = {
    "run_dir",
    "training.device",
    "training.num_workers",
    "training.decode_processes",
    "training.tensorboard",
    "evaluation.reference_folder",
}


class MemberPlan(Settings):
    """The recipe and the cost of one member."""

    values: dict[str, str]
    seed: int
    recipe: Recipe
    parameters: int
    macs: float  # multiply-adds of a forward pass of one sample
    training_macs: float  # a third of those of a training step for one sample
    sampling_macs: dict[int, float]  # of all network evaluations for one image, by the number of sampling steps
    memory_bytes: int
    fits: bool
    seconds: float  # of training
    evaluation_seconds: float  # of sampling and evaluation, at the marks and with other numbers of sampling steps

    @property
    def steps(self) -> int:
        return self.recipe.training.steps

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs."""
        return FLOPS_PER_MAC * self.training_macs * self.recipe.training.global_batch_size

    @property
    def flops(self) -> float:
        return self.flops_per_step * self.steps

    @property
    def total_flops(self) -> float:
        """With sampling. Shards are balanced by this number, which is equal on every machine."""
        return self.flops + 2 * self.evaluation_macs

    @property
    def evaluation_macs(self) -> float:
        """Multiply-adds of all scored images, at the marks and with other numbers of sampling steps."""
        at_marks = self.sampling_macs[self.recipe.sampling.num_steps]
        per_image = sum(self.sampling_macs.values()) - at_marks + at_marks * len(self.recipe.evaluation.at)
        return per_image * self.recipe.evaluation.num_samples

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


# The recipes of the members


@dataclass(frozen=True)
class ResolvedMember:
    """A member with its resolved recipe."""

    member: Member
    recipe: Recipe
    parameters: int
    macs: float
    training_macs: float


def resolve_members(study: Study) -> list[ResolvedMember]:
    """Every member with its whole recipe. Raises TesseraError that lists invalid members and unequal evaluations."""
    cache: dict[str, Any] = {}
    resolved, errors = [], []
    for member in members(study):
        try:
            resolved.append(_resolve_member(study, member, cache))
        except TesseraError as error:
            errors.append(f"{member.name}: {error}")
    if errors:
        raise TesseraError(f"{len(errors)} members of the study are invalid:{bullet_list(errors)}")
    names = [each.member.name for each in resolved]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise TesseraError(f"two members have the name {duplicates[0]}: rename values of the axes")
    _check_evaluation(resolved)
    return resolved


def _resolve_member(study: Study, member: Member, cache: dict[str, Any]) -> ResolvedMember:
    run_dir = Path(study.output) / MEMBERS / member.name
    overrides = [*member.overrides.items(), ("run_dir", str(run_dir))]
    recipe = resolve(read_recipe(Path(study.recipe), overrides), cache)
    with torch.device("meta"):
        network = recipe.network.build()
    macs = network.macs()
    training = training_macs(recipe.training, network)
    flops_per_step = FLOPS_PER_MAC * training * recipe.training.global_batch_size
    steps = training_steps(study.budget, flops_per_step)
    evaluation = {
        "every": None,
        "at": evaluation_steps(study.marks, flops_per_step, steps),
        "reference_folder": str(Path(study.output) / REFERENCE),
    }
    recipe = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update={"steps": steps}),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )
    process = recipe.diffusion.resolve(recipe.network.in_channels, recipe.network.input_size).build()
    for num_steps in study.sampling_steps:
        timestep_grid(recipe.sampling.timestep_spacing, num_steps, process)  # raises for impossible numbers
    return ResolvedMember(member, recipe, parameter_count(network), macs, training)


def resolve(recipe: Recipe, cache: dict[str, Any]) -> Recipe:
    """A recipe with all sizes filled in. cache: models, codecs, data and text that other members use, too."""
    config = recipe.training
    if config.init_from is not None:
        if config.init_from not in cache:
            cache[config.init_from] = load_init_model(recipe, None)
        recipe = initialization.inherit_settings(recipe, cache[config.init_from])
        recipe = inherit_text(recipe, cache[config.init_from].config.text)
    recipe = infer_pixel_channels(recipe)
    codec_key = recipe.codec.model_dump_json()
    if codec_key not in cache:
        cache[codec_key] = recipe.codec.build()
    codec = cache[codec_key]
    if config.init_from is not None:
        recipe = initialization.inherit_size(recipe, cache[config.init_from].config, codec)
    key = recipe.data.model_dump_json() + codec_key
    if key not in cache:
        cache[key] = open_data(recipe, codec)
    dataset = cache[key]
    text_key = f"{key} {recipe.network.kind} {recipe.network.uses_text} {recipe.text and recipe.text.model_dump_json()}"
    if text_key not in cache:
        measured, sizes = measure_text(recipe, dataset)
        cache[text_key] = measured.text, sizes
    text, sizes = cache[text_key]
    return resolve_recipe(recipe.model_copy(update={"text": text}), dataset.class_names, codec, text=sizes)


def training_steps(budget: Budget, flops_per_step: float) -> int:
    """The number of steps nearest to the budget, at least one."""
    if budget.steps is not None:
        return budget.steps
    assert budget.flops is not None
    return max(1, round(budget.flops / flops_per_step))


def evaluation_steps(marks: Marks, flops_per_step: float, steps: int) -> tuple[int, ...]:
    """The steps at which a member is scored; the last one is its end.

    A mark of FLOPs is the nearest step, so a member may be half a step off. Marks after the end are left out.
    """
    marked = {*marks.steps, *(max(1, round(flops / flops_per_step)) for flops in marks.flops)}
    return (*sorted(step for step in marked if step < steps), steps)


def evaluation_protocol(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide how a member is scored."""
    evaluation, data = recipe.evaluation.model_dump(mode="json"), recipe.data.model_dump(mode="json")
    for name in ("every", "at", "reference_folder"):
        del evaluation[name]
    return {
        "evaluation": {**evaluation, "reference": evaluation["reference"] or data},
        "sampling": recipe.sampling.model_dump(mode="json"),
    }


def _check_evaluation(resolved: Sequence[ResolvedMember]) -> None:
    """Raise TesseraError unless all members are evaluated by one possible protocol."""
    first, *others = resolved
    for other in others:
        if differences := diff(evaluation_protocol(first.recipe), evaluation_protocol(other.recipe)):
            text = "; ".join(f"{name} is {old} and {new}" for name, old, new in differences)
            raise TesseraError(
                f"members {first.member.name} and {other.member.name} are not evaluated by one protocol: {text}\n"
                "set evaluation and sampling in the recipe or in `set`, for all members, and evaluation.reference if "
                "the data differ"
            )
    evaluation = first.recipe.evaluation
    extractor, reference = load_reference(first.recipe)
    statistics = reference if isinstance(reference, FeatureSet) else None
    suite.check_metrics(evaluation.metrics, evaluation.num_samples, extractor, statistics)


def sampling_macs(recipe: Recipe, macs: float, sampling_steps: Iterable[int]) -> dict[int, float]:
    """Multiply-adds of all network evaluations for one image, with guidance, for the recipe's number of sampling steps
    and for others. Savings of caching are not subtracted.
    """
    process = recipe.diffusion.resolve(recipe.network.in_channels, recipe.network.input_size).build()
    result = {}
    for num_steps in sorted({recipe.sampling.num_steps, *sampling_steps}):
        sampling = recipe.sampling.model_copy(update={"num_steps": num_steps})
        result[num_steps] = macs * count_function_evaluations(recipe.model_copy(update={"sampling": sampling}), process)
    return result


# Cost


def plan_study(
    study: Study,
    resolved: Sequence[ResolvedMember],
    previous: StudyPlan | None = None,
    hardware: str | None = None,
    progress: Progress = None,
) -> StudyPlan:
    """Plan the members. Those in the previous plan keep the cost that was planned before they started.

    hardware: as in `tessera plan`; None: this machine. progress is called with the planned costs and their number,
    which is that of the members of one seed. Raises TesseraError if the previous plan is of another study.
    """
    if previous is not None:
        check_same_study(Path(study.output), previous, {each.member.name: each.recipe for each in resolved})
    on_gpu = choose_device(resolved[0].recipe.training.device).type == "cuda"
    machine = find(hardware or ("cuda" if on_gpu else "cpu"))
    plans: dict[str, MemberPlan] = {}
    by_values: dict[str, MemberPlan] = {}  # seeds have equal cost
    num_costs = len({json.dumps(each.member.values) for each in resolved})
    for each in resolved:
        member, values = each.member, json.dumps(each.member.values)
        if progress is not None and values not in by_values:
            progress(len(by_values), num_costs)
        if previous is not None and member.name in previous.members:
            macs = sampling_macs(each.recipe, each.macs, study.sampling_steps)
            changes = {"recipe": each.recipe, "sampling_macs": macs}
            plan = previous.members[member.name].model_copy(update=changes)
        elif values in by_values:
            plan = by_values[values].model_copy(update={"seed": member.seed, "recipe": each.recipe})
        else:
            plan = _plan_member(study, each, machine)
        plans[member.name] = by_values[values] = plan
    return StudyPlan(members=plans)


def _plan_member(study: Study, resolved: ResolvedMember, hardware: Hardware) -> MemberPlan:
    recipe, macs = resolved.recipe, resolved.macs
    cost, image_macs = plan_for_recipe(recipe, hardware), sampling_macs(recipe, macs, study.sampling_steps)
    others = [image_macs[steps] for steps in study.sampling_steps if steps != recipe.sampling.num_steps]
    image_seconds = cost.call_seconds * sum(others) / macs + cost.extract_seconds * len(others)
    return MemberPlan(
        values=resolved.member.values,
        seed=resolved.member.seed,
        recipe=recipe,
        parameters=resolved.parameters,
        macs=macs,
        training_macs=resolved.training_macs,
        sampling_macs=image_macs,
        memory_bytes=cost.memory_bytes,
        fits=cost.fits,
        seconds=cost.seconds,
        evaluation_seconds=cost.evaluation_seconds + image_seconds * recipe.evaluation.num_samples,
    )


def check_limits(study: Study, plan: StudyPlan) -> None:
    """Raise TesseraError if members do not fit in memory or the study takes too long."""
    too_large = [name for name, member in plan.members.items() if not member.fits]
    if too_large:
        raise TesseraError(
            f"these members do not fit in memory: {', '.join(too_large)}\n"
            "lower set.training.micro_batch_size, set training.activation_checkpointing, or leave them out"
        )
    limit = study.limit_minutes
    if limit is not None and plan.seconds > 60 * limit:
        raise TesseraError(
            f"the study takes about {format_duration(plan.seconds)} on one machine, and limit_minutes is {limit:g}: "
            "lower budget.steps or budget.flops, the sizes or set.evaluation.num_samples, "
            f"or allow it with limit_minutes={math.ceil(plan.seconds / 600) * 10}"
        )


def format_plan(plan: StudyPlan) -> str:
    """The plan as a text table."""
    width = max(6, *map(len, plan.members))
    lines = [
        f"{'member':<{width}}  {'parameters':>12}  {'GMACs':>9}  {'steps':>8}  {'FLOPs':>9}  {'memory':>10}  "
        f"{'training':>12}  {'evaluation':>12}"
    ]
    for name, member in plan.members.items():
        lines.append(
            f"{name:<{width}}  {member.parameters:>12,}  {member.macs / 1e9:>9.4g}  {member.steps:>8,}  "
            f"{member.flops:>9.3g}  {member.memory_bytes / 2**20:>6,.0f} MiB  {format_duration(member.seconds):>12}  "
            f"{format_duration(member.evaluation_seconds):>12}" + ("" if member.fits else "  does not fit")
        )
    flops, total = sum(member.flops for member in plan.members.values()), format_duration(plan.seconds)
    return "\n".join([*lines, f"{len(plan.members)} members, {flops:.4g} training FLOPs, about {total} in total"])


# The plan in the study's folder


def read_plan(folder: Path) -> StudyPlan | None:
    """The plan in a study's folder, or None if the study has not started. Raises TesseraError if it is damaged."""
    path = folder / PLAN
    if not path.exists():
        return None
    return validate(StudyPlan, read_json(path, "remove it to plan the study again"), str(path))


def write_plan(study: Study, plan: StudyPlan) -> None:
    """Write study.yaml and plan.json. Raises TesseraError if that fails."""
    folder, writer = Path(study.output), this_writer()
    data = json.dumps(plan.model_dump(mode="json"), indent=1) + "\n"
    for path, text in ((folder / STUDY, to_yaml(study)), (folder / PLAN, data)):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with atomic_file(path, writer) as partial:
                partial.write_text(text, encoding="utf-8")


def check_same_study(folder: Path, previous: StudyPlan, recipes: dict[str, Recipe]) -> None:
    """Raise TesseraError unless every member in the folder is in the study with the same recipe."""
    remedy = "give the study another output=, or remove that folder"
    if missing := [name for name in previous.members if name not in recipes]:
        raise TesseraError(
            f"{folder} holds another study: {', '.join(missing[:4])} {'is' if len(missing) == 1 else 'are'} not in "
            f"this one, whose members are {', '.join(list(recipes)[:4])} …; {remedy}"
        )
    for name, member in previous.members.items():
        old_recipe, new_recipe = (recipe.model_dump(mode="json") for recipe in (member.recipe, recipes[name]))
        changes = [row for row in diff(old_recipe, new_recipe) if row[0] not in RUNTIME_SETTINGS]
        if changes:
            text = "; ".join(f"{path} was {old}, is {new}" for path, old, new in changes)
            raise TesseraError(f"{folder} holds another study: in member {name} {text}; {remedy}")


def shard_members(plan: StudyPlan, shard: tuple[int, int]) -> list[str]:
    """The members of a shard (index from 0, count): the most expensive first, each to the shard with the least work.

    The work is counted in FLOPs, not seconds, so that every machine computes the same shards.
    """
    index, count = shard
    loads, shards = [0.0] * count, [set[str]() for _ in range(count)]
    for name in sorted(plan.members, key=lambda name: -plan.members[name].total_flops):
        least = loads.index(min(loads))
        loads[least] += plan.members[name].total_flops
        shards[least].add(name)
    return [name for name in plan.members if name in shards[index]]
