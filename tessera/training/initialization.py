"""Initial weights from a trained model that may have other classes, another size or another patch size."""

from dataclasses import replace

import torch
from torch import Tensor

from tessera.bundle import Model
from tessera.codecs import PixelsConfig
from tessera.errors import TesseraError, bullet_list
from tessera.layers.patches import resample_head, resample_patches
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig
from tessera.models.unet import UNetConfig
from tessera.sampling import SamplingConfig
from tessera.settings import validate
from tessera.training.recipe import Recipe

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
PATCHES, HEAD = "x_embedder.proj.weight", "final_layer.linear."
UNET_STEM, UNET_HEAD = "stem.", "final_layer.conv."
COPIED, RESAMPLED, INITIALIZED = "copied", "resampled", "initialized"


def inherit_settings(recipe: Recipe, source: Model) -> Recipe:
    """The recipe with settings of network, diffusion, codec and sampling that it leaves out taken from the source."""
    old, new = source.config, recipe.network
    kind = old.network.kind if "network" not in recipe.model_fields_set else new.kind
    if kind != old.network.kind:
        raise TesseraError(
            f"cannot start from {recipe.training.init_from}: it is a {old.network.display_name}, and the recipe's "
            f"network is a {new.display_name}: set network.kind={old.network.kind}, or leave network: out to take all "
            "its settings from there"
        )
    network = {name: getattr(new, name) for name in new.model_fields_set if name != "kind"}
    for name in type(old.network).model_fields:
        if name not in network and name not in DATA_DEPENDENT:
            network[name] = getattr(old.network, name)
    inherited = {
        name: getattr(old, name)
        for name in ("diffusion", "codec", "sampling")
        # The pixel codec depends on the channels of the data.
        if name not in recipe.model_fields_set and not isinstance(getattr(old, name), PixelsConfig)
    }
    return recipe.model_copy(update={"network": validate(type(old.network), network, "network"), **inherited})


def with_recipe_sampling(source: Model) -> Model:
    """A checkpoint with the sampling settings of its recipe: `tessera tune` may have saved others in it since."""
    settings = (source.config.recipe or {}).get("sampling")
    if settings is None:
        return source
    sampling = validate(SamplingConfig, settings, "the recipe of the checkpoint")
    return replace(source, config=source.config.model_copy(update={"sampling": sampling}))


@torch.no_grad()
def init_from(network: Network, class_names: tuple[str, ...], source: Model, name: str) -> dict[str, list[str]]:
    """Copy the weights of a trained model into a new network. Returns the names copied, resampled and initialized.

    Positions are computed for the new grid. Patch weights are resampled (FlexiViT). Classes of the same name keep
    their embedding, and so does the null label. Raises TesseraError that lists the differences if the inner weights
    have other shapes.
    """
    before, after = source.config.network, network.config
    if isinstance(before, DiTConfig) and isinstance(after, DiTConfig) and before.block != after.block:
        raise TesseraError(
            f"cannot start from {name}: its blocks are {before.block.summary()}, network.block is "
            f"{after.block.summary()}: leave block: out of the recipe to take it from there"
        )
    old, new = source.network.state_dict(), network.state_dict()
    differences = [
        f"{key} is {tuple(old[key].shape)}, expected {tuple(new[key].shape)}" if key in old else f"{key} is missing"
        for key in new
        if not key.startswith((TABLE, POSITIONS, PATCHES, HEAD, UNET_STEM, UNET_HEAD))
        and (key not in old or old[key].shape != new[key].shape)
    ]
    differences += [f"{key} is unexpected" for key in old if key not in new and key != TABLE]
    if differences:
        raise TesseraError(
            f"cannot start from {name}: it has another architecture; {_shape_settings(after)} must agree "
            f"(leave network: out of the recipe to take them from there){bullet_list(differences)}"
        )
    # These do not change the shape of any weight.
    for kind, setting in ((DiTConfig, "num_heads"), (UNetConfig, "num_head_channels")):
        if isinstance(before, kind) and isinstance(after, kind) and getattr(before, setting) != getattr(after, setting):
            raise TesseraError(
                f"cannot start from {name}: its {setting} is {getattr(before, setting)}, network.{setting} is "
                f"{getattr(after, setting)}"
            )
    report: dict[str, list[str]] = {COPIED: [], RESAMPLED: [], INITIALIZED: []}
    for key, target in new.items():
        if key == POSITIONS:
            same = old[key].shape == target.shape and before.grid == after.grid
            report[COPIED if same else RESAMPLED].append(key)  # the new network has positions for its own grid
            if same:
                target.copy_(old[key])
        elif key == TABLE:
            report[_copy_labels(target, old.get(key), network, class_names, source)].append(key)
        elif key in old and (value := _resampled(key, old[key], before, after)) is not None:
            report[COPIED if value is old[key] else RESAMPLED].append(key)
            target.copy_(value)
        else:
            report[INITIALIZED].append(key)
    return report


def _shape_settings(network: NetworkConfig) -> str:
    """The settings that determine the shapes of a network's inner weights."""
    if isinstance(network, DiTConfig):
        return "hidden_size, depth, num_heads and block"
    return "model_channels, channel_mult, num_res_blocks and attention_levels"


def _resampled(key: str, value: Tensor, old: NetworkConfig, new: NetworkConfig) -> Tensor | None:
    """A weight for the new patch size, or None if the number of channels differs."""
    if key.startswith((PATCHES, UNET_STEM)) and old.in_channels != new.in_channels:
        return None
    if key.startswith((HEAD, UNET_HEAD)) and old.out_channels != new.out_channels:
        return None
    if isinstance(old, DiTConfig) and isinstance(new, DiTConfig) and old.patch_size != new.patch_size:
        if key == PATCHES:
            return resample_patches(value, new.patch_size)
        if key.startswith(HEAD):
            return resample_head(value, new.out_channels, new.patch_size)
    return value


def _copy_labels(
    table: Tensor, old: Tensor | None, network: Network, class_names: tuple[str, ...], source: Model
) -> str:
    """Fill the rows of the label embedding by class name, and return the word for the report."""
    if old is None:
        return INITIALIZED
    names, old_config = source.config.class_names, source.config.network
    if network.config.learn_null_class and old_config.learn_null_class:
        table[-1] = old[-1]
    if names:
        rows = [(row, names.index(name)) for row, name in enumerate(class_names) if name in names]
    else:  # a checkpoint without class names: the classes are the same if there are as many
        rows = [(row, row) for row in range(len(class_names) if len(class_names) == old_config.num_classes else 0)]
    for row, old_row in rows:
        table[row] = old[old_row]
    if len(rows) == len(class_names) == old_config.num_classes:
        return COPIED
    return RESAMPLED if rows else INITIALIZED
