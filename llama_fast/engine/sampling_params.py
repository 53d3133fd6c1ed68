"""What a request asks of the sampler, and when it ends."""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM: dividing by them overflows


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Names, meanings and defaults are vLLM's, except `max_tokens`.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1: all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: the same, for each time the token is in the output.
        seed: the same seed gives the same tokens; None draws one when the request is submitted.
        logit_bias: added to the logits of these tokens; tokens may be strings, as JSON has them.
        allowed_token_ids: only these tokens; None: all.
        banned_token_ids: never these tokens.
        bad_words: these words are never completed, at the beginning of a text or after a space: of a word of several tokens the last is
            forbidden where the others have just been generated.
        stop: ends the output before the one of these strings that is complete first.
        stop_token_ids: ends the output at these tokens, beside the model's own end tokens.
        ignore_eos: the model's end tokens do not end the output.
        include_stop_str_in_output: the text ends after the stop string, or after the text of the token that ended it.
        skip_special_tokens: special tokens give no text.
        detokenize: False: no text is made, and `stop` cannot be given.
        min_tokens: no end or stop token is chosen before so many tokens, and no stop string that ends in their text counts.
        max_tokens: at most so many tokens; None: until the context is full.
        n: so many outputs, each with a seed of its own.
        logprobs: return the chosen token's log-probability and so many of the likeliest; -1: of all tokens; None: none.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        ValueError: a value is of another kind or out of its range; the message names it. Numbers may be numpy's; None stands for the
            default where that is nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    min_tokens: int = 0
    max_tokens: int | None = 128
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Takes what vLLM takes, and what numpy has for it: the fields then hold plain numbers, tuples and one dict."""
        for name, (fits, text) in _REAL_NUMBERS.items():
            self._set(name, _real(name, getattr(self, name), fits, text))
        for name, (low, or_none) in _INTEGERS.items():
            value = getattr(self, name)
            if value is True and name in _COUNTS:  # OpenAI's and vLLM's way to ask for one
                value = 1
            if not (or_none and value is None):
                expected = f"an integer, at least {low}{' (or None)' * or_none}"
                self._set(name, _integer(name, value, expected, low=low))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not be more than max_tokens ({self.max_tokens})")
        for name in ("stop", "bad_words"):
            self._set(name, _strings(name, getattr(self, name)))
        if not all(word.strip() for word in self.bad_words or ()):
            raise ValueError(f"bad_words must hold more than spaces, got {self.bad_words!r}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop must not be given with detokenize=False: there is no text, got {self.stop!r}")
        for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            self._set(name, _token_ids(name, getattr(self, name)))
        self._set("logit_bias", _biases(self.logit_bias))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def ending_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end this request's output, for a model whose end tokens are `eos_ids`."""
        return frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else frozenset(eos_ids))

    def for_vocabulary(self, vocab_size: int) -> "SamplingParams":
        """The same with a number for -1, which asks for the log-probabilities of all tokens."""
        everything: dict[str, Any] = {name: vocab_size for name in _COUNTS if getattr(self, name) == -1}
        return replace(self, **everything) if everything else self

    def check_vocabulary(
        self, vocab_size: int, eos_ids: Iterable[int] = (), bad_words: Sequence[Sequence[int]] = ()
    ) -> None:
        """Raises ValueError if a token id is outside the vocabulary, or if no token would be left to choose from.

        `bad_words` are those of the request as tokens. A token that none of them ends with must be left: such is always allowed.
        """
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            if wrong := [i for i in getattr(self, name) or () if not 0 <= i < vocab_size]:
                raise ValueError(f"{name} must hold token ids under {vocab_size} (the vocabulary), got {wrong[:10]}")
        if self.allowed_token_ids is None and not self.banned_token_ids and not bad_words:
            return
        left = set(range(vocab_size)) if self.allowed_token_ids is None else set(self.allowed_token_ids)
        left -= set(self.banned_token_ids or ())
        left -= {word[-1] for word in bad_words}
        if not left:
            raise ValueError("allowed_token_ids, banned_token_ids and bad_words leave no token to choose from")
        if self.min_tokens and not left - self.ending_ids(eos_ids):
            raise ValueError("min_tokens must be 0 where allowed and banned tokens leave only such as end the output")

    def seeds(self) -> list[int]:
        """A seed for each of the `n` outputs; the first is the request's own. Without one, from the operating system."""
        base = secrets.randbits(63) if self.seed is None else self.seed
        return [base] + [_derive_seed(base, i) for i in range(1, self.n)]


def _derive_seed(seed: int, i: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest(), "big") >> 1


def _real(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or not fits(number):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def _integer(name: str, value: Any, expected: str, *, low: int = 0) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) < 2**63:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def _token_ids(name: str, ids: Any) -> tuple[int, ...] | None:
    """Also of an array or a tensor. None is none, but of `allowed_token_ids` all."""
    if ids is None:
        return None if name == "allowed_token_ids" else ()
    each = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(each, Iterable) or isinstance(each, str | bytes | Mapping):
        raise ValueError(f"{name} must be token ids, integers from 0, got {ids!r}")
    return tuple(_integer(name, i, "token ids, integers from 0") for i in each)


def _strings(name: str, given: Any) -> tuple[str, ...]:
    given = () if given is None else given
    several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not all(isinstance(text, str) and text for text in several):
        raise ValueError(f"{name} must be a string or several, none of them empty, got {given!r}")
    return several


def _biases(given: Any) -> dict[int, float]:
    """Tokens may be strings of digits, as JSON has them."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"logit_bias must be a mapping of token ids to numbers, got {given!r}")
    biases = {}
    for key, value in (given or {}).items():
        token_id: Any = int(key) if isinstance(key, str) and key.isdecimal() else key
        bias = _real("logit_bias", value, lambda _: True, "finite numbers (banned_token_ids bans tokens)")
        biases[_integer("logit_bias", token_id, "of token ids, integers from 0")] = bias
    return biases


_REAL_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "at least 0 and finite"),
    "top_p": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "more than 0 and finite"),
    "presence_penalty": (lambda _: True, "a finite number"),
    "frequency_penalty": (lambda _: True, "a finite number"),
}
# the least value, and whether None is one too
_INTEGERS = {
    "top_k": (-1, False),
    "seed": (0, True),
    "min_tokens": (0, False),
    "max_tokens": (0, True),
    "n": (1, False),
    "logprobs": (-1, True),
    "prompt_logprobs": (-1, True),
}
_COUNTS = ("logprobs", "prompt_logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")
