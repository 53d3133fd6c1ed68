"""A run that is asked to stop: SIGTERM or Ctrl-C let it finish its step and save; a second Ctrl-C ends it at once.

`torchrun` hands a second Ctrl-C on as SIGTERM: so after a Ctrl-C any signal ends it.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, signals are noted in `asked` instead of ending the process. Outside the main thread nothing is noted.

    Attributes:
        asked: the signal that came, None if none did.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
