"""Whether other work took the CPUs while something was measured, and measuring it again if so.

Linux counts for each thread how long it was ready to run while another one had its CPU (the second number of
/proc/PID/task/TID/schedstat). On a quiet machine that is next to nothing, whatever this process does itself. It does
not show what a hypervisor gives to other machines.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MOST_WAITING = 0.05
"""Of the time that was measured: beyond it the parts of a latency are not to be believed."""

_PROC = Path("/proc")
_PAUSE = 0.3  # seconds until a try is repeated: what disturbed it may have ended


def waited_seconds(process: int | str = "self") -> float | None:
    """How long the threads of a process, all together, have waited for a CPU since they began; None where no system tells."""
    waited = []
    for file in (_PROC / str(process) / "task").glob("*/schedstat"):
        try:
            waited.append(1e-9 * int(file.read_text().split()[1]))
        except (OSError, ValueError, IndexError):  # the thread has ended, or the kernel was built without it
            continue
    return sum(waited) if waited else None


def is_busy(share: float | None) -> bool:
    """Whether so much waiting is too much; not if it is not known."""
    return share is not None and share > MOST_WAITING


def mean_share(shares: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


class Patience:
    """Repeats what other work disturbs, `repeats` times in all: on a machine that is never quiet the first ones use them up.

    What is measured is done by this process, or by another whose id is given.
    """

    def __init__(self, repeats: int, process: int | str = "self") -> None:
        self._repeats, self._process = repeats, process

    def undisturbed(self, measure: Callable[[], T]) -> tuple[T, float | None]:
        """What `measure` gave in the try that was disturbed least, and the share of its time in which the process waited for a
        CPU: of all its threads together, 1 at most. None: not known."""
        tries = [_measured(measure, self._process)]
        while self._repeats and is_busy(tries[-1][1]):
            self._repeats -= 1
            time.sleep(_PAUSE)
            tries.append(_measured(measure, self._process))
        return min(tries, key=lambda each: each[1] or 0.0)


def _measured(measure: Callable[[], T], process: int | str) -> tuple[T, float | None]:
    before, start = waited_seconds(process), time.perf_counter()
    result = measure()
    seconds, after = time.perf_counter() - start, waited_seconds(process)
    if before is None or after is None:
        return result, None
    # a thread that has ended takes what it has waited with it
    return result, min(1.0, max(0.0, after - before) / seconds)
