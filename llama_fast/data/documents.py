"""What flows through the steps: datatrove's documents, and what is said about those that are not kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from datatrove.data import Document as Document


@dataclass(frozen=True)
class Removed:
    """A step's verdict that a document is not kept."""

    reason: str


@dataclass(frozen=True)
class Fault:
    """What could not be read: a line of a file, or with no line the rest of the file."""

    file: str
    line: int | None
    reason: str


Function: TypeAlias = Callable[[Document], Document | Removed]
"""A step of ours: it may change the document it is given."""


def byte_length(document: Document) -> int:
    """Bytes of the text in UTF-8."""
    return len(document.text.encode())
