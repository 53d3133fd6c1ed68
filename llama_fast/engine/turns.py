"""Whose turn it is: one thread at a time, in the order in which they come."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

_Result = TypeVar("_Result")

_LISTEN_SECONDS = 0.05  # until who stands in line looks around, in case an interrupt kept the one before from calling


class _Ticket:
    """A place in the line: the thread that stands there, for as long as it holds `standing`, and where it hears that it is called."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.standing = threading.Lock()
        self.called: SimpleQueue[None] = SimpleQueue()


class Turns:
    """A line of threads, of which the first works.

    A lock goes to whoever asks first after its release, so a thread that computes step after step would keep it. And an interrupt may
    come anywhere, in a `finally` too. The one thing that CPython leaves whole then is `with` of a lock, so that alone says who still
    stands in line: tickets of those who left are dropped by the next who looks, and who was not called looks by itself.
    """

    def __init__(self) -> None:
        self._line: deque[_Ticket] = deque()  # its methods are atomic

    def take(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, once it is this thread's turn.

        Raises:
            RuntimeError: this thread stands in the line already, and would wait for itself.
        """
        if self.mine:
            raise RuntimeError("this thread is in the midst of a step of this LLM: call it when that has returned")
        ticket = _Ticket()
        try:
            with ticket.standing:
                self._line.append(ticket)
                while self._first() is not ticket:
                    with contextlib.suppress(Empty):
                        ticket.called.get(timeout=_LISTEN_SECONDS)
                return work()
        finally:
            first = self._first()
            if first is not None:
                first.called.put(None)

    def _first(self) -> _Ticket | None:
        """Who stands first in line, once the tickets of those who left are gone."""
        for ticket in list(self._line):
            if ticket.standing.locked():
                return ticket
            with contextlib.suppress(ValueError):  # another thread was faster
                self._line.remove(ticket)
        return None

    @property
    def mine(self) -> bool:
        """Whether this thread stands in the line: code that runs in the midst of other code (a finalizer, a signal handler) asks."""
        me = threading.get_ident()
        return any(ticket.thread == me and ticket.standing.locked() for ticket in list(self._line))
