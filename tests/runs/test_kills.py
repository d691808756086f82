"""A run of two ranks that is killed at any instant, wholly or in part, resumes and ends bit for bit the same."""

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

SHARDED = ("training.fsdp=full", "training.optimizer=muon", "training.ema.extra_decays=[0.9]", "network.depth=2")
PATIENCE = 30  # seconds after which a rank that lost the other counts as hanging
LOST = "TesseraError: process {} of 2 lost the others"


def train(recipe: Path, words: tuple[str, ...]) -> None:
    """Train in one process."""
    loop.train(read_recipe(recipe, list(words)))


@dataclass
class KillStats:
    """Counts of the kills of a run."""

    newest: list[str] = field(default_factory=list)  # the newest checkpoint after each kill
    partial: int = 0  # kills that left a partial checkpoint
    single: int = 0  # kills of one rank while both were training
    reported: int = 0  # of these, the other rank ended with the right error
    hanging: int = 0  # of these, the other rank did not end


def newest(run: Path) -> str:
    """The name of the newest checkpoint after step 0."""
    return max((path.name for path in bundle.checkpoints(run) if not path.name.endswith("-000000000")), default="")


def has_partial(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def kill_and_resume(processes, recipe: Path, run: Path, kills: int, *words: str) -> KillStats:
    """Kill two processes repeatedly at random instants, then let them end."""
    rng, stats = random.Random(kills), KillStats()
    for number in range(kills):
        before = newest(run)
        ranks = processes.start(2, train, recipe, (*words, f"run_dir={run}"))
        if number % 4 == 0:  # at any time from the start
            time.sleep(rng.uniform(0, 2))
        else:  # at any time after its first checkpoint, or while it writes one
            while ranks.alive and newest(run) == before:
                time.sleep(0.001)
            while ranks.alive and number % 4 == 3 and not has_partial(run):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02 if number % 4 == 3 else 0.15))
        training = newest(run) != before
        victim = rng.randrange(2) if number % 3 == 1 else None
        if victim is None:
            ranks.kill()
        else:
            ranks.kill(victim)
            survivor = 1 - victim
            ranks.processes[survivor].join(PATIENCE)
            hangs = ranks.processes[survivor].is_alive()
            ranks.kill()
        outcomes = ranks.outcomes()
        if all(outcome.code == 0 for outcome in outcomes):
            break  # the run ended before the kill
        if victim is not None and training:
            stats.single += 1
            stats.hanging += hangs
            stats.reported += outcomes[survivor].error.startswith(LOST.format(survivor))
        stats.newest.append(newest(run))
        stats.partial += has_partial(run)
    processes.together(2, train, recipe, (*words, f"run_dir={run}", "training.checkpoint_every=1000"))
    return stats


def check_log(run: Path, whole: Path, steps: int) -> None:
    """The log equals that of the undisturbed run, and there are no partial files."""
    assert [record["step"] for record in read_log(run)] == list(range(1, steps + 1))
    assert untimed(run) == untimed(whole)
    assert not list(run.rglob("*.partial"))


def untimed(run: Path) -> list[dict]:
    """The log without timings and memory."""
    timed = ("images_per_second", "mfu", "data_wait", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


@pytest.mark.slow
def test_two_ranks_killed_again_and_again_end_like_undisturbed_ones(processes, recipe, tmp_path, whole_state):
    words = ("training.steps=50", "training.checkpoint_every=1", *SHARDED)
    processes.together(2, train, recipe, (*words, f"run_dir={tmp_path / 'whole'}", "training.checkpoint_every=50"))
    stats = kill_and_resume(processes, recipe, tmp_path / "run", 5, *words)
    assert stats.newest == sorted(stats.newest)
    assert len(set(stats.newest)) >= 3  # killed at different steps
    assert stats.reported == stats.single >= 1
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    check_log(tmp_path / "run", tmp_path / "whole", 50)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SHARDED, ()], ids=["sharded, Muon", "replicated, AdamW"])
def test_two_ranks_killed_fifty_times(processes, recipe, tmp_path, whole_state, layout):
    """Some kills happen during saves; some hit one rank only, and the other ends with an error that reports it."""
    words = ("training.steps=200", "training.checkpoint_every=1", *layout)
    processes.together(2, train, recipe, (*words, f"run_dir={tmp_path / 'whole'}", "training.checkpoint_every=200"))
    stats = kill_and_resume(processes, recipe, tmp_path / "run", 50, *words)
    assert len(stats.newest) == 50
    assert stats.newest == sorted(stats.newest)
    assert len(set(stats.newest)) >= 25
    assert stats.partial >= 8
    assert stats.hanging == 0
    assert stats.reported == stats.single >= 8
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    check_log(tmp_path / "run", tmp_path / "whole", 200)
