"""A tokenizer built from a GGUF file's metadata; its ids are those of llama.cpp.

    gpt2     byte-level BPE with merges; `tokenizer.ggml.pre` names the rule by which a text is cut to words before
    llama    SentencePiece's BPE: pieces with scores, no merges, no words, bytes where no piece fits

In `llama` those two neighbours are joined whose joined piece has the highest score, the leftmost of equals. A list of merges in
the order of the scores does the same, as long as no two pieces share one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .file import open_file

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_CUT_OUT = (_UNKNOWN, _CONTROL, _USER_DEFINED)
_SPACE = "▁"
# Tokens that end a turn or a text, whatever their type and beside those that the metadata names, as in llama.cpp
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "</s>", "<|end_of_text|>",
    "<EOT>", "_<EOT>",
)  # fmt: skip

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rules of cutting to words by their names: each pattern cuts what those before it have left whole
_RULES = {
    name: patterns
    for names, patterns in (
        (
            "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2 dbrx smaug-bpe",
            [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
        ),
        (
            "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan",
            [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST],
        ),
        ("smollm starcoder refact command-r codeshell exaone minerva-7b", [r"\p{N}", _GPT2]),
        ("gpt-2 phi-2 mpt olmo jais exaone4 trillion mellum", [_GPT2]),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    )
    for name in names.split()
}
# With these a word that is a token is taken as it is, whatever the merges, and BOS begins a text unless the file says otherwise
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"}


@dataclass(frozen=True)
class GGUFTokenizer:
    """`backend` begins a text with BOS if the model uses one; `named` tokens and `chat_template` are for the chat template."""

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]  # the text of `bos_token` and `eos_token`
    chat_template: str | None
    eos_ids: Sequence[int]


def read_tokenizer(path: Path) -> GGUFTokenizer:
    """The tokenizer in a file. No end token is added to a text, whatever `add_eos_token` says: a prompt goes on.

    Raises ValueError for a kind of tokenizer or a rule that is not known here, naming it.
    """
    metadata = open_file(path).metadata
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = keys.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model must be gpt2 or llama, got {kind!r}")
    try:
        # as llama.cpp calls those without a text, which would not be unique
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(keys["tokens"])]
        types = keys.get("token_type", [_NORMAL] * len(tokens))
        backend = _byte_level(tokens, keys) if kind == "gpt2" else _sentencepiece(tokens, types, keys)
        _add_special(backend, tokens, types)
    except KeyError as error:
        raise ValueError(f"{path} has no tokenizer.ggml.{error.args[0]}") from error
    except Exception as error:  # the library raises plain Exception for every fault of a vocabulary
        raise ValueError(f"the tokenizer of {path} cannot be built: {error}") from error
    ids = _named_ids(path, keys, len(tokens))
    if "bos" in ids and keys.get("add_bos_token", kind == "llama" or keys.get("pre") in _WHOLE_WORDS):
        begin = processors.TemplateProcessing(single=["bos", "$A"], special_tokens=[("bos", ids["bos"])])
        backend.post_processor = begin
    ends = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    return GGUFTokenizer(
        backend=backend,
        named={f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids},
        chat_template=metadata.get("tokenizer.chat_template"),
        eos_ids=sorted(ends | {i for i, token in enumerate(tokens) if token in _ENDS}),
    )


def _named_ids(path: Path, keys: Mapping[str, Any], size: int) -> dict[str, int]:
    """The tokens that the metadata names; those of `llama` have a place of their own where it does not."""
    ids = {"bos": 1, "eos": 2} if keys["model"] == "llama" else {}
    ids |= {name: keys[key] for name in ("bos", "eos", "eot", "eom") if (key := f"{name}_token_id") in keys}
    for name, token_id in ids.items():
        if token_id >= size:
            raise ValueError(f"{path}: {name}_token_id is {token_id}, and there are {size} tokens")
    return ids


def _byte_level(tokens: list[str], keys: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pre = keys.get("pre", "default")
    if pre not in _RULES:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(_RULES)}, got {pre!r}")
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    model = models.BPE(_vocabulary(tokens), merges, ignore_merges=pre in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _RULES[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], types: list[int], keys: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocabulary = _vocabulary(tokens)
    # a special token is cut out of a text before it is read, but not one with spaces, which are written as such by then
    met = [piece for piece, type_ in zip(tokens, types, strict=True) if type_ not in _CUT_OUT or _SPACE in piece]
    merges = list(
        _merges(sorted(met, key=lambda piece: -keys["scores"][vocabulary[piece]]), vocabulary, keys["scores"])
    )
    unknown = tokens[keys.get("unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    prefix = keys.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*[normalizers.Prepend(_SPACE)] * prefix, normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * prefix]
    )
    return backend


def _merges(ranked: Iterable[str], vocabulary: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Every way to join two pieces to one of `ranked`, which begin with the best. (The order of those to one does not matter.)"""
    before = None
    for piece in ranked:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        if pairs and before is not None and scores[vocabulary[before]] == scores[vocabulary[piece]]:
            raise ValueError(f"its pieces {before!r} and {piece!r} have one score, which is not supported")
        before = piece if pairs else before
        yield from pairs


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ValueError(f"its token {twice!r} is there twice")
    return vocabulary


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are cut out of a text before all else; those that the user defined are shown when it is decoded."""
    for token, type_ in zip(tokens, types, strict=True):
        if token in _ENDS or type_ in _CUT_OUT:
            shown = type_ == _USER_DEFINED and token not in _ENDS
            backend.add_tokens([AddedToken(token, special=not shown, normalized=False)])
