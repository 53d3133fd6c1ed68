"""A training step, forward, backward and AdamW: of transformers as it is, compiled, fused ("llama-fast"), with Liger's layers, and of the decoder
that `llama-fast train` trains ("llama-fast train").

All train the same weights, of one dtype with their optimizer's states, in turns; so what is in memory beside a side's own activations is
the same for all: on a CPU it is what a step adds to the process. A call is timed by the host's clock. FLOPs are those that must be done; those of the rule that MFU is told by, which
counts attention as if it were not causal, are in the note. Parity: the losses of a few short texts, and the gradients of their sum, of the first layers.
"""

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks.models import ModelCase, Use, build_model, first_layers, in_float64, itself, model_peers
from llama_fast.benchmarks.peers import Implementation, Implementations
from llama_fast.benchmarks.shapes import CPU_10M, CPU_125M, EMBEDDED, LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape, dtypes
from llama_fast.benchmarks.suite.comparison import speed_test
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder.config import DecoderConfig
from llama_fast.fusion.verify import InFloat64
from llama_fast.profiler.measure.timing import Call
from llama_fast.profiler.measure.work import Work, attended_pairs, attention_flops, training_flops, weight_elements
from llama_fast.reports.units import size
from llama_fast.train.batches import IGNORED
from llama_fast.train.model import Packed, TrainedDecoder

test_speed = speed_test

TRAINING_STEP = "training step"
TRAINER = "llama-fast train"
"""The decoder of `llama_fast.train`, where "llama-fast" is transformers' model after `fuse`."""
JUDGED_LAYERS, JUDGED_ROWS, JUDGED_TOKENS = 2, 4, 128


def cases(device: torch.device, *, quick: bool) -> list[ModelCase]:
    """(model, layers, texts, tokens of each) by what a device holds and has the time for."""
    sizes: Sequence[tuple[ModelShape, int | None, int, int]]
    if device.type == "cuda":
        sizes = [(LLAMA_3_2_1B, None, 4, 2048)] + ([] if quick else [(LLAMA_3_1_8B, 4, 4, 2048)])
    else:
        sizes = [(EMBEDDED, None, 8, 128)] + ([] if quick else [(CPU_10M, None, 4, 256), (CPU_125M, None, 4, 128)])
    compiles = device.type == "cuda" or not quick
    return [
        train_case(shape, layers, batch, tokens, dtype, compiles=compiles)
        for shape, layers, batch, tokens in sizes for dtype in dtypes(device, quick=quick)
    ]  # fmt: skip


def train_case(
    shape: ModelShape, layers: int | None, batch: int, tokens: int, dtype: torch.dtype, *, compiles: bool
) -> ModelCase:
    """A step on `batch` texts of `tokens` each, of `shape` or its first `layers`."""
    name = shape.name if layers is None else f"{shape.name} ({layers} layers)"
    return ModelCase(
        "train_step", f"{name}, {batch} x {tokens} tokens", dtype, TRAINING_STEP, functools.partial(_peers, compiles),
        functools.partial(_Trial, shape, layers, batch, tokens, dtype),
    )  # fmt: skip


def _peers(compiles: bool) -> Implementations:
    return model_peers(mode="training", compiles=compiles) | {TRAINER: _trainer}


def _trainer(model: Any, use: Use) -> Implementation:
    """`TrainedDecoder` over the parameters of transformers' model, called as that is."""
    trained = TrainedDecoder(DecoderConfig.from_huggingface(model.config.to_dict()), dtype=model.dtype)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(trained.get_submodule(module), leaf, parameter)

    def forward(*, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        """The mean over the tokens of each row that have a next one."""
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        packed = Packed.of(input_ids.flatten(), [input_ids.shape[1]] * len(input_ids))
        return SimpleNamespace(loss=trained(packed, following.flatten()) / following[:, 1:].numel())

    return use(forward)


class _Trial:
    graphs = False

    def __init__(
        self, shape: ModelShape, layers: int | None, batch: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = build_model(shape, device, dtype, layers=layers).train()
        self._ids = torch.randint(shape.vocab, (batch, tokens), device=device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True)
        self._peaks: dict[str, int] = {}
        self._config = DecoderConfig.from_huggingface(shape.config(layers))
        self.work = step_work(self._config, batch, tokens, dtype)

    def expected(self) -> list[Tensor]:
        reference = in_float64(first_layers(self._model, JUDGED_LAYERS))
        with InFloat64():
            return self._answer(itself, reference)

    def answer(self, peer: Implementation) -> list[Tensor]:
        return self._answer(peer, first_layers(self._model, JUDGED_LAYERS))

    def _answer(self, peer: Implementation, model: Any) -> list[Tensor]:
        function = peer(model, _loss)
        rows = self._ids[:JUDGED_ROWS, None, :JUDGED_TOKENS]  # one by one: of a single loss an error is luck
        losses = torch.stack([function(row) for row in rows])
        return [losses.detach(), *torch.autograd.grad(losses.sum(), list(model.parameters()))]

    def call(self, name: str, peer: Implementation) -> Call:
        function = peer(self._model, _loss)

        def step() -> None:
            function(self._ids).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        step()  # compiles, and makes the optimizer's states
        peak = (_cuda_peak if self._ids.is_cuda else _cpu_peak)(step)
        if peak is not None:
            self._peaks[name] = peak
        return step

    def note(self, result: Result) -> str | None:
        tokens_per_s = self._ids.numel() / result.timing.median
        by_rule = 1e-12 * tokens_per_s * training_flops(self._config, self._ids.shape[1])
        rate = f"{tokens_per_s:,.0f} tokens/s, {by_rule:.3g} TFLOP/s by the rule of MFU"
        peak = self._peaks.get(result.implementation)
        return rate if peak is None else f"{rate}, peak memory {size(peak)}"


def _cuda_peak(call: Call) -> int:
    """Bytes of all that is there."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def _cpu_peak(call: Call) -> int | None:
    """Bytes that a call adds to the process at most; None where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or it uses again what another has freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def step_work(config: DecoderConfig, batch: int, tokens: int, dtype: torch.dtype) -> Work:
    """Three products for each weight of a matrix, and those of attention; of the bytes only those of weights, gradients and states.

    Weights are read forward and backward, gradients written; the optimizer reads weights, gradients and two states, and writes three.
    """
    elements, matrices = weight_elements(config)
    pairs = sum(attended_pairs(tokens, tokens, window=window) for window in config.windows)
    attention = attention_flops(pairs, config.num_heads, config.head_dim, backward=True)
    trained = elements + (0 if config.tied_embeddings else config.vocab_size * config.hidden_size)
    read, written = 2 * elements + 4 * trained, 4 * trained
    return Work(read * dtype.itemsize, written * dtype.itemsize, batch * (6 * matrices * tokens + attention))


def _loss(model: Any) -> Implementation:
    def forward(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return forward
