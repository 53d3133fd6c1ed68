"""`pytest benchmarks/` runs every case of every file on the device that is here; `--quick` runs few sizes for a short time."""

from typing import Any

import pytest

from llama_fast.environment import default_device


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--quick", action="store_true", help="few sizes, little time: whether all works, not how fast it is"
    )


@pytest.fixture
def quick(request: Any) -> bool:
    return bool(request.config.getoption("--quick"))


def pytest_generate_tests(metafunc: Any) -> None:
    """A test for each case of a file and each of its implementations."""
    if {"case", "implementation"} <= set(metafunc.fixturenames):
        cases = metafunc.module.cases(default_device(), quick=bool(metafunc.config.getoption("--quick")))
        tests = [(case, name) for case in cases for name in case.implementations()]
        ids = [
            f"{case.op}: {case.shape}, {str(case.dtype).removeprefix('torch.')}, {case.direction}, {name}"
            for case, name in tests
        ]
        metafunc.parametrize(("case", "implementation"), tests, ids=ids)
