"""What an adapter adds to one module of a network. The module and the names of its weights stay as they are.

Shapes: I input features, O output features (of the adapted projection), r rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tessera.layers.fused_linear import FusedLinear


class AdapterLayer(nn.Module, ABC):
    """One change to a Linear or an Embedding: another output in each forward pass, or other weights once merged.

    strength: 1 is the full effect, 0 none. adapter: the name of the adapter that it was attached with.
    """

    kind: ClassVar[str]
    strength: float = 1.0
    adapter: str = ""

    @abstractmethod
    def forward(self, module: Any, x: Tensor, output: Tensor) -> Tensor:
        """The adapted output, from the input of the module and its output so far."""

    @abstractmethod
    def merge(self, module: Any, base: Mapping[str, Tensor]) -> None:
        """Change the module's own parameters in place so that its output is the adapted one. base: what they were"""

    @classmethod
    @abstractmethod
    def empty(cls, module: Any, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        """A layer of the sizes of this state dict. Raises ValueError if it cannot belong to the module."""

    @classmethod
    def from_tensors(cls, module: Any, tensors: Mapping[str, Tensor], projection: int | None = None) -> Self:
        """The layer with this state dict. Raises ValueError if it does not fit the module."""
        try:
            layer = cls.empty(module, tensors, projection)
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"a {cls.kind} of {type(module).__name__} needs other tensors ({error})") from None
        expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != shapes:
            raise ValueError(f"it has the tensors {shapes}, expected {expected}")
        values = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        weight = next(module.parameters())
        if not weight.is_meta:
            values = {name: tensor.to(weight.device) for name, tensor in values.items()}
        layer.load_state_dict(values, assign=True)
        return layer.requires_grad_(False)


Dora = bool | Literal["columns"]  # True: lengths of rows


def dora_of(tensors: Mapping[str, Tensor]) -> Dora:
    """Which lengths the state dict of a layer has."""
    return "columns" if "magnitude" in tensors and tensors["magnitude"].ndim == 2 else "magnitude" in tensors


