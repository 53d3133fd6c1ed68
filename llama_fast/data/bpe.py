"""A byte-level BPE tokenizer from text, in a folder that transformers and `llama_fast.LLM` load alike.

Byte-level: the vocabulary begins with the special tokens and the 256 bytes, so every string of Unicode has tokens and comes back
from them. Text is split before merging by Llama 3's pattern, which sets words with the sign before them, up to three digits, and
runs of line breaks apart: on Shakespeare's plays 4,096 tokens reach 3.25 characters each, 3.11 with GPT-2's pattern.

The same texts in the same order give the same files, byte for byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from llama_fast.decoder.gguf.file import is_gguf
from llama_fast.decoder.gguf.tokenizer import read_tokenizer
from llama_fast.decoder.tokenizer import TOKENIZER_FILE, Tokenizer, has_tokenizer, no_tokenizer

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('roles are system, user and assistant, got ' + message['role']) }}
{%- endif %}
{{- '<|' + message['role'] + '|>\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}
{{- message['content'] }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class BpeConfig:
    """What a tokenizer is to be.

    Attributes:
        vocab_size: tokens at most, the special ones and the 256 bytes among them. Little text gives fewer.
        add_bos: whether a text starts with BOS. A document of a shard ends with EOS either way.
        special_tokens: more of them, after BOS, EOS, PAD and the three roles of a chat.
        chat_template: Jinja, as transformers reads it; None for a tokenizer that knows no conversations.
    """

    vocab_size: int = 4096
    add_bos: bool = True
    special_tokens: tuple[str, ...] = ()
    chat_template: str | None = CHAT_TEMPLATE

    def __post_init__(self) -> None:
        special = self.all_special_tokens
        if len(set(special)) < len(special) or "" in special:
            raise ValueError(f"special_tokens must differ from each other and from {special[:6]}, and none be empty")
        least = len(special) + 256
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size must be at least {least} ({len(special)} special tokens and 256 bytes), got {self.vocab_size}"
            )

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        return (BOS, EOS, PAD, *ROLES, *self.special_tokens)


def train_tokenizer(texts: Iterable[str], folder: str | Path, config: BpeConfig | None = None) -> Tokenizer:
    """Trains a tokenizer and writes it to `folder`, in place of one that is there. A run that was interrupted changes nothing.

    Raises:
        ValueError: there is no text; a text holds half a character; `folder` holds other things than a tokenizer.
        OSError: `folder` cannot be written.
    """
    config = config or BpeConfig()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(config.all_special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    if config.add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    named = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "extra_special_tokens": [*ROLES, *config.special_tokens],
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {TOKENIZER_FILE: backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(named, indent=2)}
    if config.chat_template is not None:
        files["chat_template.jinja"] = config.chat_template
    return _write(Path(folder), {name: content.encode() for name, content in files.items()})


def copy_tokenizer(source: str | Path, folder: str | Path) -> Tokenizer:
    """Copies the tokenizer of a model's folder, or the `tokenizer.json` in it and what stands beside that, to `folder`.

    That of a .gguf file is written as the files that transformers has for it.

    Raises:
        ValueError: as `tokenizer_files`.
        OSError: `folder` cannot be written.
    """
    files = tokenizer_files(source)
    contents = _files_of_gguf(files[0]) if is_gguf(files[0]) else {file.name: file.read_bytes() for file in files}
    return _write(Path(folder), contents)


def tokenizer_files(source: str | Path) -> list[Path]:
    """What `copy_tokenizer` copies.

    Raises:
        ValueError: `source` has no `tokenizer.json`, or one that cannot be read.
    """
    source = Path(source)
    if source.name == TOKENIZER_FILE:
        source = source.parent
    if is_gguf(source):
        Tokenizer(source)
        return [source]
    if not has_tokenizer(source):
        raise no_tokenizer(source)
    Tokenizer(source)  # says what is wrong with it
    return [source / name for name in _FILES if (source / name).is_file()]


def _files_of_gguf(path: Path) -> dict[str, bytes]:
    read = read_tokenizer(path)
    config = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast", **read.named}
    files = {
        TOKENIZER_FILE: read.backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps({"eos_token_id": list(read.eos_ids)}, indent=2),
    }
    if read.chat_template is not None:
        files["chat_template.jinja"] = read.chat_template
    return {name: content.encode() for name, content in files.items()}


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides which tokens a text has. Tokenizers that differ in their padding or chat template share it."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def _checked(texts: Iterable[str]) -> Iterator[str]:
    number = -1
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number} is not Unicode: its character {error.start} is {text[error.start]!r}, half of a pair"
            ) from None
        yield text
    if number < 0:
        raise ValueError("there is no text to train a tokenizer on")


def _write(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    """Puts a folder of these files where `folder` is, in one move."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {*_FILES}):
        raise ValueError(f"{folder} holds other things than a tokenizer: name a new folder")
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, content in files.items():
        (unfinished / name).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return Tokenizer(folder)
