"""Admission: how much work is accepted. A place is reserved at the door, before the body of a request is read."""

from collections import Counter
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, PositiveInt

from tessera.serving.errors import ApiError, retry_later
from tessera.settings import Settings


class Limits(Settings):
    """Limits of a server. The cost of a job is images x steps x pixels (for clips x frames)."""

    max_body_bytes: PositiveInt = Field(default=16 * 2**20, description="of a request")
    body_seconds: PositiveFloat = Field(default=30.0, description="in which a body must arrive")
    max_pixels: PositiveInt = Field(default=2**24, description="of an uploaded image")
    max_job_cost: PositiveFloat = Field(default=2e9, description="of one job: images x steps x pixels")
    max_queue: PositiveInt = Field(default=64, description="jobs that are accepted and not ended")
    max_queue_per_client: PositiveInt | None = Field(
        default=None, description="the same of one client; null: max_queue"
    )
    max_queue_cost: PositiveFloat = Field(default=2e10, description="of these jobs")


@dataclass(eq=False)
class Place:
    """A reserved place in the queue."""

    client: str
    cost: float = 0.0
    taken: bool = False  # by a job, which gives it back at its end
    freed: bool = False


class Admission:
    """The places of the queue.

    seconds_per_cost: measured by the caller, for estimates of the waiting time
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.places: Counter[str] = Counter()  # by client
        self.cost = 0.0
        self.seconds_per_cost = 0.0

    @property
    def count(self) -> int:
        return self.places.total()

    @property
    def wait_seconds(self) -> float:
        """Until about half of the accepted work is done."""
        return min(max(1.0, self.cost * self.seconds_per_cost / 2), 600.0)

    def measure(self, cost: float, seconds: float) -> None:
        """Some work was done in these seconds."""
        rate = seconds / cost
        self.seconds_per_cost = rate if not self.seconds_per_cost else 0.95 * self.seconds_per_cost + 0.05 * rate

    def enter(self, client: str) -> Place:
        """A place. Raises ApiError 429 if all are taken."""
        limits = self.limits
        if self.count >= limits.max_queue:
            raise retry_later(429, f"the queue is full ({limits.max_queue} jobs)", "queue_full", self.wait_seconds)
        most = limits.max_queue_per_client
        if most is not None and self.places[client] >= most:
            message = f"you have {most} jobs in the queue, the most that one client may have"
            raise retry_later(429, message, "client_queue_full", self.wait_seconds)
        self.places[client] += 1
        return Place(client)

    def add_cost(self, place: Place, cost: float) -> None:
        """Reserve the cost of the job of a place. Raises ApiError."""
        limits = self.limits
        if cost > limits.max_job_cost:
            raise ApiError(
                400,
                f"the job costs {cost:.3g} pixel steps (images x steps x pixels); at most {limits.max_job_cost:.3g} "
                "are allowed: request fewer images, fewer steps or a smaller size",
                "job_too_large",
            )
        if self.cost + cost > limits.max_queue_cost:
            raise retry_later(429, "the queue has no room for a job of this cost", "queue_full", self.wait_seconds)
        place.cost = cost
        self.cost += cost

    def leave(self, place: Place) -> None:
        """Give a place back; a second time does nothing."""
        if place.freed:
            return
        place.freed = True
        self.cost -= place.cost
        self.places[place.client] -= 1
        if not self.places[place.client]:
            del self.places[place.client]
            if not self.places:
                self.cost = 0.0  # without rounding errors
