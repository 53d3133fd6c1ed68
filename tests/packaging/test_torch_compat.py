"""What PyTorch calls private stands in one file, and a release that has taken some of it away is told from one that works."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast.kernels import torch_compat
from tests.packaging.test_constraints import pins
from tests.parity import not_interpreted

pytestmark = not_interpreted

ROOT = Path(__file__).parents[2]
FILES = [file for folder in ("kernels", "llama_fast", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
A_BASE_CLASS = "torch.utils._python_dispatch.TorchDispatchMode"  # PyTorch's own pages show it so

AFTER = """
import torch, torch._dynamo  # which takes them from it as it is imported
del {gone}
import llama_fast, llama_fast.cli.main
from llama_fast import ops
x = torch.ones(2, 8, 1, 16)
with torch.inference_mode():
    print(ops.softmax(x, -1).sum().item())
    for work in ({works}):
        try:
            work()
        except RuntimeError as error:
            print(error)
"""


def private_at_import(file: Path) -> set[str]:
    """The private names of PyTorch that importing the file needs: what stands in functions is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module.startswith("torch"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            found.add(ast.unparse(node))
        inside = [*node.args.defaults, node.args] if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node)
        if isinstance(node, ast.FunctionDef):  # its annotations and defaults are evaluated, its body is not
            inside = [node.args, *node.decorator_list, *([node.returns] if node.returns else [])]
        for child in inside:
            visit(child)

    visit(ast.parse(file.read_text()))
    return {name for name in found if any(part.startswith("_") for part in name.split("."))} - {A_BASE_CLASS}


def test_no_import_needs_a_private_name():
    needed = {file.name: private_at_import(file) for file in FILES if file.name != "torch_compat.py"}
    assert {name: names for name, names in needed.items() if names} == {}


def test_the_release_that_is_advised_is_the_one_that_is_tested():
    assert pins("constraints.txt")["torch"] == torch_compat._TESTED


@pytest.mark.parametrize(
    ("gone", "works"),
    [
        (
            ["torch.utils._python_dispatch._disable_current_modes"],
            "lambda: llama_fast.fuse(torch.nn.Identity()),",
        ),
        (
            ["torch._C._AutoDispatchBelowAutograd", "torch._scaled_dot_product_flash_attention_for_cpu"],
            "torch.inference_mode(False)(lambda: ops.softmax(x.clone(), -1)), lambda: ops.attention(x, x, x),",
        ),
    ],
    ids=["modes", "ops"],
)
def test_without_some_of_it_the_rest_works_and_says_what_is_missing(gone, works):
    """A name that PyTorch itself needs cannot be taken from it: these stand for all."""
    script = AFTER.format(gone=", ".join(gone), works=works)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LLAMA_FAST_CPU": "pytorch"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    advice = f"which llama-fast uses: pip install torch=={torch_compat._TESTED}"
    expected = [f"PyTorch {torch.__version__} has no {name}, {advice}" for name in gone]
    assert done.stdout.splitlines() == ["16.0", *expected]
