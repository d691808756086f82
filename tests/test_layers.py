"""The floors of docs/architecture.md, held by reading every import with `ast`.

A file imports from lower floors and from its own folder; never from a higher floor, never from another part on the
same floor. Third-party libraries that not everyone installs stay in the parts that wrap them, inside functions.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tessera

PACKAGE = Path(__file__).parents[1] / "tessera"

LAYERS = [  # the lowest first
    ("errors",),
    ("settings", "files"),
    ("conditioning", "reporting", "runtime", "randomness", "images", "checkpoint_files"),
    ("diffusion", "layers", "encoders"),
    ("models", "sampling", "codecs"),
    ("model", "acceleration", "adapters", "planning", "data"),
    ("model_card",),
    ("bundle",),
    ("generation", "interop"),
    ("evaluation", "monitoring"),
    ("training",),
    ("studies", "serving", "demo"),
    ("cli",),
]
LAYER = {part: number for number, parts in enumerate(LAYERS, start=-1) for part in parts}
ONLY_IN = {"diffusers": {"codecs", "interop"}, "transformers": {"encoders"}, "typer": {"cli"}}
LAZY = {"diffusers", "transformers", "sklearn", "matplotlib", "pyarrow", "datasets", "tensorboard"}
LAZY |= {"torch.utils.tensorboard"}
PUBLIC = {name: module.split(".")[1] for name, module in tessera._PUBLIC.items()}
EXEMPT = {"__init__.py", "__main__.py"}  # of the package itself: its table of public names, and `python -m`


@dataclass(frozen=True)
class Import:
    module: str  # dotted and absolute: "tessera.layers.attention", "torch"
    line: int
    eager: bool  # runs when the file is imported


def imports(source: str, file: str) -> list[Import]:
    """Every import of a file that stands at `file`, relative to the package."""
    package = ["tessera", *Path(file).parent.parts]

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "tessera":  # from tessera import bundle: the name is the part
                yield from (Import(f"tessera.{alias.name}", node.lineno, eager) for alias in node.names)
            else:
                yield Import(module, node.lineno, eager)
                yield from (Import(f"{module}.{alias.name}", node.lineno, eager) for alias in node.names)
        else:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                eager = False
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                eager = False
            for child in ast.iter_child_nodes(node):
                yield from walk(child, eager)

    return list(walk(ast.parse(source), True))


def faults(source: str, file: str) -> list[str]:
    """What a file imports against the rules."""
    own = Path(file).parts[0].removesuffix(".py")
    if own not in LAYER:
        return [f"{file}: '{own}' stands on no floor; give it one in LAYERS"]
    found = set()
    for told in imports(source, file):
        root, *rest = told.module.split(".")
        at = f"{file}:{told.line}"
        if root == "tessera" and rest != ["__version__"]:
            part = rest[0] if rest else ""
            if not part or part in PUBLIC:  # the package itself: whoever stands above all that it names
                if LAYER[own] <= max(LAYER[named] for named in PUBLIC.values()):
                    found.add(f"{at}: {own} may not use tessera's public names: import the part that is meant")
            elif part not in LAYER:
                found.add(f"{at}: imports 'tessera.{part}', which is no part on a floor")
            elif part != own and LAYER[part] > LAYER[own]:
                found.add(f"{at}: {own} (floor {LAYER[own]}) imports {part} from above (floor {LAYER[part]})")
            elif part != own and LAYER[part] == LAYER[own]:
                found.add(f"{at}: {own} imports {part}, its neighbour on floor {LAYER[own]}")
        if root in ONLY_IN and own not in ONLY_IN[root]:
            found.add(f"{at}: {root} may be imported only in {' and '.join(sorted(ONLY_IN[root]))}")
        if told.eager and any(told.module == lazy or told.module.startswith(lazy + ".") for lazy in LAZY):
            found.add(f"{at}: {root} must be imported inside a function")
    return sorted(found)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if file not in EXEMPT])
def test_a_file_imports_only_from_below_and_from_its_own_folder(file):
    assert faults((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layers/attention.py", "from tessera.models.dit import DiT"),
        ("layers/attention.py", "from tessera.diffusion.prediction import expand"),
        ("models/dit.py", "from tessera import sampling"),
        ("models/dit.py", "from ..sampling import walk"),
        ("models/dit.py", "def f():\n    import tessera.generation.pipeline"),
        ("models/dit.py", "from tessera import generate"),
        ("models/dit.py", "import tessera"),
        ("models/dit.py", "def f():\n    import transformers"),
        ("models/dit.py", "def f():\n    from diffusers import DDIMScheduler"),
        ("interop/diffusers.py", "from diffusers import DiTTransformer2DModel"),
        ("codecs/autoencoder.py", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
        ("training/loop.py", "from torch.utils import tensorboard"),
        ("training/loop.py", "import torch.utils.tensorboard"),
        ("training/loop.py", "import typer"),
        ("files.py", "import tessera.settings"),
        ("novelty.py", "import torch"),
    ],
)
def test_the_rules_find_a_fault(file, source):
    assert len(faults(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/dit.py", "from tessera.models.blocks import Context\nfrom .presets import PRESETS\nimport torch"),
        ("settings.py", "from tessera.errors import TesseraError"),
        ("interop/diffusers.py", "def f():\n    from diffusers import DiTTransformer2DModel"),
        ("codecs/autoencoder.py", "if TYPE_CHECKING:\n    from diffusers import AutoencoderKL"),
        ("cli.py", "import typer\ndef f():\n    from tessera.training import loop"),
        ("bundle.py", "from tessera import __version__"),
        ("studies/worker.py", "import tessera\nfrom tessera import generate"),
    ],
)
def test_the_rules_allow_what_is_right(file, source):
    assert faults(source, file) == []


def _loaded_by(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after running code."""
    asked = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", asked], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_and_its_command_import_nothing_slow():
    code = "import tessera" + ("\nimport tessera.cli" if (PACKAGE / "cli.py").exists() else "")
    assert not _loaded_by(code) & {"torch", "pydantic", "numpy", *LAZY}


def test_the_core_imports_no_extra():
    loaded = _loaded_by("import tessera.generation.pipeline, tessera.bundle, tessera.images")
    assert "torch" in loaded
    assert not loaded & LAZY


def test_unknown_public_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        tessera.generat  # noqa: B018


@pytest.mark.parametrize("name", tessera.__all__)
def test_public_names_are_found(name):
    assert getattr(tessera, name).__name__ == name
