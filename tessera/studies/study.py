"""What a study is: one YAML file that names a recipe, what differs between its members, and how all are judged."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tessera.errors import TesseraError
from tessera.settings import Settings, apply_overrides, flatten, read_yaml, unknown_name, validate

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")  # of a value: part of a folder's name
SAID_OTHERWISE = {  # settings that a study decides itself
    "run_dir": "each member has a folder in the study's output",
    "training.steps": "say budget.steps or budget.flops",
    "training.seed": "say seeds",
    "evaluation.at": "say marks",
    "evaluation.every": "say marks",
}


def _dotted(value: Any) -> Any:
    """Nested settings under dotted names, the kind of a choice first, as it drops what it replaces."""
    return flatten(_kinds_first(value)) if isinstance(value, dict) else {} if value is None else value


def _kinds_first(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _kinds_first(value[key]) for key in sorted(value, key=lambda key: key != "kind")}


def _words(value: Any) -> Any:
    """YAML reads the names of values such as 2 as numbers."""
    return {str(key): part for key, part in value.items()} if isinstance(value, dict) else value


# Settings of a recipe by their dotted names, as on the command line: {"network.depth": 3}.
Overrides = Annotated[dict[str, Any], BeforeValidator(_dotted)]
Values = Annotated[dict[str, Overrides], BeforeValidator(_words)]


class Marks(Settings):
    """Where on its way every member is scored, beside its end: all are compared at the same compute or steps."""

    flops: tuple[PositiveFloat, ...] = Field(default=(), description="training FLOPs so far")
    steps: tuple[PositiveInt, ...] = Field(default=(), description="steps so far")


class Budget(Settings):
    """How long each member trains: so many steps, or until it has spent so many training FLOPs."""

    steps: PositiveInt | None = None
    flops: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.steps is None) == (self.flops is None):
            raise ValueError("say budget.steps or budget.flops, one of the two")
        return self


class LawConfig(Settings):
    """The law that is fitted to the members, metric = scale * compute^-exponent, and what it is tried on."""

    against: Literal["gmacs", "flops"] = Field(
        default="gmacs", description="of a forward pass at equal steps (the paper's), or of all training so far"
    )
    held_out: PositiveInt = Field(default=1, description="so many of the largest are predicted from the others")


class Comparison(Settings):
    """Which of the values on an axis is better, and whether by more than seeds differ."""

    axis: str
    baseline: Annotated[str, BeforeValidator(str)]  # also of a number, as `_words`


class Study(Settings):
    """A grid of runs. Every combination of one value from each axis, with each seed, is a member."""

    question: str = Field(description="what the study is to answer, in one sentence: the report's title")
    recipe: str = Field(description="the recipe all members start from, relative to the study's file")
    output: str = Field(description="the study's folder")
    set: Overrides = Field(default_factory=dict, description="settings of all members, over the recipe's")
    axes: dict[str, Values] = Field(description="axis: value: settings")
    seeds: tuple[NonNegativeInt, ...] = (0,)
    budget: Budget
    marks: Marks = Marks()
    sampling_steps: tuple[PositiveInt, ...] = Field(
        default=(), description="at the end each model draws with so many steps, too: compute in drawing, not training"
    )
    law: LawConfig | None = None
    compare: Comparison | None = None
    limit_minutes: PositiveFloat | None = Field(
        default=None, description="refuse a plan that takes longer on one machine"
    )

    @model_validator(mode="after")
    def _known(self) -> "Study":
        if not self.axes or not all(self.axes.values()):
            raise ValueError("a study needs at least one axis with at least one value")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: name at least one, and each once")
        for name in (value for values in self.axes.values() for value in values):
            if not NAME.fullmatch(name):
                raise ValueError(f"the value '{name}' is to be part of a folder's name: use letters, digits and ._+=-")
        for settings in (self.set, *(settings for values in self.axes.values() for settings in values.values())):
            for name in settings:
                if (instead := SAID_OTHERWISE.get(name)) is not None:
                    raise ValueError(f"{name} is not a member's to set: {instead}")
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
    """All of them: the last axis changes fastest, seeds slowest (so that the first seed is complete first)."""
    for seed in study.seeds:
        for chosen in product(*(values.items() for values in study.axes.values())):
            values = {axis: value for axis, (value, _) in zip(study.axes, chosen)}
            overrides = dict(study.set)
            for _, settings in chosen:
                overrides |= settings
            name = "-".join(values.values()) + (f"-seed{seed}" if len(study.seeds) > 1 else "")
            yield Member(name, values, seed, overrides | {"training.seed": seed})


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """A study's file with dotted overrides (`budget.steps=500`, `set.training.global_batch_size=64`). Raises TesseraError.

    `output` is runs/<the file's name> where none is given; `recipe` becomes a path from here.
    """
    if not path.exists():
        raise TesseraError(f"there is no study {path}: expected a YAML file with recipe, axes and budget")
    data = apply_overrides({"output": f"runs/{path.stem}", **read_yaml(path)}, list(overrides), "budget.steps=500")
    study = validate(Study, data, f"study {path}")
    recipe = path.parent / study.recipe
    if not recipe.exists():
        raise TesseraError(f"study {path}: there is no recipe at {recipe}; the path is relative to the study's file")
    return study.model_copy(update={"recipe": str(recipe)})
