"""Dataclasses as JSON files: written whole or not at all, read back with every field checked for being there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

SCHEMA = 1


def write_json(path: str | Path, value: Any, *, exact: bool = False) -> None:
    """Writes a dataclass. Figures keep 6 digits, more than any clock has, or all; an interrupted run leaves no half of a file.

    Raises:
        OSError: the folder is not there, or the disk is full.
    """
    written = json.dumps({"schema": SCHEMA} | asdict(value), separators=(",", ":"))
    if not exact:
        rounded = json.loads(written, parse_float=lambda digits: float(f"{float(digits):.6g}"))
        written = json.dumps(rounded, separators=(",", ":"))
    write_whole(Path(path), written)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file at once, so that an interrupted run leaves no half of it.

    Raises:
        OSError: the folder is not there, or the disk is full; nothing is left of it.
    """
    with unfinished(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name when all of it is there. Where that fails it is taken away.

    Raises:
        OSError: it could not be written; it names `path`, which a full disk's own error does not.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno is not None:  # one that is only text would lose it
            error.filename = error.filename or str(path)
        raise


def read_json(path: str | Path, kind: type[T]) -> T:
    """Reads what `write_json` has written of a `kind`. Only a field with a default may be missing: older files lack it.

    Raises:
        ValueError: the file is something else, or of another version.
        OSError: it cannot be read.
    """
    wrong = f"{path} is no {kind.__name__} file of llama-fast"
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{wrong}: it is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{wrong}: it holds no object")
    try:
        schema = value.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"{path} is of schema {schema}, and this version reads schema {SCHEMA}")
        read: T = _read(value, kind)
        return read
    except KeyError as error:
        raise ValueError(f"{wrong}: it has no field {error}") from None
    except TypeError as error:
        raise ValueError(f"{wrong}: a field is of another kind ({error})") from None


def _read(value: Any, kind: Any) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        types = get_type_hints(kind)
        there = [field for field in fields(kind) if field.name in value or field.default is MISSING]
        return kind(**{field.name: _read(value[field.name], types[field.name]) for field in there})
    if get_origin(kind) in (list, tuple):
        return get_origin(kind)(_read(each, get_args(kind)[0]) for each in value)
    classes = [each for each in get_args(kind) if is_dataclass(each)]
    return _read(value, classes[0]) if classes and value is not None else value
