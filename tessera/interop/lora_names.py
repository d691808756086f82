"""The names that the linear layers of a network have in other programs, from the tables that convert its weights."""

from typing import NamedTuple

from torch import nn

from tessera.interop import diffusers, pixart, pixart_folder
from tessera.layers.fused_linear import FusedLinear
from tessera.models.diffusers_network import PREFIX, DiffusersConfig
from tessera.models.dit import DiTConfig
from tessera.models.network import Network
from tessera.models.pixart import PixArtConfig

# In front of names with points; the longest comes first.
DOTTED = (
    "unet.base_model.model.", "base_model.model.", "diffusion_model.", "transformer.", "unet.", "",
)  # fmt: skip
PEFT = DOTTED[:2]  # of programs that state alpha outside the file
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")  # in front of names whose points are underscores


class Place(NamedTuple):
    """Where a layer of another program is in our network.

    module: its name here. projection: its number in the module, where several are fused there; None: all of it.
    copies: how many layers of the other program are copies of it.
    """

    module: str
    projection: int | None = None
    copies: int = 1


Names = dict[str, Place]  # by the name in the other program


def is_diffusers(network: Network) -> bool:
    """Whether a network is a class of diffusers."""
    return isinstance(network.config, DiffusersConfig)


def own_names(network: Network) -> Names:
    """Our own names."""
    return {name: Place(name) for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def official_names(network: Network) -> Names:
    """The names of the official repositories: our own for most networks, those of diffusers for its classes."""
    if is_diffusers(network):
        return diffusers_names(network)
    own = own_names(network)
    if not isinstance(network.config, PixArtConfig):
        return own
    return {pixart.to_official(f"{name}.").removesuffix("."): place for name, place in own.items()}


def diffusers_names(network: Network) -> Names:
    """The names in diffusers; none for a network that it does not have."""
    config, own = network.config, own_names(network)
    if is_diffusers(network):
        return {name.removeprefix(PREFIX): place for name, place in own.items()}
    if isinstance(config, PixArtConfig):
        mappings = list(pixart_folder.tensor_mappings(config))
    elif isinstance(config, DiTConfig) and config.block.kind == "adaln-zero":
        mappings = diffusers.tensor_mappings(config.depth)
    else:
        return {}
    names: Names = {}
    for ours, how, theirs in mappings:
        module = ours.removesuffix(".weight")
        if module != ours and module in own:
            for number, name in enumerate(theirs):
                place = Place(module, copies=len(theirs)) if how == "copies" else Place(module)
                is_part = how == "chunks" and len(theirs) > 1
                names[name.removesuffix(".weight")] = Place(module, number) if is_part else place
    return names


class Finder:
    """Finds a layer by its name in any program."""

    def __init__(self, network: Network) -> None:
        self.names = {**diffusers_names(network), **official_names(network), **own_names(network)}
        flat: dict[str, list[Place]] = {}
        for name, place in self.names.items():
            flat.setdefault(name.replace(".", "_"), []).append(place)
        self.flat = {name: places[0] for name, places in flat.items() if len(set(places)) == 1}

    def find(self, name: str) -> tuple[Place, str] | None:
        """The place of a layer, and the prefix of its name."""
        for prefix in DOTTED:
            if name.startswith(prefix) and (place := self.names.get(name[len(prefix) :])):
                return place, prefix
        for prefix in FLAT:
            if name.startswith(prefix) and (place := self.flat.get(name[len(prefix) :].replace("_orig_mod_", ""))):
                return place, prefix
        return None


def rows_of(module: nn.Linear, projection: int | None) -> slice:
    """The rows of a projection in its map."""
    if projection is None or not isinstance(module, FusedLinear):
        return slice(0, module.out_features)
    size = module.out_features // module.num_projections
    return slice(projection * size, (projection + 1) * size)


def program(name: str) -> str:
    """Whose names a file has, from one of them: for a message, without a network."""
    is_diffusers_name = any(part in name for part in ("transformer_blocks", "attn1", "to_q", "to_k", "to_v"))
    return "diffusers" if is_diffusers_name else "an official network"
