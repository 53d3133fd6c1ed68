"""What is profiled: a model on a device, the sides that generate with it, and the prompts they get."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.stories import write_story
from ...decoder import checkpoint
from ...decoder.config import DecoderConfig
from ...decoder.tokenizer import Tokenizer
from ...engine.cache import bytes_per_token
from ...engine.llm import EMBEDDED_MODEL, LLM
from ...engine.memory import available_bytes
from ...engine.placement import device_of, dtype_of
from . import sides
from .sides import OURS, EngineSide, Side, TransformersSide
from .work import weight_elements

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAINST = ("transformers", "transformers-fused", "transformers-static")
PROMPT_TOKENS, NEW_TOKENS = 512, 128
_MEMORY_SHARE = 0.6  # of what is free, that weights and cache may take: transformers' copy of the model wants its own


@dataclass(frozen=True)
class Sizes:
    """How much is generated, checked. `contexts` are all that were asked for."""

    prompt_tokens: int
    new_tokens: int
    batch: tuple[int, ...]
    contexts: tuple[int, ...]
    rounds: int

    @classmethod
    def checked(
        cls, longest: int, *, prompt_tokens: int | None, new_tokens: int | None, batch: Sequence[int],
        contexts: Sequence[int] | None, rounds: int,
    ) -> "Sizes":  # fmt: skip
        """Sizes for a model of `longest` tokens. Raises ValueError for what makes no sense or does not fit."""
        if new_tokens is None:
            new_tokens = min(NEW_TOKENS, longest // 4 if prompt_tokens is None else max(2, longest - prompt_tokens))
        if prompt_tokens is None:
            prompt_tokens = min(PROMPT_TOKENS, longest - new_tokens)
        least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "rounds": (rounds, 1)}
        least |= {f"batch[{i}]": (rows, 1) for i, rows in enumerate(batch)}
        least |= {f"contexts[{i}]": (context, 2) for i, context in enumerate(contexts or ())}
        for name, (value, at_least) in least.items():
            if value < at_least:
                raise ValueError(f"{name} must be at least {at_least}, got {value}")
        if not batch:
            raise ValueError("batch must name at least one number of requests, got none")
        if prompt_tokens + new_tokens > longest:
            raise ValueError(
                f"prompt_tokens + new_tokens must be at most {longest}, the model's context, "
                f"got {prompt_tokens} + {new_tokens}"
            )
        if contexts is None:
            whole = prompt_tokens + new_tokens
            contexts = sorted({max(2, whole // 8), max(2, whole // 2), whole})
        return cls(prompt_tokens, new_tokens, tuple(batch), tuple(contexts), rounds)


@dataclass
class Subject:
    """A model and the sides that generate with it; the first is what the profile is of.

    Attributes:
        name: of the model.
        config: as our decoder sees it; None where it is of a family that we don't know.
        theirs: transformers' model, and its tokenizer, once they are loaded.
    """

    name: str
    sides: list[Side]
    config: DecoderConfig | None
    dtype: torch.dtype
    device: torch.device
    sizes: Sizes
    llm: LLM | None = None
    theirs: "PreTrainedModel | None" = None
    their_tokenizer: Any = None
    warnings: list[str] = field(default_factory=list)

    def cache_dtype_of(self, side: Side) -> torch.dtype:
        """What keys and values are kept in: our engine's on a CPU are wider than its weights may be."""
        return side.llm._core.runner.cache.dtype if isinstance(side, EngineSide) else self.dtype

    @property
    def measured_contexts(self) -> tuple[int, ...]:
        """Those that the model was made for and that fit into memory."""
        longest = self.sizes.prompt_tokens + self.sizes.new_tokens
        if self.llm is not None:
            longest = min(
                self.llm.longest,
                self.llm._core.runner.cache.blocks * self.llm._core.runner.cache.block_size // self.sizes.batch[0],
            )
        elif self.config is not None:
            longest = self.config.max_positions
        return tuple(context for context in self.sizes.contexts if context <= longest)

    def leave_out(self, side: Side, error: RuntimeError) -> None:
        """Goes on without a side that failed (a compiler, memory) and says so; without the first there is nothing: raises `error`."""
        if side is self.sides[0]:
            raise error
        self.sides.remove(side)
        self.warnings.append(f"{side.name} is left out from here on, as it failed: {first_line(error)}")

    def prompts(self, batch: int, tokens: int) -> tuple[Tensor, list[str] | None]:
        """(batch, tokens) token ids, no two rows alike: of stories, and these as texts, where our engine has a tokenizer."""
        if self.llm is None:
            assert self.theirs is not None
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, int(self.theirs.config.vocab_size), (batch, tokens), generator=generator)
            return ids.to(self.device), None
        rows = [story_ids(self.llm.tokenizer, self.llm.config.vocab_size, seed, tokens) for seed in range(batch)]
        return torch.tensor(rows, device=self.device), [self.llm.tokenizer.decode(row) for row in rows]


