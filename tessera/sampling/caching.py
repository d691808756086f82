"""What may be reused from one step of a drawing to the next: the settings. `tessera.acceleration.first_block_cache` does it."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from tessera.settings import Settings, by_kind


class NoCaching(Settings):
    """Every step computes every block."""

    kind: Literal["none"] = "none"


class FirstBlock(Settings):
    """While the first block says nearly what it said when all were computed, the others say what they said then.

    A picture is the same alone and in any batch: every row is decided on by itself.
    """

    kind: Literal["first-block"] = "first-block"
    threshold: NonNegativeFloat = Field(
        default=0.1, description="relative change of the first block's residual at which all are computed; 0: always"
    )
    order: Literal[0, 1] = Field(
        default=1, description="0 repeats the last computed residual, 1 goes on along a line through the last two"
    )


AnyCaching = Annotated[NoCaching | FirstBlock, BeforeValidator(by_kind), Field(discriminator="kind")]
