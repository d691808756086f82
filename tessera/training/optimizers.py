"""Optimizers and learning rates: AdamW, and Muon for the matrices of the blocks with AdamW for all else.

Shapes: N matrices of equal shape, A rows, B columns.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tessera import runtime
from tessera.layers.joint import JointLinear
from tessera.layers.modulation import Modulation
from tessera.models.dit import DiT
from tessera.settings import Settings, by_kind

Share = Annotated[float, Field(ge=0, lt=1)]


class Constant(Settings):
    """The rate stays."""

    kind: Literal["constant"] = "constant"

    def factor(self, done: float) -> float:
        return 1.0


class Linear(Settings):
    """The rate falls to zero in a straight line."""

    kind: Literal["linear"] = "linear"

    def factor(self, done: float) -> float:
        return 1 - done


class Cosine(Settings):
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


AnyDecay = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay, BeforeValidator(by_kind), Field(discriminator="kind")
]


class Optimizer(Settings):
    """What all optimizers share. The defaults are those of the DiT paper."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled: a share of the learning rate, each step")
    warmup: NonNegativeInt = Field(default=0, description="steps in which the learning rate rises from 0")
    decay: AnyDecay = Field(default=Constant(), description="how it falls after the warm-up")
    clip: PositiveFloat | None = Field(default=None, description="largest norm of the gradient")


class Adam(Optimizer):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        return _adamw(_trained(network), self, self.learning_rate)


class Muon(Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else.

    An update is scaled to the size AdamW's usually have (Liu et al. 2025, "Muon is scalable for LLM training",
    equation 4), so that a learning rate and a weight decay that suit AdamW suit both parts.
    """

    kind: Literal["muon"] = "muon"
    adamw_learning_rate: PositiveFloat | None = Field(
        default=None, description="of what Muon does not train; null: learning_rate"
    )
    momentum: Share = 0.95
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = Field(default=5, le=20, description="iterations that make an update orthogonal")

    def build(self, network: DiT) -> torch.optim.Optimizer:
        matrices = hidden_matrices(network)
        others = [parameter for parameter in _trained(network) if parameter not in matrices]
        return MuonAndAdamW(matrices, _adamw(others, self, self.adamw_learning_rate or self.learning_rate), self)


def _adamw_unless_told(value: Any) -> Any:
    value = by_kind(value)
    return {"kind": "adamw", **value} if isinstance(value, dict) else value


AnyOptimizer = Annotated[Adam | Muon, BeforeValidator(_adamw_unless_told), Field(discriminator="kind")]


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
    """The rate of a step (0 for the first) of a run of `steps`."""
    rate = config.learning_rate
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    return rate * config.decay.factor((step - config.warmup) / max(steps - config.warmup, 1))


# A group of parameters says, beside what torch reads: `share`, its learning rate over the recipe's; `keys`, what its
# optimizer remembers of each parameter.


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of parameters its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _adamw(parameters: list[nn.Parameter], config: Optimizer, rate: float) -> torch.optim.AdamW:
    """AdamW, fused into one kernel where the device has it (it also does on the CPU)."""
    return torch.optim.AdamW(
        [{"params": parameters, "share": rate / config.learning_rate, "keys": ("step", "exp_avg", "exp_avg_sq")}],
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def hidden_matrices(network: DiT) -> dict[Tensor, int]:
    """The trained matrices that carry tokens to tokens inside `network.blocks`, each with how many maps it joins.

    Not the embeddings and the readout, which Muon is not meant for (Jordan et al. 2024). Nor the modulation: its
    gradient is a sum over pictures, not tokens, so that most of its directions hold little but noise, which
    orthogonalising would raise to full size; and its 6 D rows would cost as much as half of all else in a block.
    """
    steering = {module.linear for module in network.blocks.modules() if isinstance(module, Modulation)}
    return {
        module.weight: module.maps if isinstance(module, JointLinear) else 1
        for module in network.blocks.modules()
        if isinstance(module, nn.Linear) and module not in steering and module.weight.requires_grad
    }


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon over matrices, each with its number of joined maps, and AdamW over the rest: one set of groups, one state.

    Maps that are joined in a matrix (queries, keys and values) are made orthogonal one by one (Jordan et al. 2024).
    That apart it is torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but for all matrices of a shape at once, and
    in float32 on processors, most of which emulate bfloat16.
    """

    def __init__(self, matrices: dict[Tensor, int], others: torch.optim.AdamW, config: Muon) -> None:
        super().__init__(
            [{"params": list(matrices), "share": 1.0, "keys": ("momentum",)}], {"lr": config.learning_rate}
        )
        self.config, self.others, self._maps = config, others, list(matrices.values())
        device = self.param_groups[0]["params"][0].device
        self._dtype = runtime.autocast_dtype("auto", device) or torch.float32
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters; those of the matrices must all have gradients."""
        self.others.step()
        config, group = self.config, self.param_groups[0]
        matrices, rate = group["params"], group["lr"]
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        updates = momenta
        if config.nesterov:
            updates = torch._foreach_lerp(gradients, momenta, config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        if config.weight_decay:
            torch._foreach_mul_(matrices, 1 - rate * config.weight_decay)  # pyright: ignore[reportPrivateImportUsage]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # by shape, lying: weights and their update
        for matrix, update, maps in zip(matrices, updates, self._maps):
            for weight, part in zip(matrix.chunk(maps), update.chunk(maps)):
                rows, columns = weight.shape
                lying = (weight, part) if rows <= columns else (weight.mT, part.mT)
                alike.setdefault((min(rows, columns), max(rows, columns)), []).append(lying)
        for (_, longer), pairs in alike.items():
            weights, parts = zip(*pairs)
            turned = orthogonalise(torch.stack(parts), config.newton_schulz_steps, self._dtype)
            scale = 0.2 * math.sqrt(longer)  # Liu et al. 2025, equation 4
            torch._foreach_add_(weights, turned.unbind(), alpha=-rate * scale)  # pyright: ignore[reportPrivateImportUsage]


def orthogonalise(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
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
