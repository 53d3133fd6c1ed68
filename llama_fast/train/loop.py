"""A run: steps until the schedule ends, with a look at held-out text and a checkpoint every so often.

    out/config.toml     every setting
    out/tokenizer/      the tokenizer
    out/metrics.csv     a line for each step, and out/samples.jsonl: see `metrics`
    out/report.html     its curves, samples and settings, written anew at each evaluation
    out/checkpoints/    see `checkpoints`

The loss of a step is the mean over all its target tokens, however they are spread over micro-batches: it is known beforehand how many there
are, and each micro-batch's sum is divided by that. A run that was interrupted goes on from its last checkpoint, to the same bits.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from ..data.bpe import copy_tokenizer, fingerprint
from ..data.conversations import Conversations
from ..environment import default_device
from ..profiler.measure.work import training_flops
from ..reports.jsonfile import write_whole
from ..reports.units import duration
from . import checkpoints, progress_lines, tensor_parallel
from .batches import Batches, MicroBatch, open_documents
from .checkpoints import Progress
from .config import TrainConfig
from .interruption import Interruption
from .metrics import Journal, Sample, StepMetrics, require_tensorboard
from .optimizer import GradientSum, Optimizers, clip, gradient_norm, learning_rate_share
from .ranks import Ranks, joined
from .report.page import write_report
from .speed import peak, peak_memory
from .start import BASE, fill, first_model, tokenizer_of
from .validation import Validation, continued

MOST_SKIPPED = 10
"""Steps in a row after which a run ends: it does not come back by itself."""
RECENT = 100
"""Steps whose median loss a spike is told by."""

Show = Callable[[str], None]
T = TypeVar("T")


class Diverged(RuntimeError):
    """Step after step was skipped."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: where the run stands, and the signal that ended it, if one did."""

    progress: Progress
    interrupted: signal.Signals | None = None


def train(config: TrainConfig, *, show: Show = print) -> Outcome:
    """Starts a run, or goes on with the one in `config.run.out`, and returns when it is done or was asked to stop.

    Args:
        show: is given each line that says how it goes.

    Raises:
        ValueError: the data, the model, or a checkpoint that is there do not fit the config.
        OSError: a file cannot be read or written.
        Diverged: MOST_SKIPPED steps in a row were skipped.
    """
    device = default_device()
    with joined(config.ranks.tensor_parallel, device) as ranks:
        run = _Run(config, show if ranks.is_first else _silent, ranks, device)
        try:
            return run.run()
        except Diverged:
            run.report()
            raise
        finally:
            run.close()


