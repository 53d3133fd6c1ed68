"""An engine in a process of its own, which idles until it is asked: the other end of `process.py`.

`python worker.py ENGINE.py` is run by the Python of the engine's environment, where nothing of this project is installed: so this file
imports nothing of it. ENGINE.py has its `VERSION` and `load(**settings)`, which returns an `Engine`. Each request is a line of JSON on stdin,
each answer one on stdout; what libraries print goes to stderr.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol


class Engine(Protocol):
    """A model that is loaded."""

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """Continues each prompt greedily by exactly `new` tokens.

        Returns the seconds from its start at which token i of all rows was there, and the tokens of each row.
        """

    def logits(self, ids: list[int]) -> Any:
        """The logits after each token of one sequence: numpy's (tokens, vocab), float32."""


def serve(load: Callable[..., Engine], requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers each of `requests`, the first of which loads the model; an error is answered by what it says."""
    engine: Any = None
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        said: dict[str, Any] = {}
        try:
            if do == "load":
                engine = load(**request)
            elif do == "generate":
                said["times"], said["token_ids"] = engine.generate(**request)
            else:
                engine.logits(request["ids"]).tofile(request["file"])
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        answer(said)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=out, flush=True)

    engine = runpy.run_path(sys.argv[1])
    answer({"version": engine["VERSION"]})
    serve(engine["load"], sys.stdin, answer)


if __name__ == "__main__":
    main()
