"""Text to tokens and back: `tokenizer.json`, chat templates, and text that comes a token at a time."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"  # what decoding gives for bytes that are no character, or not yet one
_PROMPT_CONTEXT = 16  # of a prompt, so many tokens are enough to tell how the text goes on


class Tokenizer:
    """The tokenizer in a model's folder.

    It reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` or `config.json` for
    the end tokens, and `chat_template.jinja`. Only the first must be there.

    Args:
        folder: where the files are.

    Attributes:
        bos_id: the token a text starts with, None if the model uses none.
        eos_ids: the tokens that end a text: the tokenizer's own and those the generation config names.

    Raises:
        ValueError: there is no `tokenizer.json`; a file cannot be read, or names a token that is not in the vocabulary.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tokenizer = _load(self.folder)
        config = _read_json(self.folder / "tokenizer_config.json")
        self._named = _named_tokens(_read_json(self.folder / "special_tokens_map.json") | config)
        self._add_missing(config)
        generation = _read_json(self.folder / "generation_config.json")
        model = _read_json(self.folder / "config.json")
        self.bos_id = self._bos_id(generation.get("bos_token_id", model.get("bos_token_id")))
        eos = generation.get("eos_token_id", model.get("eos_token_id"))
        named = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        own = [self._id_of(self._named["eos_token"])] if "eos_token" in self._named else []
        self.eos_ids = tuple(sorted({*named, *own}))
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_ids = self._byte_ids()
        self._template = _chat_template(self.folder, config)

    def _add_missing(self, config: Mapping[str, Any]) -> None:
        """Tokens that only `tokenizer_config.json` declares; and named ones that the vocabulary has but not as special."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        declared = config.get("added_tokens_decoder", {})
        for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
            if token["content"] not in known:
                keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
                self._tokenizer.add_tokens([tokenizers.AddedToken(**{key: token[key] for key in keys if key in token})])
                known.add(token["content"])
        for name in ("bos_token", "eos_token"):
            text = self._named.get(name)
            if text is not None and text not in known:
                self._id_of(text)
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])

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
        decoder = self._tokenizer.decoder
        if decoder is None or decoder.decode(["<0x41>"]) != "A":
            return frozenset()
        return frozenset(i for token, i in self._tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. It starts with exactly one BOS if the model uses one, also where the text spells it.

        Special tokens in the text are read as such. No end token is added.

        Raises:
            ValueError: the text is not Unicode, but holds half a character (a byte of a terminal or a file that is no UTF-8).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not UTF-8: its character {error.start} is {text[error.start]!r}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

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
        if self._template is None:
            raise ValueError(f"{self.folder} has no chat template: it is not a chat model; give it plain text")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"messages[{i}] must have a 'role' (and a 'content'), got {message!r}")
        known = {"tools": None, "documents": None, **self._named, **variables}
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **known
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.folder} refuses these messages: {error}") from error


def _load(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise ValueError(
                f"{folder} has a tokenizer.model but no tokenizer.json. Convert it once: pip install transformers sentencepiece "
                f"tiktoken protobuf; python -c \"from transformers import AutoTokenizer as A; p = '{folder}'; "
                'A.from_pretrained(p).save_pretrained(p)"'
            )
        raise ValueError(
            f"{folder} has no tokenizer.json: copy it, and tokenizer_config.json, from the model that this one was made from"
        )
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


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, each as its text; in files it is a string, or an object with its `content`."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it writes what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
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
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
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


class DetokenizedStream:
    """Text from tokens that come one at a time. All pieces joined are the text that decoding all tokens at once gives.

    A piece is final: never half a character, and nothing given is taken back. So a run of byte tokens (byte fallback) is given
    when it ends, because one wrong byte makes U+FFFD of the whole run.

    Args:
        tokenizer: whose tokens.
        prompt_ids: the text goes on after these: with them, a leading space that the tokenizer joins to words is kept.
        skip_special: special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        shown = [token_id for token_id in prompt_ids if token_id not in self._skipped]
        # tokens whose text was given, as the context that tells spaces, then those whose text was not yet, or in part
        self._window = shown[-_PROMPT_CONTEXT:]
        self._given = len(self._decode(self._window).removesuffix(_INCOMPLETE))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)

    def _final(self, text: str) -> str:
        """What of the window's text no later token changes: a cut character shows as one U+FFFD at the end."""
        if self._window and self._window[-1] in self._tokenizer.byte_ids:
            return text[: self._given]
        return text.removesuffix(_INCOMPLETE)

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often none."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        final = self._final(text)
        piece, self._given = final[self._given :], max(len(final), self._given)
        if len(final) == len(text):  # all is given: this token alone tells how the text goes on
            self._window, self._given = [token_id], len(self._decode([token_id]))
        return piece

    def flush(self) -> str:
        """The rest of the text, once no more tokens come; what is still incomplete becomes U+FFFD."""
        piece = self._decode(self._window)[self._given :]
        self._given += len(piece)
        return piece


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what could be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain to stand before any stop string. After one was `found` there is no more of it."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            at, self.found = min(ends)
            self._held = ""
            return text[:at]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a start of `stop`."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
