"""Text and size as conditions.

Shapes: B rows, M text tokens, E channels of the text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.conditioning.fields import ConditionField
from tessera.errors import TesseraError


class TextField(ConditionField):
    """The tokens of a text encoder: float32 [B, M, E].

    Unconditional rows hold NaN: a network replaces them by its own null embedding, and keeps their mask or not, as it
    was trained. An empty prompt is a text like others.
    """

    null = float("nan")
    input_name = "text"

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.zeros(num_rows, network.text_tokens, network.text_channels)

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor:
        """Tokens [M, E] of each row, of any lengths -> [B, M, E] of the longest"""
        rows = [torch.as_tensor(row, dtype=torch.float32) for row in inputs]
        channels = model.network.text_channels
        for row in rows:
            if row.ndim != 2 or row.shape[1] != channels or not len(row):
                raise TesseraError(
                    f"a text is the tokens of a text encoder, [M, {channels}] with M at least 1; got {list(row.shape)}"
                )
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def hint(self, model: Any) -> str:
        return f"tokens [M, {model.network.text_channels}] of its text encoder for each row"


class TextMaskField(ConditionField):
    """Which text tokens are valid: bool [B, M]. Unconditional rows keep theirs."""

    dtype = torch.bool
    input_name = "text_mask"

    def null_like(self, value: Tensor) -> Tensor:
        return value

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.ones(num_rows, network.text_tokens, dtype=torch.bool)

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor:
        """Valid tokens [M] of each row -> [B, M] of the longest"""
        rows = [torch.as_tensor(row, dtype=torch.bool) for row in inputs]
        for row in rows:
            if row.ndim != 1 or not row.any():
                raise TesseraError(f"a text mask is bool [M] with a valid token; got {row.tolist()}")
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def hint(self, model: Any) -> str:
        return "which tokens are valid, [M] for each row"


class SizeField(ConditionField):
    """Height and width in pixels and their ratio: float32 [B, 3]. Unconditional rows keep theirs."""

    input_name = "size"

    def null_like(self, value: Tensor) -> Tensor:
        return value

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.tensor([[512.0, 512.0, 1.0]]).expand(num_rows, 3)

    def encode(self, inputs: Sequence[Any], model: Any) -> Tensor:
        rows = torch.as_tensor([list(row) for row in inputs], dtype=torch.float32)
        if rows.ndim != 2 or rows.shape[1] not in (2, 3):
            raise TesseraError(f"a size is (height, width) or (height, width, ratio); got {list(rows.shape)}")
        return rows if rows.shape[1] == 3 else torch.cat((rows, rows[:, :1] / rows[:, 1:]), dim=1)

    def hint(self, model: Any) -> str:
        return "(height, width) in pixels for each row"
