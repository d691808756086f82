"""The row scheduler with a fake clock: nothing is lost or doubled, nobody starves, clients get equal time."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tessera.errors import TesseraError
from tessera.serving.scheduler import Call, CallCost, DeficitRing, RowScheduler


class FakeClock:
    """A call takes a fixed time, and more for each evaluation, by its key."""

    def __init__(self, costs: dict) -> None:
        self.costs, self.now = costs, 0.0

    def run(self, scheduler: RowScheduler, call: Call) -> float:
        constant, slope = self.costs[call.key]
        seconds = constant + slope * call.evaluations
        self.now += seconds
        scheduler.charge(call, seconds)
        return seconds


def serve(scheduler: RowScheduler, clock: FakeClock, calls: int) -> list[Call]:
    result = []
    for _ in range(calls):
        call = scheduler.choose()
        assert call is not None
        clock.run(scheduler, call)
        result.append(call)
    return result


def test_no_rows_no_call():
    scheduler = RowScheduler()
    assert scheduler.choose() is None
    scheduler.add("client", "key", "job", "row")
    with pytest.raises(ValueError, match="already"):
        scheduler.add("client", "key", "job", "row")
    scheduler.remove("row")
    assert scheduler.choose() is None
    assert len(scheduler) == 0


def test_settings_that_serve_nothing():
    with pytest.raises(TesseraError, match="above 0"):
        RowScheduler(seconds_per_call=0)
    with pytest.raises(TesseraError, match="above 0"):
        RowScheduler(max_evaluations=0)


def test_rows_of_one_key_share_a_call_up_to_its_limit():
    scheduler = RowScheduler(max_evaluations=5)
    for row in range(4):
        scheduler.add("client", "key", f"job {row}", row, evaluations=2)
    scheduler.add("client", "key", "job 4", 4)
    call = scheduler.choose()
    assert call == Call("key", [0, 1], 4)  # a third would make 6
    clock = FakeClock({"key": (0.0, 0.001)})
    clock.run(scheduler, call)
    assert scheduler.choose() == Call("key", [2, 3, 4], 5)


def test_a_row_that_costs_more_than_the_limit_is_served_alone():
    scheduler = RowScheduler(max_evaluations=1)
    scheduler.add("client", "key", "job", "row", evaluations=3)
    assert scheduler.choose() == Call("key", ["row"], 3)


def test_rows_within_a_step_take_part_whatever_the_limit():
    scheduler = RowScheduler(max_evaluations=2)
    for row in range(4):
        scheduler.add("client", "key", "job", row)
    scheduler.add("client", "other", "job", 4)
    call = scheduler.choose(together={1, 2, 3, 4})
    assert set(call.names) == {1, 2, 3}


@pytest.mark.parametrize("rows", [1, 10, 40])
def test_a_client_with_many_rows_takes_no_more_time_than_another(rows):
    """Each of two clients has more rows than a call: their evaluations differ by less than one call."""
    scheduler, clock = RowScheduler(max_evaluations=8), FakeClock({"key": (0.01, 0.002)})
    for row in range(40 * 8):
        scheduler.add("many", "key", f"job {row % 7}", ("many", row))
    for row in range(8 * rows):
        scheduler.add("few", "key", "job", ("few", row))
    calls = serve(scheduler, clock, 40)
    counts = [sum(name[0] == client for call in calls for name in call.names) for client in ("many", "few")]
    assert abs(counts[0] - counts[1]) <= 8


def test_clients_of_keys_that_cost_differently_get_equal_time():
    costs = {"small": (0.01, 0.001), "large": (0.1, 0.05)}
    scheduler, clock = RowScheduler(seconds_per_call=0.2), FakeClock(costs)
    for row in range(30):
        scheduler.add("a", "small", "job", ("a", row))
        scheduler.add("b", "large", "job", ("b", row))
    seconds = {"small": 0.0, "large": 0.0}
    for call in serve(scheduler, clock, 400):
        constant, slope = costs[call.key]
        seconds[call.key] += constant + slope * call.evaluations
    assert abs(seconds["small"] - seconds["large"]) <= 0.5


def test_a_client_with_two_keys_gets_the_time_of_one():
    costs = dict.fromkeys("xyz", (0.02, 0.001))
    scheduler, clock = RowScheduler(seconds_per_call=0.05), FakeClock(costs)
    for row in range(30):
        scheduler.add("two", "x", "job", ("x", row))
        scheduler.add("two", "y", "job", ("y", row))
        scheduler.add("one", "z", "job", ("z", row))
    keys = [call.key for call in serve(scheduler, clock, 400)]
    assert keys.count("z") == pytest.approx(200, abs=10)
    assert keys.count("x") == pytest.approx(100, abs=10)


def test_jobs_of_a_client_take_turns():
    """One row is served as often as ten of another job together."""
    scheduler, clock = RowScheduler(max_evaluations=1), FakeClock({"key": (0.0, 0.01)})
    for row in range(10):
        scheduler.add("client", "key", "ten", row)
    scheduler.add("client", "key", "one", "alone")
    names = [call.names[0] for call in serve(scheduler, clock, 20)]
    assert names.count("alone") == 10
    assert sorted(name for name in names if name != "alone") == list(range(10))


def test_calls_last_about_as_long_as_they_should():
    scheduler, clock = RowScheduler(seconds_per_call=0.5, max_evaluations=1000), FakeClock({"key": (0.1, 0.02)})
    for row in range(500):
        scheduler.add("client", "key", "job", row)
    lengths = [call.evaluations for call in serve(scheduler, clock, 20)]
    assert lengths[0] == 8
    assert all(after <= 2 * before for before, after in pairwise(lengths))
    assert lengths[-1] == 20  # 0.1 + 20 x 0.02 = 0.5


def test_the_cost_of_a_call_is_learned():
    cost = CallCost()
    assert cost.seconds(10) == 0
    cost.add(4, 0.4)
    assert cost.seconds(8) == pytest.approx(0.8)
    for n in (2, 8, 16, 3):
        cost.add(n, 0.05 + 0.01 * n)
    for n in range(1, 200):
        cost.add(1 + n % 16, 0.05 + 0.01 * (1 + n % 16))
    assert cost.line == pytest.approx((0.05, 0.01), rel=1e-3)


def test_calls_stay_below_the_size_at_which_evaluations_become_more_expensive():
    """Up to 15 an evaluation takes 10 ms, above 12 ms: after a few calls of 16 to 31 there are no more of them."""
    scheduler, lengths = RowScheduler(seconds_per_call=10, max_evaluations=64), []
    for row in range(200):
        scheduler.add("client", "key", "job", row)
    for _ in range(40):
        call = scheduler.choose()
        lengths.append(call.evaluations)
        scheduler.charge(call, call.evaluations * (0.012 if call.evaluations > 15 else 0.010))
    assert max(lengths) == 16
    assert scheduler.costs["key"].knee == 15
    assert set(lengths[10:]) == {15}


def test_a_debt_is_limited():
    ring = DeficitRing(1.0)
    ring.add("a")
    for _ in range(100):
        ring.charge("a", 2.0)
    assert ring.deficits["a"] == -2.0
    ring.add("b")
    assert ring.lead() == "b"
    ring.charge("unknown", 1.0)
    assert "unknown" not in ring.deficits


class Scheduling(RuleBasedStateMachine):
    """Any sequence of jobs, cancellations and calls. Rows leave when their steps are done; a step has one or two calls,
    as those of solvers have."""

    COSTS = {"x": (0.01, 0.002), "y": (0.0, 0.05), "z": (0.2, 0.0)}
    LIMIT = 6

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.clock = RowScheduler(0.1, self.LIMIT), FakeClock(self.COSTS)
        self.rows: dict[int, dict] = {}
        self.submitted, self.left, self.number = 0, 0, 0

    @rule(
        client=st.sampled_from("abc"),
        key=st.sampled_from("xyz"),
        steps=st.lists(st.integers(1, 5), min_size=1, max_size=4),
        evaluations=st.integers(1, 3),
        calls=st.integers(1, 2),
    )
    def submit(self, client, key, steps, evaluations, calls):
        self.number += 1
        for count in steps:
            self.submitted += 1
            name = self.submitted
            self.scheduler.add(client, key, self.number, name, evaluations)
            row = {"key": key, "left": count * calls, "calls": calls, "job": self.number, "cost": evaluations}
            self.rows[name] = {**row, "waited": 0.0}

    @rule(data=st.data())
    def cancel(self, data):
        jobs = sorted({row["job"] for row in self.rows.values()})
        if not jobs:
            return
        job = data.draw(st.sampled_from(jobs))
        for name in [name for name, row in self.rows.items() if row["job"] == job]:
            self._leave(name)

    def _leave(self, name):
        self.scheduler.remove(name)
        del self.rows[name]
        self.left += 1

    @rule(times=st.integers(1, 8))
    def call(self, times):
        for _ in range(times):
            within = {name for name, row in self.rows.items() if row["left"] % row["calls"]}
            call = self.scheduler.choose(within)
            if call is None:
                assert not self.rows
                return
            assert len(set(call.names)) == len(call.names)
            assert set(call.names) <= self.rows.keys()
            assert {self.rows[name]["key"] for name in call.names} == {call.key}
            assert call.evaluations == sum(self.rows[name]["cost"] for name in call.names)
            assert {name for name in within if self.rows[name]["key"] == call.key} <= set(call.names)
            extra = [name for name in call.names if name not in within]
            assert call.evaluations <= self.LIMIT or len(extra) <= (len(call.names) == 1)
            seconds = self.clock.run(self.scheduler, call)
            for name, row in self.rows.items():
                row["waited"] = 0.0 if name in call.names else row["waited"] + seconds
            for name in call.names:
                self.rows[name]["left"] -= 1
                if not self.rows[name]["left"]:
                    self._leave(name)

    @invariant()
    def nothing_is_lost(self):
        assert len(self.scheduler) == len(self.rows) == self.submitted - self.left

    @invariant()
    def nobody_starves(self):
        """Between two calls with a row, every other row can be served once, and every client and key a quantum."""
        if self.rows:
            longest = 0.3 * (len(self.rows) + self.left + 9)
            assert max(row["waited"] for row in self.rows.values()) <= longest

    def teardown(self):
        for _ in range(2000):
            if not self.rows:
                break
            self.call(1)
        assert not self.rows


Scheduling.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestScheduling = Scheduling.TestCase
