"""What `fuse` did: which layers it swapped, which it left and why, and how the swapped ones compare."""

import io
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

KINDS = ("norm", "mlp", "rope", "attention", "residual", "head", "loss")
"""The kinds of swaps: norms; gated MLPs; rotary embedding in attention layers; the attention itself, of a decoder layer; the two
residual sums of a decoder layer; the projection to logits, where it is large and on a CPU; the loss of the head."""


@dataclass(frozen=True)
class Swapped:
    """A layer that runs fused kernels. Errors are relative, against float64; None where nothing was checked."""

    name: str
    kind: str
    error: float | None = None
    peer_error: float | None = None


@dataclass(frozen=True)
class Left:
    """A layer that was left alone."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What was swapped and what was left. Prints as a table."""

    mode: str
    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def count(self, kind: str) -> int:
        """The number of swapped layers of one of `KINDS`."""
        return sum(swapped.kind == kind for swapped in self.swapped)

    def largest_error(self, kind: str | None = None) -> Swapped | None:
        """The checked layer, of one kind or of all, that is furthest from the float64 reference."""
        checked = [s for s in self.swapped if s.error is not None and kind in (None, s.kind)]
        return max(checked, key=lambda swapped: swapped.error or 0.0, default=None)

    def table(self) -> Table:
        """One row for each kind of swap, and one for each reason to leave layers alone."""
        table = Table(title=f"llama_fast.fuse, mode={self.mode!r}", title_justify="left")
        for column, justify in (("layers", "left"), ("swapped", "right"), ("left", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("largest error", justify="right")
        table.add_column("original's own", justify="right")
        table.add_column("why left", overflow="fold")
        for kind in KINDS:
            reasons = Counter(left.reason for left in self.left if left.kind == kind)
            if not self.count(kind) and not reasons:
                continue
            worst = self.largest_error(kind)
            errors = [_number(worst.error), _number(worst.peer_error)] if worst else ["", ""]
            table.add_row(kind, str(self.count(kind)), str(sum(reasons.values())), *errors, self._why(kind, reasons))
        return table

    def _why(self, kind: str, reasons: Counter[str]) -> str:
        lines = []
        for reason, count in reasons.most_common():
            first = next(left.name for left in self.left if left.kind == kind and left.reason == reason)
            lines.append(f"{first or 'the model'}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        return "\n".join(lines)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, markup=False, highlight=False).print(self.table())
        return text.getvalue().rstrip()


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
