"""The guide's pages: their code blocks, figures and notebooks.

    python docs/guide.py figures                  # run the chapters and write docs/figures/guide/
    python docs/guide.py notebooks --out FOLDER   # a notebook of each chapter, in English and in Chinese
    python docs/guide.py outputs [PAGE...]        # run the chapters and write what each block prints below it
    python docs/guide.py sync                     # copy the code and its outputs to the Chinese pages

A chapter's code saves its figures in the working directory, so these commands run it in a temporary folder. Blocks of
the Chinese chapters are those of the English ones (`tests/test_guide.py`).
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures" / "guide"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^```output\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)


def chapters(language: str = "en") -> list[Path]:
    """The pages of the guide with code, in order. language: en or zh"""
    folder = DOCS / "guide" if language == "en" else DOCS / language / "guide"
    return sorted(folder.glob("[0-9]*.md"))


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block of a page."""
    return FENCE.findall(text)


def code_blocks(text: str) -> list[str]:
    """The Python blocks of a page."""
    return [content for language, content in fenced_blocks(text) if language == "python"]


def translated() -> list[tuple[Path, Path]]:
    """(English page, Chinese page) of everything that is translated."""
    pages = [DOCS / "tutorial" / "first-model.md", DOCS / "guide" / "index.md", *chapters()]
    pairs = [(page, DOCS / "zh" / page.relative_to(DOCS)) for page in pages]
    return [(DOCS.parent / "README.md", DOCS / "zh" / "README.md"), *pairs]


def outputs_of(text: str) -> list[str]:
    """What each Python block of a page prints, as the page shows it: an empty text where it shows nothing."""
    blocks = fenced_blocks(text)
    following = [*blocks[1:], ("", "")]
    return [
        output if label == "output" else ""
        for (language, _), (label, output) in zip(blocks, following, strict=True)
        if language == "python"
    ]


def with_outputs(text: str, outputs: list[str]) -> str:
    """A page whose Python blocks are followed by what they print, in place of the outputs that it had."""
    remaining = iter(outputs)

    def add_output(block: re.Match[str]) -> str:
        printed = next(remaining) if block[1] == "python" else ""
        return f"{block[0]}\n```output\n{printed}```" if printed else block[0]

    return FENCE.sub(add_output, OUTPUT.sub("", text))


def sync() -> None:
    """Copy the fenced blocks of the English pages to the Chinese ones, where their number is equal.

    Outputs follow their Python block, so a Chinese page need not have them yet.
    """
    for english, chinese in translated():
        source = english.read_text(encoding="utf-8")
        blocks = [match[0] for match in FENCE.finditer(OUTPUT.sub("", source))]
        text = chinese.read_text(encoding="utf-8")
        changed = OUTPUT.sub("", text)
        if len(fenced_blocks(changed)) != len(blocks):
            print(
                f"{chinese}: {len(fenced_blocks(changed))} blocks, and {english} has {len(blocks)}: add or remove some"
            )
            continue
        remaining = iter(blocks)
        changed = FENCE.sub(lambda _, remaining=remaining: next(remaining), changed)
        changed = with_outputs(changed, outputs_of(source))
        if changed != text:
            chinese.write_text(changed, encoding="utf-8")
            print(f"{chinese}: copied the code of {english}")


def run(page: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the blocks of a page in order, with a folder as the working directory.

    Returns the names that they define, and what each block prints to the standard output.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "guide"}
    outputs = []
    blocks = code_blocks(page.read_text(encoding="utf-8"))
    with contextlib.chdir(folder):
        for number, block in enumerate(blocks, 1):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block, f"{page.name}, block {number}", "exec"), names)
            outputs.append(printed.getvalue())
    plt.close("all")
    return names, outputs


def write_outputs(pages: list[Path]) -> None:
    """Run chapters and write what each block prints below it, in both languages."""
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            _, outputs = run(page, Path(folder))
        page.write_text(with_outputs(page.read_text(encoding="utf-8"), outputs), encoding="utf-8")
        print(f"{page.name}: {sum(map(bool, outputs))} outputs")
    sync()


def write_figures() -> None:
    """Run every chapter and copy the figures that it saves to docs/figures/guide/."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for page in chapters():
        with tempfile.TemporaryDirectory() as folder:
            run(page, Path(folder))
            for figure in sorted(Path(folder).glob("*.png")):
                shutil.copy(figure, FIGURES / figure.name)
                print(f"{page.name}: {figure.name}, {os.path.getsize(figure) / 1024:.0f} KiB")


def notebook(page: Path) -> Any:
    """A page as a notebook: its Python blocks are cells, and its answers are no longer hidden.

    The figures and outputs are left out, because the cells show them.
    """
    import jupytext

    text = OUTPUT.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^<details[^>]*><summary>(.*?)</summary>$", r"**\1**", text, flags=re.MULTILINE)
    text = re.sub(r"^</details>\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^!\[.*?\]\([^)]*figures/guide/[^)]*\)\n", "", text, flags=re.MULTILINE)
    book = jupytext.reads(text, fmt="md")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def write_notebooks(out: Path) -> list[Path]:
    """Write the notebooks of all chapters to out/en and out/zh."""
    import nbformat

    targets = []
    for language in ("en", "zh"):
        for page in chapters(language):
            target = out / language / f"{page.stem}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook(page), target)
            targets.append(target)
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["figures", "notebooks", "outputs", "sync"])
    parser.add_argument("pages", nargs="*", type=Path, help="pages whose outputs are written (all chapters)")
    parser.add_argument("--out", type=Path, default=Path("notebooks"), help="folder for the notebooks")
    options = parser.parse_args()
    if options.what == "figures":
        write_figures()
    elif options.what == "outputs":
        write_outputs(options.pages or chapters())
    elif options.what == "sync":
        sync()
    else:
        print(f"{len(write_notebooks(options.out))} notebooks in {options.out}")


if __name__ == "__main__":
    main()
