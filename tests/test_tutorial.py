"""The tutorial's code runs, block after block, as a reader would run it."""

import re
from pathlib import Path

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial" / "theory-to-practice.md"


def test_every_block_of_the_tutorial_runs_in_turn(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"tutorial block {number + 1}", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 8
