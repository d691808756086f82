"""Classes of a trained model: added, removed, renamed and merged in its label table, before it is trained further."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tessera import adapters
from tessera.bundle import Model, assemble
from tessera.conditioning.fields import LabelField
from tessera.errors import TesseraError
from tessera.training.initialization import TABLE

Names = Sequence[str | int]  # of classes of the model, or their numbers


@torch.no_grad()
def change_classes(
    model: Model,
    *,
    add: Mapping[str, Names] | None = None,
    remove: Names = (),
    rename: Mapping[str, str | int] | None = None,
    merge: Mapping[str, Names] | None = None,
) -> Model:
    """A model with other classes. The kept classes have their old weights and order; new ones come after them.

    add: new name -> the classes whose mean is its first embedding; none: the null label (without one, the mean of all).
    rename: new name -> class. merge: new name -> the classes that it replaces; its embedding is their mean.
    All refer to the classes of the given model, which stays as it is and shares its other weights with the new one.
    Raises TesseraError for unknown, repeated or contradictory names, and if no class would be left.
    """
    check_has_classes(model)
    names, null = model.class_names, model.config.network.learn_null_class

    def labels(classes: Names) -> list[int]:
        return LabelField().encode(list(classes), model).tolist()

    removed = labels(remove)
    added = {name: labels(classes) for name, classes in (add or {}).items()}
    renamed = {name: labels([old])[0] for name, old in (rename or {}).items()}
    merged = {name: labels(classes) for name, classes in (merge or {}).items()}
    if not (added or removed or renamed or merged):
        raise TesseraError("nothing to change: give classes to add, remove, rename or merge")
    for name, classes in merged.items():
        if len(classes) < 2:
            raise TesseraError(f"'{name}' would be merged from one class: give two or more, or rename it")
    for name, classes in added.items():
        if len(set(classes)) < len(classes):
            raise TesseraError(f"'{name}' would be the mean of a class and itself: give each class once")
    changed = [*removed, *renamed.values(), *(label for classes in merged.values() for label in classes)]
    if repeated := [names[label] for label in changed if changed.count(label) > 1]:
        raise TesseraError(f"the class '{repeated[0]}' is removed, renamed or merged twice: change each class once")

    gone = set(changed) - set(renamed.values())
    new_names = {label: name for name, label in renamed.items()}
    kept_labels = [label for label in range(len(names)) if label not in gone]
    class_names = (*(new_names.get(label, names[label]) for label in kept_labels), *merged, *added)
    if not class_names:
        raise TesseraError(f"no class would be left of {len(names)}: keep or add one")
    for name in (*renamed, *merged, *added):
        if not name.strip():
            raise TesseraError("a new class has an empty name: give it one")
        if class_names.count(name) > 1:
            raise TesseraError(f"two classes would have the name '{name}': give each its own")

    old = model.network.state_dict()[TABLE]
    embeddings, default = old[: len(names)], old[-1] if null else old.mean(dim=0)
    rows = [embeddings[classes].mean(dim=0) if classes else default for classes in (*merged.values(), *added.values())]
    table = torch.cat((embeddings[kept_labels], *(row[None] for row in rows), old[len(names) :]))

    def listed(classes: list[int]) -> str:
        return ", ".join(names[label] for label in classes)

    default_name = "null label" if null else "mean of all"
    parts = [f"removed {listed(removed)}"] if removed else []
    parts += [f"renamed {names[label]} to {name}" for name, label in renamed.items()]
    parts += [f"merged {listed(classes)} into {name}" for name, classes in merged.items()]
    parts += [
        f"added {name} ({f'mean of {listed(classes)}' if classes else default_name})" for name, classes in added.items()
    ]
    provenance = model.config.provenance
    history = "; ".join([*([provenance.classes_changed] if provenance.classes_changed else []), *parts])
    config = model.config.model_copy(
        update={
            "network": model.config.network.model_copy(update={"num_classes": len(class_names)}),
            "class_names": class_names,
            "class_counts": (),
            "provenance": provenance.model_copy(update={"classes_changed": history}),
        }
    )
    network = assemble(config, {**model.network.state_dict(), TABLE: table}, "the model", model.device).network
    return replace(model, config=config, network=network)


def check_has_classes(model: Model) -> None:
    """Raise TesseraError unless a model has classes that can be changed."""
    network = model.config.network
    if not network.num_classes:
        raise TesseraError(
            "this model is conditioned on text, not on classes: write what is new into the captions of your data, and "
            "train with training.init_from=MODEL; tessera classes MODEL OUT --add-word NEW adds a word"
            if network.uses_text
            else "this model is unconditional: it has no classes; train one that has, with training.init_from=MODEL "
            "and data with classes"
        )
    check_no_adapters(model)


def check_no_adapters(model: Model) -> None:
    """Raise TesseraError if adapters are attached to a model."""
    if attached := adapters.attached(model.network):
        raise TesseraError(
            f"this model has adapters ({', '.join(attached)}), which belong to the model as it is: merge them "
            "first (tessera convert MODEL MERGED --to bundle), or change the model below and train the adapters on that"
        )
