"""Sides: what generates, behind one face, so that one clock measures them all. Our engine, and transformers in several ways."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...decoder.gguf.file import is_gguf
from ...engine.llm import LLM
from ...engine.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnPhase = Callable[[str], None]

OURS = "llama-fast"
TRANSFORMERS = "transformers"
FUSED = "transformers, fused"
STATIC = "transformers, static cache + compile"


@dataclass(frozen=True)
class Generation:
    """What a side has generated.

    Attributes:
        start: when it began, on the clock of `time.perf_counter`.
        times: seconds from `start` at which token i of all rows had reached the host.
        token_ids: a list for each row.
    """

    start: float
    times: list[float]
    token_ids: list[list[int]]


class Side(Protocol):
    """Something that generates."""

    name: str

    def generate(
        self, prompts: Tensor, new_tokens: int, *, texts: Sequence[str] | None = None, reuse: bool = False
    ) -> Generation:
        """Continues each of `prompts` (batch, tokens) int64 greedily by exactly `new_tokens`; no token ends a row.

        With `texts` the clock also holds the time to encode these, as a request with a text has to; what comes out is dropped.
        With `reuse` what is known of the prompts from before need not be computed again: where only the steps after them matter.
        """

    def logits(self, ids: Tensor) -> Tensor:
        """The logits (tokens, vocab) after each token of one sequence (tokens,), computed as a whole, without a cache."""

    def watch(self, on_phase: OnPhase | None) -> None:
        """From now on calls `on_phase` with the name of each phase of a step as it ends on the host; None: no more.

        The phases are the engine's own; of transformers "generate" (around the model), "forward", and "wait" on a GPU or "read" on a
        CPU, until the token is there; of a compiled model "step" in the place of the first two.
        """


class EngineSide:
    """Our engine."""

    name = OURS

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def generate(
        self, prompts: Tensor, new_tokens: int, *, texts: Sequence[str] | None = None, reuse: bool = False
    ) -> Generation:
        llm, ids = self.llm, prompts.tolist()
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        if not reuse:
            llm.forget_prefixes()
        times: list[float] = []
        start = time.perf_counter()
        if texts is not None:
            for text in texts:
                llm.tokenizer.encode(text)
            if llm.on_phase is not None:
                llm.on_phase("tokenise")
        requests = [llm.submit(prompt, params) for prompt in ids]
        if llm.on_phase is not None:
            llm.on_phase("submit")
        try:
            while not all(request.done for request in requests):
                llm.step()
                count = min(len(request.completion.token_ids) for request in requests)
                if count > len(times):
                    times += [time.perf_counter() - start] * (count - len(times))
        finally:
            for request in requests:
                llm.cancel(request)
        return Generation(start, times, [request.completion.token_ids for request in requests])

    def logits(self, ids: Tensor) -> Tensor:
        return self.llm.logits(ids)

    def watch(self, on_phase: OnPhase | None) -> None:
        self.llm.on_phase = on_phase


class TransformersSide:
    """`model.generate` of transformers, with `options` for it. `tokenizer` encodes texts, where there is one."""

    def __init__(self, model: "PreTrainedModel", name: str = TRANSFORMERS, *, tokenizer: Any = None, **options: Any):
        self.model: Any = model
        self.name, self.tokenizer, self._options = name, tokenizer, options
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._on_phase: OnPhase | None = None

    def generate(
        self, prompts: Tensor, new_tokens: int, *, texts: Sequence[str] | None = None, reuse: bool = False
    ) -> Generation:
        from transformers import GenerationConfig

        prompts = prompts.to(self.model.device)
        clock = _clock(self._on_token)
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # its own may penalise repetition
        try:
            start = time.perf_counter()
            if texts is not None and self.tokenizer is not None:
                self.tokenizer(list(texts))
                if self._on_phase is not None:
                    self._on_phase("tokenise")
            ids = self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False, num_beams=1,
                pad_token_id=0, stopping_criteria=[clock], **self._options,
            )  # fmt: skip
        finally:
            self.model.generation_config = own
        times = [at - start for at in clock.times]
        return Generation(start, times, ids[:, prompts.shape[1] :].tolist())

    def _on_token(self, token: Tensor) -> None:
        """Waits until a token is on the host."""
        if self._on_phase is None:
            token.item()
            return
        self._on_phase("step" if self.is_compiled else "generate")
        token.item()
        self._on_phase("wait" if token.is_cuda else "read")

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
        logits: Tensor = self.model(ids[None], use_cache=False).logits[0]
        return logits

    def watch(self, on_phase: OnPhase | None) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._on_phase = on_phase
        if on_phase is not None and not self.is_compiled:  # a compiled step would have to leave its graph for a hook
            self._hooks.append(self.model.register_forward_pre_hook(lambda *_: on_phase("generate")))
            self._hooks.append(self.model.register_forward_hook(lambda *_: on_phase("forward")))

    @property
    def is_compiled(self) -> bool:
        return "cache_implementation" in self._options


def transformers_side(model: "PreTrainedModel", *, tokenizer: Any = None) -> TransformersSide:
    """`model` as it is, fused or not."""
    return TransformersSide(model, FUSED if is_fused(model) else TRANSFORMERS, tokenizer=tokenizer)


def plain_side(model: "PreTrainedModel", *, tokenizer: Any = None) -> TransformersSide:
    """transformers' own layers, over the same weights as `model`, which may be fused."""
    if is_fused(model):
        from ...fusion import unfuse

        model = sharing_weights(model)
        unfuse(model)
    return TransformersSide(model, TRANSFORMERS, tokenizer=tokenizer)


