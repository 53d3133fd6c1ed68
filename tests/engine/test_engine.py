"""The engine against transformers, and against itself: whatever the schedule, a request's tokens are those it gets alone."""

import contextlib
import warnings
from dataclasses import replace

import numpy
import pytest
import torch
import transformers

from llama_fast.decoder import checkpoint
from llama_fast.decoder.model import Fusions
from llama_fast.engine.llm import LLM
from llama_fast.engine.memory import NotEnoughMemoryError
from llama_fast.engine.sampling import SamplingParams
from llama_fast.kernels.launch import GPUS
from tests.checkpoints import DREAM, needs_dream
from tests.decoder.models import (
    CHECKED,
    MODELS,
    TRAINED,
    VOCAB,
    as_tensor,
    assert_within_rule,
    expected,
    make,
    random_ids,
    save,
)
from tests.engine.engines import DEVICE, Watch, assert_nothing_left, engine
from tests.parity import not_interpreted

GREEDY = SamplingParams(temperature=0.0, max_tokens=128, logprobs=VOCAB, prompt_logprobs=VOCAB)


# --- transformers ----------------------------------------------------------------------------------------------------


def assert_transformers(llm: LLM, model, prompt: list[int], vocab_size: int = VOCAB) -> None:
    """128 greedy tokens are the same; log-probabilities of the prompt and of what follows are as close to float64."""
    theirs = expected(model, prompt, 128)
    params = SamplingParams(
        temperature=0.0, max_tokens=128, ignore_eos=True, logprobs=vocab_size, prompt_logprobs=vocab_size
    )
    ours = llm.generate(prompt, params)[0]
    assert ours.token_ids == theirs.token_ids
    assert ours.finish_reason == "length" and len(ours.logprobs) == 128
    assert [entry.token_id for entry in ours.logprobs] == ours.token_ids
    assert [entry.token_id for entry in ours.prompt_logprobs] == prompt[1:]
    assert_within_rule("prompt", as_tensor(ours.prompt_logprobs), theirs.prompt_logprobs, theirs.prompt_exact)
    assert_within_rule("output", as_tensor(ours.logprobs[:CHECKED]), theirs.logprobs[:CHECKED], theirs.exact)


@not_interpreted
@pytest.mark.parametrize(
    ("name", "length"), [*((name, 12) for name in MODELS), ("dynamic", TRAINED + 9), ("longrope", TRAINED + 9)]
)
def test_transformers(name, length, folder):
    """Longer than the windows; the rope types with a trained length pass it, or begin beyond it."""
    assert_transformers(engine(folder(name), max_context=256), make(name), random_ids(length))


@not_interpreted
@needs_dream
@pytest.mark.filterwarnings("ignore:max_context=256 is more than the 128 tokens")
def test_dream_260k():
    model = transformers.AutoModelForCausalLM.from_pretrained(DREAM).eval()
    llm = engine(DREAM, max_context=256)
    assert_transformers(llm, model, llm.tokenizer.encode("Once upon a time, there was a"), model.config.vocab_size)


@not_interpreted
@pytest.mark.parametrize("name", ["tied", "qwen3", "phi3", "longrope"])
def test_saved_again(name, folder, tmp_path):
    """What is written after loading is the same model for transformers, to the bit."""
    checkpoint.save(engine(folder(name), device="cpu").decoder, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = torch.tensor([random_ids(20)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, make(name)(ids).logits)


# --- schedules -------------------------------------------------------------------------------------------------------

# unequal prompts: of one token, of less than a block, of a block and one, beyond the windows and the trained length
PROMPTS = [random_ids(length, seed=length) for length in (1, 3, 17, 5, 30, 45, 2, 8)]
EACH = [
    SamplingParams(temperature=0.0, max_tokens=20)
    if i % 2
    else SamplingParams(seed=i, temperature=0.7, top_p=0.9, repetition_penalty=1.1, max_tokens=12 + 3 * i)
    for i in range(len(PROMPTS))
]
SCHEDULES = {
    "batch": {},
    "few rows": dict(max_batch=3),
    "chunks": dict(step_tokens=7),
    "one token a step": dict(step_tokens=1, max_batch=3),
    "small cache": dict(max_cache_tokens=80, block_size=4),
    "all at once": dict(max_cache_tokens=80, block_size=8, step_tokens=9, max_batch=4),
}


@pytest.fixture(scope="module")
def alone(folder):
    """What each of PROMPTS gets when nothing else runs."""
    found: dict[str, list[list[int]]] = {}

    def of(name: str) -> list[list[int]]:
        if name not in found:
            llm = engine(folder(name), max_context=128)
            found[name] = [
                llm.generate(prompt, params)[0].token_ids for prompt, params in zip(PROMPTS, EACH, strict=True)
            ]
        return found[name]

    return of


@not_interpreted
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *((schedule, "llama") for schedule in SCHEDULES),
        *(("all at once", name) for name in ("mistral", "dynamic", "longrope")),
        ("batch", "longrope"),
    ],
)
def test_whatever_the_schedule(schedule, name, late, folder, alone):
    options = SCHEDULES[schedule]
    llm = engine(folder(name), max_context=128, read_late=late, **options)
    watch = Watch(llm)
    completions = llm.generate(PROMPTS, EACH)
    assert [completion.token_ids for completion in completions] == alone(name)
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert_nothing_left(llm)
    # it did what its name says
    assert max(len({chunk.sequence.row for chunk in step}) for step in watch.steps) <= options.get("max_batch", 16)
    most = max(sum(chunk.size for chunk in step) for step in watch.steps)
    assert most == options.get("step_tokens", sum(map(len, PROMPTS)) if schedule == "batch" else most)
    # two of the sequences grow past the trained length and are computed again
    turned = 2 if name == "longrope" else 0
    assert watch.preemptions > turned if "max_cache_tokens" in options else watch.preemptions == turned


