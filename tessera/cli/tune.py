"""`tessera tune`: settings that draw as well in less time, found by measuring and written into the model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import Codec, Device, Heads, ModelPath, Precision, ReadAs, progress
from tessera.errors import TesseraError


def tune(
    model: ModelPath,
    reference: Annotated[str | None, typer.Option(help="data or statistics (what the model was trained on)")] = None,
    features: Annotated[str | None, typer.Option(help="as in `tessera evaluate` (by the data)")] = None,
    count: Annotated[int, typer.Option(help="pictures of a trial; the check on fresh seeds takes twice as many")] = 500,
    budget: Annotated[float, typer.Option(help="minutes, about")] = 15,
    choose: Annotated[
        str, typer.Option(help="fastest-equal (fastest that is no worse), best (lowest fd) or none (write nothing)")
    ] = "fastest-equal",
    margin: Annotated[float, typer.Option(help="no worse: within chance, and at most this share above")] = 0.05,
    search: Annotated[str, typer.Option(help="what may change")] = "solver,steps,guidance,caching",
    baseline: Annotated[
        str | None, typer.Option(help="as in 'sampler=ancestral steps=250' (the model's own settings)")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 50,
    precision: Precision = "float32",
    device: Device = "auto",
    read_as: ReadAs = None,
    heads: Heads = None,
    codec: Codec = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for everything (RUN/tune/CHECKPOINT, or tune-NAME beside it)")
    ] = None,
    save_to: Annotated[Path | None, typer.Option(help="a new bundle for the settings, instead of the model")] = None,
) -> None:
    """Search solver, grid, steps, guidance and caching; keep what is fastest at equal quality as the model's own.

    Trials are compared with the model's present settings by fd, on the same seeds; finalists again on fresh ones.
    Interrupted, or out of time? The same command goes on.
    """
    from tessera import runtime
    from tessera.evaluation import suite
    from tessera.evaluation.features import extractor
    from tessera.evaluation.reference import check_word
    from tessera.interop import load
    from tessera.settings import validate
    from tessera.studies.tuning import result
    from tessera.studies.tuning import tuner as study

    asked = {"count": count, "budget": budget, "choose": choose, "margin": margin, "batch": batch}
    asked |= {"search": [name.strip() for name in search.split(",") if name.strip()], "precision": precision}
    tuning = validate(
        study.Tuning, asked, "what --count, --budget, --choose, --margin, --search or --precision asks for"
    )
    path = Path(model).expanduser()
    if path.exists() and not load.is_model(path):
        raise TesseraError(f"{model} is no model that Tessera knows: {load.ACCEPTED}")
    home = result.home(path)
    if save_to is not None and save_to.exists():
        raise TesseraError(f"--save-to {save_to} exists already: remove it or give another name")
    writes = choose != "none"
    if path.exists() and home is None and save_to is None and writes:
        raise TesseraError(
            f"{model} is no bundle and no run, so settings cannot be written into it: give --save-to FOLDER for a "
            "bundle that has them, or --choose none"
        )
    loaded = load.load(home or path, device=device, read_as=read_as, heads=heads, codec=codec)
    compared_with = reference or suite.trained_on(loaded)
    if isinstance(compared_with, str):
        check_word(compared_with)
    network = extractor(features or suite.usual_features(compared_with), runtime.choose_device(device))
    folder = out or result.folder_for(path)
    with progress() as begin:
        told = study.Tuner(loaded, compared_with, network, folder, tuning, (baseline or "").split(), _say, begin)
        done = told.run()
    result.plot(done, folder / result.PLOT)
    print(result.page(done))
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"all trials in {folder / study.RESULTS}, plotted in {folder / result.PLOT}")
    if done.chosen is None:
        return
    said = result.note(done)
    if save_to is not None:
        result.save(loaded, save_to, done.chosen.sampling, said)
        print(f"wrote {save_to}: it draws with {done.chosen.name}")
        return
    assert home is not None
    result.record(home, done.chosen.sampling, said, loaded.network)
    print(f"wrote into {home}: it draws with {done.chosen.name}")
    if home != path:
        print("later checkpoints of this run begin with the recipe's settings: set `sampling` there, or tune again")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
