"""How a task is put to a model: in the words it was trained on, as a user's message, or in a plain form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from ..engine.llm import LLM

FILE = "task_prompts.json"
"""In a model's folder, the prompts that it was trained on, by task: {"summarize": "Story: {text}\\nSummary:"}."""

FIELDS = {"summarize": ("text",), "translate": ("text", "source", "target"), "answer": ("question", "context")}

_MESSAGES = {
    "summarize": "Summarize this text in one or two sentences:\n\n{text}",
    "translate": "Translate this text from {source} to {target}. Answer with the translation alone:\n\n{text}",
    "answer": "Answer the question with a few words from the text.\n\nText: {context}\n\nQuestion: {question}",
}
_PLAIN = {
    "summarize": "Text: {text}\nSummary:",
    "translate": "{source}: {text}\n{target}:",
    "answer": "{context}\nQuestion: {question}\nAnswer:",
}
# a piece of a text has other tokens at its two ends than the text has there
_SLACK = 8


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt with fields in braces. As a chat's message its output ends where the model ends it; a plain one's, at the end of the line."""

    llm: LLM
    form: str
    is_message: bool

    @classmethod
    def of(cls, llm: LLM, task: str, form: str | None = None) -> "TaskPrompt":
        """That of a model for a task: `form`; else what its folder's `task_prompts.json` says; else ours.

        `form` and ours are messages where the model has a chat template, and those of the folder never are.

        Raises:
            ValueError: a form has a field that the task does not have, or lacks its text; the file cannot be read.
        """
        is_message = llm.tokenizer.has_chat_template
        if form is None and (own := _own_forms(llm).get(task)) is not None:
            form, is_message = own, False
        elif form is None:
            form = (_MESSAGES if is_message else _PLAIN)[task]
        _check(task, form)
        return cls(llm, form, is_message)

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self.is_message else ("\n",)

    def tokens(self, **fields: str) -> list[int]:
        text = self.form.format_map(fields)
        if not self.is_message:
            return self.llm.tokenizer.encode(text)
        return self.llm.tokenizer.chat([{"role": "user", "content": text}])

    def room(self, output: int, **fields: str) -> int:
        """Tokens that the field which is left out may have, as often as the form has it, beside an output of so many."""
        missing = [field for field in _fields(self.form) if field not in fields]
        rest = len(self.tokens(**fields, **dict.fromkeys(missing, "")))
        return (self.llm.longest - rest - output) // len(missing) - _SLACK


def checked_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    """The texts that a task is given; one string is one. Raises ValueError for what is none, and for an empty one."""
    several = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(several):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}[{i}] must be a text that is not empty, got {text!r}")
    return several


def _own_forms(llm: LLM) -> Mapping[str, str]:
    path = llm.tokenizer.folder / FILE
    if not path.is_file():
        return {}
    try:
        forms = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(forms, dict) or not all(name in FIELDS and isinstance(form, str) for name, form in forms.items()):
        raise ValueError(f"{path} must hold a JSON object with prompts for {', '.join(FIELDS)}")
    return forms


def _fields(form: str) -> list[str]:
    try:
        return [field for _, field, _, _ in Formatter().parse(form) if field is not None]
    except ValueError as error:
        raise ValueError(
            f"the prompt {form!r} cannot be read ({error}): a brace that is none of a field is doubled"
        ) from None


def _check(task: str, form: str) -> None:
    known = set(FIELDS[task])
    needed = known - {"source", "target"}
    if not needed <= set(_fields(form)) <= known:
        expected = " and ".join(f"{{{field}}}" for field in FIELDS[task] if field in needed)
        optional = "" if needed == known else " (and may have {source} and {target})"
        raise ValueError(f"the prompt to {task} must have {expected}{optional}, and no other field; got {form!r}")