@not_interpreted
@pytest.mark.parametrize("late", [False, True])
def test_requests_that_join_and_leave_midway(late, folder, alone):
    """Each joins some steps after the one before; one of them is cancelled."""
    llm = engine(folder("llama"), max_context=128, read_late=late, max_batch=4)
    requests = []
    for i, (prompt, params) in enumerate(zip(PROMPTS, EACH, strict=True)):
        requests.append(llm.submit(prompt, params))
        for _ in range(i):
            llm.step()
    assert not requests[5].done and requests[5].completion.token_ids
    llm.cancel(requests[5])
    while not all(request.done for request in requests):
        llm.step()
    for i, (request, tokens) in enumerate(zip(requests, alone("llama"), strict=True)):
        got = request.completion.token_ids
        assert got == tokens[: len(got)] and (got == tokens or i == 5)
        assert request.completion.finish_reason == ("cancelled" if i == 5 else "length")
    assert_nothing_left(llm)


@not_interpreted
@pytest.mark.parametrize("late", [False, True])
def test_prefix_reuse(late, folder):
    """Blocks with a known beginning are not computed again: neither a finished request's nor a running one's."""
    prompt, params = random_ids(40), SamplingParams(temperature=0.0, max_tokens=12)
    llm = engine(folder("llama"), block_size=8, read_late=late)
    watch = Watch(llm)
    first = llm.generate(prompt, params)[0]
    whole = watch.computed
    again = llm.generate(prompt, params)[0]
    # four blocks of five: the prompt's last token is computed for its logits, and its block with it
    assert watch.computed == 2 * whole - 32
    assert again.token_ids == first.token_ids
    # the conversation goes on: prompt and answer are known, as far as they fill blocks
    longer = [*prompt, *first.token_ids, 5, 6, 7]
    request = llm.submit(longer, params)
    llm.step()
    assert watch.steps[-1][0].start == request.sequences[0].reused == 48
    other = llm.submit([*longer[:48], 9, 9], params)  # beside the one whose blocks it shares
    while not (request.done and other.done):
        llm.step()
    fresh = engine(folder("llama"))
    assert request.completion.token_ids == fresh.generate(longer, params)[0].token_ids
    assert other.completion.token_ids == fresh.generate([*longer[:48], 9, 9], params)[0].token_ids
    assert_nothing_left(llm)


@not_interpreted
def test_equal_beginnings_of_unequal_lengths(folder):
    """Where the whole prompt's length turns every key, no beginning is reused."""
    long = random_ids(TRAINED + 20)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    for name in ("dynamic", "longrope"):
        llm, fresh = (engine(folder(name), max_context=128, block_size=4) for _ in range(2))
        llm.generate(long, params)
        assert llm.generate(long[:20], params)[0].token_ids == fresh.generate(long[:20], params)[0].token_ids


