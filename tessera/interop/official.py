"""Checkpoints of the official DiT code (facebookresearch/DiT): a .pt file of weights alone <-> a Model.

The file is the released state dict, or the training script's dict of model, ema, opt and args. Its keys are those of
our own network; what it leaves unsaid is read off the tensors, or asked for. SiT's checkpoints (Ma et al. 2024;
willisma/SiT) have the same keys and shapes under a flow: they are read too, if their reader says what they are.

Shapes: C channels, O raw output channels, H W height and width, p patch side, L tokens, D width.
"""

import argparse
import io
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bundle import BundleConfig, Model, assemble, read_tensors
from tessera.codecs import StoredConfig
from tessera.diffusion import AnyDiffusionConfig, FlowMatchingConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.interop.readers import Codec, codec_for, difference, dit_of, read_pickle
from tessera.layers.positions import sincos_grid
from tessera.models.dit import DiTConfig
from tessera.models.presets import HEADS_OF_WIDTH
from tessera.sampling import Ancestral, Heun, SamplingConfig
from tessera.settings import unknown, validate

SUFFIXES = (".pt", ".pth")
READABLE = (*SUFFIXES, ".safetensors")  # the same state dict in a safer file
TABLE, READOUT = "y_embedder.embedding_table.weight", "final_layer.linear."
NEEDED = {  # from which the architecture is read, with their numbers of axes
    "x_embedder.proj.weight": 4,  # [D, C, p, p]
    "pos_embed": 3,  # [1, L, D]
    "t_embedder.mlp.0.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,  # [p p O, D]
}
DESIGNS = {6: "adaln-zero", 4: "adaln"}  # by the number of vectors that steer a block
WRITABLE = ("adaln-zero", "adaln", "cross-attention", "in-context")  # the designs of the DiT paper
FAMILIES = ("dit", "sit", "sit-gvp")  # what weights of these keys may have been trained as: read_as=, --as
PATHS = {"sit": "linear", "sit-gvp": "gvp"}
SAID_AS = {"Linear": "sit", "GVP": "sit-gvp"}  # path_type in the arguments of SiT's training script


def read(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    read_as: str | None = None,
    heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    codec: Codec | None = None,
) -> Model:
    """A Model from an official checkpoint, under its paper's process, drawing as the official sample.py does.

    read_as: what the weights were trained as: dit (by default), sit, or sit-gvp (SiT's path of that name); a checkpoint
    of SiT's training script says so itself. heads: of attention, where the width is none of the paper's. size: of what
    the network sees, where the position table does not show it. codec: "pixels", a folder or a hub id; by default that
    of the official code for 4 channels, and pixels for 1 or 3. Raises TesseraError if the file is damaged, holds more
    than weights, or is no DiT.
    """
    path = Path(path)
    stored = read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path, [argparse.Namespace])
    tensors, args, which = _weights(stored, path)
    network = infer(tensors, str(path), heads=heads, size=size, classes=args.get("num_classes"))
    process: AnyDiffusionConfig = implied_process(network, str(path))
    family = _family(read_as, args, tensors[f"{READOUT}weight"], network, str(path))
    if family != "dit":
        process = _flow(family, args, str(path))
        tensors |= _flow_readout(tensors, network, process)
        network = network.model_copy(update={"out_channels": network.in_channels})
    decoder = "mse" if args.get("vae") == "mse" else "ema"
    config = BundleConfig(
        network=network,
        diffusion=process,
        codec=codec_for(codec, network.in_channels, decoder),
        sampling=_sampling(network, process),
        origin={"from": f"{'official' if family == 'dit' else 'SiT'} checkpoint {path.name} ({which})"},
    )
    return assemble(config, tensors, str(path), device)


