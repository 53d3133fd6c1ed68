"""What a request has produced: tokens become text, and text ends where it should."""

from dataclasses import dataclass, field
from typing import Literal

from ..decoder.tokenizer import DetokenizedStream, StopStrings, Tokenizer
from .sampling import Logprobs, SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and those of the likeliest tokens by id, from the raw logits."""

    token_id: int
    logprob: float
    top: dict[int, float]

    @classmethod
    def of(cls, logprobs: Logprobs, row: int, token_id: int, count: int) -> "TokenLogprob":
        """That of a row's `token_id`, with the `count` likeliest tokens. `logprobs` are on the host."""
        ids, values = logprobs.top_ids[row, :count].tolist(), logprobs.top[row, :count].tolist()
        return cls(token_id, logprobs.chosen[row].item(), dict(zip(ids, values, strict=True)))


@dataclass
class Completion:
    """What a request has generated; `others` are the second to the last of `n` results, and `outputs` all of them.

    `text` ends before what stopped it, while `token_ids` hold the token that stopped it too. `finish_reason` is "stop" (an end
    token, a stop token or a stop string), "length" (`max_tokens`, or the end of the context), "cancelled", or None while it runs.
    `logprobs` has an entry for each token, `prompt_logprobs` one for each token of the prompt after the first, if asked for.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    others: list["Completion"] = field(default_factory=list, repr=False, compare=False)

    @property
    def outputs(self) -> list["Completion"]:
        """All `n` results."""
        return [self, *self.others]


class Output:
    """A completion that grows token by token. `new_text()` gives what has been settled since it was last asked."""

    def __init__(
        self, completion: Completion, params: SamplingParams, tokenizer: Tokenizer, *, ending_ids: frozenset[int]
    ) -> None:
        self.completion = completion
        self._ending_ids, self._min_tokens = ending_ids, params.min_tokens
        self._detokenizer = DetokenizedStream(tokenizer, completion.prompt_token_ids)
        self._stops = StopStrings(params.stop_strings)
        self._given = 0

    def push(self, token_id: int, logprob: TokenLogprob | None, *, last: bool) -> bool:
        """Takes the next token; `last` says that no more may follow. Returns whether the completion has ended."""
        completion = self.completion
        completion.token_ids.append(token_id)
        if logprob is not None and completion.logprobs is not None:
            completion.logprobs.append(logprob)
        if token_id in self._ending_ids:
            self.end("stop")
        else:
            self._settle(self._detokenizer.push(token_id))
            if last and completion.finish_reason is None:
                self.end("length")
        return completion.finish_reason is not None

    def end(self, reason: FinishReason) -> None:
        """Ends the completion, and settles what was held back."""
        self._settle(self._detokenizer.flush())
        if self.completion.finish_reason is None:
            self.completion.text += self._stops.flush()
            self.completion.finish_reason = reason

    def new_text(self) -> str:
        text = self.completion.text  # once: another thread's step may add to it meanwhile
        start, self._given = self._given, len(text)
        return text[start:]

    def _settle(self, text: str) -> None:
        """Adds text up to the first stop string, which ends the completion. The first `min_tokens` tokens stop nothing."""
        if len(self.completion.token_ids) >= self._min_tokens:
            text = self._stops.push(text)
            if self._stops.found is not None:
                self.completion.finish_reason = "stop"
        self.completion.text += text
