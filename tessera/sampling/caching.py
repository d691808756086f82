"""What may be reused from one sampling step to the next: the settings.

The implementation is in `tessera.acceleration.first_block_cache`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from tessera.settings import Settings, expand_kind


class NoCaching(Settings):
    """Every step computes every block."""

    kind: Literal["none"] = "none"


class FirstBlockCaching(Settings):
    """Reuse the residual of the later blocks while the residual of the first block has changed by less than threshold.

    Each row is decided on its own, so an image does not depend on its batch.
    """

    kind: Literal["first-block"] = "first-block"
    threshold: NonNegativeFloat = Field(
        default=0.1, description="relative change of the first block's residual at which all are computed; 0: always"
    )
    order: Literal[0, 1] = Field(
        default=1, description="0 reuses the last computed residual, 1 extrapolates linearly from the last two"
    )


AnyCaching = Annotated[NoCaching | FirstBlockCaching, BeforeValidator(expand_kind), Field(discriminator="kind")]
