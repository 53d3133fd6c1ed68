"""What `make` would do, without doing it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.parity import not_interpreted

pytestmark = [not_interpreted, pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make(tmp_path):
    """Says what `make install` with these variables would run, in a checkout whose .venv holds the default PyTorch."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "constraints-any-torch.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*variables: str) -> str:
        command = ["make", "--dry-run", "install", *variables]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (stamp,) = {
        word for line in run().splitlines() if "touch" in line for word in line.split() if ".installed-" in word
    }
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    return run


def test_what_is_installed_is_not_installed_again(make):
    assert "pip install" not in make()


@pytest.mark.parametrize("torch", ["torch==2.11.0", "torch>=2.14, <3", "torch"])
def test_another_torch_is_installed_where_one_is(make, torch):
    assert f'pip install -q --upgrade -c constraints-any-torch.txt "{torch}"' in make(f"TORCH={torch}")
    assert "rm -f .venv/.installed*" in make(f"TORCH={torch}")  # so that the default is installed again after it
