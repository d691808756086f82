"""The text encoders of a pipeline of diffusers: its own `encode_prompt`, so that templates, padding and the choice of
layers are those of diffusers.

Shapes: B captions, M tokens, E channels.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tessera.checkpoint_files import find_weight_files
from tessera.encoders.pretrained_text import MAX_TOKENS, SETTINGS_FILES
from tessera.encoders.text import PipelineTextConfig, PipelineTextPart, TextEncoder
from tessera.encoders.tokenizers import load_tokenizer
from tessera.encoders.vision import clear_errors
from tessera.errors import TesseraError
from tessera.files import read_json

INDEX = "model_index.json"
NAMES = ("tokenizer", "text_encoder")  # of components, perhaps with _2, _3
LENGTH = "max_sequence_length"
NEGATIVE, GUIDED = "negative_prompt", "do_classifier_free_guidance"


class PipelineTextEncoder(TextEncoder):
    """Captions by `encode_prompt` of a pipeline without its transformer and autoencoder.

    Long captions are cut for encoders that take less than the others, as the pipelines do.
    """

    vocabulary_size = 0

    def __init__(self, config: PipelineTextConfig) -> None:
        """Raises TesseraError if the folder does not hold the pipeline's tokenizers."""
        self.config, self.folder = config, config.folders[0]
        self.device = torch.device("cpu")
        self.channels = max(part.width for part in config.parts)
        self.index = read_json(self.folder / INDEX)
        names = sorted(name for name, _ in components(self.index) if name.startswith("tokenizer"))
        if not names:
            raise TesseraError(f"{self.folder} holds no tokenizer of {config.pipeline}")
        with clear_errors(str(self.folder), "the tokenizer", "the files of tokenizers"):
            tokenizers = {name: load_tokenizer(str(self.folder / name)) for name in names}
        # The encoder that takes the longest captions decides whether one is too long.
        self._tokenizer = max(reversed(tokenizers.values()), key=lambda each: min(each.model_max_length, 2**20))
        self.options = self._options(config)
        self.rows = sum(part.rows or 0 for part in config.parts)
        default = self._options(config.model_copy(update={"max_tokens": None})).get(LENGTH)
        self.limit = self.options.get(LENGTH) or min(self._tokenizer.model_max_length, MAX_TOKENS)  # of one caption
        self.max_tokens = config.tokens + (self.limit - default if default else 0)

    @cached_property
    def pipeline_type(self) -> Any:
        try:
            import diffusers
        except ImportError:
            raise TesseraError(
                "the text encoders of a pipeline need diffusers: pip install 'tessera[diffusers]'"
            ) from None
        try:
            return getattr(diffusers, self.config.pipeline)
        except AttributeError:
            raise TesseraError(
                f"the installed diffusers has no {self.config.pipeline}: pip install -U diffusers"
            ) from None

    def _options(self, config: PipelineTextConfig) -> dict[str, Any]:
        """What `encode_prompt` is called with beside the prompts: the defaults of the pipeline's own call."""
        known = inspect.signature(self.pipeline_type.encode_prompt).parameters
        defaults = inspect.signature(self.pipeline_type.__call__).parameters
        options = {
            name: defaults[name].default
            for name in known
            if name in defaults and "prompt" not in name and not name.startswith(("self", "num_"))
        }
        options |= config.options
        if config.max_tokens is not None and LENGTH in known:
            options[LENGTH] = config.max_tokens
        return options

    @cached_property
    def network(self) -> Any:
        """The pipeline with its text encoders. Raises TesseraError if they are missing or damaged."""
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        parameters = inspect.signature(self.pipeline_type.__init__).parameters
        # A copy of the text encoders alone names no others in its index.
        others = {
            name: None
            for name, each in parameters.items()
            if each.default in (None, each.empty) and not name.startswith(("self", *NAMES))
        }
        for logging in (of_diffusers, of_transformers):
            logging.disable_progress_bar()
        with clear_errors(str(self.folder), "the text encoders", "the files of the pipeline"):
            pipeline = self.pipeline_type.from_pretrained(self.folder, **others, low_cpu_mem_usage=False)
        for _, module in self._modules(pipeline):
            module.eval().requires_grad_(False)
        return pipeline.to(self.device, getattr(torch, self.config.dtype))

    @staticmethod
    def _modules(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
        return [(name, each) for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)]

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if "network" in self.__dict__:
            self.network.to(self.device)
        return self

    def unload(self) -> None:
        if "network" in self.__dict__:
            del self.network

    def tokenize(self, captions: Sequence[str], cut: bool = False) -> list[list[int]]:
        """As many zeros as a caption has rows: its ids belong to several encoders. A text without a mask is filled up
        to the most rows."""
        lengths = [len(ids) for ids in self._tokenizer(list(captions), verbose=False)["input_ids"]]
        if cut:
            lengths = [min(length, self.limit) for length in lengths]
        if self.config.parts[-1].positive[1] is None:
            return [[0] * (self.max_tokens + max(length - self.limit, 0)) for length in lengths]
        return [[0] * (self.rows + length) for length in lengths]

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError("a pipeline encodes captions, not ids: call encode")

    def encode(self, captions: Sequence[str], cut: bool | None = None) -> tuple[Tensor, Tensor]:
        for caption, ids in zip(captions, self.tokenize(captions)):
            if len(ids) > self.max_tokens and not (self.cut_long if cut is None else cut):
                raise TesseraError(
                    f"a text has {len(ids)} tokens, and {self.config.pipeline} takes at most {self.max_tokens}: "
                    f"shorten '{caption[:60]} …', or cut it there (tessera sample --cut-prompts)"
                )
        return self._encode(list(captions), negative=False)

    def encode_negative(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._encode(list(captions), negative=True)

    @torch.no_grad()
    def _encode(self, captions: list[str], negative: bool) -> tuple[Tensor, Tensor]:
        """[B, M, E] and the valid rows [B, M]: only the last part may have fewer than the others of a batch."""
        known = inspect.signature(self.pipeline_type.encode_prompt).parameters
        needed = {name: None for name, each in known.items() if name != "self" and each.default is each.empty}
        least = max(part.least_prompts for part in self.config.parts)
        prompts = captions + captions[-1:] * (least - len(captions))
        arguments: dict[str, Any] = {**needed, "prompt": prompts, "device": self.device, **self.options}
        if NEGATIVE in known:
            arguments |= {NEGATIVE: prompts if negative else None, GUIDED: negative}
        outputs: dict[str, Any] = {}
        parts: list[Tensor] = []
        lengths = torch.zeros(len(captions), dtype=torch.int64)
        for part in self.config.parts:
            key = json.dumps(part.options, sort_keys=True)
            if key not in outputs:
                with torch.autocast(self.device.type, enabled=False):
                    outputs[key] = self.network.encode_prompt(**arguments, **part.options)
            values, mask = (each[: len(captions)] for each in self._part(part, outputs[key], negative))
            is_last = part is self.config.parts[-1]
            lengths += mask.sum(dim=1) if is_last else values.shape[1]
            parts.append(pad(values, (0, self.channels - values.shape[2])))
        rows = [row[:length] for row, length in zip(torch.cat(parts, dim=1), lengths.tolist())]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), mask

    def _part(self, part: PipelineTextPart, outputs: Any, negative: bool) -> tuple[Tensor, Tensor]:
        """float32 [B, M, E] on the CPU, with zeros where it is masked, and the mask, bool [B, M]."""
        index, mask_index = part.negative if negative else part.positive
        values = outputs[index].float().cpu()
        values = values[:, None] if values.ndim == 2 else values
        if mask_index is None or outputs[mask_index] is None:
            return values, torch.ones(values.shape[:2], dtype=torch.bool)
        mask = outputs[mask_index].cpu() != 0
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise TesseraError(f"{self.config.pipeline} fills texts up on the left, which Tessera does not support")
        return values * mask[..., None], mask

    def fingerprint(self) -> str:
        facts = {
            **self.config.model_dump(mode="json", exclude={"source", "cache", "subfolder", "tokenizer_subfolder"}),
            "options": json.loads(json.dumps(self.options, default=str)),
        }
        names = []
        for name, _ in components(self.index):
            for path in sorted(component_files(self.folder / name)):
                with path.open("rb") as file:
                    names.append(f"{name}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
        return hashlib.sha256(json.dumps([facts, names], sort_keys=True).encode()).hexdigest()


def components(index: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The components of a model_index.json that are there and belong to the text, with their library and class."""
    return [
        (name, value)
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] and name.startswith(NAMES)
    ]


def component_files(folder: Path) -> set[Path]:
    """The files of one component: settings, and the weights that would be read."""
    weights = find_weight_files(folder)
    files = {path for pattern in SETTINGS_FILES for path in folder.glob(pattern)}
    return files | set(() if weights is None else weights.files)


def copy_encoders(source: Path, target: Path) -> None:
    """Copy the tokenizers and the text encoders of a pipeline, with a model_index.json that names them alone."""
    index = read_json(source / INDEX)
    parts = dict(components(index))
    for name in parts:
        (target / name).mkdir(parents=True, exist_ok=True)
        for path in component_files(source / name):
            shutil.copyfile(path, target / name / path.name)
    facts = {name: value for name, value in index.items() if name.startswith("_")}
    (target / INDEX).write_text(json.dumps({**facts, **parts}, indent=2) + "\n", encoding="utf-8")
