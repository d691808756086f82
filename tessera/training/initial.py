"""Starting from a trained model with other classes, another size or patch: what is kept, resampled, made anew."""

from dataclasses import replace

import torch
from torch import Tensor

from tessera.bundle import Model
from tessera.codecs import PixelsConfig
from tessera.errors import TesseraError, listed
from tessera.layers.patches import resample_patches, resample_readout
from tessera.models.dit import DiT
from tessera.sampling import SamplingConfig
from tessera.settings import parse
from tessera.training.recipe import Recipe

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
PATCHES, READOUT = "x_embedder.proj.weight", "final_layer.linear."
ARCHITECTURE = ("patch", "depth", "width", "heads", "mlp_ratio", "block", "time_divisor", "mlp_norm_eps", "null_class")


def inherit(recipe: Recipe, source: Model) -> Recipe:
    """What the recipe leaves unsaid about network, process, codec and sampling is as in the model it starts from."""
    old = source.config
    told = recipe.network.model_fields_set
    network = {name: getattr(recipe.network, name) for name in told} | {
        name: getattr(old.network, name) for name in ARCHITECTURE if name not in told
    }
    inherited = {
        name: getattr(old, name)
        for name in ("process", "codec", "sampling")
        if name not in recipe.model_fields_set and not isinstance(getattr(old, name), PixelsConfig)  # as the data are
    }
    return recipe.model_copy(update={"network": parse(type(old.network), network, "network"), **inherited})


def as_trained(source: Model) -> Model:
    """A run's checkpoint, to draw as its run does: `tessera tune` may have written other settings into it since."""
    told = (source.config.recipe or {}).get("sampling")
    if told is None:
        return source
    sampling = parse(SamplingConfig, told, "the recipe of the checkpoint")
    return replace(source, config=source.config.model_copy(update={"sampling": sampling}))


@torch.no_grad()
def start_from(network: DiT, class_names: tuple[str, ...], source: Model, name: str) -> dict[str, list[str]]:
    """Copy what fits from a trained model into a fresh network; returns the keys under kept, resampled and anew.

    Positions follow the new grid; patch weights are resampled (FlexiViT); classes of the same name keep their row, and
    so does 'told nothing'. Raises TesseraError, naming the keys, if the transformer itself differs.
    """
    if source.config.network.block != network.config.block:
        raise TesseraError(
            f"cannot start from {name}: its blocks are {source.config.network.block.words()}, network.block is "
            f"{network.config.block.words()}: leave block: out of the recipe to take it from there"
        )
    told: dict[str, list[str]] = {"kept": [], "resampled": [], "anew": []}
    old, fresh = source.network.state_dict(), network.state_dict()
    strangers = [
        f"{key} is {tuple(old[key].shape)}, expected {tuple(fresh[key].shape)}" if key in old else f"{key} is missing"
        for key in fresh
        if not key.startswith((TABLE, POSITIONS, PATCHES, READOUT))
        and (key not in old or old[key].shape != fresh[key].shape)
    ]
    strangers += [f"{key} has no place" for key in old if key not in fresh and key != TABLE]
    if strangers:
        raise TesseraError(
            f"cannot start from {name}: it is another architecture; width, depth, heads and block must agree "
            f"(leave network: out of the recipe to take them from it){listed(strangers)}"
        )
    if source.config.network.heads != network.config.heads:
        raise TesseraError(
            f"cannot start from {name}: it has {source.config.network.heads} heads, "
            f"network.heads is {network.config.heads}"
        )
    for key, target in fresh.items():
        if key == POSITIONS:
            same = old[key].shape == target.shape and source.config.network.grid == network.config.grid
            told["kept" if same else "resampled"].append(key)  # fixed positions: computed for the new grid already
            if same:
                target.copy_(old[key])
        elif key == TABLE:
            told[_labels(target, old.get(key), network, class_names, source)].append(key)
        elif key in old and (value := _fitted(key, old[key], network, source)) is not None:
            told["kept" if value is old[key] else "resampled"].append(key)
            target.copy_(value)
        else:
            told["anew"].append(key)
    return told


def _fitted(key: str, value: Tensor, network: DiT, source: Model) -> Tensor | None:
    """A weight for the new patch size; None where the channels differ, so that nothing fits."""
    old, new = source.config.network, network.config
    if key == PATCHES:
        if old.channels != new.channels:
            return None
        return value if old.patch == new.patch else resample_patches(value, new.patch)
    if key.startswith(READOUT):
        if old.outputs != new.outputs:
            return None
        return value if old.patch == new.patch else resample_readout(value, new.outputs, new.patch)
    return value


def _labels(target: Tensor, old: Tensor | None, network: DiT, class_names: tuple[str, ...], source: Model) -> str:
    """Fill the label table's rows by class name, and say what became of it."""
    if old is None:
        return "anew"
    names = source.config.class_names
    if network.config.null_class and source.config.network.null_class:
        target[-1] = old[-1]
    if names:
        kept = [(row, names.index(name)) for row, name in enumerate(class_names) if name in names]
    else:  # a checkpoint without names: its classes are these if there are as many
        kept = (
            [(row, row) for row in range(len(class_names))] if len(class_names) == source.config.network.classes else []
        )
    for row, place in kept:
        target[row] = old[place]
    if len(kept) == len(class_names) == source.config.network.classes:
        return "kept"
    return "resampled" if kept else "anew"
