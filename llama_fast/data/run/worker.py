"""Loaded by the server that forks worker processes, and by nobody else: from then on a worker dies with the run it works for.

A worker that outlived a killed run would write beside those of the next one; one that had no task yet would wait for ever.
"""

import os
import threading
import time

import multiprocess


def _watch_parent() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    while (parent := multiprocess.parent_process()) is None:  # this process is being set up
        time.sleep(0.01)
    parent.join()
    os._exit(1)


os.register_at_fork(after_in_child=_watch_parent)
