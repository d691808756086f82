"""The YAML file of a study: a recipe, the settings in which its members differ, and how all are evaluated."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tessera.errors import TesseraError
from tessera.settings import KeysOf, Settings, apply_overrides, find_recipe, flatten, read_yaml, unknown_name, validate
from tessera.training.recipe import Recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")  # of an axis value, which is a part of a folder's name
RESERVED = {  # settings that a study decides itself, and what to set instead
    "run_dir": "each member has a folder in the study's output",
    "training.steps": "set budget.steps or budget.flops",
    "training.seed": "set seeds",
    "evaluation.at": "set marks",
    "evaluation.every": "set marks",
}


def _flatten_overrides(value: Any) -> Any:
    return flatten(_kinds_first(value)) if isinstance(value, dict) else {} if value is None else value


def _kinds_first(value: Any) -> Any:
    """Sort `kind` before other keys, because selecting a kind drops the fields of the previous one."""
    if not isinstance(value, dict):
        return value
    return {str(key): _kinds_first(value[key]) for key in sorted(value, key=lambda key: key != "kind")}


def _text_keys(value: Any) -> Any:
    """YAML reads a value's name such as 2 as a number."""
    return {str(key): part for key, part in value.items()} if isinstance(value, dict) else value


# Settings of a recipe by their dotted names, as on the command line: {"network.depth": 3}.
Overrides = Annotated[dict[str, Any], BeforeValidator(_flatten_overrides), KeysOf(Recipe)]
Values = Annotated[dict[str, Overrides], BeforeValidator(_text_keys)]


class Marks(Settings):
    """Where every member is scored beside its end, to compare members at equal compute or equal steps."""

    flops: tuple[PositiveFloat, ...] = Field(default=(), description="training FLOPs so far")
    steps: tuple[PositiveInt, ...] = Field(default=(), description="steps so far")


class Budget(Settings):
    """The length of each member's training, in steps or in training FLOPs."""

    steps: PositiveInt | None = None
    flops: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> "Budget":
        if (self.steps is None) == (self.flops is None):
            raise ValueError("set either budget.steps or budget.flops")
        return self


class LawConfig(Settings):
    """The scaling law that is fitted to the members: metric = scale * compute^-exponent."""

    against: Literal["gmacs", "flops"] = Field(
        default="gmacs", description="GMACs of a forward pass at equal steps (the paper's), or training FLOPs so far"
    )
    held_out: PositiveInt = Field(default=1, description="number of largest members that are predicted from the others")


class Comparison(Settings):
    """Which values of an axis are better than the baseline, by more than seeds differ."""

    axis: str
    baseline: Annotated[str, BeforeValidator(str)]  # YAML reads a name such as 2 as a number


class Study(Settings):
    """A grid of runs. Every combination of one value from each axis, with each seed, is a member."""

    question: str = Field(description="the question of the study in one sentence: the title of the report")
    recipe: str = Field(description="the recipe of all members, relative to the study's file")
    output: str = Field(description="the folder of the study; by default runs/NAME")
    set: Overrides = Field(default_factory=dict, description="settings of all members, over those of the recipe")
    axes: dict[str, Values] = Field(description="axis: value: settings")
    seeds: tuple[NonNegativeInt, ...] = (0,)
    budget: Budget
    marks: Marks = Marks()
    sampling_steps: tuple[PositiveInt, ...] = Field(
        default=(), description="numbers of sampling steps with which finished members are scored, too"
    )
    law: LawConfig | None = None
    compare: Comparison | None = None
    limit_minutes: PositiveFloat | None = Field(default=None, description="refuse a longer plan, on one machine")

    @model_validator(mode="after")
    def _check(self) -> "Study":
        if not self.axes or not all(self.axes.values()):
            raise ValueError("a study needs at least one axis with at least one value")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: expected at least one, and no duplicates")
        for name in (value for values in self.axes.values() for value in values):
            if not NAME.fullmatch(name):
                raise ValueError(f"the value '{name}' becomes part of a folder's name: use letters, digits and ._+=-")
        for settings in (self.set, *(settings for values in self.axes.values() for settings in values.values())):
            for name in settings:
                if (remedy := RESERVED.get(name)) is not None:
                    raise ValueError(f"{name} cannot be set for a member: {remedy}")
        if self.compare is not None:
            if self.compare.axis not in self.axes:
                raise ValueError(unknown_name("axis", self.compare.axis, self.axes))
            if self.compare.baseline not in self.axes[self.compare.axis]:
                raise ValueError(unknown_name("value", self.compare.baseline, self.axes[self.compare.axis]))
        return self


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    name: str  # of its folder: "S-2", "S-2-seed1"
    values: dict[str, str]  # axis: value
    seed: int
    overrides: Overrides  # over the recipe


def members(study: Study) -> Iterator[Member]:
    """All members. The last axis changes fastest and the seed slowest, so that the first seed is complete first."""
    for seed in study.seeds:
        for combination in product(*(values.items() for values in study.axes.values())):
            values = {axis: value for axis, (value, _) in zip(study.axes, combination)}
            overrides = dict(study.set)
            for _, settings in combination:
                # Behind all others: another kind of network drops the settings of the kind before.
                overrides = {name: value for name, value in overrides.items() if name not in settings} | settings
            name = "-".join(values.values()) + (f"-seed{seed}" if len(study.seeds) > 1 else "")
            yield Member(name, values, seed, overrides | {"training.seed": seed})


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's file with dotted overrides (`budget.steps=500`). Raises TesseraError.

    The default of `output` is runs/<name of the file>. `recipe` becomes a path from the working directory.
    """
    path = find_recipe(path)
    if not path.exists():
        raise TesseraError(f"there is no study {path}: expected a YAML file with recipe, axes and budget")
    content = read_yaml(path, Study)
    if "training" in content and "axes" not in content:
        raise TesseraError(
            f"{path} is the recipe of one run; expected a study with recipe, axes and budget. "
            f"`tessera train {path}` runs the recipe"
        )
    data = apply_overrides({"output": f"runs/{path.stem}", **content}, overrides, Study, "budget.steps=500")
    study = validate(Study, data, f"study {path}")
    recipe = path.parent / study.recipe
    if not recipe.exists():
        raise TesseraError(f"study {path}: there is no recipe at {recipe}; the path is relative to the study's file")
    return study.model_copy(update={"recipe": str(recipe)})
