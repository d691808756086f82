"""`tessera serve`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import (
    EMA,
    Adapters,
    AnyBase,
    CheckpointType,
    Codec,
    Device,
    EMALength,
    NumClasses,
    NumHeads,
    TextEncoder,
)
from tessera.errors import TesseraError


def check_installed(with_ray: bool = False) -> None:
    """Raise TesseraError if a library of the server is missing."""
    needed = {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve", "multipart": "serve"}
    needed |= {"ray": "ray"} if with_ray else {}
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise TesseraError(f"`tessera serve` needs {missing[0]}: pip install 'tessera[{needed[missing[0]]}]'")


def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL...", help="bundles, runs, official .pt files, diffusers folders, or names"
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port; the address is printed")] = 7860,
    host: Annotated[str, typer.Option(help="any address but the loopback address needs --keys")] = "127.0.0.1",
    out: Annotated[Path, typer.Option(help="the folder for jobs and their images")] = Path("served"),
    runs: Annotated[Path | None, typer.Option(help="a folder with training runs, which the page shows")] = None,
    keys: Annotated[Path | None, typer.Option(help="a file with a line 'client key' for each client")] = None,
    without_keys: Annotated[bool, typer.Option("--without-keys", help="let in everyone who can reach --host")] = False,
    max_loaded: Annotated[int, typer.Option(min=1, help="models in memory; others are loaded when needed")] = 2,
    max_queue: Annotated[int, typer.Option(min=1, help="queued and running jobs; others are refused with 429")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="largest body of a request, in MiB")] = 16,
    max_cost: Annotated[float, typer.Option(min=1, help="largest cost of a job: images x steps x pixels")] = 2e9,
    call_seconds: Annotated[
        float,
        typer.Option(min=0.001, help="target for one network call; longer: more throughput, but later previews"),
    ] = 0.5,
    max_rows: Annotated[int, typer.Option(min=1, help="rows in one network call; guided ones count twice")] = 64,
    rows_per_call: Annotated[
        int | None,
        typer.Option(min=1, help="pad every call to this many rows: equal bits whatever else is in the call"),
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="time for accepted jobs after SIGTERM")] = 30.0,
    open_page: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="several processes or machines, with Ray Serve")] = None,
    device: Device = "auto",
    adapter: Adapters = None,
    any_base: AnyBase = False,
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
) -> None:
    """Serve models over HTTP, with a page for the browser.

    The server has OpenAI's interface for images, and /v1/jobs for everything that `tessera sample` can do. Requests of
    all clients share network calls, whatever their settings. After Ctrl-C or SIGTERM, accepted jobs are finished first.

    \b
    Example:
      tessera serve runs/mine --open
    """
    check_installed(with_ray=replicas is not None)
    if not model and runs is None:
        raise TesseraError("no model to serve: give at least one, or a folder of runs to look at with --runs")
    from tessera.serving.admission import Limits
    from tessera.serving.gate import read_keys
    from tessera.serving.models import parse_models
    from tessera.serving.server import ServerOptions, log_json, run
    from tessera.serving.service import Service, ServiceOptions

    clients = {} if keys is None else read_keys(keys)
    model_options = {
        "device": device,
        "adapters": adapter or [],
        "any_base": any_base,
        "ema": ema,
        "ema_length": ema_length,
        "checkpoint_type": checkpoint_type,
        "num_heads": num_heads,
        "num_classes": num_classes,
        "codec": codec,
        "text_encoder": text_encoder,
    }
    options = ServiceOptions(
        out,
        Limits(
            max_body_bytes=max_body * 2**20, max_job_cost=max_cost, max_queue_cost=10 * max_cost, max_queue=max_queue
        ),
        max_loaded,
        call_seconds,
        max_rows,
        rows_per_call,
        private=bool(clients),
    )
    server = ServerOptions(host, port, drain_seconds, without_keys, runs, open_page)
    log_json()
    if replicas is not None:
        from tessera.serving import ray_deployment

        if runs is not None or open_page:
            raise TesseraError("--replicas serve no page with runs: leave out --runs and --open")
        names = model or []
        parse_models(names, **model_options)  # reports what is wrong here, not in a replica
        ray_deployment.run(ray_deployment.Deployment(names, options, server, clients, model_options), replicas)
        return
    run(Service(parse_models(model or [], **model_options), options), server, clients)
