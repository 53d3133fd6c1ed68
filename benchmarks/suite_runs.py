"""The test suite as a part of a campaign: run in groups, each in a process of its own, with what failed kept."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

GROUPS = (
    ("tests/kernels/test_gpu.py", "tests/engine/test_gpu.py"),
    ("tests/kernels", "--ignore=tests/kernels/test_gpu.py", "--ignore=tests/kernels/test_binaries.py"),
    ("tests/engine", "tests/fuse", "--ignore=tests/engine/test_gpu.py"),
    ("tests/profiler",),
)
"""What needs a GPU first. The binaries are the same where there is none."""

QUICK_GROUPS = (("tests/kernels/test_parity.py",),)

_LEAST_SECONDS = 120.0  # for a group that ran out of time in less, the next call tries again
_WORKERS = 8
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
    tests: SuiteRuns,
    *,
    quick: bool,
    deadline: float,
    save: Callable[[], None],
    progress: Callable[[str, int, int], None],
) -> None:
    """The groups that `tests` does not have yet, until `deadline` (of `time.monotonic`)."""
    groups: tuple[tuple[str, ...], ...] = QUICK_GROUPS if quick else GROUPS
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
        run = _run_group(list(group), seconds, workers=1 if quick else _WORKERS)
        if run is None and seconds < _LEAST_SECONDS:
            return
        tests.runs.append(
            run or GroupRun(list(group), seconds, 0, 1, 0, [f"the group did not end within {seconds:.0f} s"])
        )
        save()
    tests.complete = True
    save()


def _run_group(group: list[str], seconds: float, *, workers: int) -> GroupRun | None:
    """None: it did not end in time."""
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *parallel,
            *group,
            f"--junitxml={report}",
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode not in (0, 1):  # not even the tests' failures: they crashed, or were not found
            return GroupRun(group, time.monotonic() - start, 0, 1, 0, [f"pytest ended with status {done.returncode}"])
        return read_report(group, time.monotonic() - start, report)


def read_report(group: list[str], seconds: float, report: Path) -> GroupRun:
    """What a junit file says."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = []
    for case in cases:
        broken = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if broken is not None:
            text = broken.text or broken.get("message") or ""
            failures.append(f"{case.get('classname')}::{case.get('name')}\n{text[-_MOST_CHARACTERS:]}")
    return GroupRun(group, seconds, len(cases) - skipped - len(failures), len(failures), skipped, failures)
