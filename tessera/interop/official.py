"""Checkpoints of the official DiT code (facebookresearch/DiT): a .pt file of weights alone <-> a Model.

The file is the released state dict, or the training script's dict of model, ema, opt and args. Wrappers and containers
of other programs are read, too (`weights`). The keys are those of Tessera's DiT; the architecture is inferred from the
tensors or passed as an argument. SiT's checkpoints (Ma et al. 2024; willisma/SiT) have the same keys and shapes with
flow matching, and REPA's (Yu et al. 2025; sihyun-yu/REPA) those of SiT with time reversed and projectors beside them.
Both are read with `checkpoint_type`. Latte's checkpoints of classes and without condition (Ma et al. 2024;
Vchitect/Latte) are those of DiT with a table of frames beside them; its network of text is another one, see
`tessera.models.diffusers_classes`.

Shapes: C channels, O output channels, H W height and width, p patch side, L tokens, D width.
"""

import argparse
import io
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bundle import BundleConfig, Model, Provenance, assemble
from tessera.checkpoint_files import find_weight_files, read_stored
from tessera.codecs import StoredConfig
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.diffusion import AnyDiffusionConfig, FlowMatchingConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.interop import pixart
from tessera.interop.common import relative_difference, require_dit
from tessera.interop.weights import find_weights
from tessera.layers.positions import sincos_grid
from tessera.models.dit import DiTConfig
from tessera.models.latte import LatteConfig
from tessera.models.pixart import PixArt
from tessera.models.presets import NUM_HEADS_BY_WIDTH
from tessera.sampling import Ancestral, Euler, Heun, SamplingConfig
from tessera.settings import unknown_name, validate

SUFFIXES = (".pt", ".pth")  # of files that are written
FRAME_TABLE, LATTE_TEXT = "temp_embed", "text_embedding_projection.1.weight"
LABEL_TABLE, HEAD = "y_embedder.embedding_table.weight", "final_layer.linear."
REQUIRED = {  # the tensors that determine the architecture, with their numbers of axes
    "x_embedder.proj.weight": 4,  # [D, C, p, p]
    "pos_embed": 3,  # [1, L, D]
    "t_embedder.mlp.0.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,  # [p p O, D]
}
BLOCKS = {6: "adaln-zero", 4: "adaln"}  # by the number of modulation vectors
WRITABLE = ("adaln-zero", "adaln", "cross-attention", "in-context")  # the block designs of the DiT paper
FLOWS = {  # the path and the network's times for data and noise, of the types with flow matching
    "sit": ("linear", (1, 0)),
    "sit-gvp": ("gvp", (1, 0)),
    "repa": ("linear", (0, 1)),
    "repa-cosine": ("gvp", (0, 1)),
}
CHECKPOINT_TYPES = ("dit", *FLOWS)
# By path_type in the arguments of the training script: SiT's are written Linear and GVP, REPA's linear and cosine.
TYPE_OF_PATH = {"Linear": "sit", "GVP": "sit-gvp", "linear": "repa", "cosine": "repa-cosine"}
# Heads that training alone uses, such as REPA's: outputs of the network do not depend on them.
TRAINING_HEADS = re.compile(
    r"(?:\w+_)?(?:projectors?|projections?|proj_heads?|projection_heads?|align(?:ment)?_heads?)\."
)
IMAGENET_ROWS = 1001  # of the paper's label tables: 1000 classes and the null label


