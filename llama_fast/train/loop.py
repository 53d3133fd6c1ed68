"""A run: steps until the schedule ends, with a look at held-out text and a checkpoint every so often.

    out/config.toml     every setting
    out/tokenizer/      the tokenizer
    out/metrics.csv     a line for each step, and out/samples.jsonl: see `metrics`
    out/report.html     its curves, samples and settings, written anew at each evaluation
    out/checkpoints/    see `checkpoints`

The loss of a step is the mean over all its target tokens, however they are spread over micro-batches: it is known beforehand how many there
are, and each micro-batch's sum is divided by that. A run that was interrupted goes on from its last checkpoint, to the same bits.
"""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import torch

from ..data.bpe import copy_tokenizer, fingerprint
from ..data.shards import Shards
from ..decoder.tokenizer import Tokenizer
from ..environment import default_device
from ..profiler.measure.work import training_flops
from ..reports.jsonfile import write_whole
from . import checkpoints, progress_lines
from .batches import Batches
from .checkpoints import Progress
from .config import TrainConfig
from .interruption import Interruption
from .metrics import Journal, Sample, StepMetrics, require_tensorboard
from .model import TrainedDecoder, load_trained
from .optimizer import GradientSum, Optimizers, clip, gradient_norm, learning_rate_share
from .report.page import write_report
from .speed import peak, peak_memory
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
    run = _Run(config, show)
    try:
        return run.run()
    except Diverged:
        run.report()
        raise
    finally:
        run.journal.close()


