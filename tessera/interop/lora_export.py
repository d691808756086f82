"""The state dict of an adapter -> adapter files of PEFT, diffusers and kohya (sd-scripts; also LyCORIS).

The scale of a layer is multiplied into `up`, and alpha = rank, because programs differ in where they look for alpha. A
file has one rank, filled up with zeros, because some programs take one for all layers. Both are exact where the scale
is a power of two.

Shapes: I input features, O output features, r rank.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tessera.adapters.layers import (
    AdapterLayer,
    BiasDelta,
    FullDelta,
    HadamardProduct,
    KroneckerProduct,
    LowRank,
)
from tessera.adapters.network import layers_from_state
from tessera.checkpoint_files import write_tensors
from tessera.errors import TesseraError, bullet_list
from tessera.files import atomic_file, atomic_folder
from tessera.interop.lora_keys import HEADER, PEFT_CONFIG, PEFT_WEIGHTS
from tessera.interop.lora_names import Names, diffusers_names, is_diffusers, official_names, own_names, rows_of
from tessera.models.network import Network
from tessera.settings import unknown_name

Format = Literal["peft", "diffusers", "kohya"]
FORMATS = ("peft", "diffusers", "kohya")
PREFIXES = {"peft": "base_model.model.", "diffusers": "transformer."}
LYCORIS = (HadamardProduct, KroneckerProduct, FullDelta, BiasDelta)  # what the form of kohya holds beside LoRA


class Exported(NamedTuple):
    """A low-rank layer of a file: down [r, I], up [O, r] with the scale, magnitude [O] or [1, I]."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None


def write(path: str | Path, state: Mapping[str, Tensor], network: Network, to: Format | str) -> str:
    """Write an adapter for another program; returns a message about what was written.

    state: the state dict of an adapter for the network. to: peft, a new folder; diffusers or kohya, a new .safetensors.
    Raises TesseraError that lists the layers which the format cannot hold.
    """
    path = Path(path).expanduser()
    if to not in FORMATS:
        raise TesseraError(unknown_name("format", to, FORMATS))
    if to != "peft" and path.suffix != ".safetensors":
        raise TesseraError(f"an adapter for {to} is a file that ends in .safetensors; got {path}")
    if to == "peft" and path.suffix == ".safetensors":
        raise TesseraError(f"an adapter for peft is a folder; got {path}: give a name without .safetensors")
    if path.exists():
        raise TesseraError(f"{path} exists already: remove it or give another name")
    by_module, problems = layers_from_state(network, state, "the adapter"), []
    names = _target_names(network, to, by_module)
    low_rank: dict[str, Exported] = {}
    others: dict[str, dict[str, Tensor]] = {}
    for module_name, by_kind in by_module.items():
        module = network.get_submodule(module_name) if module_name else network
        places = {name: place for name, place in names.items() if place.module == module_name}
        if isinstance(module, nn.Linear) and not places:
            problems.append(f"{module_name}: {to} has no name for this layer of a {network.config.display_name}")
        for kind, layer in by_kind.items():
            if not _is_lora(layer) and (to != "kohya" or not isinstance(layer, LYCORIS)):
                problems.append(f"{module_name}.{kind}: {to} has no such change")
        for name, place in places.items():
            assert isinstance(module, nn.Linear)
            rows = rows_of(module, place.projection)
            try:
                if (exported := _low_rank(module, by_kind.values(), rows, to)) is not None:
                    low_rank[name] = exported
                others[name] = dict(_lycoris(module, by_kind.values(), rows))
            except ValueError as error:
                problems.append(f"{module_name}: {error}")
    if problems:
        raise TesseraError(f"an adapter for {to} cannot hold all of this one:{bullet_list(problems)}")
    rank = max((len(layer.down) for layer in low_rank.values()), default=0)
    low_rank = {name: _filled(layer, rank) for name, layer in low_rank.items()}
    if to == "kohya":
        _write_kohya(path, low_rank, others, is_diffusers(network))
    else:
        _write_peft(path, _all_with_magnitude(low_rank, network, names), names, to)
    count = len(low_rank) or len([name for name in others if others[name]])
    whose = "diffusers" if names == diffusers_names(network) else "the official network"
    return f"wrote {path}: {to}, {count} layers by their names in {whose}" + f", rank and alpha {rank}" * bool(rank)


