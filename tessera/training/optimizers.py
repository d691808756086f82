"""Optimizers and learning rates: AdamW, and Muon for the matrices of the blocks with AdamW for all else.

Shapes: N matrices of equal shape, A rows, B columns.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tessera import runtime
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.models.network import Network
from tessera.settings import Settings, by_kind
from tessera.training import parallel

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConstantLR(Settings):
    """The rate stays."""

    kind: Literal["constant"] = "constant"

    def factor(self, done: float) -> float:
        return 1.0


class LinearDecay(Settings):
    """The rate falls to zero in a straight line."""

    kind: Literal["linear"] = "linear"

    def factor(self, done: float) -> float:
        return 1 - done


class CosineDecay(Settings):
    """The rate falls to zero along half a cosine (Loshchilov & Hutter 2017, without restarts)."""

    kind: Literal["cosine"] = "cosine"

    def factor(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))


class WarmupStableDecay(Settings):
    """The rate stays, then falls to zero over the last share as 1 - sqrt (Hägele et al. 2024, section 3).

    The plateau does not depend on the length of the run: a checkpoint from before the cooldown can go on to any length.
    """

    kind: Literal["wsd"] = "wsd"
    cooldown: float = Field(default=0.2, gt=0, le=1, description="share of the steps after the warm-up")

    def factor(self, done: float) -> float:
        return 1 - math.sqrt(max(0.0, 1 - (1 - done) / self.cooldown))


AnyLRSchedule = Annotated[
    ConstantLR | LinearDecay | CosineDecay | WarmupStableDecay, BeforeValidator(by_kind), Field(discriminator="kind")
]


class OptimizerConfig(Settings):
    """What all optimizers share. The defaults are those of the DiT paper."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled: a share of the learning rate, each step")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps in which the learning rate rises from 0")
    lr_schedule: AnyLRSchedule = Field(default=ConstantLR(), description="how it falls after the warm-up")
    grad_clip_norm: PositiveFloat | None = Field(default=None, description="largest norm of the gradient")


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"

    def build(self, network: Network) -> torch.optim.Optimizer:
        return _adamw(parallel.trained(network), self, self.learning_rate)


class MuonConfig(OptimizerConfig):
    """Momentum made orthogonal (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else.

    An update is scaled to the size AdamW's usually have (Liu et al. 2025, "Muon is scalable for LLM training",
    equation 4), so that a learning rate and a weight decay that suit AdamW suit both parts.
    """

    kind: Literal["muon"] = "muon"
    adamw_learning_rate: PositiveFloat | None = Field(
        default=None, description="of what Muon does not train; null: learning_rate"
    )
    momentum: Fraction = 0.95
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = Field(default=5, le=20, description="iterations that make an update orthogonal")

    def build(self, network: Network) -> torch.optim.Optimizer:
        trained, maps = parallel.trained(network), hidden_matrices(network)
        matrices = [
            Matrix(name, trained.pop(name), network.get_parameter(name), joined) for name, joined in maps.items()
        ]
        return MuonAndAdamW(matrices, _adamw(trained, self, self.adamw_learning_rate or self.learning_rate), self)


def _adamw_unless_told(value: Any) -> Any:
    value = by_kind(value)
    return {"kind": "adamw", **value} if isinstance(value, dict) else value


AnyOptimizer = Annotated[AdamWConfig | MuonConfig, BeforeValidator(_adamw_unless_told), Field(discriminator="kind")]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (0 for the first) of a run of `steps`."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    return rate * config.lr_schedule.factor((step - config.warmup_steps) / max(steps - config.warmup_steps, 1))


# A group of parameters says, beside what torch reads: `share`, its learning rate over the recipe's; `keys`, what its
# optimizer remembers of each parameter.


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of parameters its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def _adamw(parameters: dict[str, nn.Parameter], config: OptimizerConfig, rate: float) -> torch.optim.AdamW:
    """AdamW, fused into one kernel where the device has it (it also does on the CPU)."""
    return torch.optim.AdamW(
        [
            {
                "params": list(parameters.items()),
                "share": rate / config.learning_rate,
                "keys": ("step", "exp_avg", "exp_avg_sq"),
            }
        ],
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=next(iter(parameters.values())).device.type in ("cpu", "cuda"),
    )


