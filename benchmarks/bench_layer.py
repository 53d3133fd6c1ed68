"""One decoder layer on the tokens of a prompt: transformers' layer as it is, compiled, fused ("llama-fast"), the engine's, and Liger's.

Its masks and angles are made before: a model makes them once for all its layers. Forward and backward is with the gradients of all
weights; the engine's layer has none.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks.models import (
    ENGINE,
    ModelCase,
    build_model,
    decoder_of,
    forward_of,
    gradients_of,
    in_float64,
    itself,
    model_peers,
)
from llama_fast.benchmarks.peers import Implementation, Implementations
from llama_fast.benchmarks.shapes import CPU_125M, LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape, dtypes, models, prompt_tokens
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, speed_test
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder.config import DecoderConfig
from llama_fast.engine.paged import OneSequence
from llama_fast.fusion.verify import InFloat64
from llama_fast.profiler.measure.timing import Call
from llama_fast.profiler.measure.work import layer_work

test_speed = speed_test

MOST_TOKENS = 8192  # of four times as many, a call of the largest layer would take half a second
JUDGED_TOKENS = 2048  # in float64 PyTorch holds the scores of all heads, and their gradients


def cases(device: torch.device, *, quick: bool) -> list[ModelCase]:
    """Each model's layer, each number of tokens; on a CPU those that it does in seconds."""
    on_cpu = (CPU_125M,) if quick else (CPU_125M, LLAMA_3_2_1B)
    return [
        layer_case(shape, tokens, dtype, direction, compiles=device.type == "cuda" or not quick, tuned=not quick)
        for shape in (on_cpu if device.type == "cpu" else models(device, quick=quick))
        for tokens in prompt_tokens(device, quick=quick)
        if tokens <= MOST_TOKENS
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]


def layer_case(
    shape: ModelShape, tokens: int, dtype: torch.dtype, direction: str, *, compiles: bool, tuned: bool = False
) -> ModelCase:
    """A layer of `shape` on one sequence."""
    return ModelCase(
        "layer", f"{shape.name}, {tokens} tokens", dtype, direction,
        functools.partial(_peers, direction == TRAINING, compiles, tuned and shape is LLAMA_3_1_8B and tokens == MOST_TOKENS),
        functools.partial(_Trial, shape, tokens, dtype, direction == TRAINING),
    )  # fmt: skip


def _peers(training: bool, compiles: bool, tuned: bool) -> Implementations:
    found = model_peers(mode="training" if training else "inference", compiles=compiles, tuned=tuned)
    return found if training else found | {ENGINE: _engine}


class _Trial:
    """Of the layer's model, which has one layer, the rest is only there to prepare the layer's arguments."""

    graphs = True

    def __init__(
        self, shape: ModelShape, tokens: int, dtype: torch.dtype, training: bool, device: torch.device
    ) -> None:
        self._model = build_model(_without_vocabulary(shape), device, dtype, layers=1).requires_grad_(False)
        self._model.model.layers.requires_grad_(training)
        self._training = training
        self._x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        self._judged_tokens = min(tokens, JUDGED_TOKENS if shape.window is None else shape.window + 512)
        config = DecoderConfig.from_huggingface(shape.config(1))
        self.work = layer_work(config, tokens, dtype, training=training)

    def expected(self) -> list[Tensor]:
        with InFloat64():
            return self._answer(itself, in_float64(self._model), self._x.double())

    def answer(self, peer: Implementation) -> list[Tensor]:
        return self._answer(peer, self._model, self._x)

    def _answer(self, peer: Implementation, model: Any, x: Tensor) -> list[Tensor]:
        outputs: Any = self._call(peer, model, x[: self._judged_tokens])()
        return outputs if self._training else [outputs]

    def call(self, name: str, peer: Implementation) -> Call:
        return self._call(peer, self._model, self._x)

    def _call(self, peer: Implementation, model: Any, x: Tensor) -> Call:
        function = peer(model, functools.partial(_layer, x=x))
        return gradients_of(function, model, x) if self._training else forward_of(function, x)

    def note(self, result: Result) -> str | None:
        judged = self._judged_tokens
        return None if judged == len(self._x) else f"parity on the first {judged} tokens"


def _without_vocabulary(shape: ModelShape) -> ModelShape:
    return ModelShape(**vars(shape) | {"vocab": 16})


def _layer(model: Any, *, x: Tensor) -> Implementation:
    """The first layer of a model, as the model calls it with `x` (tokens, hidden) for its hidden states."""
    arguments: dict[str, Any] = {}
    layer = model.model.layers[0]
    watch = layer.register_forward_pre_hook(lambda module, args, kwargs: arguments.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model.model(inputs_embeds=x[None], use_cache=False)
    watch.remove()

    def forward(x: Tensor) -> Tensor:
        y: Tensor = layer(x[None], **arguments)[0]
        return y

    return forward


def _engine(model: Any, use: Any) -> Implementation:
    decoder = decoder_of(model)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = decoder.layers[0](x, *rows(len(x)), decoder.fusions)
        return y

    @functools.cache
    def rows(tokens: int) -> tuple[Tensor, Tensor, OneSequence]:
        context = OneSequence(tokens, model.device)
        return *decoder.rotary.rows(context.positions, context.lengths), context

    return forward
