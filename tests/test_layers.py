"""The layers of docs/architecture.md: every import is read with `ast`.

A file imports from lower layers and from its own folder, never from a higher layer or from another folder in the same
layer. Optional libraries are imported only in the folders that wrap them, inside functions.
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

LAYERS = [  # lowest first
    ("errors",),
    ("settings", "files", "randomness", "rows", "times"),
    ("conditioning", "reporting", "runtime", "images", "checkpoint_files", "storage", "launch", "pretrained"),
    ("diffusion", "layers", "encoders", "clips"),
    ("models", "sampling", "codecs"),
    ("model", "acceleration", "adapters", "planning", "data"),
    ("model_card", "adapter_files", "power_ema", "int8_weights"),
    ("bundle",),
    ("generation", "interop"),
    ("evaluation", "monitoring"),
    ("training",),
    ("studies", "serving", "demo"),
    ("cli",),
]
LAYER = {part: number for number, parts in enumerate(LAYERS, start=-1) for part in parts}
ONLY_IN = {"diffusers": {"codecs", "encoders", "interop", "models"}, "transformers": {"encoders"}, "typer": {"cli"}}
ONLY_IN |= {library: {"storage"} for library in ("fsspec", "s3fs", "gcsfs")}
ONLY_IN |= {library: {"serving"} for library in ("fastapi", "starlette", "uvicorn", "prometheus_client")}
ONLY_IN |= {"ray": {"serving", "launch"}, "submitit": {"launch"}}
LAZY = {"diffusers", "transformers", "sklearn", "matplotlib", "jinja2", "scipy", "pyarrow", "datasets", "tensorboard"}
LAZY |= {"torch.utils.tensorboard", "av", "fsspec", "submitit"}
PUBLIC = {name: module.split(".")[1] for name, module in tessera._PUBLIC.items()}
EXEMPT = {"__init__.py", "__main__.py"}  # the table of public names, and `python -m tessera`


@dataclass(frozen=True)
class Import:
    module: str  # dotted and absolute: "tessera.layers.attention", "torch"
    line: int
    eager: bool  # at import time


def imports(source: str, file: str) -> list[Import]:
    """Every import of a file. file: its path in the package."""
    package = ["tessera", *Path(file).parent.parts]

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "tessera":  # from tessera import bundle: the name is a module
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
                yield from visit(child, eager)

    return list(visit(ast.parse(source), True))


def violations(source: str, file: str) -> list[str]:
    """The imports of a file that break the rules."""
    own = Path(file).parts[0].removesuffix(".py")
    if own not in LAYER:
        return [f"{file}: '{own}' is in no layer: add it to LAYERS"]
    messages = set()
    for imported in imports(source, file):
        root, *rest = imported.module.split(".")
        at = f"{file}:{imported.line}"
        if root == "tessera" and rest != ["__version__"]:
            part = rest[0] if rest else ""
            if not part or part in PUBLIC:  # the package itself is above everything that its public names import
                if LAYER[own] <= max(LAYER[public] for public in PUBLIC.values()):
                    messages.add(f"{at}: {own} may not use the public names of tessera: import their modules")
            elif part not in LAYER:
                messages.add(f"{at}: imports 'tessera.{part}', which is in no layer")
            elif part != own and LAYER[part] > LAYER[own]:
                messages.add(f"{at}: {own} (layer {LAYER[own]}) imports {part} from above (layer {LAYER[part]})")
            elif part != own and LAYER[part] == LAYER[own]:
                messages.add(f"{at}: {own} imports {part}, which is in the same layer {LAYER[own]}")
        if root in ONLY_IN and own not in ONLY_IN[root]:
            messages.add(f"{at}: {root} may be imported only in {' and '.join(sorted(ONLY_IN[root]))}")
        if imported.eager and any(imported.module == lazy or imported.module.startswith(lazy + ".") for lazy in LAZY):
            messages.add(f"{at}: {root} must be imported inside a function")
    return sorted(messages)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if file not in EXEMPT])
def test_imports_come_from_lower_layers_or_the_same_folder(file):
    assert violations((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layers/attention.py", "from tessera.models.dit import DiT"),
        ("layers/attention.py", "from tessera.diffusion.process import expand"),
        ("models/dit.py", "from tessera import sampling"),
        ("models/dit.py", "from ..sampling import sample_loop"),
        ("models/dit.py", "def f():\n    import tessera.generation.pipeline"),
        ("models/dit.py", "from tessera import generate"),
        ("models/dit.py", "import tessera"),
        ("models/dit.py", "def f():\n    import transformers"),
        ("sampling/ddim.py", "def f():\n    from diffusers import DDIMScheduler"),
        ("interop/diffusers.py", "from diffusers import DiTTransformer2DModel"),
        ("codecs/autoencoder.py", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
        ("training/loop.py", "from torch.utils import tensorboard"),
        ("training/loop.py", "import torch.utils.tensorboard"),
        ("training/loop.py", "import typer"),
        ("files.py", "import tessera.settings"),
        ("novelty.py", "import torch"),
    ],
)
def test_violations_are_found(file, source):
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/dit.py", "from tessera.models.blocks import Context\nfrom .presets import PRESETS\nimport torch"),
        ("settings.py", "from tessera.errors import TesseraError"),
        ("interop/diffusers.py", "def f():\n    from diffusers import DiTTransformer2DModel"),
        ("codecs/autoencoder.py", "if TYPE_CHECKING:\n    from diffusers import AutoencoderKL"),
        ("cli/train.py", "import typer\ndef f():\n    from tessera.training import loop"),
        ("bundle.py", "from tessera import __version__"),
        ("studies/worker.py", "import tessera\nfrom tessera import generate"),
    ],
)
def test_allowed_imports(file, source):
    assert violations(source, file) == []


def _loaded_by(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after running code."""
    code = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_the_package_and_its_command_import_nothing_slow():
    assert not _loaded_by("import tessera, tessera.cli") & {"torch", "pydantic", "numpy", *LAZY}


def test_the_core_imports_no_optional_library():
    loaded = _loaded_by("import tessera.generation, tessera.bundle, tessera.images")
    assert "torch" in loaded
    assert not loaded & LAZY


def test_unknown_public_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        tessera.generat  # noqa: B018


@pytest.mark.parametrize("name", tessera.__all__)
def test_public_names_exist(name):
    assert getattr(tessera, name).__name__ == name
