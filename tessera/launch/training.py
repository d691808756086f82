"""One training on several machines: torchrun on each of them, in a SLURM job or on nodes of a Ray cluster.

A training that was stopped by the cluster, or that lost a machine, starts again and resumes from its newest checkpoint.
"""

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.errors import Interrupted, TesseraError
from tessera.launch.launcher import describe_code, interrupt_on_sigterm
from tessera.launch.ray import connect, passed_environment
from tessera.launch.slurm import require_program
from tessera.launch.task import STOP_SECONDS, Outcome, Task, run_task

SAVE_SECONDS = 110  # for all ranks to save after a signal
MARGIN_SECONDS = 30  # for an answer of a task that was stopped
NODE_SECONDS = 600  # to wait for enough nodes of a Ray cluster
SCRIPT = """#!/bin/bash
{directives}
# torchrun's own limit for ranks to save is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={save_seconds}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}" TESSERA_CPUS={threads}
attempt="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"  # this script runs on the first machine
stopped=
srun {torchrun} --rdzv-id "$attempt" --rdzv-endpoint "$endpoint" {command} &
child=$!
trap 'stopped=1; kill -TERM $child' TERM  # before the time limit: the ranks save
wait $child; code=$?
if [ -n "$stopped" ]; then wait $child; code=$?; fi
# Stopped or killed, not failed by itself: queue the job again, unless it was cancelled.
if {{ [ -n "$stopped" ] || [ $code -gt 128 ]; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        echo "queued again after code $code"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit $code
"""


