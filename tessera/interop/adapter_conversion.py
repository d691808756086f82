"""Adapters of Tessera <-> adapter files of other programs, and facts about both."""

from collections import Counter
from pathlib import Path
from typing import Any

from tessera import adapter_files, adapters, bundle
from tessera.errors import TesseraError
from tessera.files import atomic_file, atomic_folder
from tessera.interop import load, lora_files, lora_keys, lora_names, pixart_delta
from tessera.interop.adapters import ACCEPTED, find_base, find_file
from tessera.interop.adapters import read as read_adapter
from tessera.interop.lora_export import FORMATS
from tessera.model import AdapterInfo, Model, Provenance
from tessera.settings import unknown_name

ADAPTER = "adapter"  # the folder of Tessera
ALL_FORMATS = (ADAPTER, *FORMATS)
CONTROL_FORMATS = (ADAPTER, "official", "diffusers")  # of controls by copied blocks: PixArt-delta
ONLY_ADAPTERS = (ADAPTER, "peft", "kohya")  # formats that no model has


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter alone, of Tessera or of another program."""
    path = Path(path).expanduser()
    return adapter_files.find(path) is not None or lora_keys.is_adapter(path)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    base: Model | str | Path | None = None,
    alpha: float | None = None,
    any_base: bool = False,
) -> str:
    """Write an adapter in another format; returns a message about what was written.

    source: an adapter of Tessera, the run that trained one, or an adapter of another program. to: adapter, peft,
    diffusers or kohya; of a control by copied blocks: adapter, official (a .pth) or diffusers (a folder). base: the
    model it belongs to, which gives the names and the sizes of its layers; for an adapter in a run or a bundle it is
    known. alpha: if no file states it. any_base: also another model of the same shapes.
    Raises TesseraError if the target exists, or the adapter does not fit the model or the format.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.exists():
        raise TesseraError(f"there is nothing at {source}: {ACCEPTED}")
    file = find_file(source)
    if file is None and not lora_keys.is_adapter(source):
        raise TesseraError(f"{source} is not an adapter that Tessera can read: {ACCEPTED}")
    if base is None and file is not None:
        base = find_base(file)
    if base is None:
        raise TesseraError(
            f"{source} does not hold the model that it belongs to, which gives the names and sizes of its layers: pass "
            "base (--base MODEL)"
        )
    model = base if isinstance(base, Model) else load.load(base, "cpu")
    if file is not None:
        if alpha is not None:
            raise TesseraError(f"{source} is an adapter of Tessera, which states its scale: leave out alpha (--alpha)")
        info, state = read_adapter(source, model)
        if not any_base:
            bundle.check_bases(model, {source.name: info})
    else:
        state = lora_files.read(source, model.network, alpha)
        provenance = Provenance(converted_from=f"adapter file {source.name}")
        info = AdapterInfo(
            summary=lora_files.summary(state), base_network=model.config.network.summary(), provenance=provenance
        )
    is_control = any(key.startswith("copy.") for key in state)
    formats = CONTROL_FORMATS if is_control else ALL_FORMATS
    if to not in formats:
        raise TesseraError(unknown_name("format of this adapter", to, formats))
    if is_control and to != ADAPTER:
        if target.exists():
            raise TesseraError(f"{target} exists already: remove it or give another name")
        adapters.attach(model.network, source.stem, adapters.layers_from_state(model.network, state, str(source)))
        pixart_delta.write(target, model, source.stem)
        return f"wrote {target}: {info.summary}, as a ControlNet of PixArt"
    if to != ADAPTER:
        return lora_files.write(target, state, model.network, to)
    if target.suffix == ".safetensors":
        if target.exists():
            raise TesseraError(f"{target} exists already: remove it or give another name")
        with atomic_file(target) as partial:
            adapter_files.write(info, state, partial)
    else:
        with atomic_folder(target) as folder:
            adapter_files.write(info, state, folder / adapter_files.WEIGHTS)
    return f"wrote {target}: an adapter of Tessera: {info.summary}"


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of an adapter alone, by readable names. Raises TesseraError."""
    path = Path(path).expanduser()
    if adapter_files.find(path) is not None:
        info, state = adapter_files.read(path)
        facts = {"adapter": info.summary, "base": info.base_network, "weights of the base": info.base}
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        facts = {name: value for name, value in facts.items() if value is not None}
        return {**facts, "size": f"{size / 1e6:.3g} MB", **info.provenance.facts()}
    stored = lora_keys.read(path)
    kinds: Counter[str] = Counter()
    ranks, alphas = set(), set()
    for name, layer in stored.layers.items():
        roles = layer.tensors.keys()
        kind = next((role.partition(".")[0] for role in roles if "." in role), "lora")
        kinds[lora_files.KINDS[kind] + " with DoRA" * ("magnitude" in roles)] += 1
        if "down" in roles:
            ranks.add(layer.tensors["down"].shape[0] if layer.tensors["down"].ndim else 0)
        if "alpha" in roles:
            alphas |= set(layer.tensors["alpha"].flatten().tolist())
        elif (alpha := stored.stated_alpha(name)) is not None:
            alphas.add(alpha)
    first = sorted(stored.layers)[0]
    return {
        "adapter": ", ".join(f"{kind} ({count} layers)" for kind, count in kinds.items()),
        "rank": ", ".join(f"{rank}" for rank in sorted(ranks)) or "none",
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted(alphas)) or "not stated",
        "names": f"of {lora_names.program(first)}, such as {first}",
        "size": f"{stored.size / 1e6:.3g} MB",
    }
