"""The row scheduler: which rows share the next network call.

Clients get equal time by deficit round robin (Shreedhar & Varghese 1996, "Efficient fair queuing using deficit round
robin"): each has an account of seconds that grows by a quantum in every round, and pays for the network calls that its
rows take part in. So do the batch keys of one client; a batch key is what rows must have in common to share a call,
such as model and size. The client and key whose turn it is lead. The call is filled with rows of the same key: clients
take turns, then the jobs of a client, then the rows of a job. So a short request need not wait for a long one.

Nothing here knows networks or clocks: the caller measures the seconds of each call.
"""

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

from tessera.errors import TesseraError

Name = Hashable
Key = TypeVar("Key", bound=Hashable)
FIRST_EVALUATIONS = 8  # of the first calls of a key, before its cost was measured
RECENT = 5  # calls of one size, whose median counts
TOLERANCE = 1.05  # an evaluation that is more expensive by more than this is one of too large a call
MAX_KEYS = 1000  # whose cost is remembered
MEMORY = 0.95  # weight of earlier measurements of the cost after another call


class DeficitRing(Generic[Key]):
    """Deficit round robin over a changing set of entries."""

    def __init__(self, quantum: float) -> None:
        self.quantum = quantum
        self.deficits: dict[Key, float] = {}  # seconds, in the order of turns

    def add(self, entry: Key) -> None:
        self.deficits.setdefault(entry, self.quantum)

    def discard(self, entry: Key) -> None:
        self.deficits.pop(entry, None)

    def lead(self) -> Key:
        """The entry whose turn it is. Debts are limited, so this takes few rounds."""
        while True:
            entry, deficit = next(iter(self.deficits.items()))
            if deficit > 0:
                return entry
            del self.deficits[entry]
            self.deficits[entry] = deficit + self.quantum

    def charge(self, entry: Key, seconds: float) -> None:
        """Debts are limited to the seconds of one charge, or to a quantum: sharing calls that are not full is free."""
        if entry in self.deficits:
            self.deficits[entry] = max(self.deficits[entry] - seconds, -max(seconds, self.quantum))


@dataclass
class CallCost:
    """Seconds of a network call by its number of evaluations, a + b n, fitted to recent calls by least squares."""

    weights: float = 0.0
    sum_n: float = 0.0
    sum_nn: float = 0.0
    sum_y: float = 0.0
    sum_ny: float = 0.0
    most: int = 0  # evaluations measured in one call
    rates: dict[int, deque[float]] = field(default_factory=dict)  # seconds of an evaluation, by the size of the call

    def add(self, evaluations: int, seconds: float) -> None:
        recent = self.rates.setdefault(evaluations.bit_length(), deque(maxlen=RECENT))
        recent.append(seconds / evaluations)
        n = float(evaluations)
        for name, value in {
            "weights": 1.0,
            "sum_n": n,
            "sum_nn": n * n,
            "sum_y": seconds,
            "sum_ny": n * seconds,
        }.items():
            setattr(self, name, MEMORY * getattr(self, name) + value)
        self.most = max(self.most, evaluations)

    @property
    def line(self) -> tuple[float, float]:
        """a and b, at least 0. Raises ZeroDivisionError before the first call."""
        mean_n, mean_y = self.sum_n / self.weights, self.sum_y / self.weights
        variance = self.sum_nn / self.weights - mean_n**2
        if variance < 1e-6 * mean_n**2:  # all calls had the same number
            return 0.0, mean_y / mean_n
        slope = min(max((self.sum_ny / self.weights - mean_n * mean_y) / variance, 0.0), mean_y / mean_n)
        return mean_y - slope * mean_n, slope

    def seconds(self, evaluations: int) -> float:
        """The estimated seconds of a call; 0 before the first one."""
        if not self.weights:
            return 0.0
        constant, slope = self.line
        return constant + slope * evaluations

    @property
    def knee(self) -> int | None:
        """The largest calls whose evaluations are not clearly more expensive than those of smaller ones; None: unknown.

        Sizes are compared by powers of two. On a CPU, large calls leave its caches.
        """
        medians = {size: median(recent) for size, recent in self.rates.items() if len(recent) == RECENT}
        cheapest, result = math.inf, None
        for size, rate in sorted(medians.items()):
            if rate > TOLERANCE * cheapest:
                return result
            cheapest, result = min(cheapest, rate), 2**size - 1
        return None

    def limit(self, seconds: float, most: int) -> int:
        """The most evaluations, up to `most`, of a call of these seconds.

        It grows by doubling, after a few calls of each size, and stays below the knee.
        """
        if not self.weights:
            return min(FIRST_EVALUATIONS, most)
        constant, slope = self.line
        affordable = (seconds - constant) / slope if slope > 0 else math.inf
        is_known = len(self.rates[self.most.bit_length()]) == RECENT
        growth = max(2 * self.most if is_known else self.most, FIRST_EVALUATIONS)
        return int(max(1, min(affordable + 1e-6, growth, self.knee or most, most)))


