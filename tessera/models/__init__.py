"""Networks: `network(x, t, condition) -> raw`. They know nothing of noise schedules, devices or sharding."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.models.dit import DiTConfig
from tessera.models.network import Network, NetworkConfig
from tessera.models.presets import UNETS
from tessera.models.unet import UNetConfig
from tessera.settings import by_kind

__all__ = ["AnyNetwork", "Network", "NetworkConfig", "with_kind"]


def with_kind(value: Any) -> Any:
    """Settings of a network that do not say of which kind it is: what their preset is, or a DiT."""
    value = by_kind(value)
    if not isinstance(value, dict) or "kind" in value:
        return value
    return {"kind": "unet" if str(value.get("preset")) in UNETS else "dit", **value}


AnyNetwork = Annotated[DiTConfig | UNetConfig, BeforeValidator(with_kind), Field(discriminator="kind")]
