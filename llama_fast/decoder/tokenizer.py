"""Text to tokens and back: `tokenizer.json`, the files beside it, and chat templates."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.nodes import Node, Output, TemplateData
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .byte_tokens import is_byte_token, whole_characters
from .gguf.file import is_gguf
from .gguf.tokenizer import read_tokenizer
from .special_tokens import DeclaredTokens

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """The tokenizer in a model's folder, or in its .gguf file.

    Of a folder it reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`,
    `generation_config.json` or `config.json` for the end tokens, and `chat_template.jinja`. Only the first must be there.

    Args:
        folder: where the files are, or the .gguf file.

    Attributes:
        bos_id: the token a text starts with, None if the model uses none.
        start_id: what stands before the first token of a text whose likelihood is asked for: BOS, also where the model uses none, else
            its end token; None if it names neither.
        eos_id: the tokenizer's own end token, None if it names none: documents of a training text end with it.
        eos_ids: the tokens that end a text: the tokenizer's own and those the generation config names.
        special_ids: the special tokens, which `decode` skips.
        byte_ids: the tokens that are one byte each, where the vocabulary falls back on bytes.

    Raises:
        ValueError: there is no `tokenizer.json`; a file cannot be read, or names a token that is not in the vocabulary.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config: dict[str, Any]
        if is_gguf(self.folder):
            read = read_tokenizer(self.folder)
            self._tokenizer, self._named = read.backend, dict(read.named)
            config, eos_ids = {"chat_template": read.chat_template}, set(read.eos_ids)
        else:
            self._tokenizer = _load(self.folder)
            config, eos_ids = _read_json(self.folder / "tokenizer_config.json"), configured_eos_ids(self.folder)
            self._named = self._add_declared(config)
        generation = _read_json(self.folder / "generation_config.json")
        model = _read_json(self.folder / "config.json")
        self.bos_id = self._bos_id(generation.get("bos_token_id", model.get("bos_token_id")))
        own = [self._id_of(self._named["eos_token"])] if "eos_token" in self._named else []
        self.eos_ids = tuple(sorted({*eos_ids, *own}))
        named_bos = [self._id_of(self._named["bos_token"])] if "bos_token" in self._named else []
        starts = [*named_bos, *([] if self.bos_id is None else [self.bos_id]), *own, *self.eos_ids]
        self.start_id = starts[0] if starts else None
        self.eos_id = own[0] if own else None
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._decoder = self._tokenizer.decoder
        self._text_lengths: dict[int, int | None] = {}
        self.byte_ids = self._byte_ids()
        self._config = config
        self._template = _chat_template(self.folder, config)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, with the declared tokens. It is a copy: its options may be changed."""
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _add_declared(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Adds the tokens that other files declare; one that the vocabulary has keeps its id. Returns the named ones."""
        declared = DeclaredTokens.read(
            config,
            _read_json(self.folder / "special_tokens_map.json"),
            _read_json(self.folder / "added_tokens.json"),
            known={token.content for token in self._tokenizer.get_added_tokens_decoder().values()},
        )
        self._tokenizer.add_tokens(declared.added)
        for name in ("bos_token", "eos_token"):
            if name in declared.named:  # a new id would be one that the model has never seen
                self._id_of(declared.named[name])
        self._tokenizer.add_tokens(declared.special)
        return declared.named

    def _id_of(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{self.folder}: the special token {token!r} is not in the vocabulary")
        return token_id

    def _bos_id(self, fallback: int | None) -> int | None:
        """The start token, if `tokenizer.json` adds it to a text; as transformers, which reads no `add_bos_token` beside it."""
        bos = self._id_of(self._named["bos_token"]) if "bos_token" in self._named else fallback
        return bos if self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos] else None

    def _byte_ids(self) -> frozenset[int]:
        """Tokens that are one byte each, where the decoder joins runs of them to characters."""
        if self._decoder is None or self._decoder.decode(["<0x41>"]) != "A":
            return frozenset()
        return frozenset(i for token, i in self._tokenizer.get_vocab().items() if is_byte_token(token))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The tokens of a text. It starts with exactly one BOS if the model uses one, also where the text spells it.

        Without `bos` none is added.

        Special tokens in the text are read as such. No end token is added.

        Raises:
            ValueError: the text is not Unicode, but holds half a character (a byte of a terminal or a file that is no UTF-8).
        """
        ids: list[int] = self._encoding(text).ids
        return ids if not bos or self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text without a BOS, and for each how many characters of the text are over when it ends."""
        encoding = self._encoding(text)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not UTF-8: its character {error.start} is {text[error.start]!r}") from None
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens. Bytes that are no UTF-8 become U+FFFD; in a run of byte tokens, no others: see `byte_tokens`."""
        shown = [i for i in ids if i not in self.special_ids] if skip_special else list(ids)
        if self.byte_ids.isdisjoint(shown):
            return self._tokenizer.decode(shown, skip_special_tokens=False)
        assert self._decoder is not None
        tokens = (token for i in shown if (token := self.token(i)) is not None)
        text: str = self._decoder.decode(list(whole_characters(tokens)))
        return text

    def text_length(self, token_id: int) -> int | None:
        """Characters of a token's text alone, None for an id that the vocabulary does not have. It is remembered: a stream asks at every token."""
        if token_id not in self._text_lengths:
            known = self.token(token_id) is not None
            self._text_lengths[token_id] = len(self.decode([token_id], skip_special=False)) if known else None
        return self._text_lengths[token_id]

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it, None for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The tokens of a conversation as the model's chat template writes it, with exactly one BOS if the model uses one.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.
            variables: what else the template reads, such as `tools` or `enable_thinking`.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that `chat` encodes."""
        return self._render(self._template, messages, dict(add_generation_prompt=add_generation_prompt) | variables)

    def render_answers(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as the template writes it, and where the assistant's words stand in it, as places of characters.

        They are what the template has within `{% generation %}`. In a template without it they are what a message of the assistant
        adds to what stands before it, up to where it is asked to speak.

        Raises:
            ValueError: as `render_chat`; or the template has no such marks, and writes a conversation otherwise when it goes on.
        """
        text = self.render_chat(messages, add_generation_prompt=False)
        marked = self._render(self._marking_template, messages, dict(add_generation_prompt=False))
        if marked == text:
            return text, list(self._added_by_answers(messages, text))
        if re.sub(_MARKS, "", marked) != text:
            raise ValueError("the messages hold U+FDD0 or U+FDD1, which are no characters: leave them out")
        return text, list(_marked_spans(marked))

    def _added_by_answers(self, messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[tuple[int, int]]:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self.render_chat(messages[:i])
                told = self.render_chat(messages[: i + 1], add_generation_prompt=False)
                if not (told.startswith(asked) and text.startswith(told)):
                    raise ValueError(
                        f"the chat template of {self.folder} writes messages otherwise when the conversation goes on: mark the "
                        "assistant's words in it with {% generation %} and {% endgeneration %}"
                    )
                yield len(asked), len(told)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @cached_property
    def _marking_template(self) -> jinja2.Template | None:
        """The template, which puts the assistant's words between marks where it has them in a `{% generation %}` block."""
        return _chat_template(self.folder, self._config, _MarkedGenerationBlock)

    def _render(
        self, template: jinja2.Template | None, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        if template is None:
            raise ValueError(f"{self.folder} has no chat template: it is not a chat model; give it plain text")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f"messages must be a list, got {messages!r}")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"messages[{i}] must have a 'role' (and a 'content'), got {message!r}")
        known = {"tools": None, "documents": None, **self._named, **variables}
        try:
            return template.render(messages=[dict(m) for m in messages], **known)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.folder} refuses these messages: {error}") from error


def _marked_spans(marked: str) -> Iterator[tuple[int, int]]:
    """Where in the text without marks the marked parts stand."""
    place = 0
    for i, part in enumerate(re.split(_MARKS, marked)):
        if i % 2:
            yield place, place + len(part)
        place += len(part)


def has_tokenizer(folder: Path) -> bool:
    return is_gguf(folder) or (folder / TOKENIZER_FILE).is_file()


def no_tokenizer(folder: Path) -> ValueError:
    """The error that says how a folder without a `tokenizer.json` gets one."""
    if (folder / "tokenizer.model").is_file():
        return ValueError(
            f"{folder} has a tokenizer.model but no tokenizer.json. Convert it once: pip install transformers sentencepiece "
            f"tiktoken protobuf; python -c \"from transformers import AutoTokenizer as A; p = '{folder}'; "
            'A.from_pretrained(p).save_pretrained(p)"'
        )
    return ValueError(
        f"{folder} has no tokenizer.json: copy it, and tokenizer_config.json, from the model that this one was made from"
    )


def configured_eos_ids(folder: Path) -> set[int]:
    """The end tokens that `generation_config.json`, or `config.json`, names."""
    generation, model = _read_json(folder / "generation_config.json"), _read_json(folder / "config.json")
    eos = generation.get("eos_token_id", model.get("eos_token_id"))
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _load(folder: Path) -> tokenizers.Tokenizer:
    if not has_tokenizer(folder):
        raise no_tokenizer(folder)
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise ValueError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it writes what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_MARKS = "[\ufdd0\ufdd1]"
"""Two that Unicode keeps for a program's own use: no text has them."""


class _MarkedGenerationBlock(_GenerationBlock):
    """Writes what it holds between two marks."""

    def parse(self, parser: Parser) -> list[Node]:
        before, after = (Output([TemplateData(mark)]) for mark in _MARKS[1:3])
        return [before, *super().parse(parser), after]


def _chat_template(
    folder: Path, config: Mapping[str, Any], generation: type[_GenerationBlock] = _GenerationBlock
) -> jinja2.Template | None:
    """The template, in the environment that transformers gives templates."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if source is None:
        return None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {folder} cannot be read: {error}") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