def hidden_matrices(network: Network) -> dict[str, int]:
    """The trained matrices that carry tokens to tokens inside `network.blocks`, by name: how many maps each joins.

    A convolution is one, of its channels by all that each of them looks at. Not the embeddings and the readout, which
    Muon is not meant for (Jordan et al. 2024). Nor the modulation: its gradient is a sum over pictures, not tokens, so
    that most of its directions hold little but noise, which orthogonalising would raise to full size; and its 6 D rows
    would cost as much as half of all else in a block.
    """
    steering = {module.linear for module in network.blocks.modules() if isinstance(module, Modulation)}
    return {
        f"blocks.{name}.weight": module.maps if isinstance(module, FusedLinear) else 1
        for name, module in network.blocks.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in steering and module.weight.requires_grad
    }


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon trains."""

    name: str
    part: nn.Parameter  # what this process holds of it: all, unless the network is divided
    like: nn.Parameter  # as it stands in the network, which tells how it is divided
    maps: int  # how many it joins


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon over matrices and AdamW over the rest: one set of groups, one state.

    Maps that are joined in a matrix (queries, keys and values) are made orthogonal one by one (Jordan et al. 2024).
    That apart it is torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but for all matrices of a shape at once, and
    in float32 on processors, most of which emulate bfloat16. Of a divided network, every process puts the updates
    together, makes them orthogonal, and takes its part.

    As gradient scalers tell it, `found_inf` 1 leaves everything as it is.
    """

    found_inf: Tensor | None = None
    grad_scale: None = None

    def __init__(self, matrices: list[Matrix], others: torch.optim.AdamW, config: MuonConfig) -> None:
        named = [(matrix.name, matrix.part) for matrix in matrices]
        super().__init__(
            [{"params": named, "share": 1.0, "keys": ("momentum",)}],
            {"lr": config.learning_rate, "fused": others.defaults["fused"]},
        )
        self.config, self.others, self._matrices = config, others, matrices
        device = self.param_groups[0]["params"][0].device
        self._dtype = runtime.autocast_dtype("auto", device) or torch.float32
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters; those of the matrices must all have gradients."""
        found = self.found_inf
        if found is not None:
            self.others.grad_scale, self.others.found_inf = None, found  # pyright: ignore[reportAttributeAccessIssue]
        self.others.step()
        config, group = self.config, self.param_groups[0]
        matrices, rate = group["params"], group["lr"]
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        if found is not None:  # a gradient equal to the momentum changes neither; the update is held back below
            gradients = [torch.where(found > 0, old, new) for old, new in zip(momenta, gradients)]
        torch._foreach_lerp_(momenta, gradients, 1 - config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        updates = momenta
        if config.nesterov:
            updates = torch._foreach_lerp(gradients, momenta, config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        if config.weight_decay:
            left = 1 - rate * config.weight_decay
            factor = left if found is None else torch.where(found > 0, 1.0, left)
            torch._foreach_mul_(matrices, factor)  # pyright: ignore[reportPrivateImportUsage]
        targets = [
            matrix.part if matrix.part is matrix.like else torch.zeros(matrix.like.shape, device=matrix.part.device)
            for matrix in self._matrices
        ]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # by shape, lying: targets and their updates
        for matrix, target, update in zip(self._matrices, targets, updates):
            whole = parallel.full_tensor(update, matrix.like)
            for weight, part in zip(target.flatten(1).chunk(matrix.maps), whole.flatten(1).chunk(matrix.maps)):
                rows, columns = weight.shape
                lying = (weight, part) if rows <= columns else (weight.mT, part.mT)
                alike.setdefault((min(rows, columns), max(rows, columns)), []).append(lying)
        for (_, longer), pairs in alike.items():
            weights, parts = zip(*pairs)
            turned = orthogonalize(torch.stack(parts), config.newton_schulz_steps, self._dtype)
            if found is not None:
                turned = turned * (1 - found)
            scale = 0.2 * math.sqrt(longer)  # Liu et al. 2025, equation 4
            torch._foreach_add_(weights, turned.unbind(), alpha=-rate * scale)  # pyright: ignore[reportPrivateImportUsage]
        for matrix, target in zip(self._matrices, targets):
            if target is not matrix.part:
                matrix.part.add_(parallel.part_of(target, matrix.like))


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Near U V^T of each matrix U S V^T: singular values near 1, between 0.7 and 1.2 after five steps for all but the
    smallest. matrices [N, A, B], A <= B -> [N, A, B] float32

    The quintic Newton-Schulz iteration X <- (a I + b X X^T + c (X X^T)^2) X, coefficients of Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    gram = x @ x.mT
    if dtype != torch.float32 or x.shape[-1] < 2 * x.shape[-2]:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()
    # Polynomials of X X^T commute, so that all can be multiplied up, A x A, before X is touched again: 25 A^3
    # multiply-adds in place of 45 where B = 4 A. Needs the digits of float32.
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    return product @ x if product is not None else x
