"""The page on evaluation: its Python runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/evaluation.md"


def test_snippets_run_one_after_the_other():
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert len(snippets) == 3
    assert names["rate"].low < names["rate"].value < names["rate"].high
    assert names["change"].value > 0 and names["everyone"].shape == (10, 200)
