"""What the command line prints about errors that no message was written for, and what it does not print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessera import cli


@pytest.fixture
def failing(monkeypatch, capsys, tmp_path):
    """Run a command that raises an error, and return the exit code and stderr. Temporary files are in tmp_path."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TESSERA_DEBUG", raising=False)

    def run(error: BaseException) -> tuple[int, str]:
        def command() -> None:
            raise error

        monkeypatch.setattr(cli, "app", command)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError: division by zero"),
        (RuntimeError("several\n\n  lines\n" + "long " * 1000), "unexpected RuntimeError: several lines long long"),
        (KeyError("kéy\udce9"), "unexpected KeyError"),
        (RecursionError(), "unexpected RecursionError"),
        (MemoryError(), "unexpected MemoryError"),
        (
            ExceptionGroup("two", [ValueError("a"), ValueError("b")]),
            "unexpected ExceptionGroup: two (2 sub-exceptions)",
        ),
    ],
)
def test_an_unexpected_error_is_one_sentence_with_the_place_of_the_traceback(failing, tmp_path, error, words):
    code, err = failing(error)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {words}")
    assert len(err) < 800
    path = re.search(r"; the traceback is in (\S+), and TESSERA_DEBUG=1 prints it$", err).group(1)
    stored = Path(path).read_text(encoding="utf-8")
    assert Path(path).parent == tmp_path
    assert "Traceback (most recent call last)" in stored
    assert type(error).__name__ in stored


def test_without_a_place_for_the_traceback_there_is_still_a_sentence(failing, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert failing(ValueError("x")) == (1, "error: unexpected ValueError: x; TESSERA_DEBUG=1 prints the traceback\n")


def test_for_debugging_the_error_is_raised(failing, monkeypatch):
    monkeypatch.setenv("TESSERA_DEBUG", "1")
    with pytest.raises(ValueError, match="x"):
        failing(ValueError("x"))


def test_ctrl_c_and_files_that_cannot_be_read(failing, monkeypatch):
    assert failing(KeyboardInterrupt()) == (130, "interrupted\n")
    assert failing(PermissionError(13, "Permission denied", "a.txt")) == (
        1, "error: cannot read or write a.txt: Permission denied\n",
    )  # fmt: skip
    monkeypatch.setenv("RANK", "3")
    code, err = failing(ValueError("x"))
    assert (code, err.startswith("rank 3: error: unexpected ValueError: x; the traceback")) == (1, True)


def test_warnings_of_pillow_are_not_printed(environment):
    program = """
import logging, sys, warnings
from tessera import cli
def command():
    warnings.warn_explicit("corrupt EXIF", UserWarning, "Image.py", 1, module="PIL.Image")
    logging.getLogger("PIL.TiffImagePlugin").warning("more samples than expected")
    warnings.warn_explicit("of us", UserWarning, "x.py", 1, module="tessera.x")
cli.app = command
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == f"x.py:1: UserWarning: of us{os.linesep}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["study"], "settings of the study: budget.steps=500"),
        (["train"], "settings of the recipe"),
        (["sample"], "can be divided: among the ranks of torchrun"),
        (["evaluate", "score"], "can be divided: among the ranks of torchrun"),
    ],
)
def test_help(tessera, words, expected):
    assert expected in " ".join(tessera(*words, "--help").out.split())
