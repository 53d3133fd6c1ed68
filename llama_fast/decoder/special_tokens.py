"""Tokens that the files beside `tokenizer.json` declare, as transformers reads them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# each is a list of tokens, or an object of named ones
_COLLECTIONS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class DeclaredTokens:
    """What the files say.

    Attributes:
        named: `bos_token` and the like, each as its text.
        added: tokens to add to the vocabulary, in the order of the ids they are given.
        special: tokens to add after these, because they are named or listed as special.
    """

    named: dict[str, str]
    added: list[AddedToken]
    special: list[AddedToken]

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        special_map: Mapping[str, Any],
        added_ids: Mapping[str, int],
        *,
        known: Collection[str],
    ) -> "DeclaredTokens":
        """From `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

        A config with `added_tokens_decoder` says all, also how tokens are to be treated that are `known` as added ones already; and
        the others, which are older, nothing.
        """
        ids = config.get("added_tokens_decoder")
        sources = [config, special_map] if ids is None else [config]
        named = {name: token for source in sources for name, token in _named(source)}
        listed = [token for source in sources for token in _listed(source)]
        texts = {token.content for token in (*named.values(), *listed)}
        if ids is None:
            new = sorted(added_ids.keys() - known, key=added_ids.__getitem__)
            added = [_added(text, special=text in texts) for text in new]
        else:
            names = {token.content for token in named.values()}
            in_order = [token for _, token in sorted(ids.items(), key=lambda item: int(item[0]))]
            added = [
                _added(token, special=token.get("special", False) or token["content"] in names) for token in in_order
            ]
        known = {*known, *(token.content for token in added)}
        special = {token.content: token for token in (*named.values(), *listed) if token.content not in known}
        return cls({name: token.content for name, token in named.items()}, added, list(special.values()))


def _added(token: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """A token from its text, or from an object with its `content` and how it is matched."""
    flags = {} if isinstance(token, str) else {key: token[key] for key in _FLAGS if key in token}
    return AddedToken(token if isinstance(token, str) else token["content"], special=special, **flags)


def _named(source: Mapping[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    collections = [source[key] for key in _COLLECTIONS if isinstance(source.get(key), Mapping)]
    alone = {name: token for name, token in source.items() if name.endswith("_token")}
    for name, token in (item for tokens in (alone, *collections) for item in tokens.items()):
        if _is_token(token):
            yield name, _added(token, special=True)


def _listed(source: Mapping[str, Any]) -> Iterator[AddedToken]:
    for key in _COLLECTIONS:
        if isinstance(source.get(key), list):
            yield from (_added(token, special=True) for token in source[key] if _is_token(token))


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, Mapping) else value, str)
