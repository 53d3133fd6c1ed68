"""What decoding must read and how fast that can be: from the shapes of the models and the rates of a machine, nothing else."""

from dataclasses import dataclass

from llama_fast.benchmarks.report.plots import Panel, Picture, Series
from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape
from llama_fast.decoder.config import DecoderConfig
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.work import weight_elements
from llama_fast.reports import units

BFLOAT16_BYTES = 2
EXAMPLES = (LLAMA_3_2_1B, LLAMA_3_1_8B)


@dataclass(frozen=True)
class Rates:
    """Of a machine: bytes read a second and bfloat16 FLOPs a second, and where that is known from (Markdown)."""

    machine: str
    read_bytes_per_s: float
    flops_per_s: float
    source: str

    @classmethod
    def measured(cls, machine: str, limits: Limits) -> "Rates":
        return cls(machine, limits.read_bytes_per_s, limits.matmul_flops_per_s["bfloat16"], "measured")

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which a machine is bound by its arithmetic, and below which by its memory."""
        return self.flops_per_s / self.read_bytes_per_s


PUBLISHED = (
    Rates("NVIDIA H100 SXM", 3.35e12, 989e12, "[published](https://www.nvidia.com/en-us/data-center/h100/)"),
    Rates("NVIDIA H200 SXM", 4.8e12, 989e12, "[published](https://www.nvidia.com/en-us/data-center/h200/)"),
)
"""Dense products: the data sheets' 1979 TFLOP/s count the zeros of sparse ones."""

REPORTED = (
    ("[gpt-fast](https://github.com/meta-pytorch/gpt-fast)", "A100 80 GB", "Llama-3.1-8B bf16", "93.9 tokens/s", 0.69),
    (
        "[torchao](https://github.com/pytorch/ao/tree/main/torchao/quantization)",
        "H100",
        "Llama-3.1-8B bf16",
        "126.9 tokens/s",
        0.57,
    ),
    (
        "[Hazy Research](https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles), one kernel a step",
        "H100",
        "Llama-3.2-1B bf16",
        "under 1 ms a token",
        0.78,
    ),
    (
        "[Mirage](https://github.com/mirage-project/mirage), one kernel a step",
        "A100",
        "Qwen3-8B bf16",
        "9.83 ms a token",
        None,
    ),
)
"""What other projects say of their own decoding at batch 1: who, on what, which model, the figure, its share of the published bandwidth."""


def step_bytes(model: ModelShape) -> int:
    """Of the weights that a step reads, in bfloat16: not the embedding table, of which it reads a row, unless that is the head too."""
    return BFLOAT16_BYTES * weight_elements(DecoderConfig.from_huggingface(model.config()))[0]


def kv_bytes(model: ModelShape) -> int:
    """Of keys and values that a step reads for each token of context, in bfloat16."""
    return BFLOAT16_BYTES * 2 * model.layers * model.kv_heads * model.head_dim


