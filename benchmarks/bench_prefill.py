"""A prompt through a whole model, up to the logits after its last token: transformers as it is, compiled, fused, and our engine's decoder.

Nobody keeps a KV cache here. A call is timed by the host's clock, with what launching its kernels costs. Of a model too large for a
float64 copy the first layers, with its own embedding and head, are judged.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks.models import (
    FUSED,
    ModelCase,
    build_model,
    decoder_of,
    forward_of,
    in_float64,
    itself,
    judged_part,
    model_peers,
)
from llama_fast.benchmarks.peers import OURS, Implementation, Implementations
from llama_fast.benchmarks.shapes import CPU_125M, LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, speed_test
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder.config import DecoderConfig
from llama_fast.engine.paged import OneSequence
from llama_fast.fusion.verify import InFloat64
from llama_fast.profiler.measure.timing import Call
from llama_fast.profiler.measure.work import prompt_work

test_speed = speed_test

JUDGED_TOKENS = 1024


def cases(device: torch.device, *, quick: bool) -> list[ModelCase]:
    """The published models on a GPU, the smallest on a CPU; two layers of it if `quick`."""
    on_gpu = device.type == "cuda"
    shapes = [LLAMA_3_2_1B, LLAMA_3_1_8B] if on_gpu else [CPU_125M]
    lengths = [2048] if on_gpu else [128]
    if not quick:
        lengths = [512, 2048, 8192] if on_gpu else [128, 512]
    layers = 2 if quick and not on_gpu else None
    return [
        prefill_case(shape, tokens, dtype, layers=layers, compiles=on_gpu or not quick)
        for shape in shapes
        for tokens in lengths
        for dtype in dtypes(device, quick=quick)
    ]


def prefill_case(
    shape: ModelShape, tokens: int, dtype: torch.dtype, *, layers: int | None = None, compiles: bool
) -> ModelCase:
    """One prompt of so many tokens through `shape`, or its first `layers`."""
    name = shape.name if layers is None else f"{shape.name} ({layers} layers)"
    return ModelCase(
        "prefill", f"{name}, {tokens} tokens", dtype, FORWARD, functools.partial(_peers, compiles),
        functools.partial(_Trial, shape, layers, tokens, dtype),
    )  # fmt: skip


def _peers(compiles: bool) -> Implementations:
    return {OURS: _engine} | model_peers(ours=FUSED, compiles=compiles)


class _Trial:
    graphs = False

    def __init__(
        self, shape: ModelShape, layers: int | None, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = build_model(shape, device, dtype, layers=layers).requires_grad_(False)
        self._ids = torch.randint(shape.vocab, (tokens,), device=device)
        self.work = prompt_work(DecoderConfig.from_huggingface(shape.config(layers)), tokens, dtype)

    def expected(self) -> list[Tensor]:
        reference = in_float64(judged_part(self._model))
        with InFloat64():
            return [forward_of(itself(reference, _last_logits), self._ids[:JUDGED_TOKENS])()]

    def answer(self, peer: Implementation) -> list[Tensor]:
        function = peer(judged_part(self._model), _last_logits)
        return [forward_of(function, self._ids[:JUDGED_TOKENS])()]

    def call(self, name: str, peer: Implementation) -> Call:
        return forward_of(peer(self._model, _last_logits), self._ids)

    def note(self, result: Result) -> str | None:
        layers = judged_part(self._model).config.num_hidden_layers
        judged = [f"first {layers} layers"] if layers < self._model.config.num_hidden_layers else []
        judged += [f"first {JUDGED_TOKENS} tokens"] if len(self._ids) > JUDGED_TOKENS else []
        return f"parity on the {' and '.join(judged)}" if judged else None


def _last_logits(model: Any) -> Implementation:
    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0]
        return logits

    return forward


def _engine(model: Any, use: Any) -> Implementation:
    decoder = decoder_of(model)

    def forward(ids: Tensor) -> Tensor:
        hidden = decoder(ids, OneSequence(len(ids), ids.device))
        return decoder.logits(hidden[-1:])

    return forward
