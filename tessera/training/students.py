"""The recipe of a student: see `tessera.training.distillation`."""

from collections.abc import Sequence
from typing import Any

from tessera import bundle
from tessera.diffusion import FlowMatchingConfig
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.model import Model
from tessera.models.dit import DiTConfig
from tessera.sampling import Jump, SamplingConfig
from tessera.settings import validate
from tessera.training.distillation import DistillationConfig, Teacher, check_teacher
from tessera.training.recipe import Recipe, read_recipe

SHARE = 0.13  # of the teacher's steps: a step of distillation costs about 1.9 of its steps, so a quarter of its FLOPs
RATE = 0.25  # of the teacher's learning rates: half of them was stable, too (benchmarks/few_steps.md)
LEFT_OUT = ("run_dir", "network", "codec", "text", "sampling", "adapter", "diffusion")  # taken from the teacher
KEPT = ("global_batch_size", "micro_batch_size", "seed", "device", "num_workers", "stability")


def load_teacher(config: DistillationConfig) -> Teacher:
    """The teacher of a recipe. Raises TesseraError if it cannot be distilled, or is not the one of an earlier start."""
    model = load.load(config.teacher, "cpu")
    sampling = config.sampling(model.config.sampling)
    check_teacher(model, sampling, config.teacher)
    digest = bundle.weights_hash(model.network)
    if config.teacher_hash not in (None, digest):
        raise TesseraError(
            f"{config.teacher} has other weights ({digest}) than the teacher that this run began with "
            f"({config.teacher_hash}): give that one, or begin a new run"
        )
    model.network.eval().requires_grad_(False)
    return Teacher(model, sampling)


def student_recipe(recipe: Recipe, teacher: Teacher) -> Recipe:
    """The recipe with what it leaves out and a student needs: its own sampling, and no dropped conditions."""
    training, distillation = recipe.training, recipe.training.distillation
    assert distillation is not None
    digest = bundle.weights_hash(teacher.model.network)
    defaults: dict[str, Any] = {"condition_dropout": 0.0, "precision": "float32"}
    changes = {name: value for name, value in defaults.items() if name not in training.model_fields_set}
    changes["distillation"] = distillation.model_copy(update={"teacher_hash": digest})
    sections: dict[str, Any] = {"training": training.model_copy(update=changes)}
    if isinstance(recipe.network, DiTConfig):
        sections["network"] = recipe.network.model_copy(update={"step_size_embedding": True})
    settings = {name: getattr(recipe.sampling, name) for name in recipe.sampling.model_fields_set}
    sections["sampling"] = few_steps(teacher.model).model_copy(update=settings)
    if "diffusion" not in recipe.model_fields_set and not is_linear_flow(teacher.model.config.diffusion):
        sections["diffusion"] = FlowMatchingConfig()
    return recipe.model_copy(update=sections)


def check_student(recipe: Recipe) -> None:
    """Raise TesseraError for settings that a student cannot have."""
    network, config = recipe.network, recipe.training.distillation
    assert config is not None
    if not isinstance(network, DiTConfig) or recipe.adapter is not None:
        kind = network.display_name if recipe.adapter is None else "adapter"
        raise TesseraError(f"distillation trains all weights of a DiT, and this is a {kind}")
    if recipe.training.condition_dropout or recipe.training.field_dropout:
        raise TesseraError(
            "the guidance of the teacher is in the student's targets, so no condition may be dropped: set "
            "training.condition_dropout=0 and leave field_dropout out"
        )
    if not is_linear_flow(recipe.diffusion):
        raise TesseraError(
            "the average velocity is learned by flow matching on a linear path, and this is "
            f"{recipe.diffusion.summary()}: leave diffusion: out (the teacher may have another process)"
        )
    if recipe.sampling.guidance_scale != 1:
        raise TesseraError(
            "the guidance of the teacher is in the student: set sampling.guidance_scale=1, and that of the teacher "
            "with training.distillation.guidance_scale"
        )
    config.target.check(recipe.sampling)


def check_student_classes(teacher: Teacher, class_names: Sequence[str]) -> None:
    """Raise TesseraError unless the numbers of the classes in the data mean the same to the teacher."""
    config = teacher.model.config
    names, count = config.class_names, config.network.num_classes
    if count and (tuple(class_names) != names if names else len(class_names) != count):
        first = next((name for name, own in zip(class_names, names) if name != own), None)
        raise TesseraError(
            f"the teacher has {count} classes, and the data {len(class_names)}"
            + ("" if first is None else f", of which '{first}' has another number in the teacher or is not in it")
            + ": a student learns the teacher's classes, so train it on data with the same ones"
        )


def distillation_recipe(model: str, run_dir: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that distills a model, from the recipe that it was trained with. Raises TesseraError."""
    teacher = load.load(model, "cpu")
    source = teacher.config.recipe
    if source is None:
        raise TesseraError(
            f"{model} does not say what it was trained on: write a recipe with data: and "
            "training.distillation.teacher=MODEL (recipes/distill.yaml), and train it"
        )
    training = {name: value for name, value in source["training"].items() if name in KEPT}
    steps = teacher.config.provenance.steps if teacher.config.provenance else None
    steps = max(1, round(SHARE * (steps or source["training"]["steps"])))
    optimizer = dict(source["training"]["optimizer"])
    for name in ("learning_rate", "adamw_learning_rate"):
        if optimizer.get(name) is not None:
            optimizer[name] *= RATE
    training |= {
        "optimizer": optimizer,
        "steps": steps,
        "ema": _from_first_step(source["training"]["ema"]),
        "distillation": {"teacher": model},
        "sample_every": steps,
        "checkpoint_every": max(1, steps // 4),
        "health_every": max(1, steps // 4),
    }
    data = {name: value for name, value in source.items() if name not in LEFT_OUT}
    data |= {"run_dir": run_dir, "training": training}
    return read_recipe(data, overrides)


def _from_first_step(ema: dict[str, Any]) -> dict[str, Any]:
    """The averages of a teacher for a shorter run: power functions follow its length, exponential ones need warm-up."""
    return ema if ema.get("kind") == "power" else {**ema, "warmup": True}


def few_steps(model: Model) -> SamplingConfig:
    """The sampling settings of a student, with all that does not concern steps and guidance as in those of a model."""
    settings: dict[str, Any] = {
        name: value for name, value in model.config.sampling.model_dump().items() if name in ("clipping", "null_text")
    }
    return validate(SamplingConfig, {**settings, "sampler": Jump().model_dump(), "num_steps": 2}, "sampling")


def is_linear_flow(diffusion: Any) -> bool:
    """Whether a network's raw output is the velocity eps - x0 of flow matching on a linear path."""
    is_linear = isinstance(diffusion, FlowMatchingConfig) and diffusion.path == "linear"
    return is_linear and diffusion.prediction == diffusion.loss == "velocity"
