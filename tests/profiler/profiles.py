"""Profiles made of invented numbers, for the tests of what shows them: an imagined GPU, an imagined CPU, with noise from a seed."""

import random
import statistics
from collections.abc import Mapping, Sequence

from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.work import Work
from llama_fast.profiler.result import (
    Ablation,
    ContextPoint,
    Distribution,
    Kernel,
    Latency,
    Part,
    Profile,
    Run,
    Trust,
    Waterfall,
)  # fmt: skip

GPU_LIMITS = Limits(
    read_bytes_per_s=3.0e12, copy_bytes_per_s=2.8e12,
    matmul_flops_per_s={"float32": 5e13, "bfloat16": 7e14, "float16": 7e14},
    launch_s=3.1e-6, graph_node_s=1.1e-6, cache_bytes=50 << 20,
)  # fmt: skip
CPU_LIMITS = Limits(
    read_bytes_per_s=2e10, copy_bytes_per_s=1.8e10,
    matmul_flops_per_s={"float32": 2e11, "bfloat16": 9e11, "float16": 3e9},
    launch_s=1.6e-6, graph_node_s=None, cache_bytes=32 << 20,
)  # fmt: skip
LAYERS, HIDDEN, KV, INTERMEDIATE, VOCAB = 16, 2048, 512, 8192, 128256
WEIGHTS = 2 * (LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INTERMEDIATE) + HIDDEN * VOCAB)
KV_BYTES = 2 * 2 * LAYERS * KV
"""Of one token."""

_KERNELS = (  # where, name, calls, elements of weights, share of the limit
    ("attention.qkv", "_norm_qkv_rope_kernel", LAYERS, HIDDEN * (HIDDEN + 2 * KV), 0.71),
    ("attention", "_attention_decode_kernel", LAYERS, 0, 0.22),
    ("attention", "_combine_kernel", LAYERS, 0, 0.04),
    ("attention.out", "_linear_rows_kernel", LAYERS, HIDDEN * HIDDEN, 0.63),
    ("mlp.gate_up", "_norm_swiglu_kernel", LAYERS, 2 * HIDDEN * INTERMEDIATE, 0.86),
    ("mlp.down", "_linear_rows_kernel", LAYERS, HIDDEN * INTERMEDIATE, 0.82),
    ("head", "_linear_rows_kernel", 1, HIDDEN * VOCAB, 0.93),
    ("sampling", "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(...)", 1, 0, 0.1),
    ("not attributed", "Memcpy DtoD (Device -> Device)", 3, 0, 0.0),
)


def noisy(centre: float, count: int, rng: random.Random, noise: float = 0.01) -> Distribution:
    """Samples around `centre`, with an outlier now and then, as clocks give them."""
    return Distribution(
        tuple(centre * (1 + abs(rng.gauss(0, noise)) + (0.5 if rng.random() < 0.02 else 0)) for _ in range(count))
    )


def synthetic(
    *, seed: int = 0, slower: Mapping[str, float] | None = None, machine: str = "gpu", model: str = "example/Imagined-1B",
    against: Sequence[str] = ("transformers", "transformers, static cache + compile"), batches: Sequence[int] = (1,),
) -> Profile:  # fmt: skip
    """A whole profile. `slower` multiplies the time of the kernels at that place of the model, and with them the token's."""
    rng = random.Random(seed)
    limits, unit = (GPU_LIMITS, 1.0) if machine == "gpu" else (CPU_LIMITS, 150.0)
    runs = [
        _run(side, batch, factor, slower or {}, limits, unit, rng)
        for batch in batches
        for side, factor in (("llama-fast", 1.0), *zip(against, (5.2, 1.9, 1.4), strict=False))
    ]
    return Profile(
        model=model, dtype="bfloat16", device="Imagined GPU" if machine == "gpu" else "cpu",
        machine={
            "processor": "Imagined CPU", "threads": 2, "commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"llama-fast": "0.1.0", "torch": "2.13.0", "transformers": "not installed"},
        } | ({"gpu": "Imagined GPU", "gpu_state": {"clocks.sm": "1980 MHz"}} if machine == "gpu" else {}),
        limits=limits, runs=runs, contexts=_contexts(runs, limits, rng),
        ablations=[
            Ablation("norm_qkv_rope", noisy(unit * 1.19e-3, 40, rng), noisy(unit * 1.31e-3, 40, rng)),
            Ablation("norm_swiglu", noisy(unit * 1.19e-3, 40, rng), noisy(unit * 1.24e-3, 40, rng)),
            Ablation("residual", noisy(unit * 1.19e-3, 40, rng), noisy(unit * 1.14e-3, 40, rng)),
        ],
        trust=Trust(
            logit_errors={"llama-fast": 0.0041, "transformers": 0.0043},
            largest_logit_errors={"llama-fast": 0.051, "transformers": 0.055},
            logits_pass=True, common_tokens=126, tokens=128, same_bits=True, warm=True,
            before={"clocks.sm": "1980 MHz", "power.draw": "182 W"} if machine == "gpu" else {},
            after={"clocks.sm": "1965 MHz", "power.draw": "391 W"} if machine == "gpu" else {},
            memory={"weights": WEIGHTS, "kv_cache": 1 << 30, "workspace": 48 << 20, "available": 70 << 30},
            command=f"llama-fast profile {model}",
            warnings=["the spread of ITL is 3.1 %: close what else runs"] if machine == "cpu" else [],
        ),
    )  # fmt: skip