@not_interpreted
def test_bfloat16(folder):
    """Another dtype than the checkpoint's: as transformers computes in it, within the error rule."""
    model, prompt = make("llama"), random_ids(60)
    exact = expected(model, prompt, CHECKED).prompt_exact
    with torch.no_grad():
        theirs = model.bfloat16()(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    ours = engine(folder("llama"), dtype="bfloat16").generate(prompt, GREEDY)[0]
    assert_within_rule("prompt", as_tensor(ours.prompt_logprobs).bfloat16(), theirs.bfloat16(), exact)


# --- fusions ---------------------------------------------------------------------------------------------------------

SWITCHES = ["norm_qkv_rope", "norm_swiglu", "residual"]


@pytest.mark.parametrize("off", [None, *SWITCHES])
def test_fusions(off, folder):
    """A step of fused kernels gives what the plain path gives. In the interpreter these are the Triton kernels."""
    model, prompts = make("llama"), [random_ids(5), random_ids(3, seed=1)]
    fused = Fusions(**{name: name != off for name in SWITCHES})
    llm = engine(folder("llama"), fusions=fused, block_size=4, max_context=32)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=VOCAB)
    for prompt, ours in zip(prompts, llm.generate(prompts, params), strict=True):
        theirs = expected(model, prompt, CHECKED)
        assert ours.token_ids == theirs.token_ids[:4]
        assert_within_rule("output", as_tensor(ours.logprobs), theirs.logprobs[:4], theirs.exact[:4])


@not_interpreted
@pytest.mark.parametrize("on", [True, False])
def test_dependent_launch_is_what_the_switch_says_in_every_layer_and_the_head(on, folder, monkeypatch):
    llm = engine(
        folder("llama"), fusions=replace(Fusions.where(torch.device("cpu"), torch.float32), dependent_launch=on)
    )
    seen = []
    for module in (*llm.decoder.layers, llm.decoder.norm):
        module.register_forward_pre_hook(lambda *_: seen.append(GPUS["sm_90"].has_pdl))
    llm.generate([5], SamplingParams(max_tokens=1))
    assert set(seen) == {on} and len(seen) == len(llm.decoder.layers) + 1
    assert GPUS["sm_90"].has_pdl


def test_every_fusion_is_used_and_can_be_switched_off(folder, monkeypatch):
    """A switch that did nothing would pass the test above."""
    used = []
    for name in ("norm_qkv_rope", "norm_swiglu"):
        monkeypatch.setattr(f"llama_fast.decoder.model.{name}", lambda *_, name=name, **__: used.append(name) or 1 / 0)
    for on in ("norm_qkv_rope", "norm_swiglu"):
        llm = engine(folder("llama"), fusions=Fusions(**{name: name == on for name in SWITCHES}))
        with pytest.raises(ZeroDivisionError):
            llm.generate([5])
    assert used == ["norm_qkv_rope", "norm_swiglu"]
    used.clear()
    engine(folder("llama"), fusions=Fusions(norm_qkv_rope=False, norm_swiglu=False)).generate(
        [5], SamplingParams(max_tokens=2)
    )
    assert not used


# --- what goes wrong -------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["forward", "sample", "_read_tokens"])
def test_an_interrupt_leaves_the_engine_usable(where, late, folder, alone, monkeypatch):
    """Ctrl-C in the middle of a step. What another caller has submitted goes on, with the tokens it gets alone."""
    llm = engine(folder("llama"), max_context=128, read_late=late, record_steps=False)
    other = llm.submit(PROMPTS[4], EACH[4])
    owner = llm._core if where == "_read_tokens" else llm._core.runner
    method, calls = getattr(owner, where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return method(*args)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, EACH)
    assert len(llm._core.runs) == 1 and not other.done
    for _ in range(200):
        llm.step()
    assert other.completion.token_ids == alone("llama")[4]
    assert [completion.token_ids for completion in llm.generate(PROMPTS, EACH)] == alone("llama")
    assert_nothing_left(llm)


@not_interpreted
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_after_the_last_token(late, folder, alone, monkeypatch):
    """The completion is whole, and its sequence has not been told: it must get no token more."""
    llm = engine(folder("llama"), max_context=128, read_late=late)
    request, other = llm.submit(PROMPTS[4], EACH[4]), llm.submit(PROMPTS[5], EACH[5])
    publish, interrupts = llm._core.scheduler.publish, []

    def interrupted(chunks):
        if request.completion.finish_reason and not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt
        publish(chunks)

    monkeypatch.setattr(llm._core.scheduler, "publish", interrupted)
    for _ in range(200):
        with contextlib.suppress(KeyboardInterrupt):
            llm.step()
    assert interrupts
    assert [r.completion.token_ids for r in (request, other)] == alone("llama")[4:6]
    assert_nothing_left(llm)


