"""Words that may not be generated: of a word of several tokens, the last one is forbidden where the others were just chosen.

The host may not know the last tokens when it launches a step, so words and recent tokens are in tables on the device. The tables
grow with what requests ask for: a CUDA graph's key holds their `shape`, so one that reads a table that was replaced is replayed no more.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..decoder.tokenizer import Tokenizer

Words = Sequence[Sequence[int]]  # each as its tokens

_ANY, _NOTHING = -1, -2  # what stands before a word's tokens in its line, and before the first token of an output


def spelled(words: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The tokens that spell each word at the beginning of a text, and after a space (vLLM's `bad_words`).

    Without those that the model, of `vocab_size` tokens, cannot say.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            ids = tokenizer.encode(text, bos=False)
            if ids and max(ids) < vocab_size:
                found[tuple(ids)] = None
    return [list(ids) for ids in found]


class BadWords:
    """The words of up to `rows` requests, and the last tokens of each.

    Attributes:
        shape: most words of a row, most tokens of a word: powers of two, so that there are few of them.
    """

    def __init__(self, rows: int, vocab_size: int, *, upload: Callable[[Tensor], Tensor]) -> None:
        self._vocab_size, self._upload = vocab_size, upload
        self._words = self._no_words(rows, 1, 1)
        self._recent = upload(torch.full((rows, 1), _NOTHING))

    @property
    def shape(self) -> tuple[int, int]:
        return self._words.shape[1], self._words.shape[2]

    def put(self, row: int, words: Words, output_ids: Sequence[int]) -> None:
        """Gives `row` to a request with these words, which has generated `output_ids`."""
        self._grow(len(words), max(map(len, words), default=1))
        count, longest = self.shape
        lines = [[_ANY] * (longest - len(word)) + list(word) for word in words]
        lines += [[_ANY] * (longest - 1) + [self._vocab_size]] * (count - len(words))
        self._words[row] = self._upload(torch.tensor(lines))
        recent = [_NOTHING] * longest + list(output_ids)
        self._recent[row] = self._upload(torch.tensor(recent[-longest:]))

    def _grow(self, words: int, tokens: int) -> None:
        (count, longest), (rows, _) = self.shape, self._recent.shape
        wider, longer = (max(old, 1 << (new - 1).bit_length()) for old, new in ((count, words or 1), (longest, tokens)))
        if (wider, longer) != (count, longest):
            grown, recent = self._no_words(rows, wider, longer), self._upload(torch.full((rows, longer), _NOTHING))
            grown[:, :count, longer - longest :], recent[:, longer - longest :] = self._words, self._recent
            self._words, self._recent = grown, recent

    def _no_words(self, rows: int, words: int, tokens: int) -> Tensor:
        """Lines whose last token is none of the vocabulary."""
        lines = torch.full((rows, words, tokens), _ANY)
        lines[..., -1] = self._vocab_size
        return self._upload(lines)

    def forbid(self, scores: Tensor, rows: Tensor) -> Tensor:
        """`scores` (rows, vocab_size), -inf where a token would complete a word of its row, of `rows` (rows,) int64."""
        words, recent = self._words[rows], self._recent[rows]
        begun = ((words[..., :-1] == _ANY) | (words[..., :-1] == recent[:, None, 1:])).all(-1)
        # of two words with the same last token one may have begun: nothing is written for the other
        completes = torch.where(begun, words[..., -1], self._vocab_size)
        mask = torch.zeros(len(scores), self._vocab_size + 1, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(mask.scatter_(1, completes, True)[:, :-1], -math.inf)

    def push(self, rows: Tensor, token_ids: Tensor) -> None:
        """Takes note of the tokens that were chosen, (rows,)."""
        self._recent[rows] = torch.cat((self._recent[rows][:, 1:], token_ids[:, None]), dim=1)