def first_line(error: Exception) -> str:
    """Of its message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def story_ids(tokenizer: Tokenizer, vocab_size: int, seed: int, tokens: int) -> list[int]:
    """So many tokens of stories, none that a model of `vocab_size` has no row for."""
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        ids += tokenizer.encode(write_story(rng).text + "\n")
    return [min(i, vocab_size - 1) for i in ids[:tokens]]


def open_subject(
    model: Any, *, against: Sequence[str], dtype: str | torch.dtype, device: str | torch.device, sizes: dict[str, Any]
) -> Subject:  # fmt: skip
    """Loads what is profiled and what it is set against.

    Raises:
        ValueError: something is unknown, does not fit, or is set against itself.
        ImportError: transformers is asked for, and not installed.
    """
    for name in against:
        if name not in AGAINST:
            raise ValueError(f"against must hold names of {', '.join(map(repr, AGAINST))}, got {name!r}")
    if model is None or isinstance(model, str | Path):
        subject = _opened(model, dtype, device, sizes)
    elif dtype != "auto" or device != "auto":
        raise ValueError(
            f"dtype and device belong to a model that is loaded here: this {type(model).__name__} has its own"
        )
    elif isinstance(model, LLM):
        subject = _of_engine(model, str(model.tokenizer.folder), Sizes.checked(model.longest, **sizes))
        _check_rows(model, subject.sizes)
    elif isinstance(model, nn.Module) and hasattr(model, "generate"):
        subject = _of_transformers(model, sizes)
    else:
        raise ValueError(
            f"model must be a folder, a .gguf file, a name on the hub, an LLM or a transformers model, got {model!r}"
        )
    for name in dict.fromkeys(against):
        subject.sides.append(_against(subject, name))
    return subject


def _opened(model: Any, dtype: Any, device: Any, sizes: dict[str, Any]) -> Subject:
    where = device_of(device)
    opened = checkpoint.open_checkpoint(checkpoint.find(EMBEDDED_MODEL if model is None else model))
    config = opened.config
    checked = Sizes.checked(config.max_positions, **sizes)
    chosen = dtype_of(dtype, opened.dtype, where)
    longest = checked.prompt_tokens + checked.new_tokens
    room = int(available_bytes(where) * _MEMORY_SHARE) - weight_elements(config)[0] * chosen.itemsize
    fitting = [c for c in checked.contexts if c <= config.max_positions and _cache_bytes(config, checked, c) < room]
    longest = max([longest, *fitting])
    tokens = max(max(checked.batch) * (checked.prompt_tokens + checked.new_tokens), checked.batch[0] * longest)
    tokens += 32 * max(checked.batch)  # no row fills its last block
    llm = LLM(
        model, dtype=chosen, device=where, max_batch=max(checked.batch), max_context=longest,
        max_cache_tokens=tokens if where.type == "cuda" else 2 * tokens, progress=False,
    )  # fmt: skip
    return _of_engine(llm, "embedded model" if model is None else str(model), checked)


def _cache_bytes(config: DecoderConfig, sizes: Sizes, context: int) -> int:
    return 2 * sizes.batch[0] * context * bytes_per_token(config, torch.float32)


def _check_rows(llm: LLM, sizes: Sizes) -> None:
    rows, tokens = llm._core.scheduler.max_batch, llm._core.runner.cache.blocks * llm._core.runner.cache.block_size
    needed = max(sizes.batch) * (sizes.prompt_tokens + sizes.new_tokens)
    if max(sizes.batch) > rows or needed > tokens:
        raise ValueError(
            f"batch {max(sizes.batch)} must run at once: this LLM has room for {rows} sequences (max_batch) and "
            f"{tokens} tokens (max_cache_tokens), and {needed} tokens are needed"
        )


def _of_engine(llm: LLM, name: str, sizes: Sizes) -> Subject:
    warnings = [
        f"{OURS}, batch {rows}: the prompts take {steps} steps, and rows that end before the last begins are in no step with it: "
        "its tokens come faster than a whole batch's; ask for more new tokens"
        for rows in sizes.batch
        if rows > 1
        and 2 * (steps := -(-rows * sizes.prompt_tokens // llm._core.scheduler.step_tokens)) > sizes.new_tokens
    ]
    return Subject(
        name, [EngineSide(llm)], llm.config, llm.dtype, llm.device, sizes, llm=llm, warnings=warnings
    )  # fmt: skip


def _of_transformers(model: Any, sizes: dict[str, Any]) -> Subject:
    settings = model.config.to_dict()
    warnings = []
    try:
        config = DecoderConfig.from_huggingface(settings)
    except ValueError as error:
        config = None
        warnings.append(f"what a step must do at least is not known of this model: {error}")
    longest = settings.get("max_position_embeddings") or 2**31
    name = settings.get("_name_or_path") or type(model).__name__
    return Subject(
        name, [sides.transformers_side(model)], config, model.dtype, model.device, Sizes.checked(longest, **sizes),
        theirs=model, warnings=warnings,
    )  # fmt: skip


def _against(subject: Subject, name: str) -> TransformersSide:
    if name == "transformers-static" and subject.device.type != "cuda":
        raise ValueError("against 'transformers-static' needs a GPU: transformers compiles it nowhere else")
    model, tokenizer = transformers_model(subject)
    maker = {
        "transformers": sides.plain_side,
        "transformers-fused": sides.fused_side,
        "transformers-static": sides.static_side,
    }[name]
    side = maker(model, tokenizer=tokenizer)
    if side.name in [each.name for each in subject.sides]:
        raise ValueError(f"against {name!r} is what is profiled itself")
    return side


def transformers_model(subject: Subject) -> "tuple[PreTrainedModel, Any]":
    """The model as transformers computes it, loaded when it is first asked for, and its tokenizer."""
    if subject.theirs is None:
        assert subject.llm is not None
        folder = str(subject.llm.tokenizer.folder)
        loaded = sides.load_transformers(folder, dtype=subject.dtype, device=subject.device)
        subject.theirs, subject.their_tokenizer = loaded
    return subject.theirs, subject.their_tokenizer