@not_interpreted
def test_a_stream_that_is_left_early(folder, alone):
    llm = engine(folder("llama"), max_context=128)
    stream = llm.stream(PROMPTS[4], EACH[4])
    assert next(stream).text and llm._core.scheduler.pool.free < llm._core.runner.cache.blocks
    stream.close()
    assert_nothing_left(llm)
    pieces = list(llm.stream(PROMPTS[4], EACH[4]))
    assert pieces[-1].completion.token_ids == alone("llama")[4]
    assert "".join(piece.text for piece in pieces) == pieces[-1].completion.text
    assert all(piece.completion is None for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="int8"), "dtype must be 'auto', 'float32', 'bfloat16', 'float16' or that torch dtype, got 'int8'"),
        (dict(dtype=torch.float64), "dtype must be"),
        (dict(device="gpu"), 'device must be "auto", "cuda", "cuda:N" or "cpu", got \'gpu\''),
        (dict(device="meta"), "device must be"),
        *(
            ({name: value}, rf"{name} must be an integer, at least 1 and under 2\*\*31, got {value!r}")
            for name in ("max_batch", "step_tokens", "block_size", "max_context", "max_cache_tokens")
            for value in (0, 2.0, True, "1", 2**31)
        ),
        *(({name: None}, f"{name} must be an integer") for name in ("max_batch", "step_tokens", "block_size")),
        (dict(max_cache_tokens=2**31 - 1), "max_cache_tokens must leave the cache under 2"),
    ],
    ids=str,
)
def test_wrong_options(options, message, folder):
    with pytest.raises(ValueError, match=message):
        engine(folder("llama"), **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("llama", dict(head_dim=head_dim)) for head_dim in (2, 8, 10, 12, 16, 256)),
        ("phi3", dict(hidden_size=68, num_key_value_heads=4, partial_rotary_factor=0.5)),  # head_dim 17
        ("stablelm", dict(hidden_size=68, partial_rotary_factor=0.5)),
        (
            "llama",
            dict(hidden_size=51, intermediate_size=37, num_attention_heads=3, num_key_value_heads=1, head_dim=18),
        ),
    ],
    ids=str,
)
def test_what_is_loaded_generates(name, settings, fused, tmp_path):
    """No size that is accepted fails in a later step: not in a prompt, not when it decodes, in blocks of any size."""
    model, prompt = make(name, **settings), random_ids(5)
    fusions = Fusions(norm_qkv_rope=fused, norm_swiglu=fused)
    llm = engine(save(model, tmp_path), fusions=fusions, max_context=numpy.int64(32), block_size=3, max_batch=1)
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=3))[0].token_ids == theirs[0, 5:].tolist()


def test_heads_that_no_attention_takes_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        engine(save(make(head_dim=258), tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(folder):
    with pytest.raises(ValueError, match="device cuda: PyTorch sees no GPU here; use device='cpu'"):
        engine(folder("llama"), device="cuda")


def test_a_context_beyond_the_trained_one_is_warned_of(folder):
    with pytest.warns(UserWarning, match="max_context=257 is more than the 256 tokens the model was made for"):
        engine(folder("llama"), max_context=257)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(folder("llama"), max_context=256)
        engine(folder("dynamic"), max_context=256)  # made to be stretched


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nothing"):
        engine(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("free", "options", "message"),
    [
        (2**20, dict(), "weights alone are too large.*dtype='bfloat16'"),
        (2**24, dict(max_cache_tokens=10**9), "left for it, so give a smaller max_cache_tokens="),
    ],
)
def test_too_large_for_the_memory(free, options, message, folder, monkeypatch):
    monkeypatch.setattr("llama_fast.engine.placement.available_bytes", lambda _: free)
    monkeypatch.setattr(LLM, "_load", lambda *_: pytest.fail("it was loaded before the memory was looked at"))
    with pytest.raises(NotEnoughMemoryError, match=message) as error:
        engine(folder("llama"), **options)
    assert "KV cache" in str(error.value) and "available" in str(error.value)


def test_the_cache_takes_what_is_free(folder, monkeypatch):
    """Without `max_cache_tokens` the cache shrinks to fit, and the ledger counts what it takes."""
    full = engine(folder("llama"), device="cpu")
    assert full._core.runner.cache.blocks == 16 * 256 // 16
    assert full.ledger.kv_cache == full._core.runner.cache._storage.nbytes
    assert full.ledger.weights == sum(parameter.nbytes for parameter in full.decoder.parameters())
    room = full.ledger.weights + full.ledger.workspace + full.ledger.kv_cache // 2
    monkeypatch.setattr("llama_fast.engine.placement.available_bytes", lambda _: 2 * room)  # of which a CPU gives half
    small = engine(folder("llama"), device="cpu")
    assert 100 < small._core.runner.cache.blocks < 128 and small.ledger.needed <= room


def test_auto(folder):
    llm = LLM(folder("llama"), progress=False)
    assert llm.device.type == DEVICE if DEVICE == "cpu" else "cuda"
    assert llm.dtype == torch.float32
    assert LLM(folder("llama"), dtype=torch.bfloat16, progress=False).dtype == torch.bfloat16
