"""One lock for all that Triton's front end and LLVM do here, and functions that make a thing once in a process.

A fork waits for the lock: a child whose parent was in the midst of compiling would wait for it for ever.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def once(make: Callable[[], T]) -> Callable[[], T]:
    """`make`, called once, whichever threads ask at the same time. (With `functools.cache` alone each of them makes a thing,
    and all but one are freed while somebody has an address in them.)"""
    made = functools.cache(make)

    @functools.wraps(make)
    def get() -> T:
        with lock:
            return made()

    return get