def _target_names(network: Network, to: str, modules: Mapping[str, object]) -> Names:
    """The names that a format uses: those of diffusers, if it has the network; in kohya's form the official ones."""
    if to == "kohya":
        return official_names(network)
    names = diffusers_names(network)
    if to == "diffusers" or modules.keys() <= {place.module for place in names.values()}:
        return names
    return own_names(network)


def _is_lora(layer: AdapterLayer) -> TypeGuard[LowRank]:
    """Whether a layer is LoRA, and not a kind derived from it, such as one that acts on some tokens only."""
    return type(layer) is LowRank


def _low_rank(module: nn.Linear, layers: Iterable[AdapterLayer], rows: slice, to: str) -> Exported | None:
    """All low-rank layers of a map as one, for some of its rows; None if none of them changes these.

    A layer of more rows is cut; layers of some rows stand one after the other along the rank. Raises ValueError.
    """
    parts = [layer for layer in layers if _is_lora(layer)]
    parts = [layer for layer in parts if layer.rows.start < rows.stop and rows.start < layer.rows.stop]
    if not parts:
        return None
    ups = []
    for layer in parts:
        up = torch.zeros(module.out_features, len(layer.down))
        up[layer.rows] = _cpu(layer.scale * layer.up)
        ups.append(up[rows])
    down, up = torch.cat([_cpu(layer.down) for layer in parts]), torch.cat(ups, dim=1)
    if all(layer.magnitude is None for layer in parts):
        return Exported(down, up, None)
    covered = torch.zeros(module.out_features)
    lengths = torch.zeros(module.out_features)
    lengths[rows] = _lengths(module, rows, down, up)  # of rows that no layer of DoRA has: it changes nothing there
    for layer in parts:
        covered[layer.rows] += 1
        if layer.magnitude is not None and layer.magnitude.ndim == 2:
            if to != "kohya" or len(parts) > 1 or layer.rows != rows:
                raise ValueError("lengths of columns are only in kohya's form, and not for a part of a map")
            return Exported(down, up, _cpu(layer.magnitude))
        if layer.magnitude is not None:
            lengths[layer.rows] = _cpu(layer.magnitude)
    if covered.max() > 1:
        raise ValueError("several changes of the same rows, one of them DoRA, cannot be one")
    return Exported(down, up, lengths[rows])


def _lengths(module: nn.Linear, rows: slice, down: Tensor, up: Tensor) -> Tensor:
    """The lengths with which DoRA has no effect, [O]"""
    return (_cpu(module.weight)[rows].float() + up @ down).norm(dim=1)


def _filled(layer: Exported, rank: int) -> Exported:
    missing = rank - len(layer.down)
    return layer._replace(down=pad(layer.down, (0, 0, 0, missing)), up=pad(layer.up, (0, missing)))


def _all_with_magnitude(layers: dict[str, Exported], network: Network, names: Names) -> dict[str, Exported]:
    """PEFT and diffusers have DoRA for all layers or for none."""
    if all(layer.magnitude is None for layer in layers.values()):
        return layers
    result = {}
    for name, layer in layers.items():
        module = network.get_submodule(names[name].module)
        assert isinstance(module, nn.Linear)
        lengths = _lengths(module, rows_of(module, names[name].projection), layer.down, layer.up)
        result[name] = layer._replace(magnitude=lengths) if layer.magnitude is None else layer
    return result


