"""Cases that measure nothing: what the command and the campaign do with results, without the time that results take."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llama_fast.benchmarks.peers import Implementations, Unavailable
from llama_fast.benchmarks.suite.record import Result
from llama_fast.profiler.measure.limits import Limits

LIMITS = Limits(2e10, 2e10, {"float32": 1e11, "bfloat16": 2e11, "float16": 1e9}, 1e-6, None, 1 << 20)


@dataclass(frozen=True)
class FakeCase:
    """`before` is called when it is measured. PyTorch takes 2 us, ours 1; a third has a wrong answer, a fourth is not there."""

    op: str = "rms_norm"
    shape: str = "8192 x 4096"
    dtype: torch.dtype = torch.float32
    direction: str = "forward"
    read: int = 1 << 21
    before: Callable[[], None] = field(default=lambda: None, compare=False)

    def implementations(self) -> Implementations:
        def nothing() -> None: ...

        return {"llama-fast": nothing, "PyTorch": nothing, "wrong": nothing, "Liger": Unavailable("not installed")}

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        self.before()

        def result(name: str, **others: object) -> Result:
            return Result(
                self.op, self.shape, str(self.dtype).removeprefix("torch."), self.direction, name,
                read=self.read, flops=1000, floor_s=self.read / 2e10, **others,
            )  # type: ignore[arg-type]  # fmt: skip

        judged = dict(error=1e-7, bound=3e-7, peer_error=1e-7)
        return [
            result("llama-fast", samples=[1e-3, 1.01e-3, 1.02e-3] * 4, **judged),
            result("PyTorch", samples=[2e-3, 2.02e-3, 2.04e-3] * 4, **judged, note="takes 2 GiB"),
            result("wrong", error=0.5, bound=3e-7, failure="FAIL: error 5.0e-01 exceeds 3.0e-07"),
        ]
