"""What a run says: what it is and what it will take before its first step, and how it goes."""

import os
from collections.abc import Iterator, Sequence

import torch

from ..engine.memory import available_bytes
from ..profiler.measure.work import training_flops
from ..reports.units import flops, percent, size, span
from .config import TrainConfig
from .memory import Memory, sums_at_once, training_memory
from .metrics import StepMetrics
from .model import TrainedDecoder
from .ranks import Layout
from .speed import Peak


def before(
    config: TrainConfig, model: TrainedDecoder, *, rows_per_epoch: int, layout: Layout, peak: Peak | None, device: torch.device
) -> Iterator[str]:  # fmt: skip
    """Parameters, tokens, time and memory.

    The time is that of the FLOPs alone at the machine's rate of products: no run takes less. How much more is known after the first
    steps, which are the same work; a step made beforehand to be timed would keep a large model waiting for the same answer.
    """
    batch, steps = config.batch, config.schedule.steps
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    yield (
        f"{count:,} parameters{f', {trained:,} of them trained' if trained < count else ''}; {steps:,} steps of {batch.tokens:,} tokens, {steps * batch.tokens:,} in all: "
        f"{steps * batch.rows_per_step / rows_per_epoch:.3g} epochs"
    )
    work = training_flops(model.config, batch.sequence_length, frozen=config.lora is not None) * batch.tokens
    if peak is not None:
        yield (
            f"at least {span(steps * work / peak.flops_per_s)}: {flops(work)} a step at {flops(peak.flops_per_s)}/s, "
            f"{peak.source}; MFU is a share of that"
        )
    turns = -(-batch.micro_batches // layout.data_parallel)
    memory = training_memory(
        model.config, tokens=batch.rows * batch.sequence_length, dtype=config.run.torch_dtype, recompute=config.run.recompute,
        weights=getattr(torch, config.run.weights), adapters=None if config.lora is None else trained,
        optimizer=config.optimizer.kind, sums=sums_at_once(turns, exact=layout.exact),
        dp=layout.data_parallel, tp=layout.tensor_parallel,
    )  # fmt: skip
    ranks, free = layout.data_parallel * layout.tensor_parallel, available_bytes(device)
    if device.type == "cpu":  # torchrun's processes on one machine share its memory
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    yield f"memory{' of each rank' if ranks > 1 else ''} {_ledger(memory, free)}"


def _ledger(memory: Memory, free: int) -> str:
    if memory.total <= free:
        return f"{memory}; {size(free)} are free"
    return f'{memory}: more than the {size(free)} that are free. Lower batch.rows, or set run.recompute = "full"'


def during(since: Sequence[StepMetrics], *, steps: int, each: float, skipped: int) -> str:
    """One line.

    Args:
        since: the last line; the step it is about comes last. Loss and speed are means over these, without skipped ones' losses.
        each: seconds of a step so far, with evaluations and checkpoints.
        skipped: steps of the whole run.
    """
    last, seconds = since[-1], sum(step.seconds for step in since)
    losses = [step.loss for step in since if not step.skipped]
    loss = f"{sum(losses) / len(losses):.4f}" if losses else "none"
    left = each * (steps - last.step)
    parts = [
        f"step {last.step}/{steps}", f"loss {loss}", f"norm {last.gradient_norm:.3g}", f"lr {last.learning_rate:.2e}",
        f"{sum(step.tokens for step in since) / seconds:,.0f} tokens/s",
    ]  # fmt: skip
    shares = [step.mfu * step.seconds for step in since if step.mfu is not None]
    if shares:
        parts.append(f"MFU {percent(sum(shares) / seconds)}")
    parts += [f"data {percent(sum(step.data_seconds for step in since) / seconds)}", size(last.memory or 0)]
    parts.append(f"{span(left)} left" if left else "done")
    if skipped:
        parts.append(f"{skipped} skipped")
    return "  ".join(parts)