def read(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    checkpoint_type: str | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    codec: CodecSource | None = None,
) -> Model:
    """A Model from an official checkpoint, with the diffusion process of its paper and the settings of sample.py.

    path: a file, or a folder of one set of weights. checkpoint_type: what the weights were trained as: dit (default),
    sit, sit-gvp (SiT's GVP path), repa or repa-cosine; recorded in checkpoints of the training scripts of SiT and REPA.
    num_heads: needed if the width is not one of the paper's. size: of the input, needed if the position table does not
    determine it. num_classes: without the null label, the last row of a label table that has one row more (default: as
    recorded in the file, else one less than the rows). codec: "pixels", a folder or a hub id; by default that of the
    official code for 4 channels, and pixels for 1 or 3.
    Raises TesseraError if the file is damaged, holds objects other than tensors, or is not a DiT.
    """
    path = Path(path)
    files = find_weight_files(path) if path.is_dir() else None
    stored = read_stored(path) if files is None else files.read()
    if pixart.is_pixart(stored, str(path)):
        return pixart.read(stored, path, device, num_heads=num_heads, codec=codec)
    tensors, part, left_out = find_weights(stored, REQUIRED, str(path))
    heads = [name for name in tensors if TRAINING_HEADS.match(name)]
    args = _arguments(stored)
    recorded = args.get("num_classes") if isinstance(args.get("num_classes"), int) else None
    if LATTE_TEXT in tensors:
        raise TesseraError(
            f"{path} is a Latte of text in the code for classes, whose last layer ignores the text: load the published "
            "Latte of text as a folder of diffusers"
        )
    is_latte = FRAME_TABLE in tensors
    network = infer_config(
        tensors, str(path), num_heads=num_heads, size=size, num_classes=recorded if num_classes is None else num_classes
    )
    if "pos_embed" not in tensors:
        tensors["pos_embed"] = sincos_grid(network.grid, network.hidden_size)[None]
    diffusion: AnyDiffusionConfig = implied_diffusion(network, str(path))
    checkpoint_type = _checkpoint_type(checkpoint_type, args, tensors, network, bool(heads), str(path))
    if is_latte and checkpoint_type != "dit":
        raise TesseraError(f"{path} is a Latte, not a {checkpoint_type}: leave out --checkpoint-type")
    for name in heads:
        del tensors[name]
    if heads:
        left_out.append(
            f"heads of training ({len(heads)} tensors: {', '.join(sorted({_first(name) for name in heads}))})"
        )
    if checkpoint_type != "dit":
        diffusion = _flow(checkpoint_type, args, str(path))
        tensors |= _flow_head(tensors, network, diffusion)
        network = network.model_copy(update={"out_channels": network.in_channels})
    decoder = "mse" if args.get("vae") == "mse" else "ema"
    project = {"dit": "official DiT", "sit": "SiT", "repa": "REPA"}[checkpoint_type.partition("-")[0]]
    project = "official Latte" if is_latte else project
    assumed = None
    is_known = is_latte or network.num_classes + 1 == IMAGENET_ROWS  # Latte always has a null label
    if network.num_classes and recorded is None and num_classes is None and not is_known:
        rows = network.num_classes + 1
        assumed = (
            f"the last of its {rows} label vectors is the null label, so it has {rows - 1} classes; if it was trained "
            f"without label dropout, it has {rows}: pass num_classes={rows} (--num-classes {rows}, in a recipe "
            f"training.init_num_classes)"
        )
    variant = f", variant {files.variant}" if files is not None and files.variant else ""
    config = BundleConfig(
        network=network,
        diffusion=diffusion,
        codec=resolve_codec(codec, network.in_channels, decoder),
        sampling=_sampling(network, checkpoint_type),
        provenance=Provenance(
            converted_from=f"{project} checkpoint {path.name} ({part}{variant})",
            not_converted="; ".join(left_out) or None,
            assumed=assumed,
        ),
    )
    return assemble(config, {name: tensor.clone() for name, tensor in tensors.items()}, str(path), device)


