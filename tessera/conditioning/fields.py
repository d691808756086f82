"""What each field of a condition declares about itself, and the class label as the first of them.

A field is one object of a subclass of `ConditionField`, given in the declaration of `Condition`. All other code treats
fields alike: it never names one. Shapes: B rows.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera import randomness
from tessera.errors import TesseraError
from tessera.settings import unknown_name

NULL_LABEL = -1  # no class; the network's embedding table maps it to its own null row
INTEGER = re.compile(r"-?[0-9]{1,18}")
CLASS_STREAM = 0x636C6173  # random stream of the class labels of bulk sampling


class ConditionField:
    """The rules of one field. The methods are given the settings of the network, or the configuration of a model.

    companions: fields that are replaced together with this one, such as its mask. A user need not give them.

    dtype: of the values. null: the value of all entries of an unconditional row; override `null_like` for a null value
    with several entries. pad: fills up rows of different lengths. input_name: of what users give, where it differs from
    the name of the field. data_name: of the values in a data set, in messages; empty: they are not measured there.
    discrete: whether the values are whole numbers [B] that decide everything; sampling then precomputes what depends
    on the condition. from_data: whether bulk sampling chooses the inputs from a data set. from_size: whether the input
    is (height, width) of the generated image in pixels, where none is given.
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    null: ClassVar[float] = 0
    pad: ClassVar[float] = 0
    input_name: ClassVar[str] = ""
    data_name: ClassVar[str] = ""
    discrete: ClassVar[bool] = False
    from_data: ClassVar[bool] = False
    from_size: ClassVar[bool] = False
    companions: ClassVar[tuple[str, ...]] = ()

    def null_like(self, value: Tensor) -> Tensor:
        """The unconditional rows that replace these rows [B, ...]."""
        return torch.full_like(value, self.null)

    def example(self, num_rows: int, network: Any) -> Tensor:
        """Any valid rows [B, ...], to measure a network with."""
        raise NotImplementedError

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        """The rows of some samples of a data set, which are read at these positions of training."""
        raise NotImplementedError

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor | dict[str, Tensor]:
        """What a user asks for, as rows [B, ...], or those of several fields. model: a `Model`. Raises TesseraError."""
        raise NotImplementedError

    def inputs_from_data(self, seeds: Sequence[int], policy: str, dataset: Any) -> list[Any]:
        """The same as default_inputs, chosen from a data set: for conditions with `from_data`.

        dataset: None if there is none. Raises TesseraError.
        """
        raise NotImplementedError

    def default_inputs(self, seeds: Sequence[int], policy: str, model: Any) -> list[Any]:
        """Inputs for images of which only the number is requested, in bulk sampling. Raises TesseraError."""
        raise TesseraError("this model needs an input for each image: list them")

    def hint(self, model: Any) -> str:
        """How to give the inputs, for a message about a missing one."""
        return ""


class LabelField(ConditionField):
    """Class ids, int64 [B]; NULL_LABEL for unconditional rows."""

    dtype, null, discrete, input_name, data_name = torch.int64, NULL_LABEL, True, "classes", "labels"

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.int64)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return torch.tensor([dataset.label(sample) for sample in samples], dtype=torch.int64)

    def encode(self, inputs: Sequence[int | str], model: Any) -> Tensor:
        """Class numbers or names -> ids"""
        model = model.config
        count = model.network.num_classes
        numbers = [str(number) for number in range(count)]
        names = list(model.class_names) or numbers
        # Where classes have other numbers as names, such as 5 and 7, a number is never the position of a class.
        positions = names == numbers or not any(INTEGER.fullmatch(name) for name in names)
        labels = []
        for label in inputs:
            if isinstance(label, str):
                if names.count(label) > 1:
                    same = ", ".join(number for number, name in zip(numbers, names) if name == label)
                    raise TesseraError(f"several classes have the name '{label}': give the number, {same}")
                if label in names:
                    label = names.index(label)
                elif positions and INTEGER.fullmatch(label):
                    label = int(label)
                else:
                    raise TesseraError(unknown_name("class", label, names))
            if label != int(label):
                raise TesseraError(f"a class is a name or a whole number; got {label}")
            if not 0 <= label < count:
                raise TesseraError(f"class {label} is out of range: this model has {count} classes, 0 to {count - 1}")
            labels.append(int(label))
        return torch.tensor(labels, dtype=torch.int64)

    def default_inputs(self, seeds: Sequence[int], policy: str, model: Any) -> list[int]:
        """balanced: classes in turn; data: as often as in the training data, evenly spread over the images; uniform:
        each image a random class, by its seed."""
        count = model.network.num_classes
        if policy == "data":
            return _as_in_data(len(seeds), model.class_counts)
        if policy == "balanced":
            return [position % count for position in range(len(seeds))]
        uniform = randomness.uniform(0, torch.tensor(list(seeds), dtype=torch.int64), CLASS_STREAM)[:, 0]
        return (uniform.double() * count).long().tolist()

    def hint(self, model: Any) -> str:
        return f"it has {model.network.num_classes} classes; pass some, for example classes=[0]"


def _as_in_data(number: int, counts: Sequence[int]) -> list[int]:
    """Classes of images in proportion to these counts, in any prefix. Raises TesseraError without counts."""
    if not counts:
        raise TesseraError(
            "this model does not record how many images of each class it was trained on: sample balanced or uniform "
            "classes"
        )
    shares = torch.tensor([*counts], dtype=torch.float64).cumsum(0) / sum(counts)
    # Multiples of the golden ratio are evenly spread modulo 1, however many they are.
    quantiles = (torch.arange(number, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 + 0.5) % 1
    return torch.searchsorted(shares, quantiles, right=True).clamp(max=len(counts) - 1).tolist()


def condition_field(rules: ConditionField) -> Any:
    """A field of `Condition`: absent by default, with these rules."""
    return field(default=None, metadata={"rules": rules, "pad": rules.pad})
