"""Fixtures for tests of other programs' files."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a class of diffusers, or of PixArt. Tests must not change it."""
    functions = runpy.run_path(str(Path(__file__).with_name("diffusers_pipelines.py")))
    pipelines = functions["PIPELINES"] | {"PixArtTransformer2DModel": functions["pixart"]}
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pipeline"
            pipelines[name]().save_pretrained(made[name])
        return made[name]

    return folder
