"""The limits of a machine: rates that it reached, and what they are of."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llama_fast.profiler.measure import limits
from llama_fast.profiler.measure.timing import Timing

CPU = torch.device("cpu")


def test_a_busy_machine_does_not_lower_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most samples were taken while it had something else to do: shares of a limit from their median would be too large."""

    def timed(calls: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        return {name: Timing((*9 * (3.0,), 1.0)) for name in calls}

    monkeypatch.setattr(limits, "time_interleaved", timed)
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 1 << 20)
    measured = limits.measure_limits(CPU, quick=True)
    elements = (1 << 26) // 4
    assert (measured.read_bytes_per_s, measured.copy_bytes_per_s) == (4 * elements, 8 * elements)
    assert measured.matmul_flops_per_s == {"float32": 2 * 1024**3, "bfloat16": 2 * 1024**3, "float16": 2 * 256**3}
    assert measured.launch_s > 0 and measured.graph_node_s is None


def test_the_faster_product_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's packed layout has twice the float32 rate of PyTorch's own product on some CPUs, and models use it there."""

    def timed(calls: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        for call in calls.values():
            assert call() is not None
        return {name: Timing((1.0 if name == "oneDNN" else 2.0,)) for name in calls}

    monkeypatch.setattr(limits, "time_interleaved", timed)
    monkeypatch.setattr(limits, "_bandwidths", lambda *_: (1.0, 1.0))
    assert limits.measure_limits(CPU, quick=True).matmul_flops_per_s["float32"] == 2 * 1024**3


def test_of_this_machine() -> None:
    measured = limits.measure_limits(CPU, quick=True)
    assert measured.copy_bytes_per_s > 1e8 and 1e8 < measured.read_bytes_per_s < 1e13
    assert all(1e6 < rate < 1e15 for rate in measured.matmul_flops_per_s.values())
