"""Whole models and layers, of random weights or stored ones, who runs them, and how they are judged and timed.

A peer of a model is a function of transformers' model and of `use`, which says what is done with a model (`use(model)` is a function of
the inputs); it returns a function of the same inputs. All share the weights of one model. "PyTorch" is transformers as it is, "llama-fast"
the same model after `llama_fast.fuse`, where a file does not say otherwise.
"""

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llama_fast import fuse
from llama_fast.benchmarks import peers
from llama_fast.benchmarks.peers import BASELINE, Implementation, Implementations, Unavailable
from llama_fast.benchmarks.shapes import ModelShape
from llama_fast.benchmarks.suite.comparison import CALL_ERRORS, first_line, judge, release, timed
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder.checkpoint import find, open_checkpoint
from llama_fast.decoder.checkpoint_layout import huggingface_slots
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.model import Decoder
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.sides import sharing_weights
from llama_fast.profiler.measure.timing import Call
from llama_fast.profiler.measure.work import Work

FUSED = "llama-fast fuse"
"""transformers' model after `fuse`, where "llama-fast" is the engine."""
ENGINE = "llama-fast engine"
"""The engine's own decoder, where "llama-fast" is transformers' model after `fuse`."""

JUDGED_ELEMENTS = 2_000_000_000
"""Weights of the largest model that is copied to float64, which takes four times the memory that bfloat16 does."""
JUDGED_LAYERS = 2

Use = Callable[[Any], Implementation]


@dataclass(frozen=True)
class StoredModel:
    """A model with weights of its own: a folder, or a .gguf file."""

    name: str
    path: Path

    @classmethod
    def named(cls, name: str) -> "StoredModel":
        """Raises ValueError if no model is there, or none that the engine can read."""
        model = cls(Path(name).absolute().name, find(name))
        _ = model.config
        return model

    @functools.cached_property
    def config(self) -> DecoderConfig:
        """As the engine sees it."""
        return open_checkpoint(self.path).config


def build_model(shape: ModelShape, device: torch.device, dtype: torch.dtype, *, layers: int | None = None) -> Any:
    """transformers' causal language model of a shape, or its first `layers`; no norm's weight is plainly one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape.config(layers))
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0, 0.1)
    return model


def judged_part(model: Any) -> Any:
    """What of a causal language model is compared with float64: all of it, or its first layers if that would not fit a GPU."""
    fits = sum(parameter.numel() for parameter in model.parameters()) <= JUDGED_ELEMENTS
    return model if fits else first_layers(model, JUDGED_LAYERS)


def first_layers(model: Any, count: int) -> Any:
    """A causal language model of the first layers of `model`, with its embedding and head, over the same weights."""
    part: Any = sharing_weights(model)
    part.model.layers = part.model.layers[:count]
    part.config.num_hidden_layers = len(part.model.layers)
    return part


def in_float64(model: Any) -> Any:
    """A copy of a model, for use in `InFloat64`."""
    return copy.deepcopy(model).double()


def decoder_of(model: Any) -> Decoder:
    """The engine's decoder with a copy of the weights of transformers' causal language model, as the engine prepares it."""
    config = DecoderConfig.from_huggingface(model.config.to_dict())
    decoder = Decoder(config, device=model.device, dtype=model.dtype)
    tensors = model.state_dict()
    for name, slot in huggingface_slots(config).items():
        slot.fill(decoder, tensors[name])
    if model.device.type == "cpu":
        decoder.pack()
    return decoder.eval().requires_grad_(False)


def itself(model: Any, use: Use) -> Implementation:
    """The plain peer: transformers' model as it is."""
    return use(model)


def model_peers(
    *, ours: str = peers.OURS, mode: Literal["inference", "training"] = "inference", compiles: bool = True, tuned: bool = False
) -> Implementations:  # fmt: skip
    """transformers as it is, fused (under the name `ours`), by torch.compile (if it `compiles`), and with Liger's layers."""

    def fused(model: Any, use: Use) -> Implementation:
        model = sharing_weights(model)
        fuse(model, mode=mode, verify=False)  # all of it is judged here
        return use(model)

    found: Implementations = {ours: fused, BASELINE: itself}
    return found | _compiled(compiles, tuned) | _liger()


