"""The test suite as a part of a campaign: run in groups, each in a process of its own, with what failed kept."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]

Groups = tuple[tuple[str, ...], ...]

GROUPS: dict[str, Groups] = {
    "tests-gpu": (("tests/kernels/test_gpu.py",), ("tests/engine/test_gpu.py",)),
    "tests": (
        ("tests/kernels", "--ignore=tests/kernels/test_gpu.py", "--ignore=tests/kernels/test_binaries.py"),
        ("tests/engine", "tests/decoder", "tests/fusion", "--ignore=tests/engine/test_gpu.py"),
        ("tests/profiler",),
    ),
}
"""By part: what only a GPU can show, and the rest. The binaries are the same where there is none."""

QUICK_GROUPS: Groups = (("tests/kernels/test_parity.py",),)

REPORT_SECONDS = 15.0
"""For pytest to report what it has run, past the deadline."""

_LEAST_SECONDS = 120.0  # for a group that ran out of time in less, the next call tries again
_WORKERS = min(8, os.cpu_count() or 1)
_MOST_CHARACTERS = 1500  # of a failure's text


@dataclass(frozen=True)
class GroupRun:
    """A group's result: numbers of tests, and what failed with the end of its message."""

    group: list[str]
    seconds: float
    passed: int
    failed: int
    skipped: int
    failures: list[str]


@dataclass
class SuiteRuns:
    """The file of the part "tests"."""

    machine: dict[str, Any]
    complete: bool = False
    runs: list[GroupRun] = field(default_factory=list)


def run_tests(
    tests: SuiteRuns, groups: Groups, *, deadline: float,
    save: Callable[[], None], progress: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    """Those of `groups` that `tests` does not have yet, until `deadline` (of `time.monotonic`)."""
    if not (ROOT / "tests").is_dir():
        tests.runs.append(GroupRun([], 0.0, 0, 0, 0, ["this is no checkout: an installed package has no tests"]))
        groups = ()
    for number, group in enumerate(groups):
        if any(run.group == list(group) for run in tests.runs):
            continue
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return
        progress(" ".join(group), number, len(groups))
        run = _run_group(list(group), seconds)
        if run is None:
            return
        tests.runs.append(run)
        save()
    tests.complete = True
    save()


def _run_group(group: list[str], seconds: float) -> GroupRun | None:
    """What ran of it within `seconds`; None if it did not end and had so little time that another call should try."""
    parallel = ["-n", str(_WORKERS)] if importlib.util.find_spec("xdist") and _WORKERS > 1 else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *group, f"--junitxml={report}",
            "--continue-on-collection-errors",  # a file that lacks a package must not cost the others
        ]  # fmt: skip
        status = _status(subprocess.Popen(command, cwd=ROOT, preexec_fn=_hear_interrupts), seconds)
        if status is None and seconds < _LEAST_SECONDS:
            return None
        seconds = time.monotonic() - start
        run = read_report(group, seconds, report) if report.exists() else GroupRun(group, seconds, 0, 0, 0, [])
    if status in (0, 1):  # all passed, or tests failed
        return run
    problem = f"did not end within {seconds:.0f} s" if status is None else f"ended with status {status}"
    return replace(run, failed=run.failed + 1, failures=[*run.failures, f"pytest {problem}"])


def _hear_interrupts() -> None:
    """A shell starts what runs in the background deaf to Ctrl-C, and what that starts inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _status(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """None: it did not end. It is interrupted then, as by Ctrl-C: pytest still reports what it has run."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(REPORT_SECONDS)
        return None
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def read_report(group: list[str], seconds: float, report: Path) -> GroupRun:
    """What a junit file says."""
    # one that was interrupted stands there without a name
    cases = [case for case in ElementTree.parse(report).iter("testcase") if case.get("name")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = []
    for case in cases:
        broken = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if broken is not None:
            text = broken.text or broken.get("message") or ""
            failures.append(f"{case.get('classname')}::{case.get('name')}\n{text[-_MOST_CHARACTERS:]}")
    return GroupRun(group, seconds, len(cases) - skipped - len(failures), len(failures), skipped, failures)
