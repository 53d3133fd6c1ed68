"""The one place that multiplies matrices: a kernel that called `tl.dot` itself would be wrong in the interpreter."""

import re
from pathlib import Path

from llama_fast import kernels


def test_kernels_multiply_by_dot_alone():
    files = [file for folder in kernels.__path__ for file in Path(folder).glob("*.py")]
    assert len(files) > 20
    assert [file.name for file in files if re.search(r"\btl\.dot\b(?!`)", file.read_text())] == ["dot.py"]
