"""Decoding steps on a CPU: recorded once, replayed by one native call, with the tokens of steps that run op by op."""

import resource
import sys
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.decoder.config import DecoderConfig
from llama_fast.engine import recorded_steps
from llama_fast.engine.cache import KVCache
from llama_fast.engine.sampling import SamplingParams
from llama_fast.kernels import cpu, library, matmul
from llama_fast.kernels.native import compiled
from llama_fast.kernels.native.lowering import UnsupportedOpError
from tests.decoder.models import MODELS, make, random_ids
from tests.engine.engines import DEVICE, assert_nothing_left, engine
from tests.engine.test_gpu import GREEDY, PROMPTS, SAMPLED, joining
from tests.parity import not_interpreted

pytestmark = [
    not_interpreted,
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU records CUDA graphs: test_gpu.py"),
    pytest.mark.skipif(cpu.chosen() == "pytorch", reason="steps are recorded where Triton kernels run natively"),
]

RECORDED = [name for name in MODELS if name != "dynamic"]


class Ops(TorchDispatchMode):
    """Counts what PyTorch's dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:  # reading the tokens asks for some
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def decoding(llm, params, prompts=([3, 4, 5],), steps=3):
    """Requests on their way, whose prompts are computed and whose steps are recorded."""
    requests = [llm.submit(list(prompt), params) for prompt in prompts]
    for _ in range(steps):
        llm.step()
    return requests


@pytest.mark.parametrize("name", RECORDED)
def test_a_step_is_one_replay(name, folder):
    """No operator of PyTorch's runs in it, whatever the family and whatever is asked of the sampler."""
    llm = engine(folder(name), max_context=128)
    params = SamplingParams(
        temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=1, repetition_penalty=1.2, frequency_penalty=0.1,
        logit_bias={7: 3.0}, min_tokens=20, max_tokens=30,
    )  # fmt: skip
    decoding(llm, params, [[3, 4, 5], [6, 7]])
    with Ops() as seen:
        llm.step()
    assert seen.names == []
    assert llm._core.runner.steps.last is not None


class Functions(TorchFunctionMode):
    """Counts what is called of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_a_steady_batch_is_planned_once(folder):
    """Its next step is the last one a token further: rows, blocks, modes and what the sampler needs are not looked at again."""
    llm = engine(folder("llama"), max_context=128)
    requests = decoding(llm, SamplingParams(temperature=0.0, max_tokens=20), [[3, 4, 5], [6, 7]], steps=4)
    called = set()
    with Functions() as of_pytorch:
        sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_name))
        llm.step()
        sys.setprofile(None)
    assert "replay" in called and not called & {"schedule", "launch", "own_modes", "needs"}
    assert of_pytorch.called == []
    assert [len(request.completion.token_ids) for request in requests] == [5, 5]


def test_a_batch_that_changes_is_planned_anew(folder):
    """At each of these steps something is not as in the last: a row joins, a block is full, other kernels, a row ends, is cancelled."""
    alone = engine(folder("llama"), max_context=128, max_batch=1)
    each = [SamplingParams(temperature=0.0, max_tokens=most) for most in (30, 22, 9)]
    prompts = [[3, 4, 5], [6, 7], [8]]
    expected = [alone.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, each, strict=True)]
    llm = engine(folder("llama"), max_context=128, block_size=4)
    requests = [llm.submit(prompts[0], each[0])]
    for step in range(40):
        llm.step()
        if step in (5, 9):
            requests.append(llm.submit(prompts[len(requests)], each[len(requests)]))
        if step == 7:
            llm.use_fusions(replace(llm.decoder.fusions, norm_swiglu=False))
        if step == 20:
            llm.cancel(requests[1])
    assert requests[0].completion.token_ids == expected[0] and requests[2].completion.token_ids == expected[2]
    cut = requests[1].completion
    assert (
        cut.finish_reason == "cancelled"
        and 5 < len(cut.token_ids) < 22
        and cut.token_ids == expected[1][: len(cut.token_ids)]
    )
    assert_nothing_left(llm)


def test_recordings_are_counted_in_the_ledger(folder):
    """A replay's tensors: of each number of rows, as many more."""
    llm = engine(folder("llama"), max_context=64)
    params, counted = SamplingParams(temperature=0.0, max_tokens=4), [llm.ledger.recordings]
    for rows in (1, 8):
        llm.generate([[3, 4]] * rows, params)
        counted.append(llm.ledger.recordings)
    config = llm.config
    logits, gate = 4 * config.vocab_size, 4 * config.intermediate_size * config.num_layers
    assert counted[0] == 0 and counted[1] > logits + gate
    assert counted[2] - counted[1] > 8 * (logits + gate) and "recorded" in str(llm.ledger)


