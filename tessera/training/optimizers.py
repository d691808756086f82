"""Optimizers and learning-rate schedules: AdamW, and Muon for the matrices of the blocks with AdamW for the rest.

Shapes: N matrices of equal shape, A rows, B columns.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tessera import runtime
from tessera.errors import TesseraError
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.models.network import Network
from tessera.settings import Settings, expand_kind
from tessera.training import parallel

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConstantLR(Settings):
    """A constant learning rate."""

    kind: Literal["constant"] = "constant"

    def factor(self, progress: float) -> float:
        return 1.0


class LinearDecay(Settings):
    """Linear decay to zero."""

    kind: Literal["linear"] = "linear"

    def factor(self, progress: float) -> float:
        return 1 - progress


class CosineDecay(Settings):
    """Cosine decay to zero (Loshchilov & Hutter 2017, without restarts)."""

    kind: Literal["cosine"] = "cosine"

    def factor(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Settings):
    """A constant rate, then a 1 - sqrt decay to zero over the last fraction of the run (Hägele et al. 2024, section 3).

    The constant part does not depend on the length of the run, so a checkpoint from before the cooldown can be resumed
    with any number of steps.
    """

    kind: Literal["wsd"] = "wsd"
    cooldown: float = Field(default=0.2, gt=0, le=1, description="fraction of the steps after the warm-up")

    def factor(self, progress: float) -> float:
        return 1 - math.sqrt(max(0.0, 1 - (1 - progress) / self.cooldown))


AnyLRSchedule = Annotated[
    ConstantLR | LinearDecay | CosineDecay | WarmupStableDecay,
    BeforeValidator(expand_kind),
    Field(discriminator="kind"),
]


class OptimizerConfig(Settings):
    """Settings of all optimizers. The defaults are those of the DiT paper."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    eps: PositiveFloat = Field(default=1e-8, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled, multiplied by the learning rate")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps in which the learning rate rises from 0")
    lr_schedule: AnyLRSchedule = Field(default=ConstantLR(), description="the learning rate after the warm-up")
    grad_clip_norm: PositiveFloat | None = Field(default=None, description="largest norm of the gradient")


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"

    def build(self, network: Network) -> torch.optim.Optimizer:
        return _adamw(parallel.trained_parameters(network), self, self.learning_rate)


class MuonConfig(OptimizerConfig):
    """Muon, orthogonalized momentum (Jordan et al. 2024), for the matrices of the blocks; AdamW for the rest.

    An update is scaled to the usual size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", equation
    4), so that one learning rate and one weight decay suit both parts.
    """

    kind: Literal["muon"] = "muon"
    adamw_learning_rate: PositiveFloat | None = Field(
        default=None, description="of the parameters that Muon does not train; null: learning_rate"
    )
    momentum: Fraction = 0.95
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = Field(default=5, le=20, description="iterations that orthogonalize an update")

    def build(self, network: Network) -> torch.optim.Optimizer:
        parameters = parallel.trained_parameters(network)
        matrices = [
            Matrix(name, parameters.pop(name), network.get_parameter(name), num_projections)
            for name, num_projections in hidden_matrices(network).items()
        ]
        if not matrices:
            raise TesseraError(
                "muon trains the matrices of the blocks, and here they are frozen: set training.optimizer.kind=adamw"
            )
        return MuonAndAdamW(matrices, _adamw(parameters, self, self.adamw_learning_rate or self.learning_rate), self)


def _default_to_adamw(value: Any) -> Any:
    value = expand_kind(value)
    return {"kind": "adamw", **value} if isinstance(value, dict) else value


AnyOptimizer = Annotated[AdamWConfig | MuonConfig, BeforeValidator(_default_to_adamw), Field(discriminator="kind")]


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `num_steps`."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    return rate * config.lr_schedule.factor((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1))


# Each parameter group has two keys beside those of torch: `lr_scale`, its learning rate divided by the recipe's, and
# `state_keys`, the names of the optimizer state of each parameter.


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each parameter group, multiplied by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _adamw(parameters: dict[str, nn.Parameter], config: OptimizerConfig, rate: float) -> torch.optim.AdamW:
    """AdamW, fused into one kernel where the device supports it (CPUs do)."""
    return torch.optim.AdamW(
        [
            {
                "params": list(parameters.items()),
                "lr_scale": rate / config.learning_rate,
                "state_keys": ("step", "exp_avg", "exp_avg_sq"),
            }
        ],
        lr=rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=next(iter(parameters.values())).device.type in ("cpu", "cuda"),
    )


