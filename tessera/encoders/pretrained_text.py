"""Frozen text encoders that transformers loads: T5, CLIP, BERT, Gemma, ... The tokens are the last hidden state.

Shapes: B captions, M tokens of the longest, E channels.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tessera.checkpoint_files import find_weight_files
from tessera.encoders.text import FrozenConfig, TextEncoder
from tessera.encoders.tokenizers import load_tokenizer
from tessera.encoders.vision import clear_errors
from tessera.errors import TesseraError, bullet_list

WHAT, FILES = "the text encoder", "config.json, model.safetensors and the files of its tokenizer"
INSTALL = "a pretrained text encoder needs transformers: pip install 'tessera[text]'"
SETTINGS_FILES = ("*.json", "*.txt", "*.model")  # of models and tokenizers
MAX_TOKENS = 512  # of an encoder that states no limit


class PretrainedTextEncoder(TextEncoder):
    """The network is loaded when it is first used: who reads cached embeddings never needs it."""

    vocabulary_size = 0

    def __init__(self, config: FrozenConfig) -> None:
        """Raises TesseraError if the tokenizer or the configuration cannot be read."""
        try:
            from transformers import AutoConfig
        except ImportError:
            raise TesseraError(INSTALL) from None
        self.config = config
        self.tokenizer_folder, self.folder = config.folders
        self.name = config.name
        self.device = torch.device("cpu")
        with clear_errors(self.name, WHAT, FILES):
            settings: Any = AutoConfig.from_pretrained(self.folder)
            self._tokenizer: Any = load_tokenizer(str(self.tokenizer_folder))
        self._tokenizer.truncation_side = "right"
        settings = getattr(settings, "text_config", settings)
        self.channels: int = settings.hidden_size
        positions = getattr(settings, "max_position_embeddings", None)  # None: relative positions
        if config.max_tokens is not None and positions is not None and config.max_tokens > positions:
            raise TesseraError(
                f"text.max_tokens is {config.max_tokens}, but {self.name} takes at most {positions} tokens"
            )
        limit = min(self._tokenizer.model_max_length, positions or MAX_TOKENS, MAX_TOKENS)
        self.max_tokens = config.max_tokens or limit

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if "network" in self.__dict__:
            self.network.to(self.device)
        return self

    def unload(self) -> None:
        if "network" in self.__dict__:
            del self.network

    @cached_property
    def network(self) -> Any:
        """The encoder with its weights. Raises TesseraError if they are missing or damaged."""
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        files = find_weight_files(self.folder)
        with clear_errors(self.name, WHAT, FILES):
            settings = AutoConfig.from_pretrained(self.folder)
            if settings.model_type.startswith("clip"):
                kind: Any = CLIPTextModel
            else:  # the encoder of T5 without its decoder
                has_encoder = type(settings) in AutoModelForTextEncoding._model_mapping
                kind = AutoModelForTextEncoding if has_encoder else AutoModel
            network, info = kind.from_pretrained(
                self.folder,
                dtype=getattr(torch, self.config.dtype),
                variant=None if files is None else files.variant,
                output_loading_info=True,
            )
        if missing := sorted(name for name in info["missing_keys"] if "pooler." not in name):
            raise TesseraError(f"the weights of '{self.name}' are incomplete; missing:{bullet_list(missing)}")
        return network.eval().requires_grad_(False).to(self.device)

    def tokenize(self, captions: Sequence[str], cut: bool = False) -> list[list[int]]:
        if self.config.lower_case:
            captions = [caption.lower().strip() for caption in captions]
        limit = {"truncation": True, "max_length": self.max_tokens} if cut else {"verbose": False}
        tokens: list[list[int]] = self._tokenizer(list(captions), **limit)["input_ids"]
        if all(tokens):
            return tokens
        end = self._tokenizer.eos_token_id  # of a tokenizer without end tokens: an empty caption has none
        if end is None:
            raise TesseraError(f"the tokenizer of {self.name} gives an empty text no token: leave empty captions out")
        return [ids or [end] for ids in tokens]

    @torch.no_grad()
    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        if (padding := self._tokenizer.pad_token_id) is not None:
            ids = ids.masked_fill(~mask, padding)
        with torch.autocast(self.device.type, enabled=False):
            output = self.network(input_ids=ids.to(self.device), attention_mask=mask.to(self.device, torch.int64))
        return output.last_hidden_state.float().cpu()

    def fingerprint(self) -> str:
        facts = {"dtype": self.config.dtype, "max_tokens": self.max_tokens}
        facts |= {"lower_case": True} if self.config.lower_case else {}
        names = []
        for path in {*_settings_files(self.tokenizer_folder), *_all_files(self.folder)}:
            with path.open("rb") as file:
                names.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
        return hashlib.sha256(json.dumps([facts, sorted(names)]).encode()).hexdigest()


def copy_files(config: FrozenConfig, target: Path) -> None:
    """Copy the files of an encoder to a folder that `text.source` can name. Raises TesseraError."""
    tokenizer, weights = config.folders
    parts = {target: _all_files(weights)}
    if tokenizer != weights:
        parts = {target / "text_encoder": parts[target], target / "tokenizer": _settings_files(tokenizer)}
    for folder, files in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            shutil.copyfile(path, folder / path.name)


def _settings_files(folder: Path) -> set[Path]:
    """The files of a tokenizer, and those of a network without its weights."""
    return {path for pattern in SETTINGS_FILES for path in folder.glob(pattern)}


def _all_files(folder: Path) -> set[Path]:
    weights = find_weight_files(folder)
    return _settings_files(folder) | set(() if weights is None else weights.files)


def download(hub_id: str, revision: str | None, subfolders: Sequence[str]) -> Path:
    """The folder of a repository of the Hugging Face hub on this machine. Raises TesseraError.

    subfolders: of the encoder; if the first does not exist, all files are beside each other.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise TesseraError(INSTALL) from None
    patterns = (*SETTINGS_FILES, "*.safetensors")
    with clear_errors(f"hub:{hub_id}", WHAT, FILES):
        try:
            nested = [f"{folder}/{pattern}" for folder in subfolders for pattern in patterns]
            root = Path(snapshot_download(hub_id, revision=revision, allow_patterns=nested))
            if not (root / subfolders[0]).is_dir():  # a pattern also matches what is in folders
                root = Path(
                    snapshot_download(hub_id, revision=revision, allow_patterns=[*patterns], ignore_patterns="*/*")
                )
        except HfHubHTTPError as error:
            raise OSError(str(error)) from None
    return root
