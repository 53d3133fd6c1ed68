"""Objects on disk, so that a kernel is compiled once and not once a process.

    read(key)            the bytes that were written under this key, or None
    write(key, image)

The directory is `$LLAMA_FAST_CACHE`, else `$XDG_CACHE_HOME/llama-fast`, else `~/.cache/llama-fast`; one file a key, named
by the key's hash. What is read is run, so a directory that somebody else owns or can write to is not used, and a file
must carry our mark, its key and the hash of what it holds. No fault of a disk is an error: without a cache, kernels are
compiled anew. Of more than `MOST_BYTES` those that were used last stay.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
import time
import warnings
from pathlib import Path

MOST_BYTES = 256 * 2**20  # as the disk counts them: 20,000 kernels
_MARK = b"llama-fast object 1\n"
_OURS = re.compile(r"[0-9a-f]{64}(-\w+)?\.o")  # whole, or being written
_DAY = 24 * 3600
_writes = itertools.count()


def read(key: str) -> bytes | None:
    """What was written under `key`, whole and ours; else None."""
    directory = _directory()
    if directory is None:
        return None
    try:
        file = directory / _file(key)
        content = file.read_bytes()
        if time.time() - file.stat().st_mtime > _DAY:
            os.utime(file)  # when it was used, to the day
    except OSError:
        return None
    header, image = content[: len(_header(key, b""))], content[len(_header(key, b"")) :]
    return image if header == _header(key, image) else None


def write(key: str, image: bytes) -> None:
    """Keeps `image` under `key`, all at once: another process reads the whole file or none."""
    directory = _directory()
    if directory is None:
        return
    with contextlib.suppress(OSError):
        if next(_writes) % 100 == 0:
            _trim(directory)
        file = _file(key)
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=file.removesuffix(".o") + "-", suffix=".o")
        try:
            with open(descriptor, "wb") as opened:
                opened.write(_header(key, image) + image)
            os.replace(temporary, directory / file)
        except OSError:
            os.unlink(temporary)


def _trim(directory: Path) -> None:
    """Removes what was used longest ago until all files of ours take no more than they may."""
    with os.scandir(directory) as entries:
        found = [(entry.path, entry.stat()) for entry in entries if _OURS.fullmatch(entry.name)]
    total = 0
    for path, status in sorted(found, key=lambda file: file[1].st_mtime, reverse=True):
        total += 512 * status.st_blocks
        if total > MOST_BYTES:
            with contextlib.suppress(OSError):  # another process was faster
                os.unlink(path)


def _file(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest() + ".o"


def _header(key: str, image: bytes) -> bytes:
    return _MARK + hashlib.sha256(key.encode()).digest() + hashlib.sha256(image).digest()


def _directory() -> Path | None:
    """The directory of the cache, made if it is not there; None if there is none to use."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _usable(os.environ.get("LLAMA_FAST_CACHE") or os.path.join(home, "llama-fast"))


@functools.cache
def _usable(path: str) -> Path | None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.stat(path)
    except OSError:
        return None
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return Path(path)
    warnings.warn(
        f"native kernels are not kept in {path}: it belongs to another user, or others can write to it",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
