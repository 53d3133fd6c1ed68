"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that ends a text, and holds back what could be the start of one.

    It is the one that is complete first; of those that end at the same character, the first of the list. How the text is cut into
    pieces changes nothing.

    Args:
        stops: the strings, none of them empty.
        include: the text ends after the stop string, not before it.

    Attributes:
        found: the stop string that has ended the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str, *, may_end: bool = True) -> str:
        """The text that is certain to be kept. After a stop string was `found` there is no more of it.

        Args:
            piece: what comes next.
            may_end: whether a stop string that ends in this piece counts. One that ends in a later piece may begin here.
        """
        if not self._stops:
            return piece
        if self.found is not None:
            return ""
        text = self._held + piece
        if may_end and (ends := self._ends(text)):
            end, which = min(ends)
            self.found, self._held = self._stops[which], ""
            return text[: end if self._include else end - len(self.found)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _ends(self, text: str) -> list[tuple[int, int]]:
        """Where each stop string that ends after what was held back does so first, and its place in the list."""
        known = len(self._held)
        found = [(text.find(stop, max(0, known + 1 - len(stop))), len(stop), i) for i, stop in enumerate(self._stops)]
        return [(at + length, i) for at, length, i in found if at >= 0]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a start of `stop`."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
