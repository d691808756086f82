"""`load` recognizes a format and reads it; `convert` writes another one."""

from pathlib import Path
from typing import Any, Literal

import torch

from tessera import bundle, runtime
from tessera.bundle import Model
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.interop import diffusers, official
from tessera.models.dit import DiTConfig
from tessera.settings import unknown_name

ACCEPTED = (
    "expected a bundle (a folder with config.json), a run's folder, an official checkpoint (.pt, .pth or "
    ".safetensors), or a folder of diffusers' DiTPipeline or of its transformer"
)
TYPE_IS_RECORDED = (
    "{} records what it was trained as ({}): leave out --checkpoint-type; it is for files of bare weights (.pt, .pth, "
    ".safetensors)"
)
Format = Literal["bundle", "official", "diffusers"]


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    *,
    ema: float | None = None,
    checkpoint_type: str | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    codec: CodecSource | None = None,
) -> Model:
    """Load a model from a bundle, a run (its newest checkpoint), an official .pt or .pth file, or a diffusers folder.

    device: auto, cpu, cuda or mps. ema: the decay of the EMA weights of a run that saved several (default: the first).
    checkpoint_type: what a .pt was trained as, if it does not record it: dit, sit or sit-gvp.
    num_heads, size: what weights alone may not determine (see `official.read`); elsewhere they must match the source.
    codec: instead of the source's own: "pixels", a folder or a hub id. Nothing is downloaded.
    Raises TesseraError if no model is recognized, or the files are damaged.
    """
    path, device = Path(path).expanduser(), runtime.choose_device(str(device))
    if path.is_file() and path.suffix in official.READABLE:
        _reject_ema(path, ema)
        return official.read(path, device, checkpoint_type=checkpoint_type, num_heads=num_heads, size=size, codec=codec)
    model = _load_folder(path, device, codec, ema)
    if checkpoint_type is not None:
        raise TesseraError(TYPE_IS_RECORDED.format(path, model.config.diffusion.summary()))
    network = model.config.network
    if num_heads is not None and not isinstance(network, DiTConfig):
        raise TesseraError(f"{path} holds a {network.display_name}, which has no num_heads: leave it out")
    if num_heads is not None and num_heads != getattr(network, "num_heads", None):
        raise TesseraError(f"{path} has num_heads {getattr(network, 'num_heads', None)}, not {num_heads}: leave it out")
    if size is not None and network.input_size not in (size, (size, size)):
        raise TesseraError(f"{path} has size {network.input_size}, not {size}: leave it out")
    return model if codec is None else _with_codec(model, codec)


def ema_decays(path: str | Path) -> list[float]:
    """The decays of the EMA weights that a run saved, the one it samples with first; [] if there is only one."""
    folder = next(iter(bundle.checkpoints(Path(path).expanduser())), Path(path).expanduser())
    if not (folder / bundle.EMA_FOLDER).is_dir():
        return []
    return list(bundle.ema_weights(folder, bundle.load_config(folder)))


def is_model(path: str | Path) -> bool:
    """Whether `load` is likely to read a path, judged by file names only."""
    path = Path(path).expanduser()
    names = (bundle.CONFIG, diffusers.INDEX, "checkpoints", "recipe.yaml")
    return path.suffix in official.READABLE if path.is_file() else any((path / name).exists() for name in names)


def convert(
    source: Model | str | Path,
    target: str | Path,
    to: Format | str,
    approximate: bool = False,
    *,
    ema: float | None = None,
    checkpoint_type: str | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    codec: CodecSource | None = None,
) -> str:
    """Write a model, or anything that `load` reads, in another format; returns a message about what was written.

    approximate: also write what the format cannot hold exactly, and measure how much one forward pass differs. Raises
    TesseraError if the target exists, or the format cannot hold the model.
    """
    writers = {"bundle": _write_bundle, "official": official.write, "diffusers": diffusers.write}
    if to not in writers:
        raise TesseraError(unknown_name("format", to, writers))
    if not isinstance(source, Model):
        source = load(
            source, "cpu", ema=ema, checkpoint_type=checkpoint_type, num_heads=num_heads, size=size, codec=codec
        )
    elif ema is not None:
        raise TesseraError(f"the weights of this model are loaded already: leave out ema {ema}")
    elif checkpoint_type is not None:
        raise TesseraError(TYPE_IS_RECORDED.format("this model", source.config.diffusion.summary()))
    elif codec is not None:
        source = _with_codec(source, codec)
    return writers[to](source, Path(target).expanduser(), approximate)


def _reject_ema(path: Path, ema: float | None) -> None:
    if ema is not None:
        raise TesseraError(f"{path} holds one set of weights, not EMA weights of decay {ema}: leave out --ema")


def _load_folder(path: Path, device: torch.device, codec: CodecSource | None, ema: float | None) -> Model:
    if not path.exists():
        raise TesseraError(f"there is nothing at {path}: {ACCEPTED}")
    if not path.is_dir():
        raise TesseraError(f"{path} is not a model that Tessera can read: {ACCEPTED}")
    config: dict[str, Any] = read_json(path / bundle.CONFIG) if (path / bundle.CONFIG).exists() else {}
    if "format" in config:
        return bundle.load(path, device, ema)
    if "_class_name" in config or (path / diffusers.INDEX).exists():
        _reject_ema(path, ema)
        return diffusers.read(path, device, codec=codec)
    if checkpoints := bundle.checkpoints(path):
        return bundle.load(checkpoints[0], device, ema)
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").exists():
        raise TesseraError(f"the run in {path} has no checkpoint yet: wait for the first, or resume the training")
    raise TesseraError(f"{path} holds no model that Tessera can read: {ACCEPTED}")


def _with_codec(model: Model, codec: CodecSource) -> Model:
    config = resolve_codec(codec, model.config.network.in_channels)
    return Model(model.config.model_copy(update={"codec": config}), model.network)


def _write_bundle(model: Model, target: Path, approximate: bool) -> str:
    """Write a bundle, which is always exact."""
    bundle.save(model, target)
    return f"wrote {target}: a bundle, exact"
