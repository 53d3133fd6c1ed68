"""Tokenised text on disk, read without a copy.

A shard is three files of datatrove's layout and one of ours, which is written last:

    00000_00000.ds           the tokens of all documents, one after another, uint16 or uint32, little-endian
    00000_00000.ds.index     where each document ends, in tokens, uint64
    00000_00000.ds.metadata  datatrove's own note: tokenizer and number of tokens
    00000_00000.ds.json      `ShardInfo`

The first number is the task that wrote the shard, the second counts the shards of a task.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llama_fast.data.bpe import fingerprint
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.reports.jsonfile import read_json

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

INFO = ".json"
INDEX = ".index"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What stands beside a shard.

    Attributes:
        tokenizer: the fingerprint of the tokenizer.
        dtype: of the tokens, "uint16" or "uint32".
        bos_id: what every document starts with, None if with nothing.
        eos_id: what every document ends with, None if with nothing.
        task, tasks: which of how many tasks wrote it.
        part, parts: which of this task's shards it is.
    """

    tokenizer: str
    dtype: str
    documents: int
    tokens: int
    bos_id: int | None
    eos_id: int | None
    task: int
    tasks: int
    part: int
    parts: int


class Shards(Sequence[Tokens]):
    """All documents of a folder of shards, in the order in which they were tokenised.

    `shards[i]` is document `i`: a read-only view of the file, `(length,)` of `dtype`, with the BOS and EOS it was written with.
    Nothing is read before it is asked for, but each shard's index is checked.

    Args:
        folder: where the shards are.
        tokenizer: the one they were written with.

    Attributes:
        tokens: how many tokens all documents have together.
        dtype: of the tokens.
        bos_id, eos_id: what every document starts and ends with, None if with nothing.

    Raises:
        ValueError: there are no shards; one is missing, unfinished, cut, or has another index than tokens; another tokenizer
            wrote them.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.ds"))
        if not files:
            raise ValueError(f"{folder} has no shards (*.ds): `llama-fast data tokenize` writes them")
        infos = [_read_info(file) for file in files]
        _check_complete(self.folder, infos)
        _check_tokenizer(self.folder, infos, tokenizer)
        self.dtype = np.dtype(infos[0].dtype)
        self.bos_id, self.eos_id = infos[0].bos_id, infos[0].eos_id
        self.tokens = sum(info.tokens for info in infos)
        self._ends = [_read_index(file, info) for file, info in zip(files, infos, strict=True)]
        self._shards = [_map(file, self.dtype) for file in files]
        self._documents = list(accumulate(info.documents for info in infos))  # up to and with each shard

    def __len__(self) -> int:
        return self._documents[-1]

    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has, (documents,)."""
        return np.concatenate([np.diff(ends, prepend=np.uint64(0)) for ends in self._ends]).astype(np.int64)

    def is_learnt(self, i: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of a document's tokens from `start` to below `stop` are learnt: all but its first, which nothing stands before."""
        return np.arange(start, stop) > 0

    def count_learnt(self, i: int, start: int, stop: int) -> int:
        """How many they are."""
        return max(0, stop - max(start, 1))

    def fingerprint(self) -> str:
        """sha256 of the length of each document and of what stands in a thousand or two of them: all would be to read the folder."""
        digest = hashlib.sha256(self.lengths().tobytes())
        for i in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(self[i].tobytes())
        return digest.hexdigest()

    def judged(self, i: int) -> Tokens:
        """The tokens of a document whose text a model is judged by: all."""
        return self[i]

    @overload
    def __getitem__(self, i: int) -> Tokens: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tokens]: ...
    def __getitem__(self, i: int | slice) -> Tokens | list[Tokens]:
        if isinstance(i, slice):
            return [self[each] for each in range(*i.indices(len(self)))]
        document = i + len(self) if i < 0 else i
        if not 0 <= document < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        shard = bisect_right(self._documents, document)
        ends = self._ends[shard]
        first = self._documents[shard] - len(ends)
        start = ends[document - first - 1] if document > first else 0
        return self._shards[shard][int(start) : int(ends[document - first])]


def _read_info(file: Path) -> ShardInfo:
    path = file.with_name(file.name + INFO)
    if not path.is_file():
        raise ValueError(f"{file} is unfinished: it has no {path.name}, which is written last; tokenise again")
    info = read_json(path, ShardInfo)
    if info.dtype not in ("uint16", "uint32"):
        raise ValueError(f"{path}: dtype must be uint16 or uint32, got {info.dtype!r}")
    return info


def _check_complete(folder: Path, infos: Sequence[ShardInfo]) -> None:
    """Every task has written, and every shard of it is there."""
    if len({info.tasks for info in infos}) > 1:
        raise ValueError(f"{folder} holds shards of several runs: tokenise into an empty folder")
    there = {(info.task, info.part) for info in infos}
    parts = {info.task: info.parts for info in infos}
    for task in range(infos[0].tasks):
        if task not in parts:
            raise ValueError(f"{folder} is unfinished: task {task} of {infos[0].tasks} has no shard; tokenise again")
        for part in range(parts[task]):
            if (task, part) not in there:
                raise ValueError(f"{folder}: shard {part} of {parts[task]} of task {task} is missing; tokenise again")


def _check_tokenizer(folder: Path, infos: Sequence[ShardInfo], tokenizer: Tokenizer) -> None:
    ours = fingerprint(tokenizer)
    for info in infos:
        if info.tokenizer != ours:
            raise ValueError(
                f"{folder} was tokenised with another tokenizer ({info.tokenizer[:12]}) than {tokenizer.folder} "
                f"({ours[:12]}): give the one it was written with, or tokenise again"
            )
        if (info.dtype, info.bos_id, info.eos_id) != (infos[0].dtype, infos[0].bos_id, infos[0].eos_id):
            raise ValueError(f"{folder} holds shards of several runs: tokenise into an empty folder")


def _read_index(file: Path, info: ShardInfo) -> npt.NDArray[np.uint64]:
    """Where each document ends, checked against the size of the tokens."""
    path = file.with_name(file.name + INDEX)
    if not path.is_file():
        raise ValueError(f"{file} has no index ({path.name}); tokenise again")
    if path.stat().st_size != 8 * info.documents:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, and {info.documents:,} documents take {8 * info.documents:,}; tokenise again"
        )
    ends = _map(path, np.dtype("<u8"))
    tokens = int(ends[-1]) if len(ends) else 0
    if tokens != info.tokens or np.any(ends[1:] < ends[:-1]):
        raise ValueError(f"{path} is damaged: its documents do not end at {info.tokens:,} tokens one after another")
    expected = tokens * np.dtype(info.dtype).itemsize
    if file.stat().st_size != expected:
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes, and its index says {tokens:,} tokens of {info.dtype}, {expected:,} bytes: "
            "it was cut or changed; tokenise again"
        )
    return ends


def _map(file: Path, dtype: "np.dtype[Any]") -> "npt.NDArray[Any]":
    """The file as a read-only array; mmap refuses an empty one."""
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
