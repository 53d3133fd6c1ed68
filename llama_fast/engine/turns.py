"""Whose turn it is: one thread at a time, in the order in which they come."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_LISTEN_SECONDS = 0.05  # until who stands in line looks around, in case an interrupt kept the one before from calling


class _Ticket:
    """A place in the line: the thread, of which process, that stands there, for as long as it holds `standing`, and where it hears that it is called."""

    def __init__(self) -> None:
        self.process, self.thread = os.getpid(), threading.get_ident()
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
        self._process = os.getpid()

    def take(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, once it is this thread's turn.

        Raises:
            RuntimeError: this thread stands in the line already, and would wait for itself.
        """
        self._leave_parent()
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
            self._remove(ticket)  # a debugger's interrupt can come between the last line of `with` and its end
            first = self._first()
            if first is not None:
                first.called.put(None)

    def _leave_parent(self) -> None:
        """In a forked child only the thread that forked goes on: no other stands in line, and none is left to compute beside it."""
        process, me = os.getpid(), threading.get_ident()
        if self._process == process:
            return
        for ticket in list(self._line):
            if ticket.process != process and ticket.thread != me:
                self._remove(ticket)
        torch.set_num_threads(
            1
        )  # OpenMP would wait for the threads it had in the parent, as PyTorch's data loaders know
        self._process = process

    def _first(self) -> _Ticket | None:
        """Who stands first in line, once the tickets of those who left are gone."""
        for ticket in list(self._line):
            if ticket.standing.locked():
                return ticket
            self._remove(ticket)
        return None

    def _remove(self, ticket: _Ticket) -> None:
        try:  # noqa: SIM105  # `contextlib.suppress` takes three times as long, at every step
            self._line.remove(ticket)
        except ValueError:  # another thread was faster
            pass

    @property
    def mine(self) -> bool:
        """Whether this thread stands in the line: code that runs in the midst of other code (a finalizer, a signal handler) asks."""
        me = threading.get_ident()
        return bool(self._line) and any(ticket.thread == me and ticket.standing.locked() for ticket in list(self._line))
