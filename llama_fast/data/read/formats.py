"""One generator for each format: the bytes of a file -> documents, and a `Fault` for each part that is none.

A fault costs as little as it can: a bad line costs that line, and where a stream breaks, what came before is kept.
"""

import csv
import io
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet

from ..documents import Document, Fault
from .inputs import Input

_CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([\w-]+)""", re.IGNORECASE)
_PARAGRAPH = re.compile(r"\S(?:.|\n(?!\s*\n))*")


@dataclass(frozen=True)
class _Part:
    """A document of a file before it has a name: its text, and the line or row where it begins, from 1."""

    text: str
    line: int
    id: str | None = None


class _Broken(Exception):
    """The rest of a file cannot be read."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def read_file(made: Input) -> Iterator[Document | Fault]:
    """The documents of a file, in their order. Documents without any text are not counted as faults: filters name them."""
    last = 0
    try:
        filesystem, inside = fsspec.core.url_to_fs(made.address)
        if not filesystem.isfile(inside):
            raise _Broken("is no file, or a link to one that does not exist")
        with filesystem.open(inside, "rb") as raw:
            for part in _READERS[made.format](_decompressed(raw, made), made):
                if isinstance(part, Fault):
                    last = part.line or last
                    yield part
                else:
                    last = part.line
                    yield _document(part, made)
    except _Broken as error:
        yield Fault(made.file, error.line, str(error))
    except (EOFError, OSError, UnicodeError, zlib.error, pa.ArrowException) as error:
        where = f"after line {last}: " if last else ""
        yield Fault(made.file, last + 1 if last else None, f"{where}cannot be read: {_short(error)}")


def _short(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _document(part: _Part, made: Input) -> Document:
    about: dict[str, Any] = {"source": made.source.name, "file": made.file, "line": part.line}
    if made.format == "html":
        about["format"] = "html"
    if made.source.language:
        about["language"] = made.source.language
    return Document(text=part.text.strip("\n"), id=part.id or f"{made.file}:{part.line}", metadata=about)


def _decompressed(raw: IO[bytes], made: Input) -> IO[bytes]:
    """Arrow's streams, for they know where a compressed file was cut off; zstandard's own does not tell."""
    if made.compression is None:
        return raw
    stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), made.compression)
    return io.BufferedReader(stream, 1 << 16)  # where it breaks, so much may be lost of what came before


def _decode(content: bytes, made: Input) -> str:
    encoding = made.source.encoding
    if made.format == "html" and (declared := _CHARSET.search(content[:2048])):
        encoding = declared[1].decode()
    try:
        text = content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
        text.encode()  # some encodings can write half a character
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _Broken(f"is no {encoding}: byte {content[error.start]:#04x} in line {line}", line) from None
    except LookupError:
        raise _Broken(f"is in an unknown encoding: {encoding}") from None
    except UnicodeError as error:
        raise _Broken(f"cannot be read as {encoding}: {_short(error)}") from None
    return text.replace("\r\n", "\n")


def _text(stream: IO[bytes], made: Input) -> Iterator[_Part]:
    text = _decode(stream.read(), made)
    if made.source.split == "file":
        yield _Part(text, 1)
        return
    line, counted = 1, 0
    for paragraph in _PARAGRAPH.finditer(text):
        line += text.count("\n", counted, paragraph.start())
        counted = paragraph.start()
        yield _Part(paragraph[0].rstrip(), line)


def _html(stream: IO[bytes], made: Input) -> Iterator[_Part]:
    yield _Part(_decode(stream.read(), made), 1)


def _jsonl(stream: IO[bytes], made: Input) -> Iterator[_Part | Fault]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError as error:
            yield Fault(made.file, number, f"is no JSON: {_short(error)}")
            continue
        text = value.get(made.source.text) if isinstance(value, dict) else None
        if not isinstance(text, str):
            yield Fault(made.file, number, f"has no string {made.source.text!r}")
            continue
        given = value.get("id")
        yield _Part(text, number, given if isinstance(given, str) else None)


def _csv(stream: IO[bytes], made: Input) -> Iterator[_Part | Fault]:
    csv.field_size_limit(sys.maxsize)
    encoding = "utf-8-sig" if made.source.encoding.lower() in ("utf-8", "utf8") else made.source.encoding
    try:
        lines = io.TextIOWrapper(stream, encoding=encoding, newline="")
    except LookupError:
        raise _Broken(f"is in an unknown encoding: {encoding}") from None
    separator = "\t" if ".tsv" in made.file.lower() else ","
    rows = csv.reader(lines, delimiter=separator, strict=True)
    begins = 1
    try:
        header = next(rows, [])
        if made.source.text not in header:
            raise _Broken(f"has no column {made.source.text!r}; there are {', '.join(header)}", 1)
        column = header.index(made.source.text)
        begins = rows.line_num + 1
        for row in rows:
            if len(row) == len(header):
                yield _Part(row[column], begins)
            elif row:
                yield Fault(made.file, begins, f"has {len(row)} fields, and the header {len(header)}")
            begins = rows.line_num + 1
    except csv.Error as error:
        raise _Broken(f"is no CSV: {error}", begins) from None
    except UnicodeDecodeError as error:
        raise _Broken(f"is no {made.source.encoding}: {error.reason}", begins) from None


def _parquet(stream: IO[bytes], made: Input) -> Iterator[_Part | Fault]:
    whole = stream if made.compression is None else io.BytesIO(stream.read())
    table = pa.parquet.ParquetFile(whole)
    _require_column(table.schema_arrow, made)
    yield from _rows(table.iter_batches(batch_size=256, columns=[made.source.text]), made)


def _arrow(stream: IO[bytes], made: Input) -> Iterator[_Part | Fault]:
    """Of either of Arrow's formats: `datasets` writes streams, most others files, which begin with a mark."""
    whole = pa.BufferReader(stream.read()) if made.compression else pa.PythonFile(stream, mode="r")
    is_file = whole.read(6) == b"ARROW1"
    whole.seek(0)
    if is_file:
        opened = pa.ipc.open_file(whole)
        batches: Any = map(opened.get_batch, range(opened.num_record_batches))
    else:
        batches = opened = pa.ipc.open_stream(whole)
    _require_column(opened.schema, made)
    yield from _rows(batches, made)


def _require_column(schema: Any, made: Input) -> None:
    if made.source.text not in schema.names:
        raise _Broken(f"has no column {made.source.text!r}; there are {', '.join(schema.names)}")


def _rows(batches: Any, made: Input) -> Iterator[_Part | Fault]:
    number = 0
    for batch in batches:
        for value in batch.column(made.source.text):
            number += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield Fault(made.file, number, f"is no utf-8: byte {error.object[error.start]:#04x}")
                continue
            if isinstance(text, str):
                yield _Part(text, number)
            else:
                yield Fault(made.file, number, f"has no string {made.source.text!r}")


_READERS: dict[str, Any] = {
    "text": _text, "markdown": _text, "html": _html, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "arrow": _arrow,
}  # fmt: skip