@pytest.mark.parametrize("each", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3", "stablelm", "longrope"])
def test_the_tokens_of_steps_op_by_op(name, each, folder, monkeypatch):
    """Rows join and leave, one is cancelled; log-probabilities and bad words leave a part of a step to PyTorch's ops."""
    monkeypatch.setattr(recorded_steps, "_FEWEST_BLOCKS", 2)
    options = dict(max_context=128, block_size=4, max_batch=5)
    llm = engine(folder(name), **options)
    with cpu.use("native"):  # or small products would be PyTorch's, added up in another order
        expected = joining(engine(folder(name), record_steps=False, **options), each)
    assert joining(llm, each) == expected
    assert joining(llm, each) == expected  # all of them recorded before
    rows, blocks, _ = (set(each) for each in zip(*llm._core.runner.steps._recorded, strict=True))
    assert len(rows) > 2 and len(blocks) > 1  # which, the schedule says


def test_a_step_is_recorded_anew_where_a_sequence_outgrows_its_table(folder, monkeypatch):
    monkeypatch.setattr(recorded_steps, "_FEWEST_BLOCKS", 1)
    llm = engine(folder("llama"), block_size=4, max_context=128)
    alone = engine(folder("llama"), max_context=128).generate([3], SamplingParams(temperature=0.0, max_tokens=100))
    assert llm.generate([3], SamplingParams(temperature=0.0, max_tokens=100))[0].token_ids == alone[0].token_ids
    assert {key[1] for key in llm._core.runner.steps._recorded} == {1, 4, 16, 32}


def test_a_sequence_that_lost_its_blocks_is_read_where_its_new_ones_are(folder):
    """The table of a row is written where its list of blocks is another, though as long."""
    options = dict(block_size=4, max_batch=6)
    expected = engine(folder("llama"), max_batch=1, max_context=128).generate(PROMPTS, GREEDY)
    llm = engine(folder("llama"), max_cache_tokens=80, **options)
    assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == [c.token_ids for c in expected]
    assert_nothing_left(llm)


def test_more_rows_than_the_kernels_of_few_rows_take(folder):
    llm = engine(folder("llama"), max_batch=20, max_context=64)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    prompts = [random_ids(4, seed=i) for i in range(20)]
    together = [c.token_ids for c in llm.generate(prompts, params)]
    assert together == [engine(folder("llama"), max_context=64).generate(p, params)[0].token_ids for p in prompts]


def test_what_cannot_be_recorded_runs_op_by_op(folder):
    """`dynamic` angles follow the length of a sequence by PyTorch's ops."""
    llm = engine(folder("dynamic"), max_context=64)
    assert len(llm.generate([3, 4], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))[0].token_ids) == 20
    assert llm._core.runner.steps.last is None


def test_what_cannot_be_recorded_keeps_nothing_else_from_it(folder):
    """A residual that is added by PyTorch is none of a recording's; the fusion that comes back is."""
    llm, params = engine(folder("llama"), max_context=64), SamplingParams(temperature=0.0, max_tokens=8)
    expected = llm.generate([3, 4], params)[0].token_ids
    fusions, first = llm.decoder.fusions, llm._core.runner.steps.last
    llm.use_fusions(replace(fusions, residual=False))
    assert llm.generate([3, 4], params)[0].token_ids == expected
    assert llm._core.runner.steps.last is first
    llm.use_fusions(fusions)
    llm._core.runner.steps.last = None
    assert llm.generate([3, 4], params)[0].token_ids == expected and llm._core.runner.steps.last is not None


