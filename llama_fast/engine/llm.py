"""The engine: prompts in, text out.

    llm = LLM("path-or-hub-id")
    for out in llm.generate(["Once upon a time"], SamplingParams(temperature=0.8)):
        print(out.text)

A step (`core`) schedules tokens (`scheduler`), runs the decoder and samples on the device (`runner`), and hands each request its
token. On a GPU the host reads the tokens of a step only after it has launched the next, so the GPU never waits for it; a sequence that
ends has then computed one token too many, which is dropped.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import DownloadColumn, Progress
from torch import Tensor

from ..decoder import checkpoint
from ..decoder.model import Decoder, Fusions, runs_natively
from ..decoder.tokenizer import Tokenizer, configured_eos_ids, has_tokenizer, no_tokenizer
from ..kernels.attention_common import LARGEST_HEAD_DIM
from ..kernels.huge_pages import prefer_huge_pages
from .bad_words import spelled
from .cache import BlockPool, KVCache
from .completion import Completion, Output
from .core import EngineCore
from .memory import MemoryLedger
from .paged import OneSequence
from .placement import check_sizes, device_of, dtype_of, own_modes, plan_memory
from .request import Piece, Prompt, Request, Run, as_prompts, token_ids_of
from .runner import Runner
from .sampling import Sampler, SamplingParams
from .scheduler import Scheduler
from .scheduler import Sequence as TokenSequence

EMBEDDED_MODEL = checkpoint.EMBEDDED_MODEL


class LLM:
    """A decoder, its cache and its tokenizer, ready to generate.

    Any number of threads may use it at once. Their requests share the steps, and each gets the tokens it gets alone. There is no
    thread of its own: who waits for tokens computes a step, while the others wait for its end. Where a step fails, the error is
    raised to the thread that computed it, and ends its requests; those of others are computed again by whoever comes next.
    A forked process may go on with it on a CPU, on one of PyTorch's threads; a GPU is none of a forked process's.

    Args:
        model: a folder, a .gguf file, or the name of a model on the Hugging Face hub; None: the small one inside the package.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": the checkpoint's own on a GPU; float32 on a CPU, unless
            the checkpoint is bfloat16 and the CPU multiplies it in hardware.
        device: "cuda", "cuda:1", "cpu", or "auto": a GPU if there is one.
        max_batch: sequences that run at once; others wait.
        max_cache_tokens: size of the KV cache; None: `max_batch` full contexts, or what fits in the memory that is free.
        max_context: the longest sequence; None: what the model was made for.
        step_tokens: tokens that one step computes at most; longer prompts are computed in chunks.
        block_size: tokens of a block of the cache.
        fusions: which kernels are fused in a decoding step; None: all, where Triton runs.
        record_steps: whether decoding steps are recorded once and replayed by one call: as CUDA graphs, or on a CPU (not with
            `read_late`) as lists of native launches. They read the weights where they lay when they were recorded.
        read_late: whether the host reads a step's tokens after it has launched the next; None: on a GPU.
        progress: show a progress bar while loading, and a line when a graph is captured, on a terminal's stderr.

    Attributes:
        longest: tokens that a sequence may have: `max_context`, or what the cache holds where that is less.

    Raises:
        ValueError: the model is not found or not understood, or does not fit the device; the message says what to do.
    """

    def __init__(
        self, model: str | Path | None = None, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto",
        max_batch: int = 16, max_cache_tokens: int | None = None, max_context: int | None = None,
        step_tokens: int = 2048, block_size: int = 16, fusions: Fusions | None = None, record_steps: bool = True,
        read_late: bool | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        sizes = check_sizes(
            max_batch=max_batch, max_cache_tokens=max_cache_tokens, max_context=max_context, step_tokens=step_tokens,
            block_size=block_size,
        )  # fmt: skip
        self.device = device_of(device)
        self._console = Console(stderr=True, quiet=not progress)
        with own_modes(self.device, inference=False):
            opened = checkpoint.open_checkpoint(checkpoint.find(EMBEDDED_MODEL if model is None else model))
        self.config = config = opened.config
        if config.head_dim > LARGEST_HEAD_DIM:
            raise ValueError(
                f"the model's head_dim must be at most {LARGEST_HEAD_DIM} (the attention's), got {config.head_dim}"
            )
        self.dtype = dtype_of(dtype, opened.dtype, self.device)
        self._folder = opened.folder
        self._tokenizer = Tokenizer(self._folder) if has_tokenizer(self._folder) else None
        self._eos_ids = self._tokenizer.eos_ids if self._tokenizer else configured_eos_ids(self._folder)
        self.max_context = config.max_positions if max_context is None else max_context
        if self.max_context > config.max_positions and config.rope.rope_type != "dynamic":
            warnings.warn(
                f"max_context={max_context} is more than the {config.max_positions} tokens the model was made for: "
                "what it says beyond them may be nonsense",
                stacklevel=2,
            )
        fusions = Fusions.where(self.device, self.dtype) if fusions is None else fusions
        on_cpu = self.device.type == "cpu"
        natively = on_cpu and runs_natively(self.dtype)
        packs = on_cpu and not (natively or fusions.norm_qkv_rope or fusions.norm_swiglu)
        # one query over 128 keys takes PyTorch 11 us on a CPU in float32, and 85 in bfloat16
        cache_dtype = torch.float32 if packs else self.dtype
        blocks, self._ledger = plan_memory(
            config, self.dtype, cache_dtype, self.device, packs=packs, **sizes | {"max_context": self.max_context}
        )
        self.longest = min(self.max_context, blocks * block_size)
        # where what a key is depends on how long its sequence is, equal beginnings are not equal
        self._prefixes_are_reusable = config.rope.rope_type not in ("dynamic", "longrope")
        late = self.device.type == "cuda" if read_late is None else read_late
        with own_modes(self.device, inference=False):  # a decoder like any other module
            self.decoder = self._load(opened, fusions)
            if packs:
                self.decoder.pack()
            cache = KVCache(config, blocks=blocks, block_size=block_size, device=self.device, dtype=cache_dtype)
            # a tokenizer may have more tokens than the model
            eos_ids = [i for i in self._eos_ids if i < config.vocab_size]
            sampler = Sampler(config.vocab_size, max_batch, eos_ids=eos_ids, device=self.device)
            runner = Runner(self.decoder, cache, sampler, natively=natively, reads_late=late, phase=self._phase)
            if record_steps and (self.device.type == "cuda" or (natively and not late)):
                runner.record_steps(longest=self.longest, console=self._console)
        pool = BlockPool(blocks, block_size, neighbours=on_cpu)
        scheduler = Scheduler(pool, max_batch=max_batch, step_tokens=step_tokens)
        self._core = EngineCore(scheduler, runner, text_of=self._text_of, reads_late=late, phase=self._phase)
        # is told the name of each phase of a step as it ends on the host: see `profiler.phases`
        self.on_phase: Callable[[str], None] | None = None

    @property
    def ledger(self) -> MemoryLedger:
        """What weights, cache, workspace and the steps recorded so far take of the device's memory."""
        steps = self._core.runner.steps
        return self._ledger if steps is None else replace(self._ledger, recordings=steps.recorder.bytes)

    # --- what users call ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: its folder has none. Prompts of token ids get their tokens all the same, with an empty text.
        """
        if self._tokenizer is None:
            raise no_tokenizer(self._folder)
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> list[Completion]:
        """The completions of prompts (strings or lists of token ids), in their order, whatever order they end in.

        Threads may call this, `stream` and the rest at once: see the class.
        """
        many = as_prompts(prompts)
        params = SamplingParams() if params is None else params
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ValueError(f"params must be one or as many as the prompts, {len(many)}, got {len(each)}")
        requests = [self._request(prompt, one) for prompt, one in zip(many, each, strict=True)]
        try:
            self._core.add(requests)
            while not all(request.done for request in requests):
                self.step()
        finally:
            self._core.cancel(requests)
        return [request.completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The text of a prompt's completion, as it is settled. Leaving the loop cancels the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"n must be 1 to stream, got {params.n}")
        request = self._request(prompt, params)
        try:
            self._core.add([request])
            while not request.done:
                self.step()
                if not request.done and (text := request.new_text()):
                    yield Piece(text)
            yield Piece(request.new_text(), request.completion)
        finally:
            self.cancel(request)

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The reply to a conversation, `[{"role": "user", "content": "..."}, ...]`, by the model's own chat template."""
        return self.generate([self.tokenizer.chat(messages)], params)[0]

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each token of one sequence, (tokens, vocab), without the cache: to compare models."""
        return self._core.between_steps(lambda: self._logits(token_ids))

    def _logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        with own_modes(self.device):
            ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
            return self.decoder.logits(self.decoder(ids, OneSequence(len(ids), self.device)))

    def forget_prefixes(self) -> None:
        """Forgets which beginnings the cache holds: the next requests compute all of their prompts."""
        self._core.between_steps(self._core.scheduler.pool.forget)

    def use_fusions(self, fusions: Fusions) -> None:
        """Computes decoding steps with other kernels from now on, over the same weights: to compare what they gain.

        Raises:
            ValueError: weights that are packed for a CPU are read by none of the fused kernels.
        """
        if self.decoder.is_packed and (fusions.norm_qkv_rope or fusions.norm_swiglu):
            raise ValueError(
                "fusions: norm_qkv_rope and norm_swiglu need plain weights, and these are packed for the CPU"
            )
        self._core.between_steps(lambda: self._core.runner.use(fusions))

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queues a prompt; `step` works on it until `request.done`.

        Raises:
            ValueError: the prompt is empty or longer than the context or the cache; `params` do not fit the model; or prompt or
                `params` hold text (stop strings too), and the model has no tokenizer.
        """
        request = self._request(prompt, params)
        self._core.add([request])
        return request

    def cancel(self, request: Request) -> None:
        """Ends what of a request still runs; its completions keep what they have.

        At once; but called in the midst of another call of this engine by the same thread (a stream that the garbage collector
        drops there, a signal's handler), when that call ends.
        """
        self._core.cancel([request])

    def step(self) -> None:
        """Computes the next tokens of the requests that were submitted, by whatever thread; nothing if there are none.

        A step of another thread that ended meanwhile is as good. Where a step is interrupted or fails, what it was to compute is
        computed again later: requests lose time, but no token.
        """
        self._core.step()

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {params!r}")
        ids = token_ids_of(prompt, lambda text: self.tokenizer.encode(text), self.config.vocab_size)
        if len(ids) > self.longest:
            what = "context" if self.longest == self.max_context else "KV cache (give a larger max_cache_tokens)"
            raise ValueError(f"the prompt has {len(ids)} tokens, and the {what} holds {self.longest}")
        params = params.for_vocabulary(self.config.vocab_size)
        bad_words = spelled(params.bad_words, self.tokenizer, self.config.vocab_size) if params.bad_words else ()
        params.check_vocabulary(self.config.vocab_size, self._eos_ids, bad_words)
        room = self.longest - len(ids)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        runs: dict[TokenSequence, Run] = {}
        tokenizer = self.tokenizer if params.stop_strings else self._tokenizer
        for seed in params.seeds():
            completion = Completion(ids, logprobs=None if params.logprobs is None else [])
            output = Output(completion, params, tokenizer, eos_ids=self._eos_ids)
            # the first computes all of the prompt if its log-probabilities are asked for
            reuse = self._prefixes_are_reusable and (params.prompt_logprobs is None or bool(runs))
            sequence = TokenSequence(list(ids), max(1, most), reuse_prefix=reuse)
            runs[sequence] = Run(output, params, seed, bad_words, empty=most == 0)
        request = Request(runs)
        if params.prompt_logprobs is not None:
            request.completion.prompt_logprobs = []
        if most == 0:  # nothing to compute, but the log-probabilities of the prompt if they are asked for
            for run in list(runs.values())[params.prompt_logprobs is not None :]:
                run.end("length")
        return request

    # --- setting up --------------------------------------------------------------------------------------------------

    def _phase(self, name: str) -> None:
        if self.on_phase is not None:
            self.on_phase(name)

    def _text_of(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special=False)

    def _load(self, opened: checkpoint.Checkpoint, fusions: Fusions) -> Decoder:
        decoder = Decoder(opened.config, device=self.device, dtype=self.dtype, fusions=fusions)
        prefer_huge_pages(decoder.parameters())
        columns, seen = (*Progress.get_default_columns(), DownloadColumn()), self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not seen) as bar:
            task = bar.add_task("loading")
            opened.fill(decoder, lambda done, total: bar.update(task, completed=done, total=total))
        prefer_huge_pages(decoder.parameters())  # what was no new memory
        return decoder.eval()
