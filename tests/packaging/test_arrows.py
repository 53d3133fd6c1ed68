"""Who imports whom is what CONTRIBUTING's table says: its rows are read here, so that page and code cannot part."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(?:llama_fast/)?(\w+)(?:/|\.py)` \| (?P<what>.*) \| (?P<may>.*) \|$", re.MULTILINE)
NEIGHBOURS = {"transformers", "peft", "accelerate"}
MAY_IMPORT_NEIGHBOURS = {
    "fusion",
    "benchmarks",
    "cli/demo_run.py",
    "profiler/measure/sides.py",
    "profiler/measure/trust.py",
}
EVALUATORS = {"lm_eval", "sacrebleu", "rouge_score"}


def table() -> dict[str, set[str]]:
    """The rooms, and which others each may import; "everything but" leaves out those it names."""
    rows = {match[1]: match["may"] for match in ROW.finditer((ROOT / "CONTRIBUTING.md").read_text())}
    return {room: named(may, set(rows)) for room, may in rows.items()}


def named(may: str, rooms: set[str]) -> set[str]:
    names = set(re.findall(r"`(\w+)`", may))
    return rooms - names if may.startswith("everything") else names


ROOMS = table()


def files(room: str) -> list[Path]:
    """`python -m` of a room is a command, and imports the command line."""
    folder = ROOT / (room if room in ("kernels", "benchmarks") else f"llama_fast/{room}")
    return (
        sorted(file for file in folder.rglob("*.py") if file.name != "__main__.py")
        if folder.is_dir()
        else [folder.with_suffix(".py")]
    )


def imported(file: Path) -> set[str]:
    """The full names of what a file imports, here or inside a function; what only type checkers import is left out."""
    inside = file.relative_to(ROOT).parts
    inside = inside if inside[0] == "llama_fast" else ("llama_fast", *inside)
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level], *([node.module] if node.module else [])]
            module = ".".join(base) if node.level else node.module
            names.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return names


def test_the_table_names_every_room():
    rooms = {path.stem for path in (ROOT / "llama_fast").iterdir() if path.is_dir() or path.suffix == ".py"}
    not_rooms = {"__init__", "__main__", "__pycache__", "demo_model", "py"}
    assert set(ROOMS) == rooms - not_rooms


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room):
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files(room)
        for name in imported(file)
        if name.startswith("llama_fast.") and name.split(".")[1] in ROOMS.keys() - ROOMS[room] - {room}
    }
    assert found == set()


def importers_of(packages: set[str]) -> set[str]:
    return {
        str(file.relative_to(ROOT)) for room in ROOMS for file in files(room)
        for name in imported(file) if name.split(".")[0] in packages
    }  # fmt: skip


def test_only_these_import_transformers_and_its_neighbours():
    allowed = tuple(place if place == "benchmarks" else f"llama_fast/{place}" for place in MAY_IMPORT_NEIGHBOURS)
    assert {file for file in importers_of(NEIGHBOURS) if not file.startswith(allowed)} == set()


def test_only_evaluation_imports_what_its_extra_brings():
    found = importers_of(EVALUATORS)
    assert found and {file for file in found if not file.startswith("llama_fast/evaluate/")} == set()
