"""Checkpoints of a run. Each one is a bundle (the EMA model, ready for sampling) with the training state beside it.

    RUN/recipe.yaml
    RUN/log.jsonl
    RUN/index-....parquet               the index of the data; another one for each change of the data
    RUN/codec/                          the autoencoder, if it came from a local folder
    RUN/checkpoints/step-000001000/     config.json, model.safetensors, README.md: the bundle
                                        ema/: EMA weights of other decays
                                        state/: weights and optimizer, one file per rank (torch.distributed.checkpoint)
                                        training.json: step, position and a checksum of every file

Checkpoints are saved asynchronously; each rank writes its own shard. The state is stored as safetensors instead of
pickles, the default of torch.distributed.checkpoint, so reading a checkpoint cannot run code. A checkpoint can be
loaded by any number of ranks.
"""

from tessera.training.checkpoint.read import latest_valid, load_weights, missing_state, quarantine, restore, verify
from tessera.training.checkpoint.remote import RemoteRun, local_folder, remote_run
from tessera.training.checkpoint.retention import delete_after, prune
from tessera.training.checkpoint.state import (
    STATE_DIR,
    TRAINER_STATE,
    TrainerState,
    checkpoint_path,
    read_state,
    training_state_dict,
)
from tessera.training.checkpoint.write import CheckpointWriter

__all__ = ["STATE_DIR", "TRAINER_STATE", "CheckpointWriter", "TrainerState", "checkpoint_path", "delete_after"]
__all__ += ["latest_valid", "load_weights", "missing_state", "prune", "quarantine", "read_state", "restore"]
__all__ += ["RemoteRun", "local_folder", "remote_run"]
__all__ += ["training_state_dict", "verify"]
