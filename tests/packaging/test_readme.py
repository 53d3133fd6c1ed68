"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from tests.parity import not_interpreted

pytestmark = not_interpreted

README = Path(__file__).parents[2] / "README.md"


def test_the_swap_example_runs(capsys):
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if ".fuse(" in code
    )
    scope = {}
    exec(example, scope)
    assert scope["write"].model.config._attn_implementation == "sdpa"
    output = capsys.readouterr().out
    assert "llama_fast.fuse, mode='inference'" in output
    assert "Once upon a time, there was" in output
