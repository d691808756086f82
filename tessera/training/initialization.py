"""Starting from a trained model with other classes, another size or patch: what is kept, resampled, made anew."""

from dataclasses import replace

import torch
from torch import Tensor

from tessera.bundle import Model
from tessera.codecs import PixelsConfig
from tessera.errors import TesseraError, listed
from tessera.layers.patches import resample_head, resample_patches
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig
from tessera.models.unet import UNetConfig
from tessera.sampling import SamplingConfig
from tessera.settings import validate
from tessera.training.recipe import Recipe

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
PATCHES, READOUT = "x_embedder.proj.weight", "final_layer.linear."
STEM, LAST = "stem.", "final_layer.conv."  # of a U-Net


def inherit_settings(recipe: Recipe, source: Model) -> Recipe:
    """What the recipe leaves unsaid about network, process, codec and sampling is as in the model it starts from."""
    old, new = source.config, recipe.network
    kind = old.network.kind if "network" not in recipe.model_fields_set else new.kind
    if kind != old.network.kind:
        raise TesseraError(
            f"cannot start from {recipe.training.init_from}: it is a {old.network.display_name}, and the recipe's network is a "
            f"{new.display_name}: set network.kind={old.network.kind}, or leave network: out to take all of it from there"
        )
    told = new.model_fields_set - {"kind"}
    network = {name: getattr(new, name) for name in told} | {
        name: getattr(old.network, name)
        for name in type(old.network).model_fields
        if name not in told and name not in DATA_DEPENDENT
    }
    inherited = {
        name: getattr(old, name)
        for name in ("diffusion", "codec", "sampling")
        if name not in recipe.model_fields_set and not isinstance(getattr(old, name), PixelsConfig)  # as the data are
    }
    return recipe.model_copy(update={"network": validate(type(old.network), network, "network"), **inherited})


def as_trained(source: Model) -> Model:
    """A run's checkpoint, to draw as its run does: `tessera tune` may have written other settings into it since."""
    told = (source.config.recipe or {}).get("sampling")
    if told is None:
        return source
    sampling = validate(SamplingConfig, told, "the recipe of the checkpoint")
    return replace(source, config=source.config.model_copy(update={"sampling": sampling}))


@torch.no_grad()
def start_from(network: Network, class_names: tuple[str, ...], source: Model, name: str) -> dict[str, list[str]]:
    """Copy what fits from a trained model into a fresh network; returns the keys under kept, resampled and anew.

    Positions follow the new grid; patch weights are resampled (FlexiViT); classes of the same name keep their row, and
    so does 'told nothing'. Raises TesseraError, naming the keys, if the transformer itself differs.
    """
    before, now = source.config.network, network.config
    if isinstance(before, DiTConfig) and isinstance(now, DiTConfig) and before.block != now.block:
        raise TesseraError(
            f"cannot start from {name}: its blocks are {before.block.summary()}, network.block is {now.block.summary()}: "
            "leave block: out of the recipe to take it from there"
        )
    told: dict[str, list[str]] = {"kept": [], "resampled": [], "anew": []}
    old, fresh = source.network.state_dict(), network.state_dict()
    strangers = [
        f"{key} is {tuple(old[key].shape)}, expected {tuple(fresh[key].shape)}" if key in old else f"{key} is missing"
        for key in fresh
        if not key.startswith((TABLE, POSITIONS, PATCHES, READOUT, STEM, LAST))
        and (key not in old or old[key].shape != fresh[key].shape)
    ]
    strangers += [f"{key} has no place" for key in old if key not in fresh and key != TABLE]
    if strangers:
        raise TesseraError(
            f"cannot start from {name}: it is another architecture; {_shape_of(now)} must agree "
            f"(leave network: out of the recipe to take them from it){listed(strangers)}"
        )
    if isinstance(before, DiTConfig) and isinstance(now, DiTConfig) and before.num_heads != now.num_heads:
        raise TesseraError(
            f"cannot start from {name}: it has {before.num_heads} heads, network.num_heads is {now.num_heads}"
        )
    if (
        isinstance(before, UNetConfig)
        and isinstance(now, UNetConfig)
        and before.num_head_channels != now.num_head_channels
    ):
        raise TesseraError(
            f"cannot start from {name}: it has heads of {before.num_head_channels} channels, network.num_head_channels is "
            f"{now.num_head_channels}"
        )
    for key, target in fresh.items():
        if key == POSITIONS:
            same = old[key].shape == target.shape and before.grid == now.grid
            told["kept" if same else "resampled"].append(key)  # fixed positions: computed for the new grid already
            if same:
                target.copy_(old[key])
        elif key == TABLE:
            told[_labels(target, old.get(key), network, class_names, source)].append(key)
        elif key in old and (value := _fitted(key, old[key], before, now)) is not None:
            told["kept" if value is old[key] else "resampled"].append(key)
            target.copy_(value)
        else:
            told["anew"].append(key)
    return told


def _shape_of(network: NetworkConfig) -> str:
    """The settings that shape the inner weights of a network."""
    return "width, depth, heads and block" if isinstance(network, DiTConfig) else "width, multipliers, depth, attention"


def _fitted(key: str, value: Tensor, old: NetworkConfig, new: NetworkConfig) -> Tensor | None:
    """A weight for the new patch size; None where the channels differ, so that nothing fits."""
    if key.startswith((PATCHES, STEM)) and old.in_channels != new.in_channels:
        return None
    if key.startswith((READOUT, LAST)) and old.out_channels != new.out_channels:
        return None
    if isinstance(old, DiTConfig) and isinstance(new, DiTConfig) and old.patch_size != new.patch_size:
        if key == PATCHES:
            return resample_patches(value, new.patch_size)
        if key.startswith(READOUT):
            return resample_head(value, new.out_channels, new.patch_size)
    return value


def _labels(target: Tensor, old: Tensor | None, network: Network, class_names: tuple[str, ...], source: Model) -> str:
    """Fill the label table's rows by class name, and say what became of it."""
    if old is None:
        return "anew"
    names = source.config.class_names
    if network.config.learn_null_class and source.config.network.learn_null_class:
        target[-1] = old[-1]
    if names:
        kept = [(row, names.index(name)) for row, name in enumerate(class_names) if name in names]
    else:  # a checkpoint without names: its classes are these if there are as many
        kept = (
            [(row, row) for row in range(len(class_names))]
            if len(class_names) == source.config.network.num_classes
            else []
        )
    for row, place in kept:
        target[row] = old[place]
    if len(kept) == len(class_names) == source.config.network.num_classes:
        return "kept"
    return "resampled" if kept else "anew"
