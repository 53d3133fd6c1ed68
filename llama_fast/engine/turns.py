"""Whose turn it is: one thread at a time, in the order in which they come."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

_Result = TypeVar("_Result")


class _Ticket:
    """A place in the line: the thread that stands there, and where it hears that it is called (in C, which an interrupt leaves whole)."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.called: SimpleQueue[None] = SimpleQueue()


class Turns:
    """A line of threads, of which the first works.

    A lock goes to whoever asks first after its release, so a thread that computes step after step would keep it. And an interrupt
    may leave one locked: here nothing but the line says whose turn it is, and who is interrupted leaves the line.
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
            self._line.append(ticket)
            if self._line[0] is not ticket:
                ticket.called.get()
            return work()
        finally:
            with contextlib.suppress(ValueError):  # interrupted before it stood in the line
                self._line.remove(ticket)
            for first in list(self._line)[:1]:
                first.called.put(None)

    @property
    def mine(self) -> bool:
        """Whether this thread stands in the line: code that runs in the midst of other code (a finalizer, a signal handler) asks."""
        return any(ticket.thread == threading.get_ident() for ticket in list(self._line))