def write(model: Model, target: Path, approximate: bool = False) -> str:
    """Write the weights as a bare official state dict; returns a message with what a user of the file must know.

    The file cannot record every configuration: TesseraError is raised if it would be read back as another one, unless
    approximate, which writes it anyway and measures the difference. Nothing is overwritten.
    """
    target, network = Path(target), require_dit(model, "an official checkpoint").config
    if target.suffix not in SUFFIXES:
        raise TesseraError(f"an official checkpoint is a file that ends in {' or '.join(SUFFIXES)}; got {target}")
    if target.exists():
        raise TesseraError(f"{target} exists already: remove it or give another name")
    if isinstance(model.network, PixArt):
        return pixart.write(model.network, target, approximate)
    if network.block.kind not in WRITABLE:
        raise TesseraError(
            f"the official format has no {network.block.kind} blocks, only {', '.join(WRITABLE)}: convert to a bundle"
        )
    if network.is_temporal and not isinstance(network, LatteConfig):
        raise TesseraError("the official formats have no network for clips but Latte: convert to a bundle")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    height, width = network.input_size[-2:]
    implied = infer_config(tensors, str(target), num_heads=network.num_heads, size=(height, width))
    lost = _lost(network, model.config.diffusion, implied, str(target))
    if lost and not approximate:
        raise TesseraError(
            "\n  ".join(("the official format holds only weights, which do not determine all of this model:", *lost))
            + "\nconvert to a bundle, or pass approximate=True (--approximate) to write it anyway"
        )
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    atomic_write(target, buffer.getvalue())
    messages = [f"wrote {target}: an official state dict of {len(tensors)} tensors"]
    if lost:
        read_back = assemble(model.config.model_copy(update={"network": implied}), tensors, str(target))
        difference = relative_difference(model.network, read_back.network)
        messages.append(
            f"approximate: one forward pass of the model read back differs by {difference:.3g} (relative L2):"
        )
        messages.extend(f"  {line}" for line in lost)
    if network.block.kind != "adaln-zero":
        messages.append(f"the official code has only the adaln-zero block: only Tessera reads {network.block.kind}")
    if NUM_HEADS_BY_WIDTH.get(network.hidden_size) != network.num_heads:
        messages.append(f"the file does not record the number of heads: load it with num_heads={network.num_heads}")
    if isinstance(model.config.codec, StoredConfig):
        messages.append(f"the autoencoder is not part of the file: {model.config.codec.source}")
    return "\n".join(messages)


def _arguments(stored: Any) -> dict[str, Any]:
    """The arguments of the training script that a checkpoint records."""
    stored = stored if isinstance(stored, dict) else {}
    for name in ("args", "config", "hyper_parameters", "hparams"):
        args = stored.get(name)
        if isinstance(args, argparse.Namespace):
            return vars(args)
        if isinstance(args, dict) and args:
            return args
    return {}


def _first(name: str) -> str:
    return name.partition(".")[0]


def infer_config(
    tensors: dict[str, Tensor],
    source: str,
    *,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> DiTConfig:
    """The architecture of a state dict.

    num_classes: if known; the label table may lack its last, null row. Raises TesseraError if these are not the weights
    of a DiT, or do not determine something that is not passed. A position table that is missing is the sin-cos table.
    """
    missing = [
        name
        for name, axes in REQUIRED.items()
        if name not in tensors or tensors[name].ndim != axes or not tensors[name].numel()
    ]
    if missing == ["pos_embed"] and missing[0] not in tensors:
        if size is None:
            raise TesseraError(
                f"{source} has no position table (pos_embed), so the size of its input is unknown: pass "
                "size=(height, width) of the network's input"
            )
        missing = []
    if missing:
        first = ", ".join(list(tensors)[:3])
        raise TesseraError(f"{source} is not a DiT: it lacks {', '.join(missing)}; its first tensors are {first}")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if num_heads is None and width not in NUM_HEADS_BY_WIDTH:
        raise TesseraError(
            f"{source} has width {width}, which is not one of the paper's, and weights do not determine the number of "
            "heads: pass num_heads (--num-heads)"
        )
    config = {
        "input_size": _size(tensors.get("pos_embed"), patch, size, source),
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        **_classes(tensors.get(LABEL_TABLE), num_classes, source),
        "patch_size": patch,
        "depth": len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)}),
        "hidden_size": width,
        "num_heads": num_heads or NUM_HEADS_BY_WIDTH[width],
        "mlp_ratio": _ratio(tensors["blocks.0.mlp.fc1.weight"].shape[0], width),
        "block": _block_kind(tensors, width, source),
    }
    kind = DiTConfig
    if FRAME_TABLE in tensors:
        kind, config["input_size"] = LatteConfig, (tensors[FRAME_TABLE].shape[1], *config["input_size"])
    return validate(kind, config, f"the architecture inferred from {source}")


