"""Traces by `torch.profiler`: what ran on the GPU, when, and which op's launch it came from."""

import bisect
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .counting import ANNOTATION
from .kernels import Event

T = TypeVar("T")

_ANCHOR = "llama-fast start"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_EXTERNAL = "External id"
_MICRO = 1e-6


@dataclass(frozen=True)
class Trace:
    """What ran on the GPU, in seconds on the clock of `time.perf_counter`.

    Attributes:
        launched: what the host launched by itself.
        graphs: what each replay of a graph ran, in order.
    """

    launched: list[Event]
    graphs: list[list[Event]]

    @property
    def everything(self) -> list[Event]:
        """In order."""
        return sorted(itertools.chain(self.launched, *self.graphs), key=lambda event: event.start)


def traced(call: Callable[[], T], device: torch.device) -> tuple[T, Trace]:
    """Runs `call` under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        result, started = write_trace(call, device, path)
        events = json.loads(path.read_text())["traceEvents"]
    return result, read_trace(events, started)


def write_trace(call: Callable[[], T], device: torch.device, path: str | Path) -> tuple[T, float]:
    """Runs `call` and writes what the profiler saw as a Chrome trace. Returns also when it began, by `time.perf_counter`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for name in ("llama-fast warm-up", _ANCHOR):  # the first range of a process takes long to begin
            started = time.perf_counter()
            with torch.profiler.record_function(name):
                pass
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    partial = Path(path).with_name(Path(path).name + ".partial.json")  # the profiler looks at how a name ends
    profiler.export_chrome_trace(str(partial))
    os.replace(partial, path)
    return result, started


def read_trace(events: list[dict[str, Any]], started: float) -> Trace:
    """From the events of a Chrome trace whose anchor was set at `started`: times are moved so that it lies there.

    What runs on the GPU carries the number of the call that launched it, on the host; an op is known by the range that this call lies in.
    Where that call is of a kind that is not recorded, the host's op that made it has the same "External id".
    """
    spans = [event for event in events if event.get("ph") == "X"]
    anchor = next((event["ts"] for event in spans if event["name"] == _ANCHOR), None)
    if anchor is None:
        raise RuntimeError("the profiler's trace does not hold its own beginning")
    calls = {event["args"]["correlation"]: event for event in spans if event.get("cat") in _LAUNCHES and _number(event)}
    host_ops = {
        event["args"].get(_EXTERNAL): event for event in spans if event.get("cat") == "cpu_op" and "args" in event
    }
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], int(event["name"].removeprefix(ANNOTATION)))
        for event in spans
        if event["name"].startswith(ANNOTATION) and event.get("cat") == "user_annotation"
    )
    launched: list[Event] = []
    graphs: dict[int, list[Event]] = {}
    for event in sorted((event for event in spans if event.get("cat") in _ON_GPU), key=lambda event: event["ts"]):
        number = _number(event)
        call = calls.get(number)
        launch = call or host_ops.get(event.get("args", {}).get(_EXTERNAL, ""))
        start = started + (event["ts"] - anchor) * _MICRO
        op = None if launch is None else _range_of(launch["ts"], ranges)
        found = Event(event["name"], start, event["dur"] * _MICRO, op)
        if call is not None and "GraphLaunch" in call["name"]:
            graphs.setdefault(number, []).append(found)
        else:
            launched.append(found)
    return Trace(launched, list(graphs.values()))


def _number(event: dict[str, Any]) -> int:
    return int(event.get("args", {}).get("correlation", 0))


def _range_of(at: float, ranges: list[tuple[float, float, int]]) -> int | None:
    i = bisect.bisect_right(ranges, (at, float("inf"), 0)) - 1
    return ranges[i][2] if i >= 0 and at <= ranges[i][1] else None