@dataclass(frozen=True)
class Training:
    """words: of `tessera train`, without `tessera`. folder: the working directory, which all machines see. log: a file,
    likewise. nodes, ranks: machines, and ranks on each. cpus: CPU cores of a machine. gpus: GPUs of a machine.

    retries: restarts after a lost rank or machine. options: of sbatch, without dashes.
    """

    words: tuple[str, ...]
    folder: Path
    log: Path
    nodes: int
    ranks: int
    cpus: int
    gpus: int
    retries: int
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """CPU cores of a rank."""
        return max(1, self.cpus // self.ranks)

    @property
    def torchrun(self) -> list[str]:
        """The options of torchrun, without those of where its ranks meet."""
        words = [f"--nnodes={self.nodes}", f"--nproc-per-node={self.ranks}", f"--max-restarts={self.retries}"]
        return [*words, "--rdzv-backend=c10d"]


# SLURM


def slurm_script(training: Training) -> str:
    """The script for sbatch."""
    log = training.log.absolute()
    directives: dict[str, str] = {
        "job-name": "tessera-" + re.sub(r"[^\w.+-]", "-", log.parent.name),
        "dependency": "singleton",  # a second submission of a run waits for the first one
        "nodes": str(training.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(training.cpus),
        **({"gpus-per-node": str(training.gpus)} if training.gpus else {}),
        "requeue": "",
        "open-mode": "append",
        "output": str(log).replace("%", "%%"),  # sbatch replaces %j and others
        "chdir": str(training.folder),
        "signal": f"B:TERM@{SAVE_SECONDS + 40}",
        **training.options,
    }
    lines = [f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "") for name, value in directives.items()]
    return SCRIPT.format(
        directives="\n".join(lines),
        save_seconds=SAVE_SECONDS,
        threads=training.threads,
        torchrun=shlex.join([sys.executable, "-m", "torch.distributed.run", *training.torchrun]),
        command=shlex.join(["-m", "tessera", *training.words]),
        requeues=1000,
    )


def submit(training: Training) -> str:
    """Submit a job that trains, and return its number. Raises TesseraError."""
    require_program("sbatch")
    script = training.log.with_suffix(".sh")
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(slurm_script(training), encoding="utf-8")
    except OSError as error:
        raise TesseraError(f"cannot write {script}: {error.strerror or error}") from None
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TesseraError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


# Ray


def _meeting_point() -> str:
    """host:port of this machine, where the ranks meet."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def train_on_ray(training: Training, log: Callable[[str], None]) -> None:
    """Train on nodes of a Ray cluster, each with its ranks, and wait for the end.

    Raises TesseraError if the training fails, or there are too few nodes; Interrupted after Ctrl-C or SIGTERM.
    """
    first = None
    for attempt in range(training.retries + 1):
        log(f"waiting for {training.nodes} nodes with {training.cpus} CPU cores and {training.gpus} GPUs each")
        outcomes = _attempt(training, attempt, log)
        failures = [outcome for outcome in outcomes if outcome.code]
        if not failures:
            return
        first = next((failure for failure in failures if failure.code > 0 and failure.tail), failures[0])
        log(
            f"{first.task.name} failed with {describe_code(first.code)} "
            f"in attempt {attempt + 1} of {training.retries + 1}"
        )
    assert first is not None
    tail = "".join(f"\n    {line}" for line in first.tail.splitlines())
    raise TesseraError(f"the training failed {training.retries + 1} times; log: {first.task.log}{tail}")


def _attempt(training: Training, attempt: int, log: Callable[[str], None]) -> list[Outcome]:
    """The outcomes of torchrun on every node. If one node fails or is lost, the others are stopped."""
    ray = connect()
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": float(training.cpus), **({"GPU": float(training.gpus)} if training.gpus else {})}
    group = placement_group([bundle] * training.nodes, strategy="STRICT_SPREAD")
    references: dict[Any, Task] = {}

    def on_node(function: Callable, node: int, cpus: int, gpus: int) -> Callable:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        return ray.remote(function).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, scheduling_strategy=strategy,
            runtime_env={"env_vars": passed_environment()},
        ).remote  # fmt: skip

    try:
        with interrupt_on_sigterm():
            if not group.wait(NODE_SECONDS):
                raise TesseraError(
                    f"no {training.nodes} nodes with {training.cpus} free CPU cores and {training.gpus} GPUs each "
                    f"within {NODE_SECONDS // 60} minutes: see `ray status`"
                )
            endpoint = ray.get(on_node(_meeting_point, 0, 0, 0)())
            for node in range(training.nodes):
                meeting = [f"--rdzv-id={attempt}", f"--rdzv-endpoint={endpoint}"]
                meeting.append(
                    f"--rdzv-conf=is_host={int(node == 0)}"
                )  # torchrun may not know Ray's address as its own
                words = (*training.torchrun, *meeting, "-m", "tessera", *training.words)
                path = training.log.with_name(f"{training.log.stem}-{node + 1}.log")
                task = Task(
                    f"node {node + 1}", words, training.folder, path, training.threads, module="tessera.launch.torchrun"
                )
                references[on_node(run_task, node, training.cpus, training.gpus)(task)] = task
            log(f"training on {training.nodes} nodes; logs: {training.log.with_name(training.log.stem)}-*.log")
            return _wait(ray, references)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; everything is saved: repeat the command to resume") from None
    finally:
        running = ray.wait(list(references), num_returns=len(references), timeout=0)[1] if references else []
        for reference in running:  # not of those that have ended: Ray's driver can abort while it completes them
            ray.cancel(reference, force=False)
        if running:
            # Longer than a task takes to stop: Ray's driver aborts if one replies after its node was taken from it.
            ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS + MARGIN_SECONDS)
        remove_placement_group(group)


def _wait(ray: Any, references: Mapping[Any, Task]) -> list[Outcome]:
    """Wait for all nodes, or for the first failure."""
    waiting, outcomes = list(references), []
    while waiting and all(outcome.code == 0 for outcome in outcomes):
        done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        for reference in done:
            try:
                outcomes.append(ray.get(reference))
            except ray.exceptions.RayError as error:
                outcomes.append(Outcome(references[reference], 1, f"{type(error).__name__}: the node was lost"))
    return outcomes
