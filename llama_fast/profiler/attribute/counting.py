"""Every op of a step: where in the model it runs, what it must do, and on a CPU how long it takes."""

import functools
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.torch_compat import has_kernel_for_key
from ..measure.work import NO_WORK, Work
from .op_work import bound, work_of

ANNOTATION = "llama-fast op "
"""Begins the name of the range in a trace that an op's launches lie in; its number follows."""
FORWARD = "forward"
"""The phase in which the model computes."""


@dataclass(frozen=True)
class Op:
    """A call of an op in a step.

    Attributes:
        name: "aten::mm".
        where: the module it runs in, without the number of its layer ("mlp.down"), or what it belongs to outside of them.
        phase: of the step, as the side names it; "" after the last.
        work: what it must do; none for a view.
        dtype: that its floating-point inputs have.
        seconds: on the host: on a CPU all of it, on a GPU the launch.
        ended: when, on the clock of `time.perf_counter`.
    """

    name: str
    where: str
    phase: str
    work: Work
    dtype: torch.dtype
    seconds: float
    ended: float


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the ops that run under it. Those that are made of others are taken apart, unless they are known.

    What runs between the ops costs them their place in the caches, so little is done there, and the rest by `ops`.

    Args:
        model: whose modules tell where an op runs; hooks are on them while the counter listens.
        annotate: put each op in a range of its own in the trace of a profiler.
        only_time: leave out the work.
    """

    def __init__(self, model: nn.Module, *, annotate: bool = False, only_time: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._annotate, self._only_time = annotate, only_time
        self._names = {module: _folded(name) for name, module in model.named_modules()}
        self._path: list[str] = [""]
        self._calls: list[tuple[Any, str, bool, Work, torch.dtype, float, float]] = []
        self._phases: list[tuple[str, int]] = []
        self._vocab = next((x.shape[0] for name, x in model.named_parameters() if "embed" in name), 0)

    @contextmanager
    def listening(self) -> Iterator["OpCounter"]:
        """Counts, with hooks on all modules, and leaves none."""
        hooks = []
        for module in self._names:
            hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_phase(self, name: str) -> None:
        """For `watch`: the ops since the last phase were of this one."""
        self._phases.append((name, len(self._calls)))

    @property
    def ops(self) -> list[Op]:
        """What was called, in order."""
        phases = [*self._phases, ("", len(self._calls))]
        found: list[Op] = []
        for phase, end in phases:
            for func, path, is_head, work, dtype, start, ended in self._calls[len(found) : end]:
                name = func._schema.name
                where = WHERE.get(phase, "head" if is_head else _where(name, path))
                found.append(Op(name, where, phase, work, dtype, ended - start, ended))
        return found

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._path.append(self._names[module])

    def _leave(self, *_: Any) -> None:
        self._path.pop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if self._annotate:
            with torch.profiler.record_function(f"{ANNOTATION}{len(self._calls)}"):
                out = func(*args, **kwargs)
            start = ended = time.perf_counter()
        else:
            start = time.perf_counter()
            out = func(*args, **kwargs)
            ended = time.perf_counter()
        work, dtype = NO_WORK, torch.float32
        if not self._only_time:
            work, dtype = work_of(func, args, kwargs, out), _dtype(bound(func, args, kwargs), out)
        path = self._path[-1]
        is_head = not path and isinstance(out, Tensor) and out.shape[-1:] == (self._vocab,)
        self._calls.append((func, path, is_head, work, dtype, start, ended))
        return out


_LAYER = "layer"
_BY_OP = {
    "llama_fast::attention": "attention", "llama_fast::attention_decode": "attention",
    "aten::index_copy_": "attention.append", "llama_fast::norm_qkv_rope": "attention.qkv",
    "llama_fast::rope_append": "attention.append", "llama_fast::norm_swiglu": "mlp.gate_up",
    "llama_fast::rotary_angles": "rotary",
}  # fmt: skip
WHERE = {
    "sample": "sampling",
    "read": "read-back",
    "wait": "read-back",
    "launch": "read-back",
    "inputs": "inputs",
    "generate": "generate",
}
"""Where the ops of a phase are that is not the model's."""


def _folded(name: str) -> str:
    """A module's name without the number of its layer: "model.layers.3.mlp.down_proj" is "mlp.down_proj"."""
    name = re.sub(r"^model(\.|$)", "", name)
    if name == "lm_head":
        return "head"
    return re.sub(r"^layers\.\d+\.", "", re.sub(r"^layers\.\d+$", _LAYER, name))


def _where(name: str, path: str) -> str:
    """The module's name; an op that no part of a layer claims is named by what it does."""
    return _BY_OP.get(name, path or "model") if path in ("", _LAYER) else path


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(has_kernel_for_key(func.name(), "CompositeImplicitAutograd"))


def _dtype(arguments: Mapping[str, Any], out: Any) -> torch.dtype:
    tensors = [x for x in (*arguments.values(), out) if isinstance(x, Tensor) and x.is_floating_point()]
    return tensors[0].dtype if tensors else torch.float32


@functools.cache
def counting_seconds(calls: int = 500) -> float:
    """What being called through the counter adds to the seconds of an op: measured with one that does nothing."""
    x, counter = torch.zeros(1), OpCounter(nn.Module(), only_time=True)
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(calls):
            x.unsqueeze(0)
        plain = (time.perf_counter() - start) / calls
        with counter:
            for _ in range(calls):
                x.unsqueeze(0)
    return max(0.0, statistics.median(op.seconds for op in counter.ops) - plain)