def hidden_matrices(network: Network) -> dict[str, int]:
    """The matrices that Muon trains: the weights of blocks, and of layers over text, that map tokens to tokens.

    Returns the number of fused projections by parameter name. A convolution counts as the matrix of its output
    channels by its receptive field. The embeddings and the head are left out: Muon is not meant for them (Jordan et
    al. 2024). So is the modulation: its gradient is a sum over images, not over tokens, so most of its directions are
    noise, which orthogonalization would raise to full size. Its 6 D rows would also cost half as much as the rest of a
    block.
    """
    modulation = {module.linear for module in network.blocks.modules() if isinstance(module, Modulation)}
    return {
        f"{name}.weight": module.num_projections if isinstance(module, FusedLinear) else 1
        for name, module in network.named_modules()
        if name.startswith(("blocks.", "text_embedder.layers."))
        and isinstance(module, nn.Linear | nn.Conv2d)
        and module not in modulation
        and module.weight.requires_grad
    }


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon trains."""

    name: str
    local: nn.Parameter  # this rank's shard; the whole matrix unless the network is sharded
    parameter: nn.Parameter  # the parameter of the network, which has the layout of the shards
    num_projections: int  # fused in it


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, with one list of parameter groups and one state.

    Fused projections (queries, keys and values) are orthogonalized one by one (Jordan et al. 2024). Otherwise this is
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw", for all matrices of a shape at once, and in float32 on CPUs,
    most of which emulate bfloat16. For a sharded network every rank gathers the updates, orthogonalizes them and takes
    its shard.

    With `found_inf` = 1, as gradient scalers set it, a step changes nothing.
    """

    found_inf: Tensor | None = None
    grad_scale: None = None

    def __init__(self, matrices: list[Matrix], adamw: torch.optim.AdamW, config: MuonConfig) -> None:
        named = [(matrix.name, matrix.local) for matrix in matrices]
        super().__init__(
            [{"params": named, "lr_scale": 1.0, "state_keys": ("momentum",)}],
            {"lr": config.learning_rate, "fused": adamw.defaults["fused"]},
        )
        self.config, self.adamw, self._matrices = config, adamw, matrices
        device = self.param_groups[0]["params"][0].device
        self._dtype = runtime.autocast_dtype("auto", device) or torch.float32
        self.param_groups += adamw.param_groups
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters. Every matrix must have a gradient."""
        found_inf = self.found_inf
        if found_inf is not None:
            self.adamw.grad_scale, self.adamw.found_inf = None, found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()
        config, group = self.config, self.param_groups[0]
        matrices, rate = group["params"], group["lr"]
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        if found_inf is not None:  # a gradient equal to the momentum leaves it unchanged; the update is zeroed below
            gradients = [torch.where(found_inf > 0, old, new) for old, new in zip(momenta, gradients)]
        torch._foreach_lerp_(momenta, gradients, 1 - config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        updates = momenta
        if config.nesterov:
            updates = torch._foreach_lerp(gradients, momenta, config.momentum)  # pyright: ignore[reportPrivateImportUsage]
        if config.weight_decay:
            factor = 1 - rate * config.weight_decay
            factor = factor if found_inf is None else torch.where(found_inf > 0, 1.0, factor)
            torch._foreach_mul_(matrices, factor)  # pyright: ignore[reportPrivateImportUsage]
        targets = [
            matrix.local
            if matrix.local is matrix.parameter
            else torch.zeros(matrix.parameter.shape, device=matrix.local.device)
            for matrix in self._matrices
        ]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # wide matrices: targets and their updates
        for matrix, target, update in zip(self._matrices, targets, updates):
            whole, count = parallel.full_tensor(update, matrix.parameter), matrix.num_projections
            for weight, part in zip(target.flatten(1).chunk(count), whole.flatten(1).chunk(count)):
                rows, columns = weight.shape
                wide = (weight, part) if rows <= columns else (weight.mT, part.mT)
                by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(wide)
        for (_, longer), pairs in by_shape.items():
            weights, parts = zip(*pairs)
            orthogonal = orthogonalize(torch.stack(parts), config.newton_schulz_steps, self._dtype)
            if found_inf is not None:
                orthogonal = orthogonal * (1 - found_inf)
            scale = 0.2 * math.sqrt(longer)  # Liu et al. 2025, equation 4
            torch._foreach_add_(weights, orthogonal.unbind(), alpha=-rate * scale)  # pyright: ignore[reportPrivateImportUsage]
        for matrix, target in zip(self._matrices, targets):
            if target is not matrix.local:
                matrix.local.add_(parallel.local_part(target, matrix.parameter))


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately U V^T of each matrix U S V^T. After five steps singular values are between 0.7 and 1.2, except for
    the smallest. matrices [N, A, B], A <= B -> [N, A, B] float32

    The quintic Newton-Schulz iteration X <- (a I + b X X^T + c (X X^T)^2) X with the coefficients of Jordan et al.
    (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    gram = x @ x.mT
    if dtype != torch.float32 or x.shape[-1] < 2 * x.shape[-2]:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()
    # Polynomials of X X^T commute. So their product, A x A, is computed first and X is multiplied once: 25 A^3
    # multiply-adds instead of 45 where B = 4 A. This needs the precision of float32.
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    return product @ x if product is not None else x
