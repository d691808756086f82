"""Does a run with an injected fault end as an uninterrupted run? Real runs of the command line, with one fault each.

    python benchmarks/faults.py [--out runs/faults] [NAME ...]

Each row: a small run of digits is started by `tessera train` (two processes: by torchrun, with sharded weights), the
fault is injected, and the same command is run again. The last column compares all tensors of the final checkpoint
(weights, EMA, optimizer) and its position, bit for bit, with a run without the fault; if steps or batches were
skipped, with a run that skips the same batches.

A full disk is a small tmpfs, which only root may mount: without root, one row is left out. Linux.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tessera

HERE = Path(__file__).resolve()
ROOT = Path(tessera.__file__).parents[1]
STEPS, EVERY, BATCH = 60, 10, 32
RECIPE = (
    "network.hidden_size=48", "network.depth=2", "network.num_heads=2", "sampling.num_steps=2",
    f"training.global_batch_size={BATCH}",
    f"training.checkpoint_every={EVERY}", "training.keep_last=3", "training.log_every=1",
    "training.sample_every=1000", "training.sample_seeds=1", "training.tensorboard=false", "training.device=cpu",
    "training.health_every=20", "training.optimizer.lr_schedule=constant", "training.optimizer.warmup_steps=0",
    "training.ema={decay: 0.99, extra_decays: [0.9]}", "training.stability.window=16",
    "training.stability.max_consecutive_bad=4",
    "training.fsdp=full",
)  # fmt: skip
BAD = 34  # the step with the bad data, between two checkpoints
ENOUGH = 300.0  # seconds after which a run counts as hanging


# Inside a run with a fault: python benchmarks/faults.py inject FAULT train ...


def inject(fault: str) -> None:
    """Inject a fault into this process."""
    import resource

    import torch

    from tessera.training import loop, parallel, step

    name, rank, size = (*fault.split(":"), "0", "0")[:3]
    bad = (BAD - 1) * BATCH
    prepare, train_step = step.prepare_batch, loop.train_step

    def corrupt_sample(batch, task, device):
        """Change one sample of one batch, so that only one of two processes has it."""
        x0, condition, position = prepare(batch, task, device)
        there = (batch.position == bad).view(-1, 1, 1, 1)
        return torch.where(there, x0 * {"nan": torch.nan, "spike": 1000.0}[name], x0), condition, position

    def damaged(learner, batch, *rest):
        metrics = train_step(learner, batch, *rest)
        start = int(batch.position[0]) // BATCH * BATCH
        if start == bad or (name == "ruin" and start > bad):
            with torch.no_grad():
                for weight in learner.network.parameters():
                    parallel.local_tensor(weight).mul_(30)
        return metrics

    def limited(learner, batch, *rest):
        if int(batch.position[0]) // BATCH * BATCH == bad and os.environ.get("RANK", "0") == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        return train_step(learner, batch, *rest)

    if name in ("nan", "spike"):
        step.prepare_batch = corrupt_sample
    else:
        loop.train_step = {"damage": damaged, "ruin": damaged, "limit": limited}[name]


# Outside


@dataclass
class Row:
    fault: str
    processes: int
    does: str
    last_saved: int | None  # the last saved step when the run ended
    equal: str


class Life:
    """A run in processes of its own."""

    def __init__(
        self, bench: "Bench", run: Path, fault: str | None = None, restarts: int = 0, steps: int = STEPS
    ) -> None:
        self.run, self.count, count = run, bench.count, bench.count
        what = [str(HERE), "inject", fault] if fault else ["-m", "tessera"]
        words = [
            *what,
            "train",
            str(ROOT / "recipes/digits.yaml"),
            *RECIPE,
            f"training.steps={steps}",
            f"run_dir={run}",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        launcher += ["--max-restarts", str(restarts)] if restarts else []
        command = [sys.executable, *(launcher if count > 1 else []), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._output = (bench.out / f"{run.parent.name}-{run.name}-{time.monotonic_ns()}.txt").open("w+")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.disturbed = time.monotonic()

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        if self.count == 1:
            return {0: self.process.pid}
        pids = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes()
            except (OSError, ValueError):
                continue
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
            if parent == self.process.pid and rank:
                pids[int(rank[1])] = int(folder.name)
        return pids

    def reach(self, step: int) -> None:
        """Wait until the log has a step."""
        log = self.run / "log.jsonl"
        while self.process.poll() is None:
            if log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines()):
                return
            time.sleep(0.005)

    def writing(self, after: int) -> None:
        """Wait until a checkpoint after a step is partly written."""
        while self.process.poll() is None:
            half = (self.run / "checkpoints").glob("step-*.partial/state/*")
            if any(int(path.parents[1].name[5:14]) > after for path in half):
                return
            time.sleep(0.0005)

    def signal(self, number: signal.Signals, *pids: int) -> None:
        self.disturbed = time.monotonic()
        for pid in pids or (self.process.pid,):
            os.kill(pid, number)

    def end(self) -> tuple[int | None, str]:
        """Exit code and output; the code is None if the run does not end and is killed."""
        try:
            code = self.process.wait(ENOUGH)
        except subprocess.TimeoutExpired:
            code = None
            for pid in [*self.ranks().values(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.seconds = time.monotonic() - self.disturbed
        self._output.seek(0)
        output = self._output.read()
        self._output.close()
        return code, output


def state(run: Path) -> dict[str, Any]:
    """Tensors as bytes, by name, and the position, of the newest checkpoint; headers of files have no fixed order."""
    from safetensors.torch import load_file

    newest = checkpoints(run)[0]
    tensors: dict[str, Any] = {
        f"{path.relative_to(newest)} {name}": tensor.numpy().tobytes()
        for path in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    place = json.loads((newest / "training.json").read_text())
    return tensors | {name: place[name] for name in ("step", "position", "spike_detector")}


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-" + "[0-9]" * 9), reverse=True)


def newest(run: Path) -> int | None:
    present = checkpoints(run)
    return int(present[0].name[5:]) if present else None


def log(run: Path) -> list[dict]:
    """The log without timings and without the counts of skipped steps and roll-backs."""
    timed = ("images_per_second", "mfu", "data_wait", "memory", "skipped_steps", "rollbacks")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def passed(run: Path) -> list[dict]:
    path = run / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def message(code: int | None, output: str, run: Path) -> str:
    """How a run ended: exit code, and the last message of each kind from each process."""
    if code is None:
        return f"**does not end within {ENOUGH:.0f} s**"
    kinds = ("error:", "stopped at", "is damaged", "back to step", "is skipped")
    messages: dict[tuple[str, str], str] = {}  # the last of each kind, of each process
    for line in output.splitlines():
        line = line.replace(str(run), "RUN").replace(str(run.parent), "..")
        who = "process 1" if line.startswith("process 1") else ""
        for kind in kinds:
            if kind in line and not line.startswith(("torch", "[", "E1", "W1")):
                messages[who, kind] = line if len(line) < 200 else line[:200].rpartition(" ")[0] + " ..."
    for (who, kind), line in list(messages.items()):  # messages of both are printed once
        if who and messages.get(("", kind)) == line.removeprefix(f"{who}: "):
            del messages[who, kind]
    ours = any(re.search(r'File ".*/tessera/', line) for line in output.splitlines())
    crashed = "; **a traceback**" if ours else ""
    return f"exit {code}" + "".join(f'; "{line}"' for line in messages.values()) + crashed


class Bench:
    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        out.mkdir(parents=True, exist_ok=True)
        self._whole: dict[tuple[int, ...], Path] = {}

    def folder(self, name: str) -> Path:
        path = self.out / f"{name}-{self.count}"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def whole(self, passing: Iterable[int] = (), steps: int = STEPS) -> Path:
        """A run without a fault that skips these positions."""
        key = (*sorted(set(passing)), steps)
        if key not in self._whole:
            run = self.folder(f"whole{len(self._whole)}")
            run.mkdir(parents=True)
            records = [{"step": 1, "position": at, "outcome": "excluded", "samples": []} for at in key[:-1]]
            if records:
                (run / "skipped_steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            code, output = Life(self, run, steps=steps).end()
            assert code == 0, output
            self._whole[key] = run
        return self._whole[key]

    def resume(self, run: Path, whole: Path) -> str:
        """Run the same command again and compare."""
        code, output = Life(self, run).end()
        if code != 0:
            return f"**no: exit {code}** {message(code, output, run)}"
        return compare(run, whole)


def compare(run: Path, whole: Path) -> str:
    one, other = state(run), state(whole)
    differing = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    if differing:
        return f"**no: {len(differing)} of {len(other)} tensors differ**"
    if log(run) != log(whole):
        return "bit for bit; **the log differs**"
    left = [path.name for path in run.rglob("*.partial")]
    return "yes, bit for bit" + (f"; **left behind: {', '.join(left)}**" if left else "")


# The faults: each is a function of the bench, its name, and its description

Done = Callable[[Bench, str, str], Row]


def skipping_the_same(bench: Bench, run: Path) -> Path:
    """A run that skips the batches that this one skipped."""
    return bench.whole(record["position"] for record in passed(run) if record["outcome"] == "excluded")


def of_data(bench: Bench, name: str, what: str) -> Row:
    """One batch is skipped: weights and optimizer state are those of a run without it."""
    run = bench.folder(name)
    code, output = Life(bench, run, name).end()
    equal = f"**no: exit {code}**"
    if code == 0:
        whole = bench.whole([(BAD - 1) * BATCH], STEPS - 1)
        one, other = ({key: value for key, value in state(each).items() if "state/" in key} for each in (run, whole))
        noted = len(passed(run)) == 1 and len(passed(run)[0]["samples"]) == BATCH
        equal = (
            "yes: weights and optimizer of a run without this batch, bit for bit"
            if one == other and noted
            else "**no**"
        )
    return Row(what, bench.count, message(code, output, run), newest(run), equal)


def damage(bench: Bench, name: str, what: str) -> Row:
    run = bench.folder(name)
    code, output = Life(bench, run, name).end()
    last_saved = newest(run)
    whole = skipping_the_same(bench, run)
    equal = compare(run, whole) if code == 0 else bench.resume(run, whole)
    equal = equal.replace("yes", "yes: as a run that skips the same batches")
    return Row(what, bench.count, message(code, output, run), last_saved, equal)


def damaged_file(harm: Callable[[Path], None]) -> Done:
    """A file of the newest checkpoint of a finished run is damaged, and the run is resumed."""

    def done(bench: Bench, name: str, what: str) -> Row:
        whole, run = bench.whole(), bench.folder(name)
        shutil.copytree(whole, run)
        harm(checkpoints(run)[0])
        code, output = Life(bench, run).end()
        going = re.search(r"resuming from step (\d+)", output)
        does = message(code, output, run) + (f"; resumes from step {going[1]}" if going else "")
        equal = compare(run, whole) if list(run.rglob("*.damaged")) else "**no: it was not detected**"
        return Row(what, bench.count, does, int(going[1]) if going else None, equal)

    return done


def truncate(checkpoint: Path) -> None:
    shard = max((checkpoint / "state").iterdir())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-99] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def forget_place(checkpoint: Path) -> None:
    (checkpoint / "training.json").unlink()


def signalled(
    number: signal.Signals, whom: Callable[[Life], list[int]], when: str = "between", restarts: int = 0
) -> Done:
    """A signal between two checkpoints, or while one is written."""

    def done(bench: Bench, name: str, what: str) -> Row:
        run = bench.folder(name)
        life = Life(bench, run, restarts=restarts)
        life.writing(20) if when == "writing" else life.reach(25)
        life.signal(number, *whom(life))
        code, output = life.end()
        last_saved, does = newest(run), f"{message(code, output, run)}; ended after {life.seconds:.1f} s"
        starts = re.findall(r"resuming from step (\d+)", output)
        if restarts and starts:
            last_saved = int(starts[0])
            does = f"exit {code}: torchrun restarts all processes, which resume from step {', '.join(starts)}"
        equal = compare(run, bench.whole()) if code == 0 else bench.resume(run, bench.whole())
        return Row(what, bench.count, does, last_saved, equal)

    return done


def orphaned(bench: Bench, name: str, what: str) -> Row:
    """Only torchrun is killed, not its processes."""
    run = bench.folder(name)
    life = Life(bench, run)
    life.reach(25)
    left = life.ranks().values()
    life.signal(signal.SIGKILL)
    code, _ = life.end()
    _, output = Life(bench, run).end()  # at once
    refused = re.search(r"error: .* is in use by another process", output)
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        time.sleep(0.1)
    does = f"exit {code}; the two processes continue to step {newest(run)}"
    does += "; until then the same command is refused: the folder is in use" if refused else ""
    return Row(what, bench.count, does, newest(run), bench.resume(run, bench.whole()))


def everyone(life: Life) -> list[int]:
    """All processes and torchrun, as clusters do."""
    return [life.process.pid, *life.ranks().values()]


def started(life: Life) -> list[int]:
    """The process that was started: torchrun if there are several."""
    return [life.process.pid]


def one(life: Life) -> list[int]:
    """The last rank."""
    return [max(life.ranks().items())[1]]


@contextmanager
def small_disk(at: Path):
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(at)], check=True, capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def full_disk(left: int) -> Done:
    """A disk is filled up to `left` bytes between two checkpoints, and freed before the run is resumed."""

    def done(bench: Bench, name: str, what: str) -> Row:
        with small_disk(bench.folder(name)) as disk:
            run = disk / "run"
            life = Life(bench, run)
            life.reach(25)
            with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while shutil.disk_usage(disk).free > left:
                    filler.write(bytes(4096))
            life.disturbed = time.monotonic()
            code, output = life.end()
            last_saved, does = newest(run), f"{message(code, output, run)}; ended after {life.seconds:.1f} s"
            (disk / "filler").unlink()
            return Row(what, bench.count, does, last_saved, bench.resume(run, bench.whole()))

    return done


def limited(rank: int, size: int) -> Done:
    """One process can write no file longer than `size` bytes: a disk that is full for this process only."""

    def done(bench: Bench, name: str, what: str) -> Row:
        run = bench.folder(name)
        code, output = Life(bench, run, f"limit:{rank}:{size}").end()
        last_saved = newest(run)
        return Row(what, bench.count, message(code, output, run), last_saved, bench.resume(run, bench.whole()))

    return done


ANY, TWO = (1, 2), (2,)
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
RESTARTS = "under `torchrun --max-restarts 3`"
CASES: dict[str, tuple[tuple[int, ...], str, Done]] = {
    "nan": (ANY, f"a NaN sample, in step {BAD}", of_data),
    "spike": (ANY, f"a sample 1000 times too large, in step {BAD}", of_data),
    "damage": (ANY, f"weights x 30 after step {BAD}", damage),
    "ruin": (ANY, f"weights x 30 after each step from {BAD} on; then no more", damage),
    "truncated": (ANY, "half of a file of the newest checkpoint's state is gone", damaged_file(truncate)),
    "bit": (ANY, "one bit of its model.safetensors is flipped", damaged_file(flip)),
    "place": (ANY, "its training.json is missing", damaged_file(forget_place)),
    "full": (ANY, "disk full when a checkpoint is written; then space again", full_disk(100_000)),
    "full-log": (ANY, f"log.jsonl cannot be written from step {BAD} on; then it can", limited(0, 1_000)),
    "full-first": (TWO, f"disk full for the first process only, from step {BAD}; then space again", limited(0, 50_000)),
    "full-second": (TWO, "the same for the second process only", limited(1, 50_000)),
    "ctrl-c": (ANY, "Ctrl-C", signalled(INT, started)),
    "sigterm": (ANY, "SIGTERM (preemption)", signalled(TERM, started)),
    "sigterm-all": (TWO, "SIGTERM to torchrun and to every process, as clusters do", signalled(TERM, everyone)),
    "sigterm-one": (TWO, "SIGTERM to one process", signalled(TERM, one)),
    "sigterm-again": (TWO, f"SIGTERM to one process, {RESTARTS}", signalled(TERM, one, restarts=3)),
    "kill": (ANY, "SIGKILL to one process", signalled(KILL, one)),
    "kill-writing": (
        ANY,
        "SIGKILL to one process while a checkpoint is written",
        signalled(KILL, one, "writing"),
    ),
    "kill-again": (TWO, f"SIGKILL to one process, {RESTARTS}", signalled(KILL, one, restarts=3)),
    "kill-torchrun": (TWO, "SIGKILL to torchrun", orphaned),
    "kill-all": (TWO, "SIGKILL to torchrun and all processes (power cut)", signalled(KILL, everyone)),
}


def main() -> None:
    if sys.argv[1:2] == ["inject"]:
        from tessera import cli

        inject(sys.argv[2])
        sys.argv = ["tessera", *sys.argv[3:]]
        cli.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--processes", type=int, choices=(1, 2))
    options = parser.parse_args()
    print(
        "| fault | processes | what the run does | last saved step | resumed: equal to a run without the fault? |",
        flush=True,
    )
    print("|---|---|---|---|---|", flush=True)
    for count in (1, 2):
        bench = Bench(options.out.resolve(), count)
        for name, (counts, what, done) in CASES.items():
            if count in counts and (not options.names or name in options.names) and options.processes in (None, count):
                if name == "full" and os.geteuid():
                    continue
                row = done(bench, name, what)
                print(f"| {row.fault} | {row.processes} | {row.does} | {row.last_saved} | {row.equal} |", flush=True)


if __name__ == "__main__":
    main()
