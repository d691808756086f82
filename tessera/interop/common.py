"""Functions shared by the readers and writers of other formats."""

from dataclasses import replace

import torch

from tessera.bundle import Model
from tessera.conditioning import NULL_LABEL, Condition, NetworkFunction
from tessera.errors import TesseraError
from tessera.models.dit import DiT
from tessera.models.network import Network


def require_dit(model: Model, target: str) -> DiT:
    """The network of a model, if it is a DiT. Raises TesseraError otherwise: `target` can hold nothing else."""
    if not isinstance(model.network, DiT):
        raise TesseraError(
            f"{target} holds a DiT, and this model is a {model.config.network.display_name}: convert it to a bundle"
        )
    if model.config.network.takes_step_size:
        raise TesseraError(
            f"{target} has no place for the length of a step, which this distilled model is given: convert it to a "
            "bundle"
        )
    return model.network


def without_feature_head(model: Model) -> Model:
    """The model without the head of training.alignment, which its output does not depend on."""
    if getattr(model.config.network, "feature_channels", None) is None:
        return model
    network = model.config.network.model_copy(update={"feature_channels": None})
    rest = network.build().to(model.device).eval().requires_grad_(False)
    names = rest.state_dict().keys()
    rest.load_state_dict({name: value for name, value in model.network.state_dict().items() if name in names})
    return replace(model, config=model.config.model_copy(update={"network": network}), network=rest)


@torch.no_grad()
def relative_difference(network: Network, other: NetworkFunction) -> float:
    """Relative L2 distance of two networks' raw outputs on noise: at four times, with a class and without."""
    config, device = network.config, next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, config.in_channels, *config.input_size, generator=generator).to(device)
    t = torch.tensor([0.0, 250.0, 500.0, 999.0] * 2, device=device)
    label = torch.randint(max(config.num_classes, 1), (8,), generator=generator)
    if config.learn_null_class:
        label[4:] = NULL_LABEL
    condition = Condition(label=label.to(device) if config.num_classes else None)
    ours = network(x, t, condition)
    theirs = other(x.cpu(), t.cpu(), condition.to("cpu")).to(device)
    return float((ours - theirs).norm() / ours.norm().clamp(min=1e-12))
