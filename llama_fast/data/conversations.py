"""Conversations to be tuned on: the assistant's words are learnt, all else is only read.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "...", "response": "..."}

One a line. They are written as the tokenizer's chat template writes them; without a template a prompt and its response stand one after the
other, and the end token after them. Which of the tokens are the assistant's is told by `{% generation %}` in the template, or else by what
it writes with one message more: see `Tokenizer.render_answers`. An answer ends with its end token: what a template writes after it is no
part of it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_fast.decoder.tokenizer import Tokenizer

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Conversation:
    """Its tokens, (length,) uint32, and which of them are learnt, (length,)."""

    ids: npt.NDArray[np.uint32]
    is_learnt: Mask


class Conversations(Sequence[npt.NDArray[np.uint32]]):
    """The conversations of a file, in its order: `conversations[i]` are the tokens of one.

    All of them are read and tokenised at once, and stay in memory, 5 bytes a token.

    Args:
        file: JSON lines.
        tokenizer: of the model that is tuned.
        longest: tokens of a conversation. One that is longer is cut at its end, and left out if no answer remains.

    Attributes:
        tokens: how many they have together.
        learnt: how many of them are learnt.
        cut, left_out: how many conversations are.
        eos_id: what an answer ends with, None if with nothing.

    Raises:
        ValueError: a line is no conversation, or the template refuses it; none is left.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer, *, longest: int) -> None:
        self.folder = file
        self.eos_id = tokenizer.eos_id
        self.cut = self.left_out = 0
        self._conversations: list[Conversation] = []
        for line in _lines(file, tokenizer):
            kept = Conversation(line.ids[:longest], line.is_learnt[:longest])
            if not kept.is_learnt.any():
                self.left_out += 1
                continue
            self.cut += len(line.ids) > longest
            self._conversations.append(kept)
        if not self._conversations:
            raise ValueError(f"{file} has no conversation with an answer in its first {longest:,} tokens")
        self.longest = longest
        self.tokens = sum(len(each.ids) for each in self._conversations)
        self.learnt = sum(int(each.is_learnt.sum()) for each in self._conversations)
        self._learnt_before = [np.cumsum([0, *each.is_learnt]) for each in self._conversations]

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, i: Any) -> Any:
        return self._conversations[i].ids

    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each has, (conversations,)."""
        return np.array([len(each.ids) for each in self._conversations], np.int64)

    def is_learnt(self, i: int, start: int, stop: int) -> Mask:
        """Which of a conversation's tokens from `start` to below `stop` are learnt."""
        return self._conversations[i].is_learnt[start:stop]

    def count_learnt(self, i: int, start: int, stop: int) -> int:
        """How many they are."""
        return int(self._learnt_before[i][stop] - self._learnt_before[i][start])

    def fingerprint(self) -> str:
        """sha256 of all of them."""
        digest = hashlib.sha256(self.lengths().tobytes())
        for each in self._conversations:
            digest.update(each.ids.tobytes())
            digest.update(each.is_learnt.tobytes())
        return digest.hexdigest()

    def judged(self, i: int) -> npt.NDArray[np.uint32]:
        """The tokens of a conversation whose text a model is judged by: the learnt ones."""
        each = self._conversations[i]
        return each.ids[each.is_learnt]

    def __str__(self) -> str:
        cut = f", {self.cut:,} cut at {self.longest:,} tokens" if self.cut else ""
        left_out = f", {self.left_out:,} left out, which have no answer there" if self.left_out else ""
        return f"{self.folder}: {len(self):,} conversations, {self.learnt:,} of {self.tokens:,} tokens are learnt{cut}{left_out}"


def _lines(file: Path, tokenizer: Tokenizer) -> Iterator[Conversation]:
    with file.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                yield tokenised(json.loads(line), tokenizer)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None


def tokenised(value: Any, tokenizer: Tokenizer) -> Conversation:
    """The tokens of what stands in one line, with exactly one BOS if the model uses one. Raises ValueError if that is no conversation."""
    text, spans = _written(value, tokenizer)
    ids, ends = tokenizer.encode_with_ends(text)
    is_learnt = np.zeros(len(ids), np.bool_)
    starts = [0, *ends[:-1]]
    for first, last in spans:
        inside = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if first <= start and end <= last]
        ended = next((n for n, i in enumerate(inside, 1) if ids[i] in tokenizer.eos_ids), len(inside))
        is_learnt[inside[:ended]] = True
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids, is_learnt = [tokenizer.bos_id, *ids], np.concatenate(([False], is_learnt))
    return Conversation(np.array(ids, np.uint32), is_learnt)


def _written(value: Any, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it the answers stand."""
    if not isinstance(value, dict) or ("messages" not in value and not {"prompt", "response"} <= value.keys()):
        raise ValueError(f"must be an object with 'messages', or with 'prompt' and 'response', got {str(value)[:100]}")
    if "messages" in value:
        return tokenizer.render_answers(value["messages"])
    prompt, response = value["prompt"], value["response"]
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ValueError("'prompt' and 'response' must be strings")
    if tokenizer.has_chat_template:
        return tokenizer.render_answers([dict(role="user", content=prompt), dict(role="assistant", content=response)])
    end = "" if tokenizer.eos_id is None else tokenizer.token(tokenizer.eos_id) or ""
    text = prompt + response + end
    return text, [(len(prompt), len(text))]
