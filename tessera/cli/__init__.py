"""The command line. Each command imports what it needs when it runs, so `tessera --help` imports neither torch nor
pydantic."""

import logging
import os
import sys
import tempfile
import traceback
import warnings
from typing import Annotated

import typer

from tessera import __version__
from tessera.cli import codec, data, evaluate
from tessera.cli.classes import classes
from tessera.cli.convert import convert
from tessera.cli.demo import demo
from tessera.cli.distill import distill
from tessera.cli.doctor import doctor
from tessera.cli.info import info
from tessera.cli.models import models
from tessera.cli.plan import plan
from tessera.cli.report import report
from tessera.cli.sample import sample
from tessera.cli.serve import serve
from tessera.cli.study import study
from tessera.cli.train import train
from tessera.cli.tune import tune
from tessera.errors import Interrupted, TesseraError
from tessera.launch.task import exit_with_parent

START = """tessera: diffusion transformers

  see what it does        tessera demo
  train on your images    tessera train recipes/modern.yaml data.path=my-images --dry-run
  sample from a model     tessera sample emoji --prompt "smiling cat" --seeds 0-3
  work in the browser     tessera serve emoji --open

tessera --help lists all commands, and tessera COMMAND --help has examples of each."""

app = typer.Typer(
    name="tessera",
    help="Diffusion transformers: data, training, sampling, evaluation, serving.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (demo, models, train, distill, sample, serve, convert, classes, info, report, doctor, plan, tune, study)
for _command in COMMANDS:
    app.command()(_command)
for _group in (data, codec, evaluate):
    app.add_typer(_group.app, name=_group.__name__.rpartition(".")[2])


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(START)


def main() -> None:
    """Run a command. An error is one message on stderr and a non-zero exit code."""
    rank = os.environ.get("RANK", "0")  # of torchrun
    prefix = "error: " if rank == "0" else f"rank {rank}: error: "
    code = 1
    exit_with_parent()
    # `tessera data check` reports what is odd about an image; Pillow's own lines on stderr do not name the file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        app()
        return
    except TesseraError as error:
        code = error.exit_code
        if not isinstance(error, Interrupted):
            print(f"{prefix}{error}", file=sys.stderr)
        elif rank == "0":  # all ranks stop, one reports it
            print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        pass
    except OSError as error:
        path = f" {error.filename}" if error.filename else ""
        print(f"{prefix}cannot read or write{path}: {error.strerror or error}", file=sys.stderr)
    except Exception as error:
        if os.environ.get("TESSERA_DEBUG"):
            raise
        print(f"{prefix}{_report_unexpected(error)}", file=sys.stderr)
    sys.exit(code)


def _report_unexpected(error: Exception) -> str:
    """One sentence about an error that no message was written for. The traceback is stored in a file."""
    message = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}".rstrip(": ")
    try:
        with tempfile.NamedTemporaryFile("w", prefix="tessera-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode())
    except OSError:  # the disk is full
        return f"{message}; TESSERA_DEBUG=1 prints the traceback"
    return f"{message}; the traceback is in {file.name}, and TESSERA_DEBUG=1 prints it"