class LinearAdapter(AdapterLayer):
    """A change of the weight of a Linear, or of one of the projections that are fused in it: W + scale delta.

    magnitude: of DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5): the rows of that
    sum, or in files of LyCORIS its columns, keep their direction and get a learned length. The lengths they had are
    constants in the backward pass (section 4.3 there). A strength between 0 and 1 interpolates the weights.
    """

    scale: Tensor  # []
    magnitude: nn.Parameter | None  # of rows [O], of columns [1, I]

    def __init__(
        self, module: nn.Linear, scale: float = 1.0, dora: Dora = False, projection: int | None = None
    ) -> None:
        """projection: the number of the fused projection; None: all of the map"""
        super().__init__()
        count = module.num_projections if isinstance(module, FusedLinear) and projection is not None else 1
        if projection is not None and not 0 <= projection < count:
            raise ValueError(f"the map has {count} projections, so none of number {projection}")
        size = module.out_features // count
        self.rows = slice((projection or 0) * size, ((projection or 0) + 1) * size)
        self.register_buffer("scale", torch.tensor(float(scale), device=module.weight.device))
        weight = module.weight.detach()[self.rows].float()
        lengths = weight.norm(dim=0, keepdim=True) if dora == "columns" else weight.norm(dim=1)
        self.magnitude = nn.Parameter(lengths) if dora else None

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the weight at scale 1, [O, I]"""

    def delta_output(self, x: Tensor) -> Tensor:
        """x [..., I] -> delta x [..., O]"""
        return linear(x, self.delta())

    def forward(self, module: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        weight = module.weight[self.rows]
        if self.magnitude is None:
            change = self.scale * self.delta_output(x)
        elif self.magnitude.ndim == 1:
            factor = (self.magnitude / self._lengths(weight)).to(output.dtype)
            change = (factor - 1) * linear(x, weight) + factor * (self.scale * self.delta_output(x))
        else:
            factor = (self.magnitude / self._lengths(weight))[0].to(x.dtype)
            change = linear((factor - 1) * x, weight) + self.scale * self.delta_output(factor * x)
        if self.rows.stop - self.rows.start < module.out_features:
            change = pad(change, (self.rows.start, module.out_features - self.rows.stop))
        return output + self.strength * change

    @torch.no_grad()
    def merge(self, module: nn.Linear, base: Mapping[str, Tensor]) -> None:
        weight = base["weight"][self.rows]
        change = self.scale * self.delta()
        if self.magnitude is not None:
            factor = self.magnitude / self._lengths(weight)
            factor = factor[:, None] if factor.ndim == 1 else factor
            change = (factor - 1) * weight + factor * change
        module.weight[self.rows] += self.strength * change

    def _lengths(self, weight: Tensor) -> Tensor:
        """The lengths of the rows [O] or columns [1, I] of the changed weight"""
        changed = (weight.float() + self.scale * self.delta()).detach()
        by_row = self.magnitude is None or self.magnitude.ndim == 1
        return changed.norm(dim=1) if by_row else changed.norm(dim=0, keepdim=True)


class LowRank(LinearAdapter):
    """LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1): delta = up down."""

    kind: ClassVar[str] = "lora"

    def __init__(
        self, module: nn.Linear, rank: int, scale: float = 1.0, dora: Dora = False, projection: int | None = None
    ) -> None:
        super().__init__(module, scale, dora, projection)
        size, device = self.rows.stop - self.rows.start, module.weight.device
        if rank > min(size, module.in_features):
            raise ValueError(f"rank {rank} is larger than the map itself, {size} x {module.in_features}")
        self.down = nn.Parameter(torch.empty(rank, module.in_features, device=device))  # [r, I]
        self.up = nn.Parameter(torch.zeros(size, rank, device=device))  # [O, r]
        bound = module.in_features**-0.5  # as PEFT begins; `up` is zero, so the network does not change yet
        nn.init.uniform_(self.down, -bound, bound)

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        return cls(module, tensors["down"].shape[0], 1.0, dora_of(tensors), projection)

    def delta(self) -> Tensor:
        return self.up @ self.down

    def delta_output(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)


class HadamardProduct(LinearAdapter):
    """LoHa (Hyeon-Woo et al. 2022, "FedPara", section 2.2): delta = (w1_a w1_b) * (w2_a w2_b), element by element. It
    is read from files and not trained here: its first values are zero."""

    kind: ClassVar[str] = "loha"

    def __init__(self, module: nn.Linear, rank: int, dora: Dora = False, projection: int | None = None) -> None:
        super().__init__(module, 1.0, dora, projection)
        size, width, device = self.rows.stop - self.rows.start, module.in_features, module.weight.device
        self.w1_a, self.w2_a = (nn.Parameter(torch.zeros(size, rank, device=device)) for _ in range(2))  # [O, r]
        self.w1_b, self.w2_b = (nn.Parameter(torch.zeros(rank, width, device=device)) for _ in range(2))  # [r, I]

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        return cls(module, tensors["w1_b"].shape[0], dora_of(tensors), projection)

    def delta(self) -> Tensor:
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)


class KroneckerProduct(LinearAdapter):
    """LoKr (LyCORIS, Yeh et al. 2024, "Navigating Text-To-Image Customization", section 3): delta is the Kronecker
    product of w1 and w2, each stored whole or as the product of w1_a and w1_b. It is read from files and not trained
    here: its first values are zero."""

    kind: ClassVar[str] = "lokr"

    def __init__(
        self,
        module: nn.Linear,
        shapes: Mapping[str, tuple[int, ...]],
        dora: Dora = False,
        projection: int | None = None,
    ) -> None:
        """shapes: of w1, or of w1_a and w1_b, and the same of w2"""
        super().__init__(module, 1.0, dora, projection)
        rows, columns = 1, 1
        for name in ("w1", "w2"):
            for each in (name,) if name in shapes else (f"{name}_a", f"{name}_b"):
                self.register_parameter(each, nn.Parameter(torch.zeros(shapes[each], device=module.weight.device)))
            first, last = shapes.get(name, shapes.get(f"{name}_a")), shapes.get(name, shapes.get(f"{name}_b"))
            assert first is not None
            assert last is not None
            if len(first) != 2 or len(last) != 2 or (name not in shapes and first[1] != last[0]):
                raise ValueError(f"the factors {first} and {last} of {name} have no product")
            rows, columns = rows * first[0], columns * last[1]
        size = self.rows.stop - self.rows.start
        if (rows, columns) != (size, module.in_features):
            raise ValueError(f"its product is {rows} x {columns}, and the map is {size} x {module.in_features}")

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name[0] == "w"}
        return cls(module, shapes, dora_of(tensors), projection)

    def factor(self, name: str) -> Tensor:
        """w1 or w2"""
        whole = self._parameters.get(name)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole

    def delta(self) -> Tensor:
        return torch.kron(self.factor("w1"), self.factor("w2"))


class FullDelta(LinearAdapter):
    """A change of the weight that is stored whole."""

    kind: ClassVar[str] = "weight"

    def __init__(self, module: nn.Linear, projection: int | None = None) -> None:
        super().__init__(module, projection=projection)
        self.values = nn.Parameter(torch.zeros_like(module.weight[self.rows]))  # [O, I]

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        return cls(module, projection)

    def delta(self) -> Tensor:
        return self.values


class BiasDelta(AdapterLayer):
    """A change of the bias of a Linear."""

    kind: ClassVar[str] = "bias"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        if module.bias is None:
            raise ValueError("the map has no bias")
        self.values = nn.Parameter(torch.zeros_like(module.bias))  # [O]

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        return cls(module)

    def forward(self, module: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        return output + self.strength * self.values.to(output.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Linear, base: Mapping[str, Tensor]) -> None:
        module.bias.add_(self.strength * self.values)


class OutputScale(AdapterLayer):
    """A learned factor for each output of a Linear, 1 + values: the scale factors of DiffFit (Xie et al. 2023, section
    3.2), which it has at the end of each block part. It is applied after the other layers."""

    kind: ClassVar[str] = "scale"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(module.out_features, device=module.weight.device))  # [O]

    @classmethod
    def empty(cls, module: nn.Linear, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        return cls(module)

    def forward(self, module: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        return output * (1 + self.strength * self.values).to(output.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Linear, base: Mapping[str, Tensor]) -> None:
        factor = 1 + self.strength * self.values
        module.weight *= factor[:, None]
        if module.bias is not None:
            module.bias.mul_(factor)


class Rows(AdapterLayer):
    """A change of some rows of an Embedding: of classes or words. All other rows stay as they are."""

    kind: ClassVar[str] = "rows"
    numbers: Tensor  # int64 [n]

    def __init__(self, module: nn.Embedding, numbers: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers.to(module.weight.device, torch.int64))
        self.values = nn.Parameter(module.weight.new_zeros(len(numbers), module.embedding_dim))  # [n, D]

    @classmethod
    def empty(cls, module: nn.Embedding, tensors: Mapping[str, Tensor], projection: int | None) -> Self:
        numbers = tensors["numbers"]
        if not numbers.is_meta and (numbers.max() >= module.num_embeddings or numbers.min() < 0):
            raise ValueError(f"it has a row {int(numbers.max())}, and the table has {module.num_embeddings}")
        return cls(module, numbers)

    def forward(self, module: nn.Embedding, x: Tensor, output: Tensor) -> Tensor:
        matches = (x[..., None] == self.numbers).to(self.values.dtype)  # [..., n]
        return output + self.strength * (matches @ self.values).to(output.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Embedding, base: Mapping[str, Tensor]) -> None:
        module.weight[self.numbers] += self.strength * self.values


CHANGES: tuple[type[AdapterLayer], ...] = (
    LowRank, HadamardProduct, KroneckerProduct, FullDelta, BiasDelta, Rows, OutputScale,
)  # fmt: skip
