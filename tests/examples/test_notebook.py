"""examples/notebook.ipynb runs from top to bottom."""

import json
from pathlib import Path

import pytest

from tests.parity import not_interpreted

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


@not_interpreted
@pytest.mark.nightly
def test_the_notebook_runs_from_top_to_bottom_and_prints_what_it_shows(capsys):
    scope: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), scope)
        printed = capsys.readouterr().out
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        if shown and "loss" not in shown:  # the last digits of a loss are the machine's
            assert printed == shown
