"""A run as one HTML page that needs nothing else: no network, no script, curves as SVG, light and dark."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ...reports import units
from ...reports.jsonfile import write_whole
from ...reports.pages import templates
from ..config import TrainConfig
from ..metrics import Sample, StepMetrics, read_metrics, read_samples
from .curves import Curve, curve

MOST_SKIPS = 100
"""Skipped steps that the page lists."""


def write_report(out: Path, config: TrainConfig, *, parameters: int) -> None:
    """Writes out/report.html from what the run has written down so far.

    Raises:
        OSError: the disk is full.
    """
    write_whole(out / "report.html", page(config, read_metrics(out), read_samples(out), parameters=parameters))


def page(config: TrainConfig, metrics: list[StepMetrics], samples: list[Sample], *, parameters: int) -> str:
    """The page's HTML. Whatever comes from outside (samples, settings) is escaped."""
    environment = templates("llama_fast.train.report")
    environment.filters |= {"span": units.span, "size": units.size, "percent": units.percent, "number": units.number}
    learnt = [step for step in metrics if not step.skipped]
    measured = [step for step in metrics if step.bits_per_byte is not None]
    return environment.get_template("page.html.jinja").render(
        config=config, metrics=metrics, samples=samples, parameters=parameters, learnt=learnt, measured=measured,
        best=min(measured, key=_bits, default=None), curves=list(curves(config, metrics)), skips=MOST_SKIPS,
        skipped=[step for step in metrics if step.skipped], settings=dict(settings(config)),
        seconds=sum(step.seconds for step in metrics), tokens=sum(step.tokens for step in metrics),
        waited=sum(step.data_seconds for step in metrics),
    )  # fmt: skip


def curves(config: TrainConfig, metrics: list[StepMetrics]) -> Iterator[Curve]:
    """Loss, bits per byte, learning rate, gradient norm, tokens/s; those that have points."""
    steps = max(1, metrics[-1].step if metrics else 0)
    learnt = [step for step in metrics if not step.skipped]
    found = (
        curve("Loss", "nats a token, training text", [(s.step, s.loss) for s in learnt], steps=steps),
        curve("Bits per byte", "validation text", [(s.step, _bits(s)) for s in metrics if s.bits_per_byte is not None], steps=steps),
        curve("Learning rate", "of AdamW", [(s.step, s.learning_rate) for s in metrics], steps=steps),
        curve("Gradient norm", "before clipping, logarithmic", [(s.step, s.gradient_norm) for s in learnt], steps=steps, log=True),
        curve("Speed", "tokens a second", [(s.step, s.tokens / s.seconds) for s in metrics if s.seconds > 0], steps=steps, from_zero=True),
    )  # fmt: skip
    return (each for each in found if each is not None)


def settings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its name in the file; what is None is left out."""
    for field in fields(value):
        what, name = getattr(value, field.name), f"{where}.{field.name}" if where else field.name
        if is_dataclass(what):
            yield from settings(what, name)
        elif isinstance(what, tuple) and what and is_dataclass(what[0]):
            for i, one in enumerate(what):
                yield from settings(one, f"{name}.{i}")
        elif what is not None:
            yield name, ", ".join(what) if isinstance(what, tuple) else str(what)


def _bits(step: StepMetrics) -> float:
    assert step.bits_per_byte is not None
    return step.bits_per_byte
