"""Networks, called as `network(x, t, condition)`. They are independent of noise schedules, devices and sharding."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.models.diffusers_network import DiffusersConfig, DiffusersNetwork
from tessera.models.dit import DiT, DiTConfig
from tessera.models.latte import Latte, LatteConfig
from tessera.models.network import Network, NetworkConfig, parameter_count
from tessera.models.pixart import PixArt, PixArtConfig
from tessera.models.presets import PRESETS, UNET_PRESETS
from tessera.models.unet import UNet, UNetConfig
from tessera.settings import expand_kind

__all__ = [
    "PRESETS", "UNET_PRESETS", "AnyNetwork", "DiT", "DiTConfig", "DiffusersConfig", "DiffusersNetwork", "Latte",
    "LatteConfig", "Network", "NetworkConfig", "PixArt", "PixArtConfig", "UNet", "UNetConfig", "parameter_count",
    "with_kind",
]  # fmt: skip


def with_kind(value: Any) -> Any:
    """Add the kind to network settings without one: that of the preset if there is one, else `dit`."""
    value = expand_kind(value)
    if not isinstance(value, dict) or "kind" in value:
        return value
    return {"kind": "unet" if str(value.get("preset")) in UNET_PRESETS else "dit", **value}


AnyNetwork = Annotated[
    DiTConfig | LatteConfig | PixArtConfig | UNetConfig | DiffusersConfig,
    BeforeValidator(with_kind),
    Field(discriminator="kind"),
]