def write(model: Model, target: Path, approximate: bool = False) -> str:
    """Write the weights as a bare official state dict; returns a message that says what the reader must know.

    The file cannot say every configuration: what would be read back otherwise raises TesseraError, unless
    approximate, which writes it all the same and measures the difference. Nothing is overwritten.
    """
    target, network = Path(target), dit_of(model, "an official checkpoint").config
    if target.suffix not in SUFFIXES:
        raise TesseraError(f"an official checkpoint is a file that ends in {' or '.join(SUFFIXES)}; got {target}")
    if target.exists():
        raise TesseraError(f"{target} exists already: remove it or give another name")
    if network.block.kind not in WRITABLE:
        raise TesseraError(
            f"the official format knows no {network.block.kind} blocks, only {', '.join(WRITABLE)}: convert to a bundle"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    implied = infer(tensors, str(target), heads=network.num_heads, size=network.input_size)
    lost = _lost(network, model.config.diffusion, implied, str(target))
    if lost and not approximate:
        raise TesseraError(
            "\n  ".join(("the official format holds weights alone and cannot say all of this model:", *lost))
            + "\nconvert to a bundle, or pass approximate=True (--approximate) to write it all the same"
        )
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    atomic_write(target, buffer.getvalue())
    said = [f"wrote {target}: an official state dict of {len(tensors)} tensors"]
    if lost:
        read_back = assemble(model.config.model_copy(update={"network": implied}), tensors, str(target))
        apart = difference(model.network, read_back.network)
        said.append(f"approximate: one forward pass of what is read back differs by {apart:.3g} (relative L2):")
        said.extend(f"  {fault}" for fault in lost)
    if network.block.kind != "adaln-zero":
        said.append(f"the official code knows the adaln-zero block alone: only Tessera reads this {network.block.kind}")
    if HEADS_OF_WIDTH.get(network.hidden_size) != network.num_heads:
        said.append(f"the file does not say the number of heads: read it with heads={network.num_heads}")
    if isinstance(model.config.codec, StoredConfig):
        said.append(f"the autoencoder is not part of it: {model.config.codec.source}")
    return "\n".join(said)


def _weights(stored: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """(the state dict, the training script's arguments, which of its state dicts it is): the EMA where there is one."""
    args, which = {}, "state dict"
    if isinstance(stored, dict):
        if isinstance(stored.get("args"), argparse.Namespace):
            args = vars(stored["args"])
        found = next((name for name in ("ema", "model") if isinstance(stored.get(name), dict)), None)
        if found is not None:
            stored, which = stored[found], found
    if not isinstance(stored, dict) or not stored or not all(isinstance(value, Tensor) for value in stored.values()):
        raise TesseraError(
            f"{path} holds no weights: expected a state dict, or a training checkpoint with 'ema' or 'model'"
        )
    for wrapper in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        if all(name.startswith(wrapper) for name in stored):
            stored = {name.removeprefix(wrapper): tensor for name, tensor in stored.items()}
    return {name: tensor.clone() for name, tensor in stored.items()}, args, which  # off the mapped file


def infer(
    tensors: dict[str, Tensor],
    source: str,
    *,
    heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    classes: int | None = None,
) -> DiTConfig:
    """The architecture that a state dict belongs to.

    classes: how many there are, where the label table may lack its last, null row. Raises TesseraError if these are
    no weights of a DiT, or do not tell something that is not given.
    """
    missing = [name for name, axes in NEEDED.items() if name not in tensors or tensors[name].ndim != axes]
    if missing:
        shown = ", ".join(list(tensors)[:3])
        raise TesseraError(f"{source} holds no weights of a DiT: it lacks {', '.join(missing)}; it begins with {shown}")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if heads is None and width not in HEADS_OF_WIDTH:
        raise TesseraError(
            f"{source} has width {width}, which is none of the paper's, and weights do not tell the number of heads: "
            "give heads= (--heads)"
        )
    config = {
        "input_size": _size(tensors["pos_embed"], patch, size, source),
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        **_classes(tensors.get(TABLE), classes, source),
        "patch_size": patch,
        "depth": 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)),
        "hidden_size": width,
        "num_heads": heads or HEADS_OF_WIDTH[width],
        "mlp_ratio": _ratio(tensors["blocks.0.mlp.fc1.weight"].shape[0], width),
        "block": _design(tensors, width, source),
    }
    return validate(DiTConfig, config, f"the architecture read off {source}")


def _size(table: Tensor, patch: int, told: int | tuple[int, int] | None, source: str) -> tuple[int, int]:
    """Height and width of what the network sees, from its position table [1, L, D]: of all grids of L patches, the one
    whose sin-cos positions these are; a square one if they are of another make."""
    _, tokens, width = table.shape
    if told is not None:
        height, breadth = (told, told) if isinstance(told, int) else told
        if height % patch or breadth % patch or height * breadth != tokens * patch**2:
            raise TesseraError(
                f"{source} has positions for {tokens} patches of {patch} x {patch}; size {height} x {breadth} does "
                "not have as many"
            )
        return height, breadth
    side = math.isqrt(tokens)
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for grid in sorted(grids, key=lambda grid: grid != (side, side)):
        if width % 4 == 0 and torch.allclose(table[0].float(), sincos_grid(grid, width), rtol=0, atol=0.01):
            return grid[0] * patch, grid[1] * patch
    if side**2 != tokens:
        raise TesseraError(
            f"{source} has {tokens} positions that are no sin-cos table and no square grid: "
            f"give size= (height, width) of what the network sees, {tokens * patch**2} pixels or latents in all"
        )
    return side * patch, side * patch


