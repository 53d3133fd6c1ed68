"""What a LLaMA is used for: to sum up, translate, answer and complete texts, all greedily and in batches.

    llm = LLM("path-or-hub-id")
    print(summarize(llm, [text])[0])

A task is a prompt (`prompts`), a rule where the output ends, and what is done to it. A text longer than the context is cut (`pieces`).
`rows` reads and writes files of many.
"""

from .answers import answer
from .completions import complete
from .summaries import summarize
from .translations import translate

__all__ = ["answer", "complete", "summarize", "translate"]
