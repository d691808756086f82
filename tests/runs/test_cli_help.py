"""The first things that a new user sees: `tessera` alone, the help of each command, `tessera doctor --system`."""

import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tessera import cli
from tessera.monitoring import system

PROJECT = Path(__file__).parents[2]


def commands(group: Any, name: str = "tessera") -> Iterator[tuple[str, Any]]:
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


ROOT = typer.main.get_command(cli.app)
COMMANDS = dict(commands(ROOT))


def parse(line: str) -> str:
    """The name of the command that a line calls. Raises click's error if its arguments or options are not valid."""
    words = shlex.split(line)
    name, command = words.pop(0), ROOT
    while hasattr(command, "commands"):
        if name == "tessera evaluate" and words[0] not in command.commands:
            words = ["score", *words]
        name, command = f"{name} {words[0]}", command.commands[words.pop(0)]
    command.make_context(name, words)
    return name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_examples_that_it_accepts(name):
    text = COMMANDS[name].help
    examples = text.partition("\b\n")[2].splitlines()[1:]
    assert examples
    for line in examples:
        assert parse(line.strip()) == name


def test_the_first_sentence_of_each_command_fits_the_list(tessera):
    lines = tessera("--help").out.partition("Commands:\n")[2].splitlines()
    assert len(lines) == len(ROOT.commands)
    assert not [line for line in lines if line.endswith("...") or len(line) > 80]


def test_without_arguments_four_commands_are_shown(tessera):
    done = tessera()
    assert done.code == 0
    examples = [line[line.index("tessera ") :] for line in done.out.splitlines() if line.startswith("  ")]
    assert [parse(line).split()[1] for line in examples] == ["demo", "train", "sample", "serve"]


def test_shell_completion_offers_the_commands():
    environment = {"_TESSERA_COMPLETE": "complete_bash", "COMP_WORDS": "tessera dis", "COMP_CWORD": "1"}
    program = "from tessera.cli import app; app(prog_name='tessera')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["distill"], done.stderr


def test_the_system_is_described(tessera):
    done = tessera("doctor", "--system")
    assert done.code == 0
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line.startswith("  "))
    assert rows["tessera"] == cli.__version__
    assert rows["cpu"].startswith("works: float32")
    assert rows["demo"].startswith("installed")


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(system, "EXTRAS", {"video": ("videos", ["av", "no_such_module.at_all"])})
    assert system.describe_system().split()[-6:] == [
        "video",
        "missing",
        "videos:",
        "pip",
        "install",
        "'tessera[video]'",
    ]


def test_a_device_that_computes_wrong_numbers_is_reported(monkeypatch):
    monkeypatch.setattr(system.torch.Tensor, "cpu", lambda tensor: tensor + 1)
    assert "does not work: Tensor-likes are not close" in system.describe_system()


def test_all_extras_are_described():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert system.EXTRAS.keys() == extras.keys() - {"all", "dev"}


@pytest.mark.parametrize(
    ("words", "message"), [([], "give the folder of a run, or --system"), (["x", "--system"], "leave out the run")]
)
def test_what_cannot_be_diagnosed(tessera, words, message):
    done = tessera("doctor", *words)
    assert done.code == 1
    assert message in done.err
