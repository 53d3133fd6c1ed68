"""What every test shares: one device, poisoned memory, and one thread a worker."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace

# keyed by the calls of ops, not by their derivatives: a backward op that has changed would not be seen
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

from collections import Counter

import hypothesis
import pytest
import torch

from llama_fast.environment import implementation_on
from llama_fast.kernels.launch import INTERPRETED
from tests.browser import browser as browser

# the same examples every run: a failure is the code's, not the draw's
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; else the CPU, where ops are PyTorch's, or Triton's in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN (the largest value for integers), so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test's cases only the first and each N-th"
    )
    parser.addoption("--nightly", action="store_true", help="also the cases that are too slow for every change")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = [], []
    cases: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
            left_out.append(item)
            continue
        test = item.nodeid.partition("[")[0]
        (left_out if cases[test] % config.getoption("--every") else kept).append(item)
        cases[test] += 1
    # those that take a minute each come first, or one worker does them alone at the end
    items[:] = sorted(
        kept, key=lambda item: not (item.get_closest_marker("real") or item.path.name == "test_distribution.py")
    )
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the suite runs one worker a core


def pytest_report_header() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    return f"llama-fast: {implementation_on(device).name}"
