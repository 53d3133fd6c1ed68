"""Result files made up for tests: no figure here was measured."""

from typing import Any

from llama_fast.benchmarks.suite.record import Record, Result, Skipped
from llama_fast.profiler.measure.limits import Limits

H100_MACHINE: dict[str, Any] = {
    "processor": "a CPU", "threads": 16, "commit": "0123456789abcdef", "gpu": "NVIDIA H100 80GB HBM3", "cuda": "13.0",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "liger-kernel": "not installed"},
    "gpu_state": {
        "driver_version": "580.1", "clocks.sm": "1755 MHz", "clocks.mem": "2619 MHz", "clocks.max.sm": "1980 MHz",
        "power.draw": "300 W", "power.limit": "700 W", "temperature.gpu": "50",
    },
}  # fmt: skip
CPU_MACHINE: dict[str, Any] = {
    "processor": "AMD EPYC",
    "threads": 2,
    "commit": None,
    "versions": {"torch": "2.13.0+cpu"},
}
H100_LIMITS = Limits(3.0e12, 2.8e12, {"float32": 50e12, "bfloat16": 700e12, "float16": 690e12}, 4e-6, 1.3e-6, 50 << 20)
CPU_LIMITS = Limits(20e9, 18e9, {"float32": 0.1e12, "bfloat16": 0.4e12, "float16": 1e9}, 2e-6, None, 32 << 20)


def samples(median: float) -> list[float]:
    """Eleven with this median, p20 to p80 from 1 % below to 1 % above it."""
    return [median * (1 + step / 300) for step in (0, 4, -3, 1, -5, 5, -1, 2, -4, 3, -2)]


def result(op: str, shape: str, implementation: str, seconds: float | None, **more: Any) -> Result:
    """Of 100 MB read and 100 MB written, unless told otherwise; without seconds it has failed."""
    given = dict(
        dtype="bfloat16", direction="forward", error=1.5e-3, bound=9e-3, peer_error=1.4e-3,
        read=100_000_000, written=100_000_000, floor_s=200e6 / 2.8e12,
    ) | more  # fmt: skip
    if seconds is None:
        return Result(
            op, shape, implementation=implementation, **{"failure": "FAIL: error 1.0e-01 exceeds 9.0e-03"} | given
        )
    return Result(op, shape, implementation=implementation, samples=samples(seconds), **given)


def record(*results: Result, gpu: bool = True, **more: Any) -> Record:
    """Of an H100 that never was, or of a CPU."""
    machine, limits = (H100_MACHINE, H100_LIMITS) if gpu else (CPU_MACHINE, CPU_LIMITS)
    given: dict[str, Any] = dict(
        settings={"seconds": 1.0}, skipped=[Skipped("rms_norm", "Liger", "liger-kernel is not installed")]
    )
    return Record(machine, limits, results=list(results), **given | more)


def rich_record() -> Record:
    """Several ops, peers and sizes, wins, losses and a failure, as a campaign on a GPU leaves them."""
    results = []
    widths = {2048: "Llama-3.2-1B", 4096: "Llama-3.1-8B", 8192: "Llama-3.1-70B layer"}
    peers = {
        "llama-fast": 0.9,
        "PyTorch": 0.55,
        "torch.compile": 0.8,
        "torch.compile max-autotune": 0.82,
        "Liger": 0.87,
    }
    for width in widths:
        for tokens in (2048, 8192, 32768):
            for direction, factor in (("forward", 1), ("forward + backward", 3)):
                moved = 2 * tokens * width * factor
                floor = 2 * moved / 2.8e12
                for name, share in peers.items():
                    small = 1 - 0.4 * 2048 / tokens
                    seconds = floor / (
                        share * small * (0.9 if factor == 3 and name == "llama-fast" and width == 8192 else 1)
                    )
                    results.append(
                        result(
                            "rms_norm",
                            f"{tokens} x {width}",
                            name,
                            seconds,
                            direction=direction,
                            read=moved,
                            written=moved,
                            floor_s=floor,
                        )
                    )
    for model, (heads, dim) in {"Llama-3.2-1B": (32, 64), "Llama-3.1-8B": (32, 128), "Mistral-7B": (32, 128)}.items():
        for tokens in (2048, 8192, 16384):
            flops = 2 * tokens * tokens * heads * dim
            moved = 2 * tokens * heads * dim
            floor = flops / 700e12
            for name, share in {"llama-fast": 0.55, "PyTorch": 0.5, "SDPA flash": 0.5, "SDPA cuDNN": 0.75}.items():
                seconds = None if name == "llama-fast" and model == "Mistral-7B" and tokens == 8192 else floor / share
                results.append(
                    result(
                        "attention",
                        f"{model}, {tokens} tokens",
                        name,
                        seconds,
                        read=moved,
                        written=moved,
                        flops=flops,
                        floor_s=floor,
                    )
                )
    for model, weights, cache in (("Llama-3.2-1B", 2.472e9, 32768), ("Llama-3.1-8B", 15.01e9, 131072)):
        for context in (1024, 8192, 32768):
            read = int(weights + cache * context)
            for name, share in {
                "llama-fast": 0.8,
                "transformers": 0.1,
                "transformers, static cache + compile": 0.55,
            }.items():
                results.append(
                    result(
                        "generate",
                        f"{model}, batch 1, {context} + 64 tokens",
                        name,
                        read / 3e12 / share,
                        read=read,
                        written=0,
                        flops=2 * read,
                        floor_s=read / 3e12,
                        direction="inter-token latency",
                    )
                )
    return record(*results, warnings=["SM clock moved from 1980 to 1755 MHz during attention"])
