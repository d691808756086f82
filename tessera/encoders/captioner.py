"""Descriptions of images by pretrained models, through transformers: BLIP, GIT, LLaVA, Qwen-VL, ...

Shapes: B images.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tessera.encoders.vision import clear_errors
from tessera.errors import TesseraError, bullet_list

WHAT = "the captioner"
FILES = "config.json, model.safetensors, preprocessor_config.json and the files of a tokenizer"
INSTALL = "a captioner needs transformers: pip install 'tessera[text]'"
DEFAULT_PROMPT = "Describe this image in one sentence."  # of models that are trained on conversations


class Captioner:
    """Describes images. The most probable token is chosen at each step, so a description is a function of the batch."""

    def __init__(self, folder: Path, prompt: str | None, max_tokens: int, device: torch.device | str = "cpu") -> None:
        """Raises TesseraError if the folder holds no model that describes images."""
        check_folder(folder)
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
            from transformers.utils import logging
        except ImportError:
            raise TesseraError(INSTALL) from None
        logging.disable_progress_bar()
        self.name, self.prompt, self.max_tokens = str(folder), prompt, max_tokens
        self.device = torch.device(device)
        with clear_errors(self.name, WHAT, FILES):
            self._processor: Any = AutoProcessor.from_pretrained(folder)
            kind: Any = AutoModelForImageTextToText
            network, info = kind.from_pretrained(folder, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise TesseraError(f"the weights of '{self.name}' are incomplete; missing:{bullet_list(missing)}")
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is None:
            raise TesseraError(f"'{self.name}' has no tokenizer; expected a folder that holds {FILES}")
        tokenizer.padding_side = "left"  # new tokens follow the prompt directly
        self.network: Any = network.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One description for each RGB image, without the prompt: B texts. Raises TesseraError."""
        images = [image.convert("RGB") for image in images]
        with clear_errors(self.name, WHAT, FILES):
            inputs = self._inputs(images).to(self.device)
            ids = self.network.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
            prompt = inputs.get("input_ids")
            if prompt is not None and ids.shape[1] >= prompt.shape[1] and (ids[:, : prompt.shape[1]] == prompt).all():
                ids, prompt = ids[:, prompt.shape[1] :], None
            texts = self._decode(ids)
            if prompt is not None:  # of models that change its first or last token, such as BLIP
                texts = [text.removeprefix(start).strip() for text, start in zip(texts, self._decode(prompt))]
        return texts

    def _decode(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(text.split()) for text in self._processor.batch_decode(ids, skip_special_tokens=True)]

    def _inputs(self, images: Sequence[Image.Image]) -> Any:
        if getattr(self._processor, "chat_template", None):
            text = {"type": "text", "text": self.prompt or DEFAULT_PROMPT}
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
            return self._processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        if self.prompt is None:
            return self._processor(images=list(images), return_tensors="pt")
        prompts = [self.prompt] * len(images)
        return self._processor(images=list(images), text=prompts, return_tensors="pt", padding=True)


def check_folder(folder: Path) -> None:
    """Raise TesseraError for a path that is not the folder of a model."""
    if not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "is not a folder"
        raise TesseraError(f"captioner.source {folder} {problem}; expected a folder that holds {FILES}")


def fingerprint(folder: Path) -> str:
    """A hash of all files of a captioner. Raises TesseraError."""
    check_folder(folder)
    names = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            names.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
