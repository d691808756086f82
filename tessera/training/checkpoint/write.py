"""Saving checkpoints in the background of training."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from tessera import __version__, adapters, bundle, files, power_ema
from tessera.checkpoint_files import write_tensors
from tessera.errors import TesseraError
from tessera.models.network import Network
from tessera.runtime import SINGLE, Distributed
from tessera.training import parallel
from tessera.training.checkpoint.remote import RemoteRun
from tessera.training.checkpoint.state import (
    FORMAT,
    STATE_DIR,
    TRAINER_STATE,
    TrainerState,
    checkpoint_path,
    error_reason,
    file_checksum,
    ignore_single_process_warning,
    saved_state,
    training_state_dict,
)
from tessera.training.ema import EMA


class CheckpointWriter:
    """Writes checkpoints while training continues, one at a time.

    `save` copies everything and returns. A thread of each rank writes that rank's shard, and the thread of the main
    rank completes the checkpoint. The threads use their own process group, because messages of training and of writing
    must not mix.
    """

    def __init__(self, run_dir: Path, world: Distributed = SINGLE, remote: RemoteRun | None = None) -> None:
        """remote: where each checkpoint is uploaded to once it is complete."""
        self.run_dir, self.world, self.remote = run_dir, world, remote
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tessera-checkpoint")
        self._pending: Future[None] | None = None
        self._group: Any = None
        if world.world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        ignore_single_process_warning()

    def save(
        self,
        state: TrainerState,
        model: bundle.Model,
        network: Network,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint. Every rank must call it. The main rank calls `after` once it is complete.

        model: the configuration of the EMA model. Raises TesseraError if the previous checkpoint could not be written.
        """
        self.wait()
        target = checkpoint_path(self.run_dir, state.step)
        partial = files.begin(target) if self.world.is_main else target.with_name(target.name + files.PARTIAL)
        self.world.barrier()
        averages = {average: parallel.full_network(network) for average, network in ema.networks.items()}
        if self.world.is_main:
            averages = {average: _cpu_copy(network) for average, network in averages.items()}
        try:
            writing = async_save(
                training_state_dict(network, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(partial / STATE_DIR), save_distributed=True),
                process_group=self._group,
                no_dist=self.world.world_size == 1,
            )
        except OSError as error:
            raise self._write_error(f"cannot write {target}: {error}") from error
        assert isinstance(writing, Future)

        def finish() -> None:
            self._finish(writing, state, model, averages, ema.config.kind, partial, target)
            if after is not None and self.world.is_main:
                after()

        self._pending = self._thread.submit(finish)

    def save_snapshot(self, step: int, ema: EMA) -> None:
        """Begin to write the averages of a step alone. Every rank must call it. Raises TesseraError as `save` does."""
        self.wait()
        averages: dict[float, dict[str, torch.Tensor]] = {}
        for average, network in ema.networks.items():
            state = bundle.trained_state(parallel.full_network(network))
            if self.world.is_main:
                averages[average] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

        def write() -> None:
            reason: str | None = None
            if self.world.is_main:
                try:
                    power_ema.write_snapshot(averages, self.run_dir, step)
                except TesseraError as error:
                    reason = str(error)
            if (reason := self._gather(reason)[0]) is not None:
                raise self._write_error(reason)

        self._pending = self._thread.submit(write)

    def _finish(
        self,
        writing: Future,
        state: TrainerState,
        model: bundle.Model,
        averages: dict[float, Network],
        kind: str,
        partial: Path,
        target: Path,
    ) -> None:
        """Wait for all shards, add the bundle and the checksums, and rename the folder to its final name."""
        reason: str | None = None
        checksums: dict[str, str] = {}
        try:
            writing.result()
            paths = sorted((partial / STATE_DIR).glob(f"shard-{self.world.rank + 1:05d}-*"))
            if self.world.is_main:
                ema_model = bundle.Model(model.config, next(iter(averages.values())), adapters=model.adapters)
                bundle.write(ema_model, partial, shared_folder="../..")
                config = bundle.load_config(partial)
                paths += [partial / bundle.CONFIG, bundle.trained_weights(partial, config)]
                for average, network in list(averages.items())[1:]:
                    (partial / bundle.EMA_FOLDER).mkdir(exist_ok=True)
                    paths.append(bundle.ema_path(partial, kind, average))
                    write_tensors(bundle.trained_state(network), paths[-1])
            checksums = {path.relative_to(partial).as_posix(): file_checksum(path) for path in paths}
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            reason = error_reason(error)
        reasons, parts = zip(*self._gather((reason, checksums)))
        failure = next((reason for reason in reasons if reason is not None), None)
        if failure is None and self.world.is_main:
            try:
                content = {
                    "format": FORMAT,
                    "tessera_version": __version__,
                    **asdict(state),
                    "world_size": self.world.world_size,
                    "files": {name: checksum for part in parts for name, checksum in part.items()},
                }
                (partial / TRAINER_STATE).write_text(json.dumps(content), encoding="utf-8")
                files.commit(partial, target)
                if self.remote is not None:
                    self.remote.push_checkpoint(state.step)
            except (OSError, TesseraError) as error:
                failure = error_reason(error)
        failure = self._gather(failure)[0]
        if failure is not None:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._write_error(f"cannot write {target}: {failure}")

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world.world_size
        distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _write_error(self, problem: str) -> TesseraError:
        saved = bundle.checkpoints(self.run_dir)
        return TesseraError(
            f"{problem}; "
            + (f"the last checkpoint is {saved[0]}; " if saved else "there is no checkpoint yet; ")
            + "fix the cause and run the same command again to resume"
        )

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint is written. Raises TesseraError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the checkpoint, but ignore its errors, and end the thread."""
        self._thread.shutdown(wait=True)


def _cpu_copy(network: Network) -> Network:
    """A copy that training does not change."""
    copy, trained = adapters.build_like(network), saved_state(network)
    tensors = {
        name: tensor.detach().to("cpu", copy=True) if name in trained else tensor.detach()
        for name, tensor in network.state_dict().items()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy
