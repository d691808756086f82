"""Similarity of images and captions by a CLIP network (Radford et al. 2021), through transformers.

Shapes: B images, C channels, H W height and width, D width of the embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.encoders import vision
from tessera.encoders.tokenizers import load_tokenizer
from tessera.errors import TesseraError


class Clip(nn.Module):
    """Embeddings of images and captions. Longer captions are cut to `max_tokens`, as CLIP was trained."""

    def __init__(self, images: vision.VisionEncoder, tokenizer: Any) -> None:
        super().__init__()
        self.images, self.tokenizer = images, tokenizer
        self.name, self.resize = images.name, images.resize
        self.max_tokens: int = images.network.config.text_config.max_position_embeddings

    def tokens(self, captions: Sequence[str], cut: bool = True) -> Any:
        """input_ids and attention_mask, padded to the longest."""
        longest = {"truncation": True, "max_length": self.max_tokens} if cut else {"verbose": False}
        return self.tokenizer(list(captions), padding=True, return_tensors="pt", **longest)

    def num_cut(self, captions: Sequence[str]) -> int:
        """The number of captions that are longer than max_tokens."""
        return int((self.tokens(captions, cut=False)["attention_mask"].sum(dim=1) > self.max_tokens).sum())

    @torch.inference_mode()
    def text_embeddings(self, captions: Sequence[str]) -> Tensor:
        """float32 [B, D] of length 1"""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            output = self.images.network.get_text_features(**self.tokens(captions).to(device))
        output = output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 returns a tensor
        return nn.functional.normalize(output, dim=-1)

    @torch.inference_mode()
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarities of images uint8 [B, C, H, W] and their captions: float32 [B]"""
        embeddings = nn.functional.normalize(self.images(images)["pool"], dim=-1)
        return (embeddings * self.text_embeddings(captions)).sum(dim=-1)


def load(source: str) -> Clip:
    """A CLIP network with its tokenizer, from a folder that transformers wrote or a hub id; in float32, on the CPU.

    Raises TesseraError if it cannot be loaded, or is not CLIP.
    """
    images = vision.load(source)
    if images.network.config.model_type != "clip":
        raise TesseraError(f"'{source}' is a {images.network.config.model_type} network; expected CLIP")
    with vision.clear_errors(source, "the tokenizer of CLIP", "tokenizer.json, or vocab.json and merges.txt"):
        return Clip(images, load_tokenizer(source))
