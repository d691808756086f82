"""The guide's code runs, block after block, as a reader would run it."""

import re
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "index.md"


def test_every_block_of_the_guide_runs_in_turn(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"guide block {number + 1}", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 8