def _compiled(compiles: bool, tuned: bool) -> Implementations:
    def named(name: str) -> Implementation:
        def peer(model: Any, use: Use) -> Implementation:
            function = peers.compiled(use(sharing_weights(model)))[name]
            assert not isinstance(function, Unavailable)
            return function

        return peer

    found: Implementations = {}
    for name, function in peers.compiled(_nothing).items():
        found[name] = function if isinstance(function, Unavailable) else named(name)
        if not compiles:
            found[name] = Unavailable("compiling a whole model takes longer than a quick run")
        elif "max-autotune" in name and not tuned:
            found[name] = Unavailable("tuning all kernels of a model takes minutes: see the layer of Llama-3.1-8B")
    return found


def _nothing() -> None:
    pass


def _liger() -> Implementations:
    if importlib.util.find_spec("liger_kernel") is None:
        return {"Liger": Unavailable("liger-kernel is not installed")}
    if not torch.cuda.is_available():
        return {"Liger": Unavailable("liger-kernel has no CPU implementation")}

    def peer(model: Any, use: Use) -> Implementation:
        return use(_with_liger(sharing_weights(model)))

    return {"Liger": peer}


def _with_liger(model: Any) -> Any:
    """Liger's layers in this model alone: its patches of transformers' module are undone, but for RoPE while its attention runs."""
    transformers_api = importlib.import_module("liger_kernel.transformers")
    modeling: Any = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    apply = getattr(transformers_api, f"apply_liger_kernel_to_{model.config.model_type}")
    apply(fused_linear_cross_entropy=hasattr(model, "lm_head"), model=model)
    rope, own_rope = modeling.apply_rotary_pos_emb, before["apply_rotary_pos_emb"]
    vars(modeling).update(before)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.register_forward_pre_hook(lambda *_: setattr(modeling, "apply_rotary_pos_emb", rope))
            module.register_forward_hook(
                lambda *_: setattr(modeling, "apply_rotary_pos_emb", own_rope), always_call=True
            )
    return model


class Trial(Protocol):
    """A model and its inputs, ready to be run by peers."""

    work: Work
    graphs: bool  # whether a CUDA graph can hold a call

    def expected(self) -> list[Tensor]:
        """The answer in float64."""

    def answer(self, peer: Implementation) -> list[Tensor]:
        """A peer's answer to the same."""

    def call(self, name: str, peer: Implementation) -> Call:
        """What is timed of a peer, which results call `name`."""

    def note(self, result: Result) -> str | None:
        """What a reader must know of a result."""


@dataclass(frozen=True)
class ModelCase:
    """A whole model or layer at one size. `build` makes it on a device."""

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    peers: Callable[[], Implementations]
    build: Callable[[torch.device], Trial]

    def implementations(self) -> Implementations:
        return self.peers()

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        release()
        torch.manual_seed(0)
        trial = self.build(device)
        there = {name: peer for name, peer in self.peers().items() if not isinstance(peer, Unavailable)}
        answers = {name: _later(trial.answer, peer) for name, peer in there.items()}
        results = judge(self, trial.expected(), answers)
        release()
        calls: dict[str, Call] = {}
        for name, result in results.items():
            if result.failure is None:
                try:
                    calls[name] = trial.call(name, there[name])
                except CALL_ERRORS as error:
                    results[name] = replace(result, failure=f"it cannot be timed: {first_line(error)}")
        measured = timed(self, results, calls, device, seconds, limits, trial.work, graphs=trial.graphs)
        return [replace(result, note=trial.note(result)) if result.samples else result for result in measured]


def _later(answer: Callable[[Implementation], list[Tensor]], peer: Implementation) -> Call:
    return lambda: answer(peer)


def forward_of(function: Implementation, x: Any) -> Callable[[], Any]:
    """A call without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return function(x)

    return call


def gradients_of(function: Implementation, model: nn.Module, x: Tensor) -> Call:
    """A call that returns y = function(x), and the gradients of x and of the model's trained weights for a random one of y."""
    x = x.detach().requires_grad_()
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    given: list[Tensor] = []

    def call() -> list[Tensor]:
        y = function(x)
        if not given:
            generator = torch.Generator(y.device).manual_seed(1)
            dy = torch.randn(y.shape, generator=generator, device=y.device)  # the same numbers in every dtype
            given.append(dy.to(torch.bfloat16).to(y.dtype))
        return [y, *torch.autograd.grad(y, wanted, given[0])]

    return call
