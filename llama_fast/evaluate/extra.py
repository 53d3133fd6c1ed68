"""The packages that only evaluation needs."""

from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = ("sacrebleu", "rouge-score", "lm-eval")


@contextmanager
def needed_extra() -> Iterator[None]:
    """Around an import of one of them: where it is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "llama-fast[eval]"') from error
