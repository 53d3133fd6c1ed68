"""Text of tokens that come one at a time."""

import itertools
from collections.abc import Sequence

from .byte_tokens import unfinished
from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character, or not yet one
# tokens: at most three are an unfinished character, and one before them tells that a space is no leading one
_CONTEXT = 4


class DetokenizedStream:
    """The text of tokens o that come one at a time after those of a prompt p.

    All pieces joined are what `decode(p + o)` has after the beginning that it shares with `decode(p)`. So a character that the
    prompt has begun belongs to the text that ends it; where nothing ends it, its U+FFFD is the prompt's; and a space before the
    first word is kept, which a tokenizer drops where a text starts. Without a prompt, or with one of special tokens alone, they
    are `decode(o)`.

    A piece is final: nothing given is taken back, and a character is given with its last token. A step looks at no more than a
    few tokens, however long the text or a run of bytes is.

    Args:
        tokenizer: whose tokens.
        prompt_ids: the prompt's tokens.
        skip_special: special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        # the last tokens: one or more whose text was given, then those of an unfinished character
        self._window = list(itertools.islice(filter(self._shows, reversed(prompt_ids)), _CONTEXT))[::-1]
        text = self._decode()
        self._given = len(text) - self._unfinished(text)
        self._of_prompt = len(text) - self._given  # U+FFFDs of the prompt's text that may stay

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often none."""
        if not self._shows(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode()
        waiting = self._unfinished(text)
        piece = text[self._given : len(text) - waiting]
        if waiting:
            self._window = self._window[-_CONTEXT:]
            self._given = len(self._decode()) - waiting
        else:  # where all is given, one token alone tells how the text goes on
            self._window = [token_id]
            self._given = self._tokenizer.text_length(token_id) or 0
        return self._after_prompt(piece)

    def flush(self) -> str:
        """The rest of the text, once no more tokens come; what is still unfinished becomes U+FFFD."""
        text = self._decode()
        piece, self._given = text[self._given :], len(text)
        return self._after_prompt(piece)

    def _shows(self, token_id: int) -> bool:
        """Whether decoding makes anything of a token: a model may have more than its tokenizer knows."""
        return token_id not in self._skipped and self._tokenizer.text_length(token_id) is not None

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=False)

    def _unfinished(self, text: str) -> int:
        """How many characters at the end of the window's text its next token may change."""
        if not self._tokenizer.byte_ids:  # tokens are any part of a character: one that is cut shows as one U+FFFD
            return int(text.endswith(_REPLACEMENT))
        if not self._window or self._window[-1] not in self._tokenizer.byte_ids:
            return 0
        return unfinished([self._tokenizer.token(token_id) or "" for token_id in self._window])

    def _after_prompt(self, piece: str) -> str:
        """What of a piece `decode(p)` does not show already."""
        if not self._of_prompt:
            return piece
        shared = min(self._of_prompt, len(piece) - len(piece.lstrip(_REPLACEMENT)))
        if piece:
            self._of_prompt = self._of_prompt - shared if shared == len(piece) else 0
        return piece[shared:]
