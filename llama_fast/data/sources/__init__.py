"""Text that comes by name: `collect` writes it into the cache, one JSON Lines file for each play, form or module.

    shakespeare         plays and poems in modern spelling, and the plays as the First Folio of 1623 spells them
    shakespeare-pairs   their lines in both spellings: a translation task
    stories             the stories, questions and summaries of `llama_fast.data.stories`
    pydoc               the reference manual inside every Python (465 kB)

Each line has `text`, an `id`, `held_out`, and what else is known of it. What is held out (Macbeth and The Tempest in every spelling,
the stories of held-out worlds) stands in files of its own, and no training may see it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import included, shakespeare
from .package import cache_folder
from .record import Record

_FORMAT = 1  # counts the changes of what is written
_WRITERS: dict[str, Callable[[], Iterator[Record]]] = {
    "shakespeare": shakespeare.plays,
    "shakespeare-pairs": shakespeare.pairs,
    "stories": included.stories,
    "pydoc": included.pydoc,
}
NAMES = tuple(_WRITERS)


def collect(name: str) -> Path:
    """The folder of a source's files. What the cache has not is fetched and written, whole or not at all.

    Raises:
        ValueError: no source has this name, or its package cannot be had; the message says why.
        OSError: the cache cannot be written.
    """
    if name not in _WRITERS:
        raise ValueError(f"no source is named {name!r}; there are {', '.join(NAMES)}")
    folder = cache_folder() / "text" / f"{name}-{_FORMAT}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{name}-"))
    try:
        for record in _WRITERS[name]():
            path = unfinished / f"{record.file}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record.line(), ensure_ascii=False) + "\n")
        if not folder.is_dir():  # another process may have been faster
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
