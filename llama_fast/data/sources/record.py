"""What a source writes."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """A document and where it belongs.

    Attributes:
        file: which file it goes to, seen from the source's folder, without the ending.
        number: its place in that file.
        held_out: whether it is kept for evaluation; all documents of a file are, or none.
        about: what else is known of it.
    """

    file: str
    number: int
    text: str
    held_out: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        return {"id": f"{self.file}/{self.number}", "text": self.text, "held_out": self.held_out, **self.about}