def _run(
    side: str, batch: int, factor: float, slower: Mapping[str, float], limits: Limits, unit: float, rng: random.Random
) -> Run:  # fmt: skip
    kernels = [_kernel(*row, batch, slower, factor, limits, rng) for row in _KERNELS]
    busy = sum(kernel.seconds for kernel in kernels)
    host, gaps = 4e-6 * unit * factor, 1e-4 * unit * (factor - 0.8)
    others = [
        Part("gaps between kernels", gaps, "gap"),
        Part("host between steps", host, "host", "scheduling, inputs of the step"),
        Part("sampling", 9e-6 * unit, "sampling"),
        Part("read-back", 5e-6 * unit, "read-back"),
        Part("detokenising", 2e-6 * unit, "text"),
    ]
    itl = noisy(busy + sum(part.seconds for part in others), 600, rng)
    prompt = [_kernel(*row, 512 * batch, {}, 1.2 * factor, limits, rng) for row in _KERNELS if row[3]]
    ttft = noisy(sum(kernel.seconds for kernel in prompt) + 1.4e-4 * unit * factor, 5, rng)
    e2el = Distribution(tuple(t + 127 * itl.median for t in ttft.samples))
    first = [
        Part("tokenising", 6e-5 * unit, "text"),
        Part("template", 1e-5 * unit, "text"),
        Part("copy to the device", 8e-6 * unit, "host"),
        *_kernel_parts(prompt),
        Part("first sample", 9e-6 * unit, "sampling"),
    ]
    return Run(
        side=side, prompt_tokens=512, new_tokens=128, batch=batch,
        latency=Latency(ttft, itl, noisy(itl.median, 5, rng), e2el, cold_ttft=40 * ttft.median, batch=batch),
        first_token=_adding_up(ttft.median, first), token=_adding_up(itl.median, [*_kernel_parts(kernels), *others]),
        kernels=kernels, prompt_kernels=prompt,
    )  # fmt: skip


def _kernel(
    where: str, name: str, calls: int, weights: int, share: float, rows: int, slower: Mapping[str, float],
    factor: float, limits: Limits, rng: random.Random,
) -> Kernel:  # fmt: skip
    read = 2 * weights * calls + (512 * KV_BYTES * rows if where == "attention" else 0) if share else 0
    work = Work(read, 2 * HIDDEN * rows * calls if share else 0, 2 * weights * calls * rows)
    compute = work.flops / limits.matmul_flops_per_s["bfloat16"]
    floor = max(limits.memory_floor_s(work), compute)
    centre = (floor / share if share else 4e-6) * slower.get(where, 1.0) * (0.7 + 0.3 * factor)
    samples = noisy(centre, 20, rng).samples
    return Kernel(
        name, where, calls, statistics.median(samples), work.read, work.written, work.flops, floor, samples=samples
    )


def _kernel_parts(kernels: Sequence[Kernel]) -> list[Part]:
    floor = Part("floor", sum(min(k.floor, k.seconds) for k in kernels), "floor", "weights and keys at the read rate")
    lost = [Part(kernel.where, kernel.winnable, "inefficiency", kernel.name) for kernel in kernels]
    return [floor, *lost]


def _adding_up(measured: float, parts: list[Part]) -> Waterfall:
    rest = measured - sum(part.seconds for part in parts)
    hidden = [Part("scheduling the next step", 3.1e-5, "host"), Part("launching the graph", 1.2e-5, "host")]
    return Waterfall(measured, [*parts, Part("not attributed", rest, "rest")], hidden)


def _contexts(runs: Sequence[Run], limits: Limits, rng: random.Random) -> list[ContextPoint]:
    points = []
    for run in [run for run in runs if run.batch == 1]:
        for context in (1024, 4096, 16384, 65536):
            kv = KV_BYTES * context
            floor = limits.memory_floor_s(Work(WEIGHTS + kv))
            measured = noisy(run.token.measured + 1.3 * kv / limits.read_bytes_per_s, 40, rng)
            only_computed = context == 65536 and run.side != "llama-fast"
            points.append(ContextPoint(run.side, context, 1, WEIGHTS, kv, floor, None if only_computed else measured))
    return points