def opening(measured: list[Rates]) -> list[str]:
    """The page's first section, in Markdown."""
    model = EXAMPLES[0]
    first = PUBLISHED[0]
    lines = [
        "## What the hardware allows",
        "",
        "To decode one token at batch 1 a GPU reads every weight once, and every key and value of the context. Its arithmetic takes "
        "a fraction of that time, so no implementation can be faster than",
        "",
        "```",
        "bytes of a step = 2 B x [ layers x ( (heads + 2 kv_heads) x head_dim x hidden     q, k, v",
        "                                    + hidden x heads x head_dim                  output projection",
        "                                    + 3 x hidden x intermediate + 2 x hidden )   gate, up, down; norms",
        "                          + hidden + vocab x hidden ]                            last norm, head",
        "                + 2 B x 2 x layers x kv_heads x head_dim x context               keys and values",
        "floor of a step = bytes of a step / bandwidth of reading",
        "```",
        "",
        f"For {model.name}: 2 B x [ {model.layers} x ( {model.qkv} x {model.hidden} + {model.hidden} x "
        f"{model.heads * model.head_dim} + 3 x {model.hidden} x {model.intermediate} + 2 x {model.hidden} ) + {model.hidden} + "
        f"{model.vocab} x {model.hidden} ] = {1e-9 * step_bytes(model):.3f} GB. The embedding table counts only as the head: a step "
        "reads one row of it.",
        "",
        "| model | weights a step reads | cache a token of context | context at which the cache is as large as the weights |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name}, bfloat16 | {1e-9 * step_bytes(each):.3f} GB | {kv_bytes(each) // 1024} KiB "
        f"| {step_bytes(each) // kv_bytes(each):,} tokens |"
        for each in EXAMPLES
    ]
    header = " | ".join(f"{each.name}, floor of a step without context" for each in EXAMPLES)
    lines += ["", f"| machine | reads | bfloat16 products | ridge point | {header} | rates are |"]
    lines += ["|---|---:|---:|---:|" + "---:|" * len(EXAMPLES) + "---|"]
    lines += [_rates_row(rates) for rates in [*measured, *PUBLISHED]]
    lines += [
        "",
        "The ridge point is where the roofline bends: products / reads, in FLOPs a byte. A step multiplies each weight by one row of "
        "the batch: 2 FLOPs for 2 bytes, 1 FLOP a byte a row. So its matrices are bound by memory up to a batch of about the ridge "
        f"point ({first.flops_per_s / 1e12:.0f} TFLOP/s / {first.read_bytes_per_s / 1e12} TB/s = {first.ridge:.0f} on {first.machine} "
        "as published), and by arithmetic beyond it, as a prompt of more tokens than that is. Keys and values are not shared by a batch: "
        "attention over them stays bound by memory. Published rates are a data sheet's. Where this page gives a share of the "
        "limit, it is of rates measured on that machine.",
        "",
        "What other projects report of their own decoding at batch 1 (on their machines, not measured here):",
        "",
        "| who | GPU | model | figure | share of the published bandwidth |",
        "|---|---|---|---:|---:|",
    ]
    lines += [
        f"| {who} | {gpu} | {what} | {figure} | {'' if share is None else units.percent(share)} |"
        for who, gpu, what, figure, share in REPORTED
    ]
    return lines


def picture(measured: list[Rates]) -> Picture:
    """What no implementation can exceed: tokens a second over context, and products of a step's matrices over the batch."""
    machines = [*measured, *PUBLISHED]
    contexts = tuple(1024 * 2**i for i in range(8))
    panels = []
    for model in EXAMPLES:
        series = (
            Series(
                _label(rates),
                tuple((n, rates.read_bytes_per_s / (step_bytes(model) + n * kv_bytes(model))) for n in contexts),
            )
            for rates in machines
        )
        title = f"{model.name}, bfloat16, batch 1"
        panels.append(
            Panel(
                title, "context, tokens", "tokens/s at most", tuple(series), log_x=True, log_y=True, ticks=contexts[::2]
            )
        )
    batches = tuple(2**i for i in range(12))
    series = (
        Series(_label(rates), tuple((n, 1e-12 * min(rates.flops_per_s, n * rates.read_bytes_per_s)) for n in batches))
        for rates in machines
    )
    panels.append(
        Panel("a step's matrices, bfloat16", "rows of the batch (FLOPs a byte)", "TFLOP/s at most", tuple(series), log_x=True, log_y=True)
    )  # fmt: skip
    return Picture("limits.svg", "What the hardware allows", tuple(panels))


def _label(rates: Rates) -> str:
    return f"{rates.machine}, {'measured' if rates.source == 'measured' else 'published'}"


def _rates_row(rates: Rates) -> str:
    floors = (step_bytes(model) / rates.read_bytes_per_s for model in EXAMPLES)
    cells = " | ".join(f"{units.duration(floor)} = {units.number(1 / floor, 4)} tokens/s" for floor in floors)
    return (
        f"| {rates.machine} | {units.size(rates.read_bytes_per_s)}/s | {units.flops(rates.flops_per_s)}/s "
        f"| {rates.ridge:.0f} FLOP/B | {cells} | {rates.source} |"
    )
