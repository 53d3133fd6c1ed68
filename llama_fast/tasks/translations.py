"""Translations, paragraph by paragraph; one that is long, in groups of sentences."""

from collections.abc import Sequence

from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from .pieces import pieces
from .prompts import TaskPrompt, checked_texts

_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}
# a translation may have twice the tokens of its source, and a few: one that has more goes round in circles
_GROWTH, _MORE = 2, 32


def translate(
    llm: LLM, texts: str | Sequence[str], *, source: str = "English", target: str, prompt: str | None = None
) -> list[str]:
    """The translation of each text, in their order. Line breaks, indents and empty lines stay where they are.

    Args:
        llm: the engine.
        texts: of any length: each line is translated by itself, and one that does not fit, in groups of sentences.
        source, target: names of languages, as the prompt has them.
        prompt: with {text}, and {source} and {target} where they are needed; by default that of the model's `task_prompts.json`, or else ours.

    Raises:
        ValueError: a text is empty; `prompt` has other fields.
    """
    asked = TaskPrompt.of(llm, "translate", prompt)
    languages = {"source": source, "target": target}
    room = asked.room(_MORE, **languages) // (1 + _GROWTH)
    cut = [
        [piece for line in text.splitlines(keepends=True) for piece in pieces(llm.tokenizer, line, room)]
        for text in checked_texts("texts", texts)
    ]
    wanted = [piece.strip() for parts in cut for piece in parts if piece.strip()]
    params = [
        SamplingParams(
            temperature=0, max_tokens=_GROWTH * len(llm.tokenizer.encode(piece, bos=False)) + _MORE, stop=asked.stop
        )
        for piece in wanted
    ]
    done = llm.generate([asked.tokens(text=piece, **languages) for piece in wanted], params)
    # a line's translation is a line: what follows is a chat model's talk about it
    lines = (each.text.strip().partition("\n")[0] for each in done)
    found = iter([_unquoted(line, piece) for line, piece in zip(lines, wanted, strict=True)])
    return ["".join(_in_place(piece, next(found)) if piece.strip() else piece for piece in parts) for parts in cut]


def _in_place(piece: str, translation: str) -> str:
    """With the spaces around it that the piece has."""
    before, after = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    return f"{before}{translation}{after}"


def _unquoted(translation: str, source: str) -> str:
    """Without the quotes that a model puts around a text that has none."""
    first, inside, last = translation[:1], translation[1:-1], translation[-1:]
    is_quoted = inside and _QUOTES.get(first) == last and first not in inside and last not in inside
    return inside.strip() if is_quoted and source[0] not in _QUOTES else translation
