"""What the adapter files of other programs hold: which layers, and at which strength.

W is changed by `scale B A`, scale = alpha / rank (alpha / sqrt(rank) with use_rslora). Alpha may be a tensor, or stand
in a header or a configuration beside the tensors, or nowhere.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera.checkpoint_files import SUFFIXES, is_weights_file, read_header, read_state_dict
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.interop.weights import unwrapped
from tessera.settings import Settings, validate

PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_config.json", "adapter_model", "pytorch_lora_weights"
HEADER, KOHYA_ALPHA = "lora_adapter_metadata", "ss_network_alpha"
PEFT_ALPHA = 8  # LoraConfig's default, which the official script of PixArt leaves as it is
# The names of the tensors of a layer, by what they are here.
TENSORS = {
    "down": "lora_A|lora_down|lora\\.down",
    "up": "lora_B|lora_up|lora\\.up",
    "magnitude": "lora_magnitude_vector|lora_magnitude|dora_scale",
    "alpha": "alpha",
    "loha.w1_a": "hada_w1_a",
    "loha.w1_b": "hada_w1_b",
    "loha.w2_a": "hada_w2_a",
    "loha.w2_b": "hada_w2_b",
    "lokr.w1": "lokr_w1",
    "lokr.w1_a": "lokr_w1_a",
    "lokr.w1_b": "lokr_w1_b",
    "lokr.w2": "lokr_w2",
    "lokr.w2_a": "lokr_w2_a",
    "lokr.w2_b": "lokr_w2_b",
    "weight.values": "diff",
    "bias.values": "diff_b",
}
KEY = re.compile(rf"(.+)\.(?:{'|'.join(TENSORS.values())})(?:\.default)?(\.weight|\.bias)?")
OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")  # of the first LoRA files of diffusers
# The settings of LoraConfig that change nothing once an adapter is trained.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "runtime_config", "qalora_group_size", "lora_bias", "eva_config", "ensure_weight_tying",
    "lora_ga_config", "corda_config",
}  # fmt: skip
# Those of init_lora_weights with which the weights of the base stay as they were.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftConfig(Settings):
    """The settings of PEFT's LoraConfig that are read."""

    r: PositiveInt | None = None
    lora_alpha: PositiveFloat | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class StoredLayer:
    """The tensors of one layer in a file, by what they are, and their names there."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class StoredAdapter:
    """A file of another program.

    layers: by the name of the layer there. other: the names of tensors that belong to no kind of adapter. config: the
    settings of PEFT beside the tensors or in the header. kohya_alpha: in the header of kohya's scripts.
    """

    source: str
    size: int
    layers: dict[str, StoredLayer]
    other: list[str]
    config: PeftConfig | None = None
    kohya_alpha: float | None = None

    def stated_scale(self, name: str, rank: int) -> tuple[float, float] | None:
        """(alpha, scale) of a layer in the configuration or header. Raises ValueError if it states another rank."""
        if self.config is not None:
            stated = _by_pattern(self.config.rank_pattern, name, self.config.r)
            if stated is not None and stated != rank:
                raise ValueError(f"its rank is {rank}, and the configuration of the file states {stated:g}")
        alpha = self.stated_alpha(name)
        if alpha is None:
            return None
        return alpha, alpha / (math.sqrt(rank) if self.config is not None and self.config.use_rslora else rank)

    def stated_alpha(self, name: str) -> float | None:
        """The alpha of a layer in the configuration or header."""
        if self.config is None:
            return self.kohya_alpha
        return _by_pattern(self.config.alpha_pattern, name, self.config.lora_alpha)


def _by_pattern(patterns: Mapping[str, float] | None, name: str, default: float | None) -> float | None:
    """As in PEFT: the value of the first regular expression that matches the end of a name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def find(path: Path) -> tuple[Path, Path | None] | None:
    """The file of an adapter's weights and its adapter_config.json; None if a path is no adapter of another program."""
    if path.is_dir():
        for stem in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
            for suffix in (".safetensors", ".bin"):
                if (file := path / f"{stem}{suffix}").exists():
                    config = path / PEFT_CONFIG
                    return file, config if stem == PEFT_WEIGHTS and config.exists() else None
        return None
    if not path.is_file() or not is_weights_file(path):
        return None
    config = path.with_name(PEFT_CONFIG)
    return path, config if path.stem == PEFT_WEIGHTS and config.exists() else None


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter of another program, by the names in it."""
    files = find(path)
    if files is None or files[0].suffix.lower() != ".safetensors":
        return files is not None and (path.is_dir() or files[1] is not None)
    try:
        with safe_open(files[0], framework="pt") as file:
            return any(_split(name)[1] not in (None, "alpha") for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def read(path: Path) -> StoredAdapter:
    """The adapter at a path. Raises TesseraError if there is none, it is damaged, or has settings not known here."""
    if not path.exists():
        raise TesseraError(f"there is nothing at {path}: expected the file or folder of an adapter")
    files = find(path)
    if files is None:
        raise TesseraError(
            f"{path} is not an adapter: expected a file ({', '.join(SUFFIXES)}), or a folder with {PEFT_WEIGHTS} "
            f"(PEFT) or {DIFFUSERS_WEIGHTS} (diffusers)"
        )
    file, config_file = files
    if path.is_dir() and config_file is None and file.stem == PEFT_WEIGHTS:
        raise TesseraError(f"{path} has no {PEFT_CONFIG}, which states the alpha of an adapter of PEFT")
    tensors = unwrapped(read_state_dict(file), str(file))
    config = None if config_file is None else read_json(config_file)
    header = read_header(file) if file.suffix.lower() == ".safetensors" else {}
    if HEADER in header and config is None:
        config = _header_config(header[HEADER], str(file))
    settings = None if config is None else _peft_config(config, str(config_file or file))
    layers: dict[str, StoredLayer] = {}
    other = []
    for key, tensor in tensors.items():
        name, role = _split(key)
        if role is None:
            other.append(key)
            continue
        layer = layers.setdefault(name, StoredLayer())
        if role in layer.tensors:
            raise TesseraError(f"{file} holds two tensors for one place: {key} and {layer.keys[role]}")
        layer.tensors[role], layer.keys[role] = tensor, key
    if not layers:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise TesseraError(f"{file} is not an adapter: it has no tensor of LoRA, LoHa or LoKr; the first are {first}")
    return StoredAdapter(str(path), file.stat().st_size, layers, other, settings, _number(header.get(KOHYA_ALPHA)))


def _split(key: str) -> tuple[str, str | None]:
    """The layer of a tensor and what it is: blocks.0.attn.qkv.lora_A.weight -> blocks.0.attn.qkv, down"""
    key = OLD_PROCESSOR.sub(lambda match: f".to_{'out.0' if match[1] == 'out' else match[1]}.lora.", key)
    match = KEY.fullmatch(key)
    if match is None:
        return key, None
    name, suffix = match.groups()
    stored = key[len(name) + 1 : len(key) - len(suffix or "")].removesuffix(".default")
    role = next(role for role, names in TENSORS.items() if re.fullmatch(names, stored))
    if suffix == ".bias":
        role = "up_bias" if role == "up" else None
    return name, role


def _header_config(text: str, source: str) -> dict[str, Any]:
    """The settings of PEFT in the header of a file of diffusers, where those of each part have its name in front."""
    try:
        header = json.loads(text)
        return {
            name.removeprefix("transformer.").removeprefix("unet."): value
            for name, value in header.items()
            if not name.startswith("text_encoder")
        }
    except (ValueError, AttributeError) as error:
        raise TesseraError(f"the header {HEADER} of {source} is damaged: {error}") from None


def _peft_config(config: dict[str, Any], source: str) -> PeftConfig:
    """Raises TesseraError for settings that change what the tensors mean."""
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": BEGINNINGS,
    }  # fmt: skip
    read = {name: value for name, value in config.items() if name in PeftConfig.model_fields}
    for name, value in config.items():
        is_free = name in read or name in WITHOUT_EFFECT or not value
        if value not in allowed[name] if name in allowed else not is_free:
            raise TesseraError(f"{source} sets {name} to {value}, which Tessera does not support")
    settings = validate(PeftConfig, read, source)
    for pattern in {**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise TesseraError(
                f"{source} has the pattern '{pattern}', which is no regular expression: {error}"
            ) from None
    return settings


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None  # such as "Dynamic" in resized files, which hold alpha as tensors