class _Run:
    def __init__(self, config: TrainConfig, show: Show, ranks: Ranks, device: torch.device) -> None:
        self.config, self.show, self.ranks, self.device = config, show, ranks, device
        run = config.run
        if run.tensorboard:
            require_tensorboard()
        self.tokenizer = tokenizer_of(config)
        documents = open_documents(config.data.train, self.tokenizer, config.batch)
        self.batches = Batches(documents, config.batch, seed=run.seed, device=self.device)
        self.validation = self._validation()
        self.exact = self.device.type == "cpu" if run.exact is None else run.exact
        self.model = first_model(config, self.tokenizer)
        if run.compile:
            self.model.compile_layers()
        if ranks.mesh is not None and ranks.tensor_parallel > 1:
            tensor_parallel.cut(self.model, ranks.mesh["tp"])
        self.sums = ranks.shard(self.model, list(self.model.model.layers), exact=self.exact)
        self.model.to_empty(device=self.device)
        self.origin = {
            "tokenizer": fingerprint(self.tokenizer),
            "data.train": documents.fingerprint(),
            "run.seed": str(run.seed),
            "batch.sequence_length": str(config.batch.sequence_length),
        }
        if (base := fill(self.model, config)) is not None:
            self.origin[BASE] = base
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizers = Optimizers(self.model, config.optimizer)
        self.layout = ranks.layout(exact=self.exact)
        self.peak = peak(self.device, run.torch_dtype) if ranks.is_first else None
        self.progress = Progress()
        self._open()

    def _validation(self) -> Validation | None:
        if self.config.data.validation is None:
            return None
        shards = open_documents(self.config.data.validation, self.tokenizer, self.config.batch)
        tokens = self.config.run.validation_tokens
        return Validation(shards, self.tokenizer, self.config.batch, tokens=tokens, device=self.device)

    def _open(self) -> None:
        """Makes the run's folder, or goes on from its last checkpoint."""
        out = self.config.run.out
        there = self.ranks.of_the_first(list(checkpoints.folders(out).values()))
        self.before = self.layout
        if there:
            self.progress, self.before = checkpoints.restore(
                there[-1], self.model, self.optimizers, self.ranks, origin=self.origin
            )
        self.saver = checkpoints.Saver(out, self.ranks)
        self.journal = self._folder() if self.ranks.is_first else None

    def _folder(self) -> Journal:
        out = self.config.run.out
        out.mkdir(parents=True, exist_ok=True)
        if self.tokenizer.folder.resolve() != (out / "tokenizer").resolve():
            copy_tokenizer(self.tokenizer.folder, out / "tokenizer")
        write_whole(out / "config.toml", self.config.to_toml())
        return Journal(out, step=self.progress.step, tensorboard=self.config.run.tensorboard)

    def run(self) -> Outcome:
        self._say_what_it_is()
        if not self.progress.step and self.config.model.path is not None:
            self._evaluate()  # what there is to be bettered
        first, start, since = self.progress.step, time.perf_counter(), list[StepMetrics]()
        asked = 0
        with Interruption() as interruption, self._last_checkpoint_kept():
            while not self._is_done() and not (asked := self.ranks.largest(interruption.asked or 0)):
                metrics = self._step()
                self._attempt_checkpoint(self.saver.check)
                since.append(metrics)
                evaluated = _is_due(self.progress.step, self.config.run.evaluate_every) or self._is_done()
                if evaluated:
                    metrics = replace(metrics, bits_per_byte=self._evaluate())
                if self.journal is not None:
                    self._attempt("metrics", partial(self.journal.append, metrics))
                if metrics.step == first + 1 or _is_due(metrics.step, self.config.run.log_every) or self._is_done():
                    self._say_how_it_goes(since, (time.perf_counter() - start) / (metrics.step - first))
                    since = []
                if evaluated:
                    self.report()
                is_best = self.progress.best_step == self.progress.step
                if is_best or _is_due(self.progress.step, self.config.run.save_every):
                    self._attempt_checkpoint(self.saver.finish)
                    self._attempt("checkpoint", self._save)
            if self.progress.step:
                self._attempt_checkpoint(self.saver.finish)
                self._save()
                self.saver.finish()
        if self.sums is not None and self.progress.step > first:
            self._say_what_sums_took(self.sums.seconds, time.perf_counter() - start, self.progress.step - first)
        self.report()
        return Outcome(self.progress, signal.Signals(asked) if asked else None)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def _is_done(self) -> bool:
        gave_up = 0 < self.config.run.patience <= self.progress.worse_in_a_row
        return gave_up or self.progress.step >= self.config.schedule.steps

    def _step(self) -> StepMetrics:
        start, reading = time.perf_counter(), _Stopwatch()
        progress, batch, loss = self.progress, self.config.batch, self.config.loss
        targets = max(1, self.batches.targets(progress.rows))
        losses: dict[int, Tensor] = {}
        gradients = GradientSum(self.parameters, exact=self.exact)
        for number, micro in reading.timed(self._micro_batches()):
            summed = self.model(
                micro.packed, micro.labels, key=micro.key, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss
            )
            part = summed * 0.0 if number is None else summed / targets
            part.backward()
            gradients.add()
            if number is not None:
                losses[number] = part.detach()
        gradients.finish()
        share = learning_rate_share(progress.step, self.config.schedule)
        total, norm, fits = self._update(self.ranks.gathered(losses, batch.micro_batches, self.device).sum(), share)
        if fits:
            progress.skipped_in_a_row = 0
            progress.recent = [*progress.recent, total][-RECENT:]
        else:
            self._note_skip(total, norm)
        progress.step += 1
        tokens = self.batches.tokens(progress.rows)
        progress.rows += batch.rows_per_step
        seconds = time.perf_counter() - start
        return StepMetrics(
            step=progress.step, loss=total, gradient_norm=norm, learning_rate=self.config.optimizer.lr * share,
            skipped=not fits, tokens=tokens, seconds=seconds, data_seconds=reading.seconds,
            memory=peak_memory(self.device), mfu=self._mfu(tokens / seconds),
        )  # fmt: skip

    def _mfu(self, tokens_per_s: float) -> float | None:
        """See `speed`."""
        if self.peak is None:
            return None
        flops = training_flops(
            self.model.config, self.config.batch.sequence_length, frozen=self.config.lora is not None
        )  # fmt: skip
        return tokens_per_s * flops / self.peak.flops_per_s

    def _micro_batches(self) -> Iterator[tuple[int | None, MicroBatch]]:
        for number in self.ranks.turns(self.config.batch.micro_batches):
            yield number, self.batches.micro_batch(self.progress.rows, number or 0)

    def _update(self, loss: Tensor, share: float) -> tuple[float, float, bool]:
        """Changes the weights, if the step may. What is decided is decided on the device, and read when all its work is given.

        Returns:
            The loss, the norm of the gradient, and whether the step was not skipped.
        """
        norm = gradient_norm(self.parameters, self.ranks)
        fits = (loss + norm).isfinite() & (loss <= self._highest_loss())
        if self.config.optimizer.clip_norm:
            clip(self.parameters, norm, self.config.optimizer.clip_norm)
        self.optimizers.step(share, skip=~fits)
        total, length, fitted = torch.stack((loss, norm, fits)).tolist()
        return total, length, bool(fitted)

    def _highest_loss(self) -> float:
        """What a loss above is a spike."""
        factor, recent = self.config.run.spike_factor, self.progress.recent
        return factor * median(recent) if factor and len(recent) == RECENT else math.inf

    def _note_skip(self, loss: float, norm: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        fault = "the loss or the gradient is not finite"
        if math.isfinite(loss + norm):
            fault = (
                f"the loss of {loss:.4f} is more than {self.config.run.spike_factor:g} times {median(progress.recent):.4f}, "
                f"the median of {RECENT} steps"
            )
        self.show(f"step {progress.step + 1}: skipped: {fault}")
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            there = checkpoints.folders(self.config.run.out)
            advice = f"The last checkpoint in {self.config.run.out} is good: go on from it" if there else "Begin anew"
            raise Diverged(
                f"{MOST_SKIPPED} steps in a row were skipped, up to step {progress.step + 1}: {fault}. {advice} with a lower "
                "learning rate, or a longer warm-up"
            )

    def _evaluate(self) -> float | None:
        """Bits per byte, None without validation shards, and what follows from them for the run."""
        progress, run = self.progress, self.config.run
        bits = None
        if self.validation is not None:
            bits = self.validation.bits_per_byte(self.model, self.ranks)
            better = math.isfinite(bits) and (progress.best is None or bits < progress.best)
            if better:
                progress.best, progress.best_step, progress.worse_in_a_row = bits, progress.step, 0
            else:
                progress.worse_in_a_row += 1
            self.show(f"step {progress.step}: {bits:.4f} bits per byte" + (", the best" if better else ""))
        if run.sample is not None:
            sample = Sample(progress.step, continued(self.model, self.tokenizer, run.sample, tokens=run.sample_tokens))
            if self.journal is not None:
                self._attempt("sample", partial(self.journal.add_sample, sample))
            self.show(f"  {sample.text!r}")
        self.ranks.reshard(self.model)
        return bits

    def _attempt(self, what: str, write: Callable[[], None], *, step: int | None = None) -> None:
        """Where something cannot be written, the run goes on, and tries again when the next one is due."""
        try:
            write()
        except OSError as error:
            self.show(f"no {what} of step {self.progress.step if step is None else step}: {error}")

    def _attempt_checkpoint(self, wait: Callable[[], None]) -> None:
        """Of the one that is being written."""
        self._attempt("checkpoint", wait, step=self.saver.step)

    @contextmanager
    def _last_checkpoint_kept(self) -> Iterator[None]:
        """Where the run ends by its own decision, the checkpoint that is being written is finished."""
        try:
            yield
        except Diverged:
            self._attempt_checkpoint(self.saver.finish)
            raise

    def _save(self) -> None:
        note = {"data": self.origin, "layout": asdict(self.layout)}
        self.saver.start(self.model, self.optimizers, self.progress, note, keep=self.config.run.keep)

    def report(self) -> None:
        if self.ranks.is_first:
            count = sum(each.numel() for each in self.parameters)
            self._attempt("report", partial(write_report, self.config.run.out, self.config, parameters=count))

    def _say_what_it_is(self) -> None:
        lines = progress_lines.before(
            self.config, self.model, rows_per_epoch=self.batches.rows_per_epoch, layout=self.layout, peak=self.peak, device=self.device
        )  # fmt: skip
        for line in lines:
            self.show(line)
        if isinstance(self.batches.documents, Conversations):
            self.show(str(self.batches.documents))
        if self.progress.step:
            self.show(f"goes on after step {self.progress.step}")
        self._say_who_shares_it()

    def _say_who_shares_it(self) -> None:
        layout = self.layout
        if self.ranks.mesh is not None:
            bits = (
                "the bits of one process"
                if layout.gives_the_bits_of_one
                else "right, but not to the bits of one process"
            )
            self.show(f"on {layout}: {bits}")
        if not layout.gives_the_bits_of(self.before):
            self.show(
                f"the steps before were done on {self.before}: it goes on right, but not to the bits it would have had there"
            )

    def _say_what_sums_took(self, seconds: float, elapsed: float, steps: int) -> None:
        each, whole = duration(seconds / steps), duration(elapsed / steps)
        self.show(f"exact sums over ranks took {each} of the {whole} of a step, with waiting for each other")

    def _say_how_it_goes(self, since: Sequence[StepMetrics], each: float) -> None:
        steps = self.config.schedule.steps
        self.show(progress_lines.during(since, steps=steps, each=each, skipped=self.progress.skipped))


class _Stopwatch:
    """How long the loop waited for what it iterates over."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self.seconds += time.perf_counter() - start
            if item is None:
                return
            yield item


def _silent(line: str) -> None:
    pass


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
