"""datatrove's executors: here, on Slurm or on Ray. Each returns when every task is complete, and skips those that were."""

import contextlib
import copy
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import multiprocess
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
        ValueError: the executor cannot be used here, or has given up.
        OSError: of a task, such as a full disk.
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
    """One process is this one. Several say nothing on the terminal (each task has a log file), and leave Ctrl-C to us."""

    def run(self) -> None:
        if self.workers == 1:
            for rank in self.get_incomplete_ranks():
                copy.deepcopy(self)._run_for_rank(rank)
            return
        before = multiprocess.get_start_method(allow_none=True)
        multiprocess.set_forkserver_preload([f"{__package__}.worker", "llama_fast.data.steps.filters"])
        multiprocess.set_start_method("forkserver", force=True)  # datatrove's manager too: forked, it would outlive us
        try:
            super().run()
        finally:
            multiprocess.set_start_method(before, force=True)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        if multiprocess.parent_process() is None:
            return super()._run_for_rank(rank, local_rank, node_rank)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with _only_logged_in_files():
            return super()._run_for_rank(rank, local_rank, node_rank)


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