def fused_side(model: "PreTrainedModel", *, tokenizer: Any = None) -> TransformersSide:
    """`fuse` of a copy of `model` over the same weights; `model` stays as it is."""
    from ...fusion import fuse

    if not is_fused(model):
        model = sharing_weights(model)
        fuse(model)
    return TransformersSide(model, FUSED, tokenizer=tokenizer)


def static_side(model: "PreTrainedModel", *, tokenizer: Any = None) -> TransformersSide:
    """transformers' own layers with a static cache, which it compiles on a GPU, and replays as a CUDA graph."""
    plain = sharing_weights(plain_side(model).model)
    return TransformersSide(plain, STATIC, tokenizer=tokenizer, cache_implementation="static")


def load_transformers(folder: str, *, dtype: torch.dtype, device: torch.device) -> tuple["PreTrainedModel", Any]:
    """The causal language model in a folder or a .gguf file, and its tokenizer.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "llama-fast[transformers]"') from error
    path = Path(folder)
    place, file = (path.parent, {"gguf_file": path.name}) if is_gguf(path) else (folder, {})
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **file)
    if file and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # dequantised, it can be saved like any other
    return model.to(device).eval(), AutoTokenizer.from_pretrained(place, **file)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws no progress bar of its own between our lines; that of a download, which may take long, stays."""
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf_files: Any = modeling_gguf_pytorch_utils
    was_on, tqdm = logging.is_progress_bar_enabled(), gguf_files.tqdm
    gguf_files.tqdm = logging.tqdm  # its bar heeds no switch
    if was_on:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        enable_progress_bars()  # of downloads, which it has switched off too
    try:
        yield
    finally:
        gguf_files.tqdm = tqdm
        if was_on:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def is_fused(model: Any) -> bool:
    """Whether `llama_fast.fuse` has swapped layers of it."""
    from ...fusion.swap import Fused

    return any(isinstance(module, Fused) for module in model.modules())


def sharing_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of a model, modules and config, over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: PreTrainedModel = copy.deepcopy(model, memo=shared)
    return copied


def _clock(on_token: Callable[[Tensor], None]) -> Any:
    """A stopping criterion that stops nothing: it notes when each token is on the host, where `on_token` waits for it."""
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            on_token(input_ids[0, -1])
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Clock()
