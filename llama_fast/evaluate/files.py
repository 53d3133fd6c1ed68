"""Tasks from files: texts, JSONL documents, shards of tokens, and prompts with their references, described in a TOML file.

data = "questions.jsonl"            # beside the TOML file
prompt = "{story}\\nQ: {question}\\nA:"  # fields of a line
reference = "answer"                # a field: a string, or a list of them
scores = ["exact_match", "f1"]
stop = ["\\n"]
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from ..data.shards import Shards
from ..decoder.tokenizer import Tokenizer
from .perplexity import DEFAULT_WINDOWS, Windows
from .tasks import PromptTask, TextTask

_OWN = ("data", "prompt", "reference", "text")
_OPTIONS = ("name", "scores", "chat", "system", "max_tokens", "stop")


def read_task(
    path: Path, *, limit: int | None = None, windows: Windows = DEFAULT_WINDOWS, training: str | None = None
) -> TextTask | PromptTask:
    """The task in a file: a .toml describes one; of a .jsonl the field "text" of each line is a document; any other is one text.
    In a folder of shards each document is one, as text: any model can be judged by it.

    Args:
        path: of the file, or the folder, beside which `llama-fast data` has put the shards' tokenizer.
        limit: of the lines of JSONL, or of the documents of shards, only the first so many.
        windows, training: of texts.

    Raises:
        ValueError: the file is not what its name says; the message names line and field.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return TextTask(name=path.name, documents=_of_shards(path, limit), windows=windows, training=training)
    if path.suffix == ".toml":
        return _described(path, limit, windows, training)
    if path.suffix == ".jsonl":
        documents = [_string(path, number, line, "text") for number, line in read_lines(path, limit)]
    else:
        documents = [read_text(path)]
    return TextTask(name=path.stem, documents=documents, windows=windows, training=training)


def _of_shards(folder: Path, limit: int | None) -> list[str]:
    tokenizer = Tokenizer(folder.parent / "tokenizer")
    shards = Shards(folder, tokenizer)
    documents = [tokenizer.decode(document.tolist()) for document in shards[:limit]]
    if not any(documents):
        raise ValueError(f"{folder} holds no text")
    return [text for text in documents if text]


def read_outputs(path: Path, *, output: str, reference: str) -> tuple[list[str], list[list[str]]]:
    """Of each line of a JSONL file what is in a field, and the references (a text, or a list of them) in another.

    Raises:
        ValueError: a line has no such field; the message names it.
        OSError: it cannot be read.
    """
    outputs, references = [], []
    for number, line in read_lines(path):
        value = _field(path, number, line, output)
        if not isinstance(value, str):
            raise ValueError(f"{path}, line {number}: {output} must be a text, got {value!r}")
        outputs.append(value)
        references.append(_references(path, number, line, reference))
    return outputs, references


def read_text(path: Path) -> str:
    """A whole text, its line ends as they are. Raises ValueError if it is empty or no UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def read_lines(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, from 1. Raises ValueError for what is none, and where there are none."""
    count = 0
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if count == limit:
            return
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} must hold an object, got {line[:60]}")
        count += 1
        yield number, value
    if not count:
        raise ValueError(f"{path} holds no lines")


def _described(path: Path, limit: int | None, windows: Windows, training: str | None) -> TextTask | PromptTask:
    try:
        description = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    if unknown := description.keys() - {*_OWN, *_OPTIONS}:
        raise ValueError(f"{path} has the unknown key {min(unknown)!r}: a task has {', '.join((*_OWN, *_OPTIONS))}")
    is_text = "text" in description
    if missing := [
        key for key in (("data",) if is_text else ("data", "prompt", "reference", "scores")) if key not in description
    ]:
        raise ValueError(f"{path} has no {missing[0]!r}")
    _check_kinds(path, description)
    lines = list(read_lines(path.parent / description["data"], limit))
    data = path.parent / description["data"]
    name = description.get("name", path.stem)
    if is_text:
        if other := description.keys() & {"prompt", "reference", *_OPTIONS[1:]}:
            raise ValueError(f"{path} has {min(other)!r} beside 'text': documents are predicted, not answered")
        documents = [_string(data, number, line, description["text"]) for number, line in lines]
        return TextTask(name=name, documents=documents, windows=windows, training=training)
    named = _fields(path, description["prompt"])
    options = {key: description[key] for key in _OPTIONS if key in description}
    return PromptTask(
        **options | {"name": name},
        prompts=[_filled(data, number, line, description["prompt"], named) for number, line in lines],
        references=[_references(data, number, line, description["reference"]) for number, line in lines],
    )


def _check_kinds(path: Path, description: Mapping[str, Any]) -> None:
    for key, value in description.items():
        expected, fits = _KINDS.get(key, ("a string", lambda value: isinstance(value, str)))
        if not fits(value):
            raise ValueError(f"{path}: {key} must be {expected}, got {value!r}")


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scores": ("a list of strings", _are_strings),
    "stop": ("a list of strings", _are_strings),
    "chat": ("true or false", lambda value: isinstance(value, bool)),
    "max_tokens": ("an integer, at least 1", lambda value: type(value) is int and value >= 1),
}


def _field(path: Path, number: int, line: Mapping[str, Any], field: str) -> Any:
    if field not in line:
        raise ValueError(f"{path}, line {number} has no field {field!r}: it has {', '.join(line) or 'none'}")
    return line[field]


def _string(path: Path, number: int, line: Mapping[str, Any], field: str) -> str:
    value = _field(path, number, line, field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}, line {number}: {field} must be a text that is not empty, got {value!r}")
    return _unicode(path, number, value)


def _unicode(path: Path, number: int, text: str) -> str:
    r"""The text. JSON can write half a character, as \ud83d."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number} holds half a character, {text[error.start]!r}") from None
    return text


def _fields(path: Path, template: str) -> list[str]:
    """The names in the braces of a prompt."""
    try:
        parsed = [(name, rest) for _, name, *rest in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{path}: prompt cannot be filled: {error}; {{{{ and }}}} are braces that name no field"
        ) from None
    for name, rest in parsed:
        if not name or any(rest):
            raise ValueError(
                f"{path}: prompt must name a field between braces, and no more; {{{{ and }}}} are braces that name none"
            )
    return [name for name, _ in parsed]


def _filled(path: Path, number: int, line: Mapping[str, Any], template: str, named: Sequence[str]) -> str:
    values = {name: _field(path, number, line, name) for name in named}
    return _unicode(path, number, Formatter().vformat(template, (), values))


def _references(path: Path, number: int, line: Mapping[str, Any], field: str) -> list[str]:
    value = _field(path, number, line, field)
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(each, str) and each for each in several):
        raise ValueError(f"{path}, line {number}: {field} must be a text or a list of texts, none empty, got {value!r}")
    return [_unicode(path, number, each) for each in several]