def _classes(table: Tensor | None, told: int | None, source: str) -> dict[str, Any]:
    """How many classes a label table [rows, D] is for, and whether its last row is the null class."""
    if table is None:
        return {"num_classes": 0}
    rows = table.shape[0]
    if told is not None and rows not in (told, told + 1):
        raise TesseraError(
            f"{source} has {rows} label vectors, but its args say num_classes={told}: expected {told}, or one more"
        )
    return (
        {"num_classes": rows - 1, "learn_null_class": True}
        if told != rows
        else {"num_classes": rows, "learn_null_class": False}
    )


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio whose product with the width is cut off to `hidden`, however the division was rounded."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _design(tensors: dict[str, Tensor], width: int, source: str) -> str:
    steering = tensors.get("blocks.0.adaLN_modulation.1.weight")
    if steering is None:
        return "cross-attention" if any(".cross_attn." in name for name in tensors) else "in-context"
    if steering.shape[0] not in (6 * width, 4 * width):
        raise TesseraError(
            f"{source}: blocks.0.adaLN_modulation.1.weight is {tuple(steering.shape)}; expected {6 * width} rows "
            f"(adaln-zero) or {4 * width} (adaln) at width {width}"
        )
    return DESIGNS[steering.shape[0] // width]


def implied_process(network: DiTConfig, source: str) -> GaussianDiffusionConfig:
    """The paper's process, its variance learned if the network has the outputs for it. TesseraError if neither fits."""
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise TesseraError(
            f"{source} has {network.out_channels} raw output channels for {network.in_channels} channels; expected as many, "
            "or twice as many (learned variance)"
        )
    # Without learned sigma the official code fixes the variance to the larger of the two bounds.
    return GaussianDiffusionConfig(variance="learned" if network.out_channels == 2 * network.in_channels else "beta")


def _sampling(network: DiTConfig, process: AnyDiffusionConfig) -> SamplingConfig:
    """As the official sample.py draws, with 250 calls of the network, guidance 4 on three channels; SiT along its ODE
    by Heun's method, which calls twice a step (Ma et al. 2024)."""
    guided = bool(network.num_classes) and network.learn_null_class
    sampler, steps = (Ancestral(), 250) if isinstance(process, GaussianDiffusionConfig) else (Heun(), 125)
    return SamplingConfig(sampler=sampler, num_steps=steps, guidance_scale=4.0 if guided else 1.0, guidance_channels=3)


# SiT


def _family(told: str | None, args: dict[str, Any], readout: Tensor, network: DiTConfig, source: str) -> str:
    """What the weights were trained as, one of FAMILIES: as told, or as SiT's training script wrote down, or dit."""
    if told is not None and told not in FAMILIES:
        raise TesseraError(unknown("kind of checkpoint", told, FAMILIES))
    if (path := args.get("path_type")) is not None:
        if path not in SAID_AS:
            raise TesseraError(f"{source} is a SiT on the {path} path; Tessera knows {' and '.join(SAID_AS)}")
        if told not in (None, SAID_AS[path]):
            raise TesseraError(f"{source} says itself that it is {SAID_AS[path]}, not {told}: leave read_as (--as) out")
        return SAID_AS[path]
    # SiT throws away the half of its outputs that DiT learns the variance with: it stays as it began, at zero.
    used = _used(readout, network)
    if told is None and not used.all() and readout[used].any() and not readout[~used].any():
        raise TesseraError(
            f"half the outputs of {source} are untrained, as SiT leaves them, but weights do not say what they were "
            "trained as: give read_as='sit' (--as sit, in a recipe training.init_type), or 'dit'"
        )
    return told or "dit"


def _flow(family: str, args: dict[str, Any], source: str) -> FlowMatchingConfig:
    """SiT's process: its time runs from 0 at the noise to 1 at the data, and is not scaled."""
    kinds = {"velocity": "velocity", "noise": "epsilon"}
    predicted = args.get("prediction", "velocity")
    if predicted not in kinds:
        raise TesseraError(f"{source} is a SiT that predicts the {predicted}; Tessera knows {' and '.join(kinds)}")
    told = {"path": PATHS[family], "prediction": kinds[predicted], "loss": kinds[predicted], "network_times": (1, 0)}
    return validate(FlowMatchingConfig, told, source)


def _flow_readout(tensors: dict[str, Tensor], network: DiTConfig, process: FlowMatchingConfig) -> dict[str, Tensor]:
    """The readout without the half that SiT throws away; its velocity turned round, from data to noise."""
    sign = -1 if process.prediction == "velocity" else 1
    readout = {name: tensor for name, tensor in tensors.items() if name.startswith(READOUT)}
    return {name: sign * tensor[_used(tensor, network)] for name, tensor in readout.items()}


def _used(readout: Tensor, network: DiTConfig) -> Tensor:
    """Which rows of a readout [p p O, ...] are of the first C outputs: bool [p p O]."""
    return torch.arange(len(readout)) % network.out_channels < network.in_channels


def _lost(network: DiTConfig, process: AnyDiffusionConfig, implied: DiTConfig, source: str) -> list[str]:
    """Each setting of a model that its bare weights would not bring back."""
    faults = []
    same = {"mlp_ratio"} | (
        set() if network.num_classes else {"learn_null_class"}
    )  # the hidden width decides, and it is told
    for name in DiTConfig.model_fields.keys() - same:
        if getattr(network, name) != getattr(implied, name):
            faults.append(f"network.{name} is {getattr(network, name)}; it would be read as {getattr(implied, name)}")
    read_back = implied_process(implied, source)
    if not isinstance(process, GaussianDiffusionConfig):
        return sorted([*faults, f"its process is {process.summary()}, not {read_back.summary()}"])
    for name in GaussianDiffusionConfig.model_fields:
        if getattr(process, name) != getattr(read_back, name):
            faults.append(f"process.{name} is {getattr(process, name)!r}, not {getattr(read_back, name)!r}")
    return sorted(faults)
