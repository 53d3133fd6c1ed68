"""What a request asks of the sampler, and when it ends."""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

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
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: only these tokens; None: all.
        banned_token_ids: never these tokens.
        stop: ends the output before the one of these strings that is complete first.
        stop_token_ids: ends the output at these tokens, beside the model's own end tokens.
        ignore_eos: the model's end tokens do not end the output.
        include_stop_str_in_output: the text ends after the stop string, or after the text of the token that ended it.
        skip_special_tokens: special tokens give no text.
        detokenize: False: no text is made, and `stop` cannot be given.
        min_tokens: no end or stop token is chosen before so many tokens, and no stop string that ends in their text counts.
        max_tokens: at most so many tokens; None: until the context is full.
        n: so many outputs, each with a seed of its own.
        logprobs: return the chosen token's log-probability and so many of the likeliest; None: none.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
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
        for name, (fits, text) in _REAL_NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value) or not fits(float(value)):
                raise ValueError(f"{name} must be {text}, got {value!r}")
        for name, (low, or_none) in _INTEGERS.items():
            value = getattr(self, name)
            fits_integer = isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63
            if not fits_integer and not (or_none and value is None):
                raise ValueError(f"{name} must be an integer, at least {low}{' (or None)' * or_none}, got {value!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not be more than max_tokens ({self.max_tokens})")
        for name in ("include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        self._freeze_collections()
        if self.stop and not self.detokenize:
            raise ValueError(f"stop must not be given with detokenize=False: there is no text, got {self.stop!r}")

    def _freeze_collections(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a string or several, none of them empty, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise ValueError(f"logit_bias must be finite (banned_token_ids bans tokens), got {self.logit_bias!r}")
        for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            ids = getattr(self, name)
            object.__setattr__(self, name, None if ids is None else tuple(ids))
            if ids is not None and not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError(f"{name} must be token ids, integers from 0, got {ids!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def ending_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end this request's output, for a model whose end tokens are `eos_ids`."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_ids))

    def check_vocabulary(self, vocab_size: int, eos_ids: Iterable[int] = ()) -> None:
        """Raises ValueError if a token id is outside the vocabulary, or if no token would be left to choose from."""
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            if wrong := [i for i in getattr(self, name) or () if not 0 <= i < vocab_size]:
                raise ValueError(f"{name} must hold token ids under {vocab_size} (the vocabulary), got {wrong[:10]}")
        if self.allowed_token_ids is None and not self.banned_token_ids:
            return
        left = set(range(vocab_size)) if self.allowed_token_ids is None else set(self.allowed_token_ids)
        left -= set(self.banned_token_ids)
        if not left:
            raise ValueError("allowed_token_ids and banned_token_ids leave no token to choose from")
        if self.min_tokens and not left - self.ending_ids(eos_ids):
            raise ValueError("min_tokens must be 0 where allowed and banned tokens leave only such as end the output")

    def seeds(self) -> list[int]:
        """A seed for each of the `n` outputs; the first is the request's own. Without one, from the operating system."""
        base = secrets.randbits(63) if self.seed is None else self.seed
        return [base] + [_derive_seed(base, i) for i in range(1, self.n)]


def _derive_seed(seed: int, i: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest(), "big") >> 1


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
    "logprobs": (0, True),
    "prompt_logprobs": (0, True),
}
