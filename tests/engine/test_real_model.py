"""SmolLM2-135M-Instruct in our engine beside transformers, each reading the .gguf file by itself, both in float32."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers

from llama_fast import LLM, SamplingParams
from llama_fast.fusion.verify import InFloat64
from llama_fast.kernels.parity import error_bound, relative_error
from tests.engine.real_prompts import PROMPTS
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted

TOKENS = 64


@functools.cache
def engine() -> LLM:
    return LLM(real_model(), dtype="float32", max_context=1024, progress=False)


@functools.cache
def theirs() -> Any:
    path = real_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.to(engine().device).eval()


@functools.cache
def exact() -> Any:
    return copy.deepcopy(theirs()).double()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0]


def logits_in_float64(ids: list[int]) -> torch.Tensor:
    with InFloat64():
        return logits(exact(), ids)


def prompt_ids(prompt: str) -> list[int]:
    return engine().tokenizer.chat([{"role": "user", "content": prompt}])


@needs_real_model
@pytest.mark.parametrize(
    "prompt", [*PROMPTS[:5], *(pytest.param(each, marks=pytest.mark.nightly) for each in PROMPTS[5:])]
)
def test_greedy_tokens_are_those_of_transformers(prompt):
    """All of them, or all before one where float64 has its two best closer together than float32 is exact.

    transformers reads our tokens at once: where each is its likeliest after those before, it would have chosen the same ones.
    """
    ids = prompt_ids(prompt)
    ours = engine().generate([ids], SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))[0].token_ids
    assert len(ours) == TOKENS
    scores = logits(theirs(), ids + ours[:-1])[len(ids) - 1 :]
    expected = scores.argmax(-1).tolist()
    if ours != expected:
        at = next(i for i in range(TOKENS) if ours[i] != expected[i])
        seen = ids + ours[:at]
        true = logits_in_float64(seen)[-1]
        best, second = true.topk(2).values.tolist()
        error = max((each - true).abs().max().item() for each in (engine().logits(seen)[-1], scores[at]))
        assert best - second < 2 * error, f"token {at} is {ours[at]} and not {expected[at]}"


@needs_real_model
def test_logits_within_the_rule():
    for prompt in PROMPTS[:2]:
        ids = prompt_ids(prompt)
        true = logits_in_float64(ids)
        error, their_error = relative_error(engine().logits(ids), true), relative_error(logits(theirs(), ids), true)
        assert error <= error_bound(their_error, torch.float32), f"{error:.2e}, transformers {their_error:.2e}"


@needs_real_model
def test_a_chat_ends_by_itself():
    done = engine().chat([{"role": "user", "content": PROMPTS[0]}], SamplingParams(temperature=0, max_tokens=200))
    assert done.finish_reason == "stop" and "Paris" in done.text and "<|" not in done.text
