"""Initial weights from a trained model that may have other classes, another size or another patch size."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate, linear, silu

from tessera.bundle import BundleConfig, Model
from tessera.codecs import Codec, PixelsConfig
from tessera.data.images import ImagesConfig
from tessera.errors import TesseraError, bullet_list
from tessera.layers.modulation import Modulation
from tessera.layers.patches import resample_head, resample_patches
from tessera.models.blocks import AdaLNZeroBlock, BlockConfig, RoPESwiGLU
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig
from tessera.models.pixart import PixArtBlockConfig, PixArtConfig
from tessera.models.unet import UNetConfig
from tessera.sampling import SamplingConfig
from tessera.settings import validate
from tessera.training.recipe import Recipe

TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
FRAME_POSITIONS = "temp_embed"  # of Latte
PATCHES, HEAD = "x_embedder.proj.weight", "final_layer.linear."
UNET_STEM, UNET_HEAD = "stem.", "final_layer.conv."
RELATIVE = (".rel_pos_h", ".rel_pos_w")
STEP_SIZE = "step_size_embedder."  # of a student, which begins without effect
SIZE_OUTPUTS = ("csize_embedder.mlp.2.", "ar_embedder.mlp.2.")
PIXART_OPTIONS = ("y_embedder.y_embedding", "csize_embedder.", "ar_embedder.")
TEXT, TEXT_IN_BLOCKS = "text_embedder.", (".text_kv.", ".text_offset", ".cross_attn.")
CAPTIONS = "y_embedder.y_proj."
TEMPORAL = ".temporal."  # layers of temporal attention, which begin without effect
TIME_BIAS = "t_embedder.mlp.2.bias"
REFERENCE_TIME = 501 / 1000  # step 500 of 1000
COPIED, RESAMPLED, INITIALIZED = "copied", "resampled", "initialized"


def inherit_settings(recipe: Recipe, source: Model) -> Recipe:
    """The recipe with settings of network, diffusion, codec and sampling that it leaves out taken from the source."""
    old, new, is_named = source.config, recipe.network, "network" in recipe.model_fields_set
    to_pixart = is_named and isinstance(new, PixArtConfig) and type(old.network) is DiTConfig
    kind = type(new) if to_pixart else type(old.network)
    if is_named and new.kind != old.network.kind and not to_pixart:
        raise TesseraError(
            f"cannot start from {recipe.training.init_from}: it is a {old.network.display_name}, and the recipe's "
            f"network is a {new.display_name}: set network.kind={old.network.kind}, or leave network: out to take all "
            "its settings from there"
        )
    network = {name: getattr(new, name) for name in new.model_fields_set if name != "kind"}
    left_out = (*DATA_DEPENDENT, *(("kind", "block", "learn_null_class") if to_pixart else ()))
    for name in type(old.network).model_fields:
        # A null embedding has one row for each text token.
        is_inherited = name not in left_out or (name == "text_tokens" and isinstance(old.network, PixArtConfig))
        if name not in network and is_inherited:
            network[name] = getattr(old.network, name)
    if isinstance(old.network, DiTConfig) and isinstance(new, DiTConfig) and "block" in new.model_fields_set:
        network["block"] = _inherit_block(old.network.block, new.block)
    if to_pixart:  # the positions of a DiT
        network = {"position_base": max(old.network.grid[-2:]), "position_scale": 1.0, **network}
    inherited = {
        name: getattr(old, name)
        for name in ("diffusion", "codec", "sampling")
        # The pixel codec depends on the channels of the data.
        if name not in recipe.model_fields_set and not isinstance(getattr(old, name), PixelsConfig)
    }
    data = recipe.data
    if (
        recipe.adapter is not None  # other runs may train on more channels than they start from
        and isinstance(old.codec, PixelsConfig)
        and isinstance(data, ImagesConfig)
        and "channels" not in data.model_fields_set
        and "codec" not in recipe.model_fields_set
    ):
        inherited["data"] = data.model_copy(update={"channels": old.codec.channels})
    return recipe.model_copy(update={"network": validate(kind, network, "network"), **inherited})


def inherit_size(recipe: Recipe, source: BundleConfig, codec: Codec) -> Recipe:
    """The recipe with data.size, if it leaves it out, of the images that the source was trained on."""
    data = recipe.data
    if not isinstance(data, ImagesConfig) or "size" in data.model_fields_set:
        return recipe
    height, width = source.network.input_size[-2:]
    size = height * codec.factor, width * codec.factor
    return recipe.model_copy(update={"data": data.model_copy(update={"size": size})})


def _inherit_block(old: BlockConfig, new: BlockConfig) -> BlockConfig:
    """The rope-swiglu block of a recipe with what it leaves out taken from the source. With text as keys that the
    source does not have, their logits begin at an offset at which it keeps its function."""
    if not (isinstance(old, RoPESwiGLU) and isinstance(new, RoPESwiGLU)):
        return new
    settings = {**old.model_dump(), **{name: getattr(new, name) for name in new.model_fields_set}}
    if old.text == "none" and new.text == "keys" and "text_offset" not in new.model_fields_set:
        settings["text_offset"] = True
    return RoPESwiGLU(**settings)


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

    Positions are computed for the new grid. Patch weights are resampled (FlexiViT), relative positions linearly.
    Classes of the same name keep their embedding, and so does the null label. A network of text may start from one of
    classes: see `pixart_state` and `_without_classes`. Raises TesseraError that lists the differences if the inner
    weights have other shapes.
    """
    before, after = source.config.network, network.config
    old, new = source.network.state_dict(), network.state_dict()
    computed: set[str] = set()
    free = PIXART_OPTIONS if isinstance(after, PixArtConfig) else ()  # names that may be missing, or of another shape
    to_pixart = isinstance(after, PixArtConfig) and not isinstance(before, PixArtConfig)
    if to_pixart:
        old, computed = pixart_state(source, name)
        free = tuple(new.keys() - old.keys())
    elif after.uses_text and not before.uses_text:
        old, computed = _without_classes(old, before, after)
        free = tuple(key for key in new if key.startswith(TEXT) or any(part in key for part in TEXT_IN_BLOCKS))
    if isinstance(before, DiTConfig) and isinstance(after, DiTConfig) and not to_pixart:
        adds_text = after.uses_text and not before.uses_text
        if _lasting(before.block) != _lasting(after.block, without_text=adds_text):
            raise TesseraError(
                f"cannot start from {name}: its blocks are {before.block.summary()}, network.block is "
                f"{after.block.summary()}: leave block: out of the recipe to take it from there"
            )
    if not before.takes_step_size:
        free = (*free, *(key for key in new if key.startswith(STEP_SIZE)))
    if not getattr(before, "temporal_attention", False):
        free = (*free, *(key for key in new if TEMPORAL in key))
    differences = [
        f"{key} is {tuple(old[key].shape)}, expected {tuple(new[key].shape)}" if key in old else f"{key} is missing"
        for key in new
        if not key.startswith((TABLE, POSITIONS, FRAME_POSITIONS, PATCHES, HEAD, UNET_STEM, UNET_HEAD, *free))
        and not key.endswith(RELATIVE)
        and (key not in old or old[key].shape != new[key].shape)
    ]
    differences += [f"{key} is unexpected" for key in old if key not in new and key != TABLE]
    if differences:
        has_text = any(each.startswith((TEXT, CAPTIONS)) for each in differences)
        settings = "the text encoder, " * has_text + _shape_settings(after)
        raise TesseraError(
            f"cannot start from {name}: it has another architecture; {settings} must agree "
            f"(leave {'network: and text:' if has_text else 'network:'} out of the recipe to take them from there)"
            f"{bullet_list(differences)}"
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
        if key in (POSITIONS, FRAME_POSITIONS):
            same = old[key].shape == target.shape and (before.grid[-2:] == after.grid[-2:] or key == FRAME_POSITIONS)
            report[COPIED if same else RESAMPLED].append(key)  # the new network has positions for its own grid
            if same:
                target.copy_(old[key])
        elif key == TABLE:
            report[_copy_labels(target, old.get(key), network, class_names, source)].append(key)
        elif key in old and (value := _resampled(key, old[key], before, after, target)) is not None:
            report[COPIED if value is old[key] and key not in computed else RESAMPLED].append(key)
            target.copy_(value)
        else:
            report[INITIALIZED].append(key)
            if key.startswith(SIZE_OUTPUTS):  # a new condition begins without effect
                target.zero_()
    return report


def freeze_image_layers(network: Network) -> None:
    """Freeze everything but the layers of temporal attention. Raises TesseraError if there are none."""
    names = [name for name, _ in network.named_parameters() if TEMPORAL in name]
    if not names:
        raise TesseraError("training.trainable=temporal needs network.temporal_attention=true")
    network.requires_grad_(False)
    for name in names:
        network.get_parameter(name).requires_grad_(True)


def _lasting(block: BlockConfig, without_text: bool = False) -> BlockConfig:
    """The settings of blocks that trained weights depend on. without_text: on those of a network without text"""
    if isinstance(block, RoPESwiGLU) and without_text:
        defaults = RoPESwiGLU()
        return block.model_copy(
            update={name: getattr(defaults, name) for name in ("text", "text_layers", "text_offset")}
        )
    return block.model_copy(update={"drop_path": 0.0}) if isinstance(block, PixArtBlockConfig) else block


def _without_classes(
    state: dict[str, Tensor], before: NetworkConfig, after: NetworkConfig
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights for a network of text, and the names of those computed.

    Where it has no classes, the time embedding gets the null label (or the mean of all) as a bias: so it begins as the
    class model without a class.
    """
    if after.num_classes or TABLE not in state:
        return state, set()
    table = state[TABLE]
    null = table[-1] if before.learn_null_class else table.mean(dim=0)
    rest = {key: value for key, value in state.items() if key != TABLE}
    return rest | {TIME_BIAS: state[TIME_BIAS] + null}, {TIME_BIAS}


@torch.no_grad()
def pixart_state(source: Model, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """The weights of a PixArt without its text from those of a class-conditional DiT, and the names of those computed.

    As PixArt-alpha began (Chen et al. 2023, section 2.3, "re-parameterization"): the tables are such that shifts,
    scales and gates at step 500 of 1000 are those of the DiT without a class. With cross-attention that begins with a
    zero output, the two networks are the same function at this time. The layer that the blocks share is the mean of
    theirs, so that other times are near, too.
    """
    dit = source.network
    assert isinstance(dit, DiT)
    if dit.config.block.kind != "adaln-zero":
        raise TesseraError(
            f"cannot start a PixArt from {name}: its blocks are {dit.config.block.summary()}; expected adaln-zero"
        )
    time = dit.t_embedder(source.diffusion.model_time(torch.tensor([REFERENCE_TIME]))[:, None].to(source.device))
    c = time
    if dit.y_embedder is not None:
        table = dit.y_embedder.embedding_table.weight
        c = time + (table[-1] if dit.config.learn_null_class else table.mean(dim=0))
    modulations = [cast(AdaLNZeroBlock, block).adaLN_modulation for block in dit.blocks]
    linears = [cast(Modulation, modulation).linear for modulation in modulations]
    weight = torch.stack([each.weight for each in linears]).mean(dim=0)
    bias = torch.stack([each.bias for each in linears]).mean(dim=0)
    shared = linear(silu(time), weight, bias)
    computed = {"shared.adaLN_modulation.1.weight": weight, "shared.adaLN_modulation.1.bias": bias}
    for number, modulation in enumerate(modulations):
        computed[f"blocks.{number}.adaLN_modulation.table"] = (modulation(c) - shared).view(6, -1)
    head = dit.final_layer.adaLN_modulation
    assert head is not None
    computed["final_layer.scale_shift_table"] = head(c).view(2, -1) - time[0]
    replaced = (TABLE, POSITIONS, "final_layer.adaLN_modulation.")
    copied = {
        key: value
        for key, value in dit.state_dict().items()
        if not key.startswith(replaced) and ".adaLN_modulation." not in key
    }
    return copied | computed, set(computed)


def _shape_settings(network: NetworkConfig) -> str:
    """The settings that determine the shapes of a network's inner weights."""
    if isinstance(network, DiTConfig):
        return "hidden_size, depth, num_heads and block"
    return "model_channels, channel_mult, num_res_blocks and attention_levels"


def _resampled(key: str, value: Tensor, old: NetworkConfig, new: NetworkConfig, target: Tensor) -> Tensor | None:
    """A weight for the new patch size or token grid, or None if the number of channels differs."""
    if key.endswith(RELATIVE) and value.shape != target.shape:
        return interpolate(value.T[None], size=len(target), mode="linear")[0].T
    if value.shape != target.shape and key.startswith(PIXART_OPTIONS):
        return None
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
