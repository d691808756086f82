"""A SLURM cluster on one machine: munge, a controller and two node daemons, in a temporary folder.

Daemons run in the foreground and are ended by their process ids. Needs root, and Debian's packages slurm-wlm and munge.
As a program: `python tests/launch/slurm_cluster.py FOLDER` starts one until Ctrl-C, and prints SLURM_CONF for clients.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=tessera
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MinJobAge=600
JobRequeue=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)"
    return "" if os.getuid() == 0 else "needs root"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; yields the variables with which clients reach them. All are stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    for node in ("node1", "node2"):
        (folder / f"spool-{node}").mkdir()
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(3)).lstrip())
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    munge = [
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={files['socket']}",
        f"--pid-file={files['pid']}",
    ]
    munge += [f"--log-file={files['log']}", f"--seed-file={files['seed']}"]
    environment = {"SLURM_CONF": str(configuration), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    daemons = [
        ["munged", *munge],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-f", str(configuration), "-N", node] for node in ("node1", "node2")),
    ]
    with contextlib.ExitStack() as stack:
        for words in daemons:
            stack.callback(_stop, _start(words, folder, environment))
            if words[0] == "munged":
                _wait(lambda: files["socket"].exists(), f"munged does not start: see {files['log']}")
        _wait(lambda: _idle_nodes(environment) == 2, f"the nodes do not start: see the logs in {folder}")
        yield environment


def _start(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    with (folder / f"{words[0]}-{words[-1].rpartition('/')[2]}.out").open("ab") as log:
        return subprocess.Popen(
            words, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _stop(daemon: subprocess.Popen) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _wait(is_ready, message: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > deadline:
            raise RuntimeError(message)
        time.sleep(0.2)


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).absolute()) as variables:
        print(f"export SLURM_CONF={variables['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
