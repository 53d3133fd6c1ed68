"""Generating in a terminal: text as it comes, and a conversation that goes on."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.completion import Completion
from ..engine.llm import LLM
from ..engine.request import Request
from ..engine.sampling import SamplingParams

Write = Callable[[str], None]


@dataclass(frozen=True)
class Streamed:
    """A completion as it was watched: how long the first token took, and all of them; `interrupted` by Ctrl-C."""

    completion: Completion
    first_token_seconds: float
    seconds: float
    interrupted: bool

    def __str__(self) -> str:
        tokens = len(self.completion.token_ids)
        text = f"{tokens} token{'s' if tokens != 1 else ''}, first after {1e3 * self.first_token_seconds:.0f} ms"
        if tokens > 1:
            text += f", then {(tokens - 1) / (self.seconds - self.first_token_seconds):.0f} tokens/s"
        return text + f" ({self.completion.finish_reason})"


def stream(llm: LLM, request: Request, write: Write) -> Streamed:
    """Writes a completion piece by piece. Ctrl-C ends it, and what was generated until then is kept."""
    start = time.perf_counter()
    first = 0.0
    interrupted = False
    try:
        while not request.done:
            llm.step()
            if not first and request.completion.token_ids:
                first = time.perf_counter() - start
            write(request.new_text())
    except KeyboardInterrupt:
        interrupted = True
    finally:
        llm.cancel(request)
    write(request.new_text())
    return Streamed(request.completion, first, time.perf_counter() - start, interrupted)


class Conversation:
    """A chat. Each turn sends all of it; what the engine has computed of it before is found in its cache."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm, self._params, self._system = llm, params, system
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def say(self, text: str, write: Write) -> Streamed:
        """Sends a message and writes the reply as it comes. An interrupted reply stays in the conversation as far as it went.

        Raises:
            ValueError: the conversation has become longer than the context; it is as before the message.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        request = self._llm.submit(self._llm.tokenizer.chat(messages), self._params)
        streamed = stream(self._llm, request, write)
        reply = streamed.completion.text.strip()
        self._messages = [*messages, {"role": "assistant", "content": reply}]
        return streamed
