"""Files of many texts: rows in, rows out in their order, each written whole when it is computed.

A .jsonl file has a row a line; any other file is one text. A row that cannot be read or computed is reported and left out.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
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
    lines = ((f"{name}, line {number}", line) for number, line in enumerate(_without_mark(file), 1) if line.strip())
    return (
        row for place, line in lines for row in _read(place, partial(_of_line, place, line, fields), report)
    )  # fmt: skip


def _read(place: str, read: Callable[[], Row], report: Report) -> Iterator[Row]:
    try:
        yield read()
    except ValueError as error:
        report(f"{place}: {error}")


def _whole_text(content: bytes, name: str, fields: Sequence[str]) -> Row:
    text = content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")  # the newline that editors end a text with
    if not text.strip():
        raise ValueError("it is empty")
    if len(fields) > 1:
        raise ValueError(f"a text alone has no {fields[1]}: give rows of JSONL with the fields {', '.join(fields)}")
    return Row(name, {fields[0]: text}, {"file": name})


def _without_mark(file: IO[bytes]) -> Iterator[bytes]:
    """Lines without the mark that some editors begin UTF-8 with."""
    for number, line in enumerate(file):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _of_line(place: str, line: bytes, fields: Sequence[str]) -> Row:
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except RecursionError:
        raise ValueError("no JSON that can be read: its brackets are nested too deep") from None
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
    """Half a character, which JSON spells \\ud800 and UTF-8 has not, is spelt so again."""
    line = json.dumps({**row.fields, OUTPUT: output}, ensure_ascii=False)
    return line.encode(errors="backslashreplace").decode() + "\n"


class Finished:
    """The rows that a file of outputs holds, all of them written by this module, and what a kill has left of one more.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        *lines, self._torn = content.split(b"\n")
        self._rows = [self._row(number, line) for number, line in enumerate(lines, 1)]

    @property
    def count(self) -> int:
        return len(self._rows)

    def _row(self, number: int, line: bytes) -> Mapping[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
            del row[OUTPUT]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{self.path}, line {number} is no row of an output: it must be an object with a field {OUTPUT!r}"
            ) from None
        return row

    def skip(self, rows: Iterator[Row], report: Report) -> Iterator[Row]:
        """The rows that are to be computed. The torn line is cut off.

        Args:
            rows: the whole input.
            report: is told of each row before the last that is there which was left out when the file was written.

        Raises:
            ValueError: what is there are not rows of the input, in its order; nothing is cut off.
        """
        left_out: list[Row] = []
        for number, there in enumerate(self._rows, 1):
            passed, matched = _until(rows, partial(_made, there))
            if not matched:
                raise self._is_no_beginning(number)
            left_out += passed[:-1]
        ahead: list[Row] = []
        if self._torn:
            ahead, matched = _until(rows, self._is_torn_from)
            if not matched:
                raise self._is_no_beginning(self.count + 1)
            with self.path.open("rb+") as file:
                file.truncate(self.path.stat().st_size - len(self._torn))
        for row in left_out:
            report(f"{row.place}: it was left out before")
        return chain(ahead, rows)

    def _is_torn_from(self, row: Row) -> bool:
        beginning = as_line(row, "").removesuffix('"}\n').encode()
        shorter = min(len(beginning), len(self._torn))
        return beginning[:shorter] == self._torn[:shorter]

    def _is_no_beginning(self, number: int) -> ValueError:
        return ValueError(
            f"{self.path} is no beginning of this output: its line {number} is of no row that the input has there"
        )


def _made(there: Mapping[str, Any], row: Row) -> bool:
    """By what would be written: a number that is none differs from itself."""
    return json.dumps(row.fields) == json.dumps(there)


def _until(rows: Iterator[Row], wanted: Callable[[Row], bool]) -> tuple[list[Row], bool]:
    """The rows up to the first that is wanted, and whether there is one."""
    passed: list[Row] = []
    for row in rows:
        passed.append(row)
        if wanted(row):
            return passed, True
    return passed, False
