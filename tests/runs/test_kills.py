"""A run of two processes that is killed at any instant, wholly or in part, goes on and ends bit for bit."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tessera import bundle
from tessera.monitoring.logger import read_log
from tessera.training import loop
from tessera.training.recipe import read_recipe

pytest.importorskip("sklearn")

SHARDED = ("training.fsdp=all", "training.optimizer=muon", "training.ema.extra_decays=[0.9]", "network.depth=2")
PATIENCE = 30  # seconds after which a process that lost the other counts as hanging
LOST = "TesseraError: process {} of 2 lost the others"


def train(recipe: Path, words: tuple[str, ...]) -> None:
    """One life of one process."""
    loop.train(read_recipe(recipe, list(words)))


@dataclass
class Toll:
    """What was seen at the kills of a run."""

    newest: list[str] = field(default_factory=list)  # the newest checkpoint after each kill
    halves: int = 0  # kills that left a checkpoint half-written
    lone: int = 0  # kills of one process, the other having begun to train
    told: int = 0  # of these, the other ended by itself and said why
    hanging: int = 0  # or did not end


def newest(run: Path) -> str:
    """The name of the newest checkpoint of a step that was taken."""
    return max((path.name for path in bundle.checkpoints(run) if not path.name.endswith("-000000000")), default="")


def half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def killed_and_gone_on(processes, recipe: Path, run: Path, kills: int, *words: str) -> Toll:
    """Kill two processes so many times at random instants, then let them end."""
    draw, toll = random.Random(kills), Toll()
    for life in range(kills):
        before = newest(run)
        fellows = processes.start(2, train, recipe, (*words, f"output={run}"))
        if life % 4 == 0:  # anywhere, from its first instant on
            time.sleep(draw.uniform(0, 2))
        else:  # anywhere after its first checkpoint, or in the midst of writing one
            while fellows.alive and newest(run) == before:
                time.sleep(0.001)
            while fellows.alive and life % 4 == 3 and not half_written(run):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02 if life % 4 == 3 else 0.15))
        began = newest(run) != before
        victim = draw.randrange(2) if life % 3 == 1 else None
        if victim is None:
            fellows.kill()
        else:
            fellows.kill(victim)
            survivor = 1 - victim
            fellows.processes[survivor].join(PATIENCE)
            hangs = fellows.processes[survivor].is_alive()
            fellows.kill()
        outcomes = fellows.outcomes()
        if all(outcome.code == 0 for outcome in outcomes):
            break  # it was faster
        if victim is not None and began:
            toll.lone += 1
            toll.hanging += hangs
            toll.told += outcomes[survivor].error.startswith(LOST.format(survivor))
        toll.newest.append(newest(run))
        toll.halves += half_written(run)
    processes.together(2, train, recipe, (*words, f"output={run}", "training.checkpoint_every=1000"))
    return toll


def has_one_log(run: Path, whole: Path, steps: int) -> None:
    """The log is that of the run that nobody disturbed, and nothing half-written is left."""
    assert [record["step"] for record in read_log(run)] == list(range(1, steps + 1))
    assert untimed(run) == untimed(whole)
    assert not list(run.rglob("*.partial"))


def untimed(run: Path) -> list[dict]:
    """The log without what differs from time to time."""
    timed = ("images_per_second", "utilisation", "stalled", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


def test_two_processes_killed_again_and_again_end_as_undisturbed_ones(processes, recipe, tmp_path, whole_state):
    words = ("training.steps=50", "training.checkpoint_every=1", *SHARDED)
    processes.together(2, train, recipe, (*words, f"output={tmp_path / 'whole'}", "training.checkpoint_every=50"))
    toll = killed_and_gone_on(processes, recipe, tmp_path / "run", 5, *words)
    assert toll.newest == sorted(toll.newest)
    assert len(set(toll.newest)) >= 3  # killed at different places
    assert toll.told == toll.lone >= 1
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    has_one_log(tmp_path / "run", tmp_path / "whole", 50)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SHARDED, ()], ids=["sharded, Muon", "replicated, AdamW"])
def test_two_processes_killed_fifty_times(processes, recipe, tmp_path, whole_state, layout):
    """Some kills fall into saves; some take one process only, and the other says so and ends."""
    words = ("training.steps=200", "training.checkpoint_every=1", *layout)
    processes.together(2, train, recipe, (*words, f"output={tmp_path / 'whole'}", "training.checkpoint_every=200"))
    toll = killed_and_gone_on(processes, recipe, tmp_path / "run", 50, *words)
    assert len(toll.newest) == 50
    assert toll.newest == sorted(toll.newest)
    assert len(set(toll.newest)) >= 25
    assert toll.halves >= 8
    assert toll.hanging == 0
    assert toll.told == toll.lone >= 8
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    has_one_log(tmp_path / "run", tmp_path / "whole", 200)