def _lycoris(module: nn.Linear, layers: Iterable[AdapterLayer], rows: slice) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all changes but low-rank ones as LyCORIS has them, for some rows of a map. Raises ValueError."""
    weight = torch.zeros(module.out_features, module.in_features)
    for layer in layers:
        if isinstance(layer, BiasDelta):
            yield "diff_b", _cpu(layer.values)[rows]
        elif isinstance(layer, FullDelta):
            weight[layer.rows] += _cpu(layer.scale * layer.values)
        elif isinstance(layer, HadamardProduct | KroneckerProduct):
            if layer.rows != rows:
                raise ValueError(f"a change of the kind {layer.kind} for a part of a map cannot be one for all of it")
            tensors = {name: _cpu(tensor) for name, tensor in layer.named_parameters()}
            magnitude = tensors.pop("magnitude", None)
            first = "w1" if "w1" in tensors else "w1_a"
            tensors[first] = _cpu(layer.scale) * tensors[first]
            prefix = "hada" if isinstance(layer, HadamardProduct) else "lokr"
            yield from ((f"{prefix}_{name}", tensor) for name, tensor in tensors.items())
            yield "alpha", torch.tensor(float(next((len(tensors[n]) for n in ("w1_b", "w2_b") if n in tensors), 1)))
            if magnitude is not None:
                yield "dora_scale", _column(magnitude)
    if weight.any():
        yield "diff", weight[rows]


def _write_peft(path: Path, layers: Mapping[str, Exported], names: Names, to: str) -> None:
    """The folder of PEFT, or the file of diffusers with the same settings in its header."""
    prefix, rank = PREFIXES[to], len(next(iter(layers.values())).down)
    is_dora = next(iter(layers.values())).magnitude is not None
    config: dict[str, object] = {"r": rank, "lora_alpha": rank, "use_dora": is_dora, "target_modules": sorted(layers)}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = layer.magnitude
    if to == "diffusers":
        header = {f"{prefix}{name}": value for name, value in config.items()}
        with atomic_file(path) as partial:
            write_tensors(_own(tensors), partial, {HEADER: json.dumps(header, sort_keys=True)})
        return
    if any(other.endswith(f".{name}") for name in layers for other in names.keys() - layers.keys()):
        # PEFT also takes the layers that a name is the end of: a regular expression has to match the whole name.
        config["target_modules"] = "|".join(name.replace(".", r"\.") for name in sorted(layers))
    config = {"peft_type": "LORA", **config, "bias": "none", "inference_mode": True}
    with atomic_folder(path) as folder:
        (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(_own(tensors), folder / f"{PEFT_WEIGHTS}.safetensors")


def _write_kohya(
    path: Path, layers: Mapping[str, Exported], others: Mapping[str, Mapping[str, Tensor]], in_diffusers: bool
) -> None:
    """The file of kohya's scripts, with alpha as a tensor."""
    # After lora_unet_ programs expect official names, after lora_transformer_ those of diffusers.
    prefix, tensors = "lora_transformer_" if in_diffusers else "lora_unet_", {}
    for name in {**layers, **others}:
        module = prefix + name.replace(".", "_")
        own = dict(others.get(name, {}))
        if name in layers:
            layer = layers[name]
            if "alpha" in own:
                raise TesseraError(f"an adapter for kohya has one kind of change for each layer, and {name} has two")
            own |= {"lora_down.weight": layer.down, "lora_up.weight": layer.up}
            own["alpha"] = torch.tensor(float(len(layer.down)))
            own |= {} if layer.magnitude is None else {"dora_scale": _column(layer.magnitude)}
        tensors |= {f"{module}.{key}": tensor for key, tensor in own.items()}
    with atomic_file(path) as partial:
        write_tensors(_own(tensors), partial)


def _column(magnitude: Tensor) -> Tensor:
    """Lengths of rows as [O, 1], of columns as [1, I]"""
    return magnitude[:, None] if magnitude.ndim == 1 else magnitude


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with its own memory, as safetensors needs it."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
