"""datatrove's executors: here, on Slurm or on Ray. Each returns when every task is complete, and skips those that were."""

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import multiprocess
import multiprocess.connection
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from ..config import Executor

_POLL_SECONDS = 5.0


def execute(steps: Sequence[PipelineStep], *, tasks: int, work: Path, settings: Executor, workers: int) -> None:
    """Runs `steps` as a pipeline in `tasks` parts, each of which is done once however often this is called.

    Args:
        work: folder for datatrove's logs and its marks of what is complete.
        workers: processes at a time on this machine.

    Raises:
        ValueError: the executor cannot be used here, or has given up; a task was killed.
        ValueError, OSError: of a task, such as a full disk.
    """
    work.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = dict(pipeline=list(steps), tasks=tasks, logging_dir=str(work))
    if settings.kind == "local":
        with _only_logged_in_files():
            _Local(workers=min(workers, tasks), **common).run()
    elif settings.kind == "slurm":
        _run_on_slurm(common, work, settings)
    else:
        if not find_spec("ray"):
            raise ValueError('the executor ray needs Ray, which is not installed: pip install "ray[default]"')
        executor = RayPipelineExecutor(**common | settings.ray)
        executor.run()
        left = executor.get_incomplete_ranks(skip_completed=True)
        if left:  # it gives up on a task after three tries, and says so in a log
            raise ValueError(
                f"Ray left {len(left)} of {tasks} tasks incomplete: see the logs in {work}; run the same command again to repeat those alone"
            )


class _Local(LocalPipelineExecutor):  # type: ignore[misc]
    """One process is this one. Several are one for each task: datatrove's pool waits for ever for a worker that was killed."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                copy.deepcopy(self)._run_for_rank(rank)
            return
        context = multiprocess.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.worker", "llama_fast.data.steps.filters"])
        running: dict[Any, tuple[int, Any]] = {}
        try:
            while ranks or running:
                while ranks and len(running) < self.workers:
                    ours, theirs = context.Pipe(duplex=False)
                    task = context.Process(target=self._task, args=(ranks[0], theirs))
                    task.start()
                    theirs.close()  # so that ours ends when the task does
                    running[ours] = (ranks.pop(0), task)
                for ended in multiprocess.connection.wait(running):
                    self._finish(ended, *running[ended])
                    running.pop(ended)
        finally:
            for _, task in running.values():
                task.kill()

    def _task(self, rank: int, result: Any) -> None:
        """In a process of its own, which says nothing on the terminal (each task has a log file), and leaves Ctrl-C to ours."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with _only_logged_in_files():
                self._run_for_rank(rank)
            result.send(None)
        except Exception as error:
            result.send(_portable(error))

    def _finish(self, result: Any, rank: int, task: Any) -> None:
        try:
            error = result.recv()
        except EOFError:
            task.join()
            raise ValueError(
                f"the process of task {rank} ended with status {task.exitcode} before its task did. Killed (-9) it is where memory "
                f"runs out: set executor.workers below {self.workers}, and run the same command again"
            ) from None
        task.join()
        if error:
            raise error


def _portable(error: Exception) -> Exception:
    """An error as another process can read it: not every one can be made again of what it was pickled as."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        kind = ValueError if isinstance(error, OSError | ValueError) else RuntimeError
        return kind("".join(traceback.format_exception_only(error)).strip())
    if not isinstance(error, OSError | ValueError):  # a mistake of ours: where it was made
        error.add_note("".join(traceback.format_exception(error)))
    return error


@contextlib.contextmanager
def _only_logged_in_files() -> Iterator[None]:
    """What datatrove and tqdm print goes nowhere; the log file of each task has it."""
    logger.remove()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            logger.remove()


def _run_on_slurm(common: dict[str, Any], work: Path, settings: Executor) -> None:
    if missing := {"time", "partition"} - settings.slurm.keys():
        raise ValueError(f"the executor slurm needs {' and '.join(sorted(missing))} in the table executor.slurm")
    logs = str(work / "slurm")
    executor = SlurmPipelineExecutor(**{"slurm_logs_folder": logs, "mail_user": None} | common | settings.slurm)
    try:
        executor.run()
    except FileNotFoundError as error:
        raise ValueError(f"the executor slurm needs {error.filename}, which is not here: run this where jobs are submitted") from None  # fmt: skip
    _wait_for_slurm(executor, work)


def _wait_for_slurm(executor: PipelineExecutor, work: Path) -> None:
    """Until all tasks are complete, or no job is left that could complete them."""
    job = str(executor.job_id)
    while executor.get_incomplete_ranks(skip_completed=True):
        queued = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True).stdout.strip()
        if not queued and (left := executor.get_incomplete_ranks(skip_completed=True)):
            raise ValueError(
                f"Slurm's job {job} ended with {len(left)} of {executor.world_size} tasks incomplete: see the logs in {work}; "
                "run the same command again to repeat those alone"
            )
        time.sleep(_POLL_SECONDS)


def processors() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else multiprocessing.cpu_count()
