"""`tessera tune`."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import (
    Adapters,
    AnyBase,
    CheckpointType,
    Codec,
    Device,
    Features,
    ModelPath,
    NumClasses,
    NumHeads,
    Precision,
    TextEncoder,
    print_error,
    progress,
)
from tessera.errors import TesseraError


def tune(
    model: ModelPath,
    baseline: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="sampling settings of the baseline, instead of the model's own: num_steps=250",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="data or statistics (default: the training data of the model)")
    ] = None,
    features: Features = None,
    num_samples: Annotated[
        int, typer.Option(help="samples per trial, at least 50; twice as many in the final comparison")
    ] = 500,
    budget: Annotated[float, typer.Option(help="minutes, approximately")] = 15,
    select: Annotated[
        str, typer.Option(help="fastest-equal (fastest that is not worse), best (lowest fd) or none (write nothing)")
    ] = "fastest-equal",
    tolerance: Annotated[
        float, typer.Option(help="not worse: no significant difference, and fd at most this fraction higher")
    ] = 0.05,
    search: Annotated[str, typer.Option(help="what may change")] = "solver,steps,guidance,caching",
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    precision: Precision = "float32",
    device: Device = "auto",
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for all results (default: RUN/tune/CHECKPOINT, or tune-NAME beside the model)"),
    ] = None,
    save_to: Annotated[Path | None, typer.Option(help="write a new bundle instead of changing the model")] = None,
) -> None:
    """Search for the fastest sampling settings of equal quality.

    It varies solver, timestep grid, steps, guidance and caching, and writes the best settings into the model.

    Each trial is compared with the baseline by fd on the same seeds, and the finalists again on new seeds. To resume
    after an interruption, or to continue the search, repeat the command.

    \b
    Example:
      tessera tune runs/mine --budget 15
    """
    from tessera import pretrained, runtime
    from tessera.evaluation import suite
    from tessera.evaluation.features import load_extractor
    from tessera.evaluation.reference import check_reference
    from tessera.interop import load
    from tessera.interop.adapters import AdapterSpec
    from tessera.settings import validate
    from tessera.studies.tuning import result, tuner

    settings = {
        "num_samples": num_samples,
        "budget": budget,
        "select": select,
        "tolerance": tolerance,
        "search": [name.strip() for name in search.split(",") if name.strip()],
        "batch_size": batch_size,
        "precision": precision,
    }
    tuning = validate(tuner.TuningConfig, settings, "the command line")
    if pretrained.find(model) is not None and save_to is None and select != "none":
        raise TesseraError(f"{model} comes with Tessera and is not changed: give --save-to FOLDER, or --select none")
    path = Path(model).expanduser()
    if path.exists() and not load.is_model(path):
        raise TesseraError(f"{model} is not a model that Tessera can read: {load.ACCEPTED}")
    home = result.find_bundle(path)
    if save_to is not None and save_to.exists():
        raise TesseraError(f"--save-to {save_to} exists already: remove it or give another name")
    if adapter and save_to is None and select != "none":
        raise TesseraError(
            "the settings found for a model with adapters are not written into the model without them: give --save-to "
            "FOLDER for a new bundle with the adapters, or --select none"
        )
    if path.exists() and home is None and save_to is None and select != "none":
        raise TesseraError(
            f"{model} is neither a bundle nor a run, so it cannot hold settings: give --save-to FOLDER for a new "
            "bundle, or --select none"
        )
    specs = [AdapterSpec.parse(text) for text in adapter or ()]
    loaded = load.load(
        home or path,
        device=device,
        checkpoint_type=checkpoint_type,
        num_heads=num_heads,
        num_classes=num_classes,
        codec=codec,
        text_encoder=text_encoder,
        adapters=specs,
        any_base=any_base,
    )
    data = reference or suite.training_data(loaded)
    if isinstance(data, str):
        check_reference(data)
    extractor = load_extractor(features or suite.default_features(data), runtime.choose_device(device))
    default = result.default_folder(path)
    folder = out or default.with_name("+".join([default.name, *(spec.label for spec in specs)]))
    with progress() as start:
        outcome = tuner.Tuner(loaded, data, extractor, folder, tuning, baseline, print_error, start).run()
    result.plot(outcome, folder / result.PLOT)
    print(result.format_result(outcome))
    for note in outcome.notes:
        print_error(f"note: {note}")
    print(f"all trials in {folder / tuner.RESULTS}, plotted in {folder / result.PLOT}")
    if outcome.chosen is None:
        return
    provenance = result.provenance_text(outcome)
    if save_to is not None:
        result.save_bundle(loaded, save_to, outcome.chosen.sampling, provenance)
        print(f"wrote {save_to} with {outcome.chosen.name}")
        return
    assert home is not None
    result.write_settings(home, outcome.chosen.sampling, provenance, loaded.network)
    print(f"wrote {outcome.chosen.name} into {home}")
    if home != path:
        print("later checkpoints of this run use the recipe's settings: change `sampling` there, or tune again")
