"""Resuming a run: finding its checkpoint, checking that the recipe agrees with it, and restoring the state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera import bundle
from tessera.errors import TesseraError
from tessera.runtime import SINGLE, Distributed
from tessera.settings import diff
from tessera.training import checkpoint
from tessera.training.checkpoint import TrainerState
from tessera.training.run import RECIPE, TrainingRun, index_path


def find_checkpoint(
    run_dir: Path,
    resume: str,
    world: Distributed = SINGLE,
    on_damaged: Callable[[Path, list[str]], None] = lambda path, problems: None,
) -> Path | None:
    """The valid checkpoint that --resume selects, or None if the run starts at step 0. Raises TesseraError.

    resume: "auto", "never", or the path of a run or a checkpoint. on_damaged: called for each damaged checkpoint that
    is newer than the result.
    """
    existing = bundle.checkpoints(run_dir)
    if resume == "auto":
        path, damaged = checkpoint.latest_valid(run_dir, world)
        for damaged_path, problems in damaged.items():
            on_damaged(damaged_path, problems)
        # At step 0 there is nothing to lose, and the recipe may change.
        return None if path is None or checkpoint.read_state(path).step == 0 else path
    if resume == "never":
        if existing or (run_dir / RECIPE).exists():
            raise TesseraError(
                f"{run_dir} holds a run already: choose another run_dir=, or resume it with --resume auto"
            )
        return None
    path = Path(resume)
    candidates = [path] if (path / checkpoint.TRAINER_STATE).exists() else bundle.checkpoints(path)
    if not candidates:
        raise TesseraError(f"nothing to resume at {resume}: expected the folder of a run or of a checkpoint")
    if existing and checkpoint.read_state(existing[0]).step > checkpoint.read_state(candidates[0]).step:
        raise TesseraError(
            f"{run_dir} holds later checkpoints than {candidates[0]}: continue from it with another run_dir="
        )
    if problems := checkpoint.verify(candidates[0], world):
        raise TesseraError(f"{candidates[0]} is damaged ({'; '.join(problems[:3])}): choose another checkpoint")
    return candidates[0]


def restore_run(run: TrainingRun, path: Path | None) -> TrainerState:
    """Restore a run from a checkpoint, after checking that they agree. Returns the position of the run."""
    if path is None:
        return TrainerState(step=0, position=0)
    check_compatible(run, path)
    return checkpoint.restore(path, run.network, run.ema, run.state.optimizer)


def check_compatible(run: TrainingRun, path: Path) -> None:
    """Raise TesseraError if network, diffusion process, kind of codec or classes differ from the checkpoint's."""
    saved, current = bundle.load_config(path), run.ema_model.config
    if differences := diff(_fixed_settings(saved), _fixed_settings(current)):
        lines = "; ".join(f"{name} was {old}, is {new}" for name, old, new in differences)
        raise TesseraError(
            f"cannot resume {path} with another model: {lines}\n"
            f"undo the change, start again with another run_dir=, or fine-tune with training.init_from={path}"
        )
    before, ema = bundle.ema_weights(path, saved, "power"), run.ema.config
    if ema.kind == "power" and before and (added := set(ema.lengths) - before.keys()):
        raise TesseraError(
            f"{path} has averages of the lengths {', '.join(map(str, before))}, and "
            f"{', '.join(map(str, sorted(added)))} would lack the steps before: leave "
            "training.ema.lengths as it was; --ema-length computes other lengths after training"
        )


def _fixed_settings(config: bundle.BundleConfig) -> dict[str, Any]:
    """The settings that must not change when a run is resumed."""
    diffusion = config.diffusion.resolve(config.network.in_channels, config.network.input_size)
    return {
        "network": config.network.model_dump(mode="json", exclude={"text_tokens"}),  # it follows from the captions
        "diffusion": diffusion.model_dump(mode="json"),
        "codec": config.codec.kind,
        "classes": ", ".join(config.class_names),
        "adapter": (config.recipe or {}).get("adapter"),
        "text": config.text and config.text.model_dump(mode="json", include={"kind", "vocabulary", "max_tokens"}),
    }


def changed_settings(run: TrainingRun, path: Path) -> list[str]:
    """The settings that differ from the recipe of the checkpoint: these changes are allowed, but they are logged."""
    config, after = bundle.load_config(path), run.recipe.model_dump(mode="json")
    before = config.recipe or {}
    for name in ("codec", "text"):  # copies in the run, in place of what training.init_from had, are no change
        part = getattr(config, name)
        if name in before and part is not None and part.model_dump(mode="json") == after[name]:
            before = before | {name: after[name]}
    return [
        f"{name} was {old}, is {new}"
        for name, old, new in diff(before, after)
        if "absent" not in (old, new) and name != "run_dir"
    ]


def changed_data(run: TrainingRun, path: Path) -> list[str]:
    """How the data differ from those of the checkpoint, and what restores them. Empty if it stores no fingerprint."""
    before, now = checkpoint.read_state(path).data, run.data_fingerprint
    if not before or not now or before == now:
        return []
    if before["samples"] != now["samples"]:
        text = (
            f"the samples of the data ({before['count']:,}, now {now['count']:,}), and with them their order: the "
            "current epoch repeats some and leaves some out. "
        )
    else:
        text = f"the {' and '.join(part for part in ('labels', 'captions') if before[part] != now[part])} of the data. "
    index = index_path(path.parent.parent, before)
    if index.exists() and not getattr(run.recipe.data, "weights", ()):  # an index is one path
        split = " data.split=null" if getattr(run.recipe.data, "split", None) else ""
        text += f"data.path={index}{split} reads the old samples in the old order, where their files still exist"
    return [text.strip()]
