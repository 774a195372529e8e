"""The examples of docs/emulator.md run, and print what the page says."""
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "emulator.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_the_examples_do_what_the_page_says(capsys):
    pytest.importorskip("numba.cuda", reason="numba-cuda compiles the example")
    names = {"__name__": "example"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = re.sub(r"\d+", "#", capsys.readouterr().out)       # line and register numbers vary
    assert printed.split() == re.sub(r"\d+", "#", blocks("text")[0]).split()
    names["test_row_sums"](rows=65, seed=1)
