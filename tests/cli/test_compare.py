"""`bench compare` and `profile compare` of what is no measurement: a sentence each, and exit status 2."""

import json

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.reports.jsonfile import write_json
from tests.benchmarks.records import record, result
from tests.parity import not_interpreted
from tests.profiler.profiles import synthetic

pytestmark = not_interpreted

RIGHT = {"bench": record(result("rope", "8192 x 4096", "llama-fast", 1e-4)), "profile": synthetic()}
MADE_BY = {"bench": "`llama-fast bench --json`", "profile": "`llama-fast profile`"}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("command", ["bench", "profile"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("missing.json", "missing.json does not exist"),
        ("folder", {"bench": "folder cannot be read: Is a directory", "profile": "folder/profile.json does not exist"}),
        ("empty.json", "it is no JSON (Expecting value"),
        ("bytes.json", "it is no JSON ('utf-8' codec can't decode"),
        ("list.json", "it holds no object"),
        ("half.json", "it is no JSON ("),
        ("other.json", {"bench": "no Record file of llama-fast: it has no field 'settings'", "profile": "it has no field 'model'"}),
        ("kind.json", "a field is of another kind"),
        ("inside", "right.json/inside cannot be read: Not a directory"),
        ("secret.json", "secret.json cannot be read: Permission denied"),
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_named(tmp_path, monkeypatch, command, wrong, says, second):
    right, path = tmp_path / "right.json", tmp_path / wrong
    write_json(right, RIGHT[command])
    if wrong == "folder":
        path.mkdir()
    elif wrong == "other.json":
        write_json(path, RIGHT["bench" if command == "profile" else "profile"])
    elif wrong == "inside":
        path = right / wrong
    elif wrong == "secret.json":  # nothing is forbidden to root
        read = type(path).read_text

        def refuse(file, *args, **options):
            if file.name == wrong:
                raise PermissionError(13, "Permission denied", str(file))
            return read(file, *args, **options)

        monkeypatch.setattr(type(path), "read_text", refuse)
    elif wrong != "missing.json":
        text = right.read_text()
        other_kind = json.loads(text) | {"runs" if command == "profile" else "results": 7}
        contents = {
            "empty.json": "",
            "list.json": "[1, 2]",
            "half.json": text[:-9],
            "kind.json": json.dumps(other_kind),
        }
        path.write_bytes(b"\xe6\x00" if wrong == "bytes.json" else contents[wrong].encode())
    files = [right, path] if second else [path, right]
    done = CliRunner().invoke(app, [command, "compare", *map(str, files)])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), said
    assert (says if isinstance(says, str) else says[command]) in said
    assert said.startswith("error: ") and said.endswith(f"Give a file that {MADE_BY[command]} has written")
