"""Files of many texts: rows in, rows out in their order, each written whole when it is computed.

A .jsonl file has a row a line; any other file is one text. A row that cannot be read or computed is reported and left out.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

OUTPUT = "output"
"""The field that a row of the output has beside those of the input."""

BATCH = 32
"""Rows that the engine is given at a time: an interrupt loses no more. Twice what it computes at once, so that few wait for the longest."""

Report = Callable[[str], None]
Compute = Callable[[list[Mapping[str, str]]], list[str]]
"""From the texts of rows, by field, to their outputs."""


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        place: where it stands, to be reported.
        texts: by field, what a task reads.
        fields: what the output repeats; of a text file its name.
    """

    place: str
    texts: Mapping[str, str]
    fields: Mapping[str, Any]


def read_rows(file: IO[bytes], name: str, fields: Sequence[str], report: Report, *, is_jsonl: bool) -> Iterator[Row]:
    """The rows of an open file, line by line where it is JSONL.

    Args:
        file: its bytes.
        name: of the file.
        fields: that a row must have, each a text; a text file is the first of them, and there is no other.
        report: is told of each row that cannot be read.
    """
    if not is_jsonl:
        return _read(name, partial(_whole_text, file.read(), name, fields), report)
    lines = ((f"{name}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    return (
        row for place, line in lines for row in _read(place, partial(_of_line, place, line, fields), report)
    )  # fmt: skip


def _read(place: str, read: Callable[[], Row], report: Report) -> Iterator[Row]:
    try:
        yield read()
    except ValueError as error:
        report(f"{place}: {error}")


def _whole_text(content: bytes, name: str, fields: Sequence[str]) -> Row:
    text = content.decode().removesuffix("\n")  # the newline that editors end a text with
    if not text.strip():
        raise ValueError("it is empty")
    if len(fields) > 1:
        raise ValueError(f"a text alone has no {fields[1]}: give rows of JSONL with the fields {', '.join(fields)}")
    return Row(name, {fields[0]: text}, {"file": name})


def _of_line(place: str, line: bytes, fields: Sequence[str]) -> Row:
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, got {line.decode().strip()[:60]}")
    if OUTPUT in value:
        raise ValueError(f"its field {OUTPUT!r} would be written over: give it another name")
    for field in fields:
        if not isinstance(value.get(field), str) or not value[field].strip():
            there = ", ".join(value) or "none"
            raise ValueError(
                f"the field {field!r} must be a text that is not empty, got {value.get(field)!r} (fields: {there})"
            )
    return Row(place, {field: value[field] for field in fields}, value)


def compute_rows(rows: Iterator[Row], compute: Compute, report: Report) -> Iterator[list[tuple[Row, str]]]:
    """Batch by batch, rows and their outputs. Where a batch is refused, its rows are computed one by one to find which."""
    while batch := list(islice(rows, BATCH)):
        yield _computed(batch, compute, report)


def _computed(batch: list[Row], compute: Compute, report: Report) -> list[tuple[Row, str]]:
    try:
        return list(zip(batch, compute([row.texts for row in batch]), strict=True))
    except ValueError as error:
        if len(batch) > 1:
            return [pair for row in batch for pair in _computed([row], compute, report)]
        report(f"{batch[0].place}: {error}")
        return []


def as_line(row: Row, output: str) -> str:
    return json.dumps({**row.fields, OUTPUT: output}, ensure_ascii=False) + "\n"


class Finished:
    """The rows that a file of outputs holds. A last line without an end, which a kill leaves, is taken away.

    Raises:
        ValueError: the file holds something else than this module writes.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = self._read() if path.exists() else []

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self) -> list[Mapping[str, Any]]:
        with self.path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
                os.fsync(file.fileno())
        rows = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                del row[OUTPUT]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}, line {number} is no row of an output: it must be an object with a field {OUTPUT!r}"
                ) from None
            rows.append(row)
        return rows

    def skip(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that are not there.

        Raises:
            ValueError: those that are there are not the first of `rows`.
        """
        for i, there in enumerate(self._rows, 1):
            row = next(rows, None)
            if row is None or json.loads(json.dumps(row.fields)) != there:
                read = "the input has fewer rows" if row is None else f"the input has that of {row.place}"
                raise ValueError(f"{self.path} is no beginning of this output: its line {i} is of another row ({read})")
        return rows