class _Run:
    def __init__(self, config: TrainConfig, show: Show) -> None:
        self.config, self.show = config, show
        run = config.run
        self.device = default_device()
        if run.tensorboard:
            require_tensorboard()
        self.tokenizer = Tokenizer(config.data.tokenizer)
        shards = Shards(config.data.train, self.tokenizer)
        self.batches = Batches(shards, config.batch, seed=run.seed, device=self.device)
        self.validation = self._validation()
        self.model = self._model().to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizers = Optimizers(self.model, config.optimizer)
        self.exact = self.device.type == "cpu" if run.exact is None else run.exact
        self.data = {"tokenizer": fingerprint(self.tokenizer), "training text": _hash(shards)}
        self.peak = peak(self.device, run.torch_dtype)
        self.progress = Progress()
        self._open()

    def _model(self) -> TrainedDecoder:
        config, run = self.config.model, self.config.run
        length = self.config.batch.sequence_length
        if config.path is None:
            decoder = config.decoder_config(self.tokenizer, length)
            model = TrainedDecoder(decoder, dtype=run.torch_dtype, recompute=run.recompute)
            model.initialise(
                seed=run.seed, std=config.init_std, embedding_std=config.embedding_std, last_norm=config.init_last_norm
            )
            return model
        model = load_trained(config.path, dtype=run.torch_dtype, recompute=run.recompute)
        if model.config.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"{config.path} has {model.config.vocab_size:,} tokens, and {self.tokenizer.folder} {self.tokenizer.vocab_size:,}: "
                "tokenise with the model's own tokenizer"
            )
        if model.config.max_positions < length:
            raise ValueError(f"batch.sequence_length must be at most {model.config.max_positions}, got {length}")
        return model

    def _validation(self) -> Validation | None:
        if self.config.data.validation is None:
            return None
        shards = Shards(self.config.data.validation, self.tokenizer)
        tokens = self.config.run.validation_tokens
        return Validation(shards, self.tokenizer, self.config.batch, tokens=tokens, device=self.device)

    def _open(self) -> None:
        """Makes the run's folder, or goes on from its last checkpoint."""
        out = self.config.run.out
        there = checkpoints.folders(out)
        if there:
            self.progress = checkpoints.restore(
                list(there.values())[-1], self.model, self.optimizers, data=self.data
            )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        if self.config.data.tokenizer.resolve() != (out / "tokenizer").resolve():
            copy_tokenizer(self.config.data.tokenizer, out / "tokenizer")
        write_whole(out / "config.toml", self.config.to_toml())
        self.journal = Journal(out, step=self.progress.step, tensorboard=self.config.run.tensorboard)

    def run(self) -> Outcome:
        self._say_what_it_is()
        first, start, since = self.progress.step, time.perf_counter(), list[StepMetrics]()
        with Interruption() as interruption:
            while not self._is_done() and interruption.asked is None:
                metrics = self._step()
                since.append(metrics)
                evaluated = _is_due(self.progress.step, self.config.run.evaluate_every) or self._is_done()
                if evaluated:
                    metrics = replace(metrics, bits_per_byte=self._evaluate())
                self.journal.append(metrics)
                if metrics.step == first + 1 or _is_due(metrics.step, self.config.run.log_every) or self._is_done():
                    self._say_how_it_goes(since, (time.perf_counter() - start) / (metrics.step - first))
                    since = []
                if evaluated:
                    self.report()
                is_best = self.progress.best_step == self.progress.step
                if is_best or _is_due(self.progress.step, self.config.run.save_every):
                    self._try_to_save()
            if self.progress.step:
                self._save()
        self.report()
        return Outcome(self.progress, None if self._is_done() else interruption.asked)

    def _is_done(self) -> bool:
        gave_up = 0 < self.config.run.patience <= self.progress.worse_in_a_row
        return gave_up or self.progress.step >= self.config.schedule.steps

    def _step(self) -> StepMetrics:
        start, reading = time.perf_counter(), _Stopwatch()
        progress, batch, loss = self.progress, self.config.batch, self.config.loss
        targets = max(1, self.batches.targets(progress.rows))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients = GradientSum(self.parameters, exact=self.exact)
        for micro in reading.timed(self.batches.step(progress.rows)):
            summed = self.model(micro.packed, micro.labels, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss)
            part = summed / targets
            part.backward()
            gradients.add()
            total += part.detach().double()
        gradients.finish()
        norm = gradient_norm(self.parameters)
        share = learning_rate_share(progress.step, self.config.schedule)
        fault = self._fault(total.item(), norm.item())
        if fault is None:
            self._update(norm, share)
            progress.skipped_in_a_row = 0
            progress.recent = [*progress.recent, total.item()][-RECENT:]
        else:
            self._skip(fault)
        progress.step += 1
        progress.rows += batch.rows_per_step
        seconds = time.perf_counter() - start
        return StepMetrics(
            step=progress.step, loss=total.item(), gradient_norm=norm.item(), learning_rate=self.config.optimizer.lr * share,
            skipped=fault is not None, tokens=batch.tokens, seconds=seconds, data_seconds=reading.seconds,
            memory=peak_memory(self.device), mfu=self._mfu(batch.tokens / seconds),
        )  # fmt: skip

    def _mfu(self, tokens_per_s: float) -> float | None:
        """See `speed`."""
        if self.peak is None:
            return None
        flops = training_flops(self.model.config, self.config.batch.sequence_length)
        return tokens_per_s * flops / self.peak.flops_per_s

    def _fault(self, loss: float, norm: float) -> str | None:
        """Why the weights must not change by this gradient, None if they may."""
        if not math.isfinite(loss + norm):
            return "the loss or the gradient is not finite"
        factor, recent = self.config.run.spike_factor, self.progress.recent
        if factor and len(recent) == RECENT and loss > factor * median(recent):
            return f"the loss of {loss:.4f} is more than {factor:g} times {median(recent):.4f}, the median of {RECENT} steps"
        return None

    def _update(self, norm: torch.Tensor, share: float) -> None:
        if self.config.optimizer.clip_norm:
            clip(self.parameters, norm, self.config.optimizer.clip_norm)
        self.optimizers.step(share)

    def _skip(self, fault: str) -> None:
        progress = self.progress
        self.optimizers.zero_grad()
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.show(f"step {progress.step + 1}: skipped: {fault}")
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} steps in a row were skipped, up to step {progress.step + 1}: {fault}. The last checkpoint in "
                f"{self.config.run.out} is good: go on from it with a lower learning rate, or a longer warm-up"
            )

    def _evaluate(self) -> float | None:
        """Bits per byte, None without validation shards, and what follows from them for the run."""
        progress, run = self.progress, self.config.run
        bits = None
        if self.validation is not None:
            bits = self.validation.bits_per_byte(self.model)
            better = progress.best is None or bits < progress.best
            if better:
                progress.best, progress.best_step, progress.worse_in_a_row = bits, progress.step, 0
            else:
                progress.worse_in_a_row += 1
            self.show(f"step {progress.step}: {bits:.4f} bits per byte" + (", the best" if better else ""))
        if run.sample is not None:
            sample = Sample(progress.step, continued(self.model, self.tokenizer, run.sample, tokens=run.sample_tokens))
            self.journal.add_sample(sample)
            self.show(f"  {sample.text!r}")
        return bits

    def _try_to_save(self) -> None:
        """Where it fails, the run goes on, and tries again when the next checkpoint is due."""
        try:
            self._save()
        except OSError as error:
            self.show(f"step {self.progress.step}: no checkpoint: {error}")

    def _save(self) -> None:
        out = self.config.run.out
        checkpoints.save(out, self.model, self.optimizers, self.progress, data=self.data)
        checkpoints.remove_old(out, keep=self.config.run.keep, best=self.progress.best_step)

    def report(self) -> None:
        """Where it cannot be written, the run goes on."""
        try:
            write_report(self.config.run.out, self.config, parameters=sum(each.numel() for each in self.parameters))
        except OSError as error:
            self.show(f"step {self.progress.step}: no report: {error}")

    def _say_what_it_is(self) -> None:
        lines = progress_lines.before(
            self.config, self.model, rows_per_epoch=self.batches.rows_per_epoch, exact=self.exact, peak=self.peak, device=self.device
        )  # fmt: skip
        for line in lines:
            self.show(line)
        if self.progress.step:
            self.show(f"goes on after step {self.progress.step}")

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


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _hash(shards: Shards) -> str:
    """Of the length of every document: another text has others."""
    return hashlib.sha256(shards.lengths().tobytes()).hexdigest()
