"""Telling apart what can be loaded, and turning one into another."""

from pathlib import Path
from typing import Any, Literal

import torch

from tessera import bundle, runtime
from tessera.bundle import Model
from tessera.errors import TesseraError
from tessera.interop import diffusers, official
from tessera.interop.readers import Codec, codec_for, read_json
from tessera.models.dit import DiTConfig
from tessera.settings import unknown

ACCEPTED = (
    "expected a bundle (a folder with config.json), a run's folder, an official checkpoint (.pt, .pth or "
    ".safetensors), or a folder of diffusers' DiTPipeline or of its transformer"
)
SAYS_ITSELF = (
    "{} says itself what it was trained as ({}): leave read_as (--as) out; it is for files of bare weights (.pt, .pth, "
    ".safetensors)"
)
Format = Literal["bundle", "official", "diffusers"]


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    *,
    ema: float | None = None,
    read_as: str | None = None,
    heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    codec: Codec | None = None,
) -> Model:
    """Load a model from whatever holds one: a bundle, a run (its newest checkpoint), an official .pt or .pth file, a
    diffusers folder. Nothing is fetched.

    device: auto, cpu, cuda or mps. ema: the decay of the average to take of a run that keeps several (its first).
    read_as: what a .pt was trained as where it cannot say: dit, sit or sit-gvp.
    heads, size: what weights alone may leave unsaid (see `official.read`); elsewhere they must agree with what is said.
    codec: in place of the source's own: "pixels", a folder or a hub id.
    Raises TesseraError if nothing is recognised, or what is there is damaged.
    """
    path, device = Path(path).expanduser(), runtime.choose_device(str(device))
    if path.is_file() and path.suffix in official.READABLE:
        _one_set_of_weights(path, ema)
        return official.read(path, device, read_as=read_as, heads=heads, size=size, codec=codec)
    model = _load_folder(path, device, codec, ema)
    if read_as is not None:
        raise TesseraError(SAYS_ITSELF.format(path, model.config.diffusion.summary()))
    network = model.config.network
    if heads is not None and not isinstance(network, DiTConfig):
        raise TesseraError(f"{path} holds a {network.display_name}, which has no one number of heads: leave heads out")
    for what, told, said in (("heads", heads, getattr(network, "num_heads", None)), ("size", size, network.input_size)):
        if told is not None and told != said and (told, told) != said:
            raise TesseraError(f"{path} says {what} {said}, not {told}: leave {what} out")
    return model if codec is None else _with_codec(model, codec)


def ema_decays(path: str | Path) -> list[float]:
    """The decays of the averages that a run keeps, the one it draws with first; [] where there is but one."""
    folder = next(iter(bundle.checkpoints(Path(path).expanduser())), Path(path).expanduser())
    if not (folder / bundle.AVERAGES).is_dir():
        return []
    return list(bundle.ema_weights(folder, bundle.load_config(folder)))


def is_model(path: str | Path) -> bool:
    """Whether a path looks like something that `load` reads, without reading it."""
    path = Path(path).expanduser()
    marks = (bundle.CONFIG, diffusers.INDEX, "checkpoints", "recipe.yaml")
    return path.suffix in official.READABLE if path.is_file() else any((path / mark).exists() for mark in marks)


def convert(
    source: Model | str | Path,
    target: str | Path,
    to: Format | str,
    approximate: bool = False,
    *,
    ema: float | None = None,
    read_as: str | None = None,
    heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    codec: Codec | None = None,
) -> str:
    """Write a model, or what `load` reads, in another format; returns a message of what was written.

    approximate: write also what the format cannot hold exactly, and say by how much one forward pass differs. Raises
    TesseraError if the target exists, or the format has no place for the model.
    """
    writers = {"bundle": _write_bundle, "official": official.write, "diffusers": diffusers.write}
    if to not in writers:
        raise TesseraError(unknown("format", to, writers))
    if not isinstance(source, Model):
        source = load(source, "cpu", ema=ema, read_as=read_as, heads=heads, size=size, codec=codec)
    elif ema is not None:
        raise TesseraError(f"this model has its weights already, no average of decay {ema}: leave ema out")
    elif read_as is not None:
        raise TesseraError(SAYS_ITSELF.format("this model", source.config.diffusion.summary()))
    elif codec is not None:
        source = _with_codec(source, codec)
    return writers[to](source, Path(target).expanduser(), approximate)


def _one_set_of_weights(path: Path, ema: float | None) -> None:
    if ema is not None:
        raise TesseraError(f"{path} holds one set of weights, no average of decay {ema}: leave ema (--ema) out")


def _load_folder(path: Path, device: torch.device, codec: Codec | None, ema: float | None) -> Model:
    if not path.exists():
        raise TesseraError(f"there is nothing at {path}: {ACCEPTED}")
    if not path.is_dir():
        raise TesseraError(f"{path} is no model that Tessera knows: {ACCEPTED}")
    config: dict[str, Any] = read_json(path / bundle.CONFIG) if (path / bundle.CONFIG).exists() else {}
    if "format" in config:
        return bundle.load(path, device, ema)
    if "_class_name" in config or (path / diffusers.INDEX).exists():
        _one_set_of_weights(path, ema)
        return diffusers.read(path, device, codec=codec)
    found = bundle.checkpoints(path)
    if found:
        return bundle.load(found[0], device, ema)
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").exists():
        raise TesseraError(f"the run in {path} has no checkpoint yet: wait for its first, or train it further")
    raise TesseraError(f"{path} holds no model that Tessera knows: {ACCEPTED}")


def _with_codec(model: Model, codec: Codec) -> Model:
    chosen = codec_for(codec, model.config.network.in_channels)
    return Model(model.config.model_copy(update={"codec": chosen}), model.network)


def _write_bundle(model: Model, target: Path, approximate: bool) -> str:
    """A bundle holds everything: it is never approximate."""
    bundle.save(model, target)
    return f"wrote {target}: a bundle, exact"
