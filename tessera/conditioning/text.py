"""Text and size as conditions.

Shapes: B rows, M text tokens, E channels of the text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera import randomness
from tessera.conditioning.fields import ConditionField
from tessera.errors import TesseraError

NULL_TOKEN = -1  # the id of all tokens of an unconditional row
CAPTION_STREAM = 0x63617074  # random stream of the captions of bulk sampling


class TextField(ConditionField):
    """The tokens of a text encoder: float32 [B, M, E], or int64 ids [B, M] where the network embeds them.

    Unconditional rows hold NaN or NULL_TOKEN: a network replaces them by its own null value, and keeps their mask or
    not, as it was trained. An empty prompt is a text like others.
    """

    input_name, data_name, from_data = "prompts", "captions", True
    companions = ("text_mask",)

    def null_like(self, value: Tensor) -> Tensor:
        return torch.full_like(value, float("nan") if value.is_floating_point() else NULL_TOKEN)

    def example(self, num_rows: int, network: Any) -> Tensor:
        if network.vocabulary_size:
            return torch.zeros(num_rows, network.text_tokens, dtype=torch.int64)
        return torch.zeros(num_rows, network.text_tokens, network.text_channels)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return dataset.text.tokens(samples, positions)

    def encode(self, inputs: Sequence[Any], model: Any) -> dict[str, Tensor]:
        """Prompts, or the tokens [M, E] or ids [M] of each row -> text and text_mask, padded to the longest"""
        if not len(inputs):
            raise TesseraError("no prompt: give one for each image, or one for all")
        if all(isinstance(each, str) for each in inputs):
            text, mask = model.text_encoder.encode(list(inputs))
            return {"text": text, "text_mask": mask}
        network = model.config.network
        dtype, channels = (torch.int64, ()) if network.vocabulary_size else (torch.float32, (network.text_channels,))
        rows = [torch.as_tensor(each, dtype=dtype) for each in inputs if not isinstance(each, str)]
        shape = "[M]" if network.vocabulary_size else f"[M, {network.text_channels}]"
        for row in rows:
            if row.ndim != 1 + len(channels) or row.shape[1:] != channels or not len(row):
                raise TesseraError(
                    f"a text is a prompt, or tokens of a text encoder: {shape} with M at least 1; got {list(row.shape)}"
                )
            if network.vocabulary_size and not NULL_TOKEN <= int(row.min()) <= int(row.max()) < network.vocabulary_size:
                last = network.vocabulary_size - 1
                raise TesseraError(f"ids of a text are from 0 to {last}; got {int(row.min())} to {int(row.max())}")
        if len(rows) != len(inputs):
            raise TesseraError("some texts are prompts and others are tokens: give all in one form")
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return {"text": pad_sequence(rows, batch_first=True), "text_mask": mask}

    def inputs_from_data(self, seeds: Sequence[int], policy: str, dataset: Any) -> list[str]:
        """Captions of a data set. balanced, data: of its samples in turn, in a random order that never changes;
        uniform: of a random sample for each image, by its seed. A sample without a caption is replaced by the next one
        with one.
        """
        missing = TesseraError(
            "this model needs a prompt for each image: list them, or name data with captions (--captions, "
            "evaluation.captions)"
        )
        if not hasattr(dataset, "caption") or not len(dataset):
            raise missing
        count = len(dataset)
        if policy in ("balanced", "data"):
            order = randomness.permutation(0, CAPTION_STREAM, 0, count).tolist()
            chosen = [order[position % count] for position in range(len(seeds))]
        else:
            uniform = randomness.uniform(0, torch.tensor(list(seeds), dtype=torch.int64), CAPTION_STREAM)[:, 0]
            chosen = (uniform.double() * count).long().tolist()
        captions = []
        for first in chosen:
            following = (dataset.caption((first + step) % count) for step in range(count))
            caption = next((caption for caption in following if caption is not None), None)
            if caption is None:
                raise missing
            captions.append(caption)
        return captions

    def hint(self, model: Any) -> str:
        return 'one for each image, for example --prompt "a red circle", or condition={"text": ["a red circle"]}'


class TextMaskField(ConditionField):
    """Which text tokens are valid: bool [B, M]. Unconditional rows keep theirs."""

    dtype = torch.bool
    input_name = "text_mask"

    def null_like(self, value: Tensor) -> Tensor:
        return value

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.ones(num_rows, network.text_tokens, dtype=torch.bool)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return dataset.text.mask(samples, positions)

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor:
        """Valid tokens [M] of each row -> [B, M] of the longest"""
        rows = [torch.as_tensor(row, dtype=torch.bool) for row in inputs]
        for row in rows:
            if row.ndim != 1 or not row.any():
                raise TesseraError(f"a text mask is bool [M] with a valid token; got {row.tolist()}")
        return pad_sequence(rows, batch_first=True)

    def hint(self, model: Any) -> str:
        return "which tokens are valid, [M] for each row"


class SizeField(ConditionField):
    """Height and width in pixels and their ratio: float32 [B, 3]. Unconditional rows keep theirs.

    In training they are those of the file, and the ratio of the size it is cropped to, as in PixArt-alpha. In sampling
    they are by default those of the generated image.
    """

    input_name, from_size = "size", True

    def null_like(self, value: Tensor) -> Tensor:
        return value

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.tensor([[512.0, 512.0, 1.0]]).expand(num_rows, 3)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return torch.from_numpy(dataset.image_sizes[list(samples)])

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor:
        rows = torch.as_tensor([list(row) for row in inputs], dtype=torch.float32)
        if rows.ndim != 2 or rows.shape[1] not in (2, 3):
            raise TesseraError(f"a size is (height, width) or (height, width, ratio); got {list(rows.shape)}")
        return rows if rows.shape[1] == 3 else torch.cat((rows, rows[:, :1] / rows[:, 1:]), dim=1)

    def hint(self, model: Any) -> str:
        return "(height, width) in pixels for each row"