def _size(table: Tensor | None, patch: int, size: int | tuple[int, int] | None, source: str) -> tuple[int, int]:
    """Height and width of the input, from the position table [1, N, D]: the grid of N patches that has this
    sin-cos table, or a square grid if it is another table."""
    if table is None:
        assert size is not None  # checked by the caller
        return (size, size) if isinstance(size, int) else size
    _, tokens, width = table.shape
    if size is not None:
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows % patch or columns % patch or rows * columns != tokens * patch**2:
            raise TesseraError(
                f"{source} has positions for {tokens} patches of {patch} x {patch}; size {rows} x {columns} does not"
            )
        return rows, columns
    side = math.isqrt(tokens)
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for grid in sorted(grids, key=lambda grid: grid != (side, side)):
        if width % 4 == 0 and torch.allclose(table[0].float(), sincos_grid(grid, width), rtol=0, atol=0.01):
            return grid[0] * patch, grid[1] * patch
    if side**2 != tokens:
        raise TesseraError(
            f"{source} has {tokens} positions that are neither a sin-cos table nor a square grid: "
            f"pass size=(height, width) of the network's input, {tokens * patch**2} pixels or latents in total"
        )
    return side * patch, side * patch


def _classes(table: Tensor | None, num_classes: int | None, source: str) -> dict[str, Any]:
    """The number of classes of a label table [rows, D], and whether its last row is the null label."""
    if table is None:
        return {"num_classes": 0}
    rows = table.shape[0]
    if num_classes is not None and rows not in (num_classes, num_classes + 1):
        raise TesseraError(
            f"{source} has {rows} label vectors, but num_classes={num_classes} was passed or is recorded in it: "
            f"expected {num_classes}, or one more for the null label"
        )
    learn_null_class = num_classes != rows
    return {"num_classes": rows - learn_null_class, "learn_null_class": learn_null_class}


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio for which int(width * mlp_ratio) is `hidden`, whatever the rounding of the division."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _block_kind(tensors: dict[str, Tensor], width: int, source: str) -> str:
    modulation = tensors.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is None:
        return "cross-attention" if any(".cross_attn." in name for name in tensors) else "in-context"
    if modulation.shape[0] not in (6 * width, 4 * width):
        raise TesseraError(
            f"{source}: blocks.0.adaLN_modulation.1.weight is {tuple(modulation.shape)}; expected {6 * width} rows "
            f"(adaln-zero) or {4 * width} (adaln) at width {width}"
        )
    return BLOCKS[modulation.shape[0] // width]


def implied_diffusion(network: DiTConfig, source: str) -> GaussianDiffusionConfig:
    """The paper's process, with learned variance if the network has outputs for it. Raises TesseraError."""
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise TesseraError(
            f"{source} has {network.out_channels} output channels for {network.in_channels} inputs; expected as many, "
            "or twice as many (learned variance)"
        )
    # Without learned variance the official code uses the larger of the two bounds.
    return GaussianDiffusionConfig(variance="learned" if network.out_channels == 2 * network.in_channels else "beta")


def _sampling(network: DiTConfig, checkpoint_type: str) -> SamplingConfig:
    """As in the official sample.py: 250 calls of the network, guidance scale 4 on three channels; SiT with Heun's
    method along its ODE, two calls per step (Ma et al. 2024); REPA's generate.py: Euler's method, scale 1.5; Latte: all
    four channels of epsilon are guided, scale 7."""
    guided = bool(network.num_classes) and network.learn_null_class
    if isinstance(network, LatteConfig):
        return SamplingConfig(sampler=Ancestral(), num_steps=250, guidance_scale=7.0 if guided else 1.0)
    if checkpoint_type.startswith("repa"):
        return SamplingConfig(sampler=Euler(), num_steps=50, guidance_scale=1.5 if guided else 1.0)
    sampler, steps = (Ancestral(), 250) if checkpoint_type == "dit" else (Heun(), 125)
    return SamplingConfig(sampler=sampler, num_steps=steps, guidance_scale=4.0 if guided else 1.0, guidance_channels=3)


# SiT and REPA


def _checkpoint_type(
    requested: str | None,
    args: dict[str, Any],
    tensors: dict[str, Tensor],
    network: DiTConfig,
    heads: bool,
    source: str,
) -> str:
    """One of CHECKPOINT_TYPES: as recorded by the training scripts of SiT and REPA, as requested, or dit.

    heads: whether the file holds heads of training, which DiT and SiT do not have.
    """
    if requested is not None and requested not in CHECKPOINT_TYPES:
        raise TesseraError(unknown_name("checkpoint type", requested, CHECKPOINT_TYPES))
    if (path := args.get("path_type")) is not None:
        path = str(path)
        if path not in TYPE_OF_PATH:
            raise TesseraError(
                f"{source} is a SiT with the {path} path; Tessera supports Linear and GVP, and REPA's linear and cosine"
            )
        if requested not in (None, TYPE_OF_PATH[path]):
            raise TesseraError(
                f"{source} records that it is {TYPE_OF_PATH[path]}, not {requested}: leave out --checkpoint-type"
            )
        return TYPE_OF_PATH[path]
    choices = "(--checkpoint-type {}, in a recipe training.init_type), or {}"
    if requested is None and heads:
        raise TesseraError(
            f"{source} holds heads of training, as REPA's checkpoints do, but weights do not record what they were "
            f"trained as: pass checkpoint_type='repa' {choices.format('repa', 'one of ' + ', '.join(CHECKPOINT_TYPES))}"
        )
    # SiT discards the half of the outputs with which DiT learns the variance: those weights stay zero.
    head = tensors[f"{HEAD}weight"]
    used = _used_rows(head, network)
    if requested is None and not used.all() and head[used].any() and not head[~used].any():
        raise TesseraError(
            f"half the outputs of {source} are untrained, as in SiT, but weights do not record what they were trained "
            f"as: pass checkpoint_type='sit' {choices.format('sit', repr('dit'))}"
        )
    return requested or "dit"


def _flow(checkpoint_type: str, args: dict[str, Any], source: str) -> FlowMatchingConfig:
    """The process of SiT, whose network's time runs from 0 (noise) to 1 (data), or of REPA, where it is reversed."""
    is_sit = checkpoint_type.startswith("sit")
    predictions = {"velocity": "velocity", "noise": "epsilon"} if is_sit else {"v": "velocity"}
    predicted = str(args.get("prediction", next(iter(predictions))))
    if predicted not in predictions:
        raise TesseraError(
            f"{source} is a {'SiT' if is_sit else 'REPA'} that predicts the {predicted}; Tessera supports "
            f"{' and '.join(predictions)}"
        )
    path, times = FLOWS[checkpoint_type]
    prediction = predictions[predicted]
    data = {"path": path, "prediction": prediction, "loss": prediction, "network_times": times}
    return validate(FlowMatchingConfig, data, source)


def _flow_head(tensors: dict[str, Tensor], network: DiTConfig, diffusion: FlowMatchingConfig) -> dict[str, Tensor]:
    """The head without the half that SiT discards. SiT's velocity leads from noise to data: its sign is reversed."""
    sign = -1 if diffusion.prediction == "velocity" and diffusion.network_times == (1, 0) else 1
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    return {name: sign * tensor[_used_rows(tensor, network)] for name, tensor in head.items()}


def _used_rows(head: Tensor, network: DiTConfig) -> Tensor:
    """Which rows of a head [p p O, ...] belong to the first C outputs: bool [p p O]."""
    return torch.arange(len(head)) % network.out_channels < network.in_channels


def _lost(network: DiTConfig, diffusion: AnyDiffusionConfig, implied: DiTConfig, source: str) -> list[str]:
    """The settings of a model that would be read back from its bare weights as another value."""
    lost = []
    ignored = {"mlp_ratio", "label_init_std"}  # the hidden width is in the weights; the other is of initial weights
    if not network.num_classes:
        ignored.add("learn_null_class")
    for name in type(network).model_fields.keys() - ignored:
        if getattr(network, name) != getattr(implied, name):
            lost.append(f"network.{name} is {getattr(network, name)}; it would be read as {getattr(implied, name)}")
    read_back = implied_diffusion(implied, source)
    if not isinstance(diffusion, GaussianDiffusionConfig):
        return sorted([*lost, f"diffusion is {diffusion.summary()}, not {read_back.summary()}"])
    for name in GaussianDiffusionConfig.model_fields:
        if getattr(diffusion, name) != getattr(read_back, name):
            lost.append(f"diffusion.{name} is {getattr(diffusion, name)!r}, not {getattr(read_back, name)!r}")
    return sorted(lost)