@dataclass
class _Flow:
    """The rows of one client with one key, by job; each dictionary is in the order of turns."""

    jobs: dict[Hashable, dict[Name, int]] = field(default_factory=dict)

    def turns(self) -> Iterator[Name]:
        """The first row of every job, then the second ones."""
        iterators = [iter(rows) for rows in self.jobs.values()]
        while iterators:
            remaining = []
            for rows in iterators:
                if (name := next(rows, None)) is not None:
                    remaining.append(rows)
                    yield name
            iterators = remaining

    def served(self, job: Hashable, name: Name) -> None:
        """The row and its job go to the end of the queue."""
        rows = self.jobs.pop(job)
        rows[name] = rows.pop(name)
        self.jobs[job] = rows


@dataclass(frozen=True)
class _Row:
    client: Hashable
    key: Hashable
    job: Hashable
    evaluations: int


@dataclass(frozen=True)
class Call:
    """Rows of one batch key that share the next network call."""

    key: Hashable
    names: list[Name]
    evaluations: int


class RowScheduler:
    """Rows by client, batch key and job.

    seconds_per_call: the target for one call; a call has more rows only if they are within a step together.
    max_evaluations: of one call.
    """

    def __init__(self, seconds_per_call: float = 0.5, max_evaluations: int = 64) -> None:
        if not (seconds_per_call > 0 and max_evaluations >= 1):
            raise TesseraError(
                f"seconds_per_call is {seconds_per_call} and max_evaluations {max_evaluations}; use numbers above 0"
            )
        self.seconds_per_call, self.max_evaluations = seconds_per_call, max_evaluations
        self.costs: dict[Hashable, CallCost] = {}
        self._rows: dict[Name, _Row] = {}
        self._clients: DeficitRing[Hashable] = DeficitRing(seconds_per_call)
        self._keys: dict[Hashable, DeficitRing[Hashable]] = {}  # of each client
        self._flows: dict[tuple[Hashable, Hashable], _Flow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, client: Hashable, key: Hashable, job: Hashable, name: Name, evaluations: int = 1) -> None:
        """A row that takes part from now on. evaluations: of the network in one call; 1 without guidance."""
        if name in self._rows:
            raise ValueError(f"there is a row {name} already")
        self._rows[name] = _Row(client, key, job, evaluations)
        self._clients.add(client)
        self._keys.setdefault(client, DeficitRing(self.seconds_per_call)).add(key)
        self._flows.setdefault((client, key), _Flow()).jobs.setdefault(job, {})[name] = evaluations

    def remove(self, name: Name) -> None:
        """A row that is finished or cancelled. Raises KeyError for another name."""
        row = self._rows.pop(name)
        flow = self._flows[row.client, row.key]
        del flow.jobs[row.job][name]
        if not flow.jobs[row.job]:
            del flow.jobs[row.job]
        if not flow.jobs:
            del self._flows[row.client, row.key]
            self._keys[row.client].discard(row.key)
            if not self._keys[row.client].deficits:
                del self._keys[row.client]
                self._clients.discard(row.client)

    def choose(self, together: Collection[Name] = ()) -> Call | None:
        """The rows of the next call; None if there are none.

        together: rows within a step, which take part in the next call of their key in any case
        """
        if not self._rows:
            return None
        lead = self._clients.lead()
        key = self._keys[lead].lead()
        names = [name for name in together if name in self._rows and self._rows[name].key == key]
        chosen = set(names)
        evaluations = sum(self._rows[name].evaluations for name in names)
        cost = self.costs.get(key, CallCost())
        limit = cost.limit(self.seconds_per_call, self.max_evaluations)
        clients = [client for client in self._clients.deficits if (client, key) in self._flows]
        queues = [self._flows[client, key].turns() for client in clients]
        while queues and evaluations < limit:
            remaining = []
            for queue in queues:
                name = next((name for name in queue if name not in chosen), None)
                if name is None:
                    continue
                needed = self._rows[name].evaluations
                if names and evaluations + needed > limit:
                    continue
                names.append(name)
                chosen.add(name)
                evaluations += needed
                remaining.append(queue)
            queues = remaining
        return Call(key, names, evaluations)

    def charge(self, call: Call, seconds: float) -> None:
        """What a call took. Its rows pay by their evaluations, and go to the end of their queues."""
        self.costs.setdefault(call.key, CallCost()).add(call.evaluations, seconds)
        if len(self.costs) > MAX_KEYS:  # clients choose sizes: there may be many
            del self.costs[next(iter(self.costs))]
        paid: dict[Hashable, float] = {}
        for name in call.names:
            row = self._rows[name]
            paid[row.client] = paid.get(row.client, 0.0) + seconds * row.evaluations / call.evaluations
            self._flows[row.client, row.key].served(row.job, name)
        for client, share in paid.items():
            self._clients.charge(client, share)
            self._keys[client].charge(call.key, share)