def test_a_kernel_that_cannot_be_compiled_leaves_its_op_to_pytorch(folder, monkeypatch):
    load = compiled._load_or_compile

    def refusing(plan, *rest):
        if plan.kernel.__name__ == "token_kernel":
            raise UnsupportedOpError("not here")
        return load(plan, *rest)

    expected = engine(folder("llama"), max_context=64).generate([3, 4], GREEDY[0])[0].token_ids
    monkeypatch.setattr(compiled, "_load_or_compile", refusing)
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(cpu, "fallbacks", {})
    library._on_cpu[torch.ops.llama_fast.sample.default]._known.clear()
    llm = engine(folder("llama"), max_context=64)
    with pytest.warns(RuntimeWarning, match="sample runs on PyTorch's ops: not here"):
        assert llm.generate([3, 4], GREEDY[0])[0].token_ids == expected
    assert llm._core.runner.steps.last is None
    assert all("not here" in reason for reason in llm._core.runner.steps.refused.values())
    library._on_cpu[torch.ops.llama_fast.sample.default]._known.clear()


def test_few_rows_beside_a_short_prompt_have_the_bits_of_a_recorded_step(folder):
    """Whichever kernels are faster for such small products."""
    llm = engine(folder("llama"), max_context=64)
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    alone = llm.generate([3, 4, 5], params)[0]
    llm.forget_prefixes()
    request = llm.submit([3, 4, 5], params)
    for i in range(4):
        llm.step()
        llm.submit([6 + i, 7], SamplingParams(max_tokens=1))
    while not request.done:
        llm.step()
    assert request.completion.token_ids == alone.token_ids
    assert [each.logprob for each in request.completion.logprobs] == [each.logprob for each in alone.logprobs]


def test_many_rows_of_a_prompt_are_onednns(folder, monkeypatch):
    """In float32, where nobody asks for native kernels by name; the few rows of the next step are ours."""
    multiplied = []
    real = matmul.onednn_linear
    monkeypatch.setattr(matmul, "onednn_linear", lambda x, *rest: multiplied.append(len(x)) or real(x, *rest))
    llm = engine(folder("llama"), max_context=64)
    llm.generate(list(range(3, 3 + 21)), SamplingParams(temperature=0.0, max_tokens=2))
    assert multiplied == ([21] * 4 * 2 if cpu.chosen() == "auto" else [])  # four products in each of two layers


def test_other_fusions_have_recordings_of_their_own(folder):
    llm = engine(folder("llama"), max_context=64)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    launches = []
    for fusions in (llm.decoder.fusions, replace(llm.decoder.fusions, norm_swiglu=False), llm.decoder.fusions):
        llm.use_fusions(fusions)
        llm.generate([3, 4], params)
        launches.append(len(llm._core.runner.steps.last[0].recording.launches))
    assert launches[0] == launches[2] == launches[1] - 2 * 2  # norm and SwiGLU in each of two layers


def test_pytorchs_ops_by_name(folder):
    with cpu.use("pytorch"):
        llm = engine(folder("llama"), max_context=64)
        assert llm.generate([3], SamplingParams(temperature=0.0, max_tokens=5))[0].token_ids
    assert llm._core.runner.steps is None and llm.decoder.is_packed


def test_a_cache_takes_the_memory_of_what_was_written():
    """A gigabyte of it can be made in a moment, and costs nothing before it is used."""
    config = DecoderConfig.from_huggingface(make().config.to_dict())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = KVCache(config, blocks=2**17, block_size=16, device=torch.device("cpu"), dtype=torch.float32)
    k, _ = cache.layer(1)
    assert k.untyped_storage().nbytes() > 2**30
    k[5] = 1.0
    assert k[5].sum() == k[5].numel() and k[4].sum() == 0 and k[2**17].sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
