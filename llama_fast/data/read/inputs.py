"""Which files a source is made of, and what they hold: files, folders, globs, folders of `datasets`, and `hf://`."""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import has_magic
from pathlib import PurePath
from typing import Any

import fsspec
import xxhash

from ..config import Source

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Input:
    """A file to read, and the source that it belongs to."""

    address: str
    """What fsspec opens."""
    file: str
    """How it is named in reports: as its source's path is written."""
    format: str
    compression: str | None
    source: Source

    @property
    def is_held_out(self) -> bool:
        return any(self.matches(pattern) for pattern in self.source.hold_out)

    def matches(self, pattern: str) -> bool:
        """Whether its name does, with or without the folders."""
        names = (self.file, PurePath(self.file).name)
        return any(fnmatch(name.lower(), pattern.lower()) for name in names)


def list_inputs(source: Source, folder: str | None = None) -> list[Input]:
    """The files of a source, in the order of their names.

    Args:
        folder: where the collection that the source names has been fetched to.

    Raises:
        ValueError: there is none that can be read.
        OSError: the address cannot be reached.
    """
    path = folder or source.path
    assert path is not None, "a collection is fetched into a folder first"
    filesystem, inside = _open_filesystem(source, path)
    if has_magic(inside):
        found = [each for each in filesystem.glob(inside) if not filesystem.isdir(each)]
    elif filesystem.isdir(inside):
        found = filesystem.find(inside)
    else:
        found = [inside] if filesystem.exists(inside) else []
    is_dataset = path.startswith("hf://") or any(PurePath(each).name == "dataset_info.json" for each in found)
    inputs = [
        made for each in sorted(found)
        if (made := _input(source, filesystem.unstrip_protocol(each), _shown(path, inside, each, source.collection)))
        and not (is_dataset and _is_about_a_dataset(made))
    ]  # fmt: skip
    if not inputs:
        raise ValueError(f"source {source.name!r}: {_why_nothing(path, found)}")
    return inputs


def _open_filesystem(source: Source, path: str) -> tuple[Any, str]:
    try:
        opened: tuple[Any, str] = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"source {source.name!r}: {path} cannot be opened: {error}") from None
    except ValueError as error:
        raise ValueError(f"source {source.name!r}: {path} is no address: {error}") from None
    return opened


def _why_nothing(path: str, found: list[str]) -> str:
    if not found:
        return f"there is nothing at {path}"
    known = " ".join([*_FORMATS, "each also with", *_COMPRESSED])
    return f"of {len(found)} files at {path} none ends as those that can be read: {known}. Or say its format"


def _shown(path: str, inside: str, found: str, collection: str | None) -> str:
    """A relative path stays one, and a collection's begins with its name, so that outputs do not depend on where a folder lies."""
    if collection:
        return f"{collection}/{os.path.relpath(found, inside)}"
    if "://" in path or os.path.isabs(path):
        return found if "://" not in path else f"{path.partition('://')[0]}://{found}"
    return os.path.relpath(found, os.getcwd()) if os.path.isabs(inside) else found


def _input(source: Source, address: str, shown: str) -> Input | None:
    name = PurePath(shown)
    compression = _COMPRESSED.get(name.suffix.lower())
    ending = PurePath(name.stem).suffix if compression else name.suffix
    kind = _FORMATS.get(ending.lower()) if source.format == "auto" else source.format
    return Input(address, shown, kind, compression, source) if kind else None


def _is_about_a_dataset(made: Input) -> bool:
    """A data set's card and the caches of its own library are no documents."""
    return made.format in ("text", "markdown", "html") or PurePath(made.file).name.startswith("cache-")


def fingerprint(made: Input) -> str:
    """What changes when the file's content does: a hash of a local file, what the store says of a remote one.

    Of what cannot be read, such as a link to nowhere, it is empty: `read_file` says why.
    """
    filesystem, inside = fsspec.core.url_to_fs(made.address)
    if "file" not in filesystem.protocol:
        about = filesystem.info(inside)
        names = ("size", "etag", "ETag", "blob_id", "checksum", "mtime", "LastModified")
        return " ".join(f"{name}={about[name]}" for name in names if about.get(name) is not None)
    digest = xxhash.xxh3_128()
    if not filesystem.isfile(inside):  # a pipe would be waited for
        return ""
    try:
        with filesystem.open(inside, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return str(digest.hexdigest())
