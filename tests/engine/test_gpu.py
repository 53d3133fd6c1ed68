"""Decoding steps as CUDA graphs: what a GPU must show, and what can be seen of it without one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_fast.decoder.model import Decoder, Fusions
from llama_fast.engine import recorded_steps
from llama_fast.engine import runner as runner_module
from llama_fast.engine.bad_words import BadWords
from llama_fast.engine.cache import KVCache
from llama_fast.engine.paged import StepInputs
from llama_fast.engine.sampling import Needs, SamplingParams
from llama_fast.kernels.launch import INTERPRETED
from tests.decoder.models import VOCAB, random_ids
from tests.engine.engines import DEVICE, assert_nothing_left, engine
from tests.parity import not_interpreted

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"
)

PROMPTS = [random_ids(length, seed=length) for length in (1, 3, 17, 5, 30, 45, 2, 8)]
GREEDY = [SamplingParams(temperature=0.0, max_tokens=12 + 3 * i) for i in range(len(PROMPTS))]
SAMPLED = [
    GREEDY[0],
    SamplingParams(seed=1, temperature=0.8, max_tokens=20),
    SamplingParams(seed=2, temperature=1.5, top_k=9, max_tokens=25),
    SamplingParams(seed=3, top_p=0.9, min_p=0.01, max_tokens=16),
    SamplingParams(seed=4, repetition_penalty=1.2, frequency_penalty=0.5, max_tokens=30),
    SamplingParams(seed=5, logit_bias={7: 3.0}, banned_token_ids=[9], max_tokens=12),
    SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=list(range(3, 40)), max_tokens=22),
    SamplingParams(seed=7, logprobs=3, bad_words=["w5", "w7 w8"], max_tokens=14),
]


def joining(llm, each):
    """The tokens of PROMPTS, of which each joins some steps after the one before; the third is cancelled on its way."""
    requests = []
    for i, (prompt, params) in enumerate(zip(PROMPTS, each, strict=True)):
        requests.append(llm.submit(prompt, params))
        for _ in range(i):
            llm.step()
    llm.cancel(requests[2])
    while not all(request.done for request in requests):
        llm.step()
    assert_nothing_left(llm)
    return [request.completion.token_ids for i, request in enumerate(requests) if i != 2]


# --- without a GPU ---------------------------------------------------------------------------------------------------


class Emulated:
    """A GPU's graphs on the CPU: a replay computes the step again, from its own inputs into its own outputs."""

    pads, bytes = True, 0

    def record(self, step):
        for _ in range(3):  # warm-ups leave traces in the padding row, as they do on a GPU
            sampled = step()
        return sampled, SimpleNamespace(replay=lambda: self._replay(step, sampled))

    def _replay(self, step, sampled):
        pairs = zip(tree_leaves(vars(sampled)), tree_leaves(vars(step())), strict=True)
        for mine, theirs in pairs:
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs)
            elif mine is not None:
                for name, value in vars(mine).items():
                    value.copy_(getattr(theirs, name))


def emulated(folder, monkeypatch, **options):
    """An engine that takes the CPU for a GPU with graphs."""
    llm = engine(folder("llama"), max_context=128, block_size=4, record_steps=False, **options)
    runner = llm._core.runner
    runner._triton, runner._natively = True, False  # rows by their block tables, all of a step in its graph
    monkeypatch.setattr(runner_module, "CudaGraphs", lambda device: Emulated())
    runner.record_steps(longest=100, console=llm._console)
    return llm


@not_interpreted
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has graphs of its own")
@pytest.mark.parametrize("each", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_padding_rows_change_nothing(each, folder, monkeypatch):
    """All of a graph but the capture: rows and blocks padded to those of its key, outputs read before the next replay."""
    monkeypatch.setattr(recorded_steps, "_FEWEST_BLOCKS", 2)
    plain = engine(folder("llama"), max_context=128, block_size=4, max_batch=5, record_steps=False)
    llm = emulated(folder, monkeypatch, max_batch=5)
    assert joining(llm, each) == joining(plain, each)
    rows, blocks, _ = zip(*llm._core.runner.steps._recorded, strict=True)
    assert set(rows) == {1, 2, 4, 8} and set(blocks) == {8, 25}  # 25 blocks hold the longest sequence


@not_interpreted
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has graphs of its own")
def test_fusions_that_come_back_find_their_graphs(folder, monkeypatch):
    recorded = []
    record = Emulated.record

    def noted(self, step):
        recorded.append(llm.decoder.fusions)
        return record(self, step)

    monkeypatch.setattr(Emulated, "record", noted)
    llm = emulated(folder, monkeypatch)
    on, off = llm.decoder.fusions, replace(llm.decoder.fusions, residual=False)
    texts = []
    for fusions in (on, off, on, off):
        llm.use_fusions(fusions)
        texts.append(llm.generate([3, 4, 5], GREEDY[0])[0].token_ids)
    assert recorded == [on, off] and texts == texts[:1] * 4


class OnlyOn(TorchDispatchMode):
    """Raises where an op reads or makes a tensor elsewhere than on `device`: on a GPU, the host would wait for it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.ops = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == self.device for tensor in tensors), f"{func} has a tensor of the host"
        self.ops.add(str(func).split(".")[1])
        return out


@not_interpreted
@pytest.mark.parametrize("fusions", [Fusions(), Fusions(norm_qkv_rope=False, norm_swiglu=False, residual=False)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "stablelm", "dynamic", "longrope"])
def test_a_step_needs_nothing_of_the_host(name, fusions, folder):
    """On the meta device, where a value cannot be read at all: so a graph can hold it, and no step waits."""
    llm = engine(folder(name), device="cpu", max_batch=4, read_late=True)
    llm._core.runner._triton = True
    llm._core.runner.decoder = Decoder(llm.config, device=torch.device("meta"), fusions=fusions)
    llm._core.runner.cache = KVCache(
        llm.config, blocks=8, block_size=16, device=torch.device("meta"), dtype=torch.float32
    )
    sampler = llm._core.runner.sampler
    everything = dict(bias=True, penalties=True, min_tokens=True, random=True, width=VOCAB, min_p=True, logprobs=3)
    needs = Needs(**everything, bad_words=(1, 1))
    sampler._bad_words = BadWords(5, VOCAB, upload=lambda values: values.to("meta"))
    tables = dict(_bias=torch.float32, _in_prompt=torch.bool, _counts=torch.int32, _ending=torch.bool)
    for table, dtype in tables.items():
        setattr(sampler, table, torch.empty(5, VOCAB, dtype=dtype, device="meta"))
    sampler._numbers = sampler._numbers.to("meta")
    llm._core.runner.last_tokens = llm._core.runner.last_tokens.to("meta")
    of_tokens = torch.empty(5, 4, dtype=torch.int64, device="meta")
    inputs = StepInputs(of_tokens, torch.empty(4 + 4 * 8, dtype=torch.int32, device="meta"), 4)
    with torch.inference_mode(), OnlyOn("meta") as seen:
        assert llm._core.runner.decode(inputs, needs).token_ids.shape == (4,)
    assert {"attention_decode", "sample", "topk"} <= seen.ops
    assert ("norm_qkv_rope" in seen.ops) == (fusions.norm_qkv_rope and name != "qwen3" and name != "stablelm")


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("each", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "longrope"])
def test_graphs_give_the_tokens_of_no_graph(name, late, each, folder, monkeypatch):
    """Rows join and leave; one is cancelled; tables of the sampler are made after the first graphs were captured."""
    monkeypatch.setattr(recorded_steps, "_FEWEST_BLOCKS", 2)
    options = dict(max_context=128, block_size=4, max_batch=5, read_late=late)
    llm = engine(folder(name), **options)
    expected = joining(engine(folder(name), record_steps=False, **options), each)
    assert joining(llm, each) == expected
    assert joining(llm, each) == expected  # all of them captured before
    assert llm._core.runner.steps is not None and len(llm._core.runner.steps._recorded) >= 8
    assert 0 < llm._core.runner.steps.recorder.bytes == llm.ledger.recordings and "recorded" in str(llm.ledger)


@needs_gpu
def test_graphs_and_preemption(folder):
    options = dict(max_cache_tokens=80, block_size=4, max_batch=6)
    expected = engine(folder("llama"), record_steps=False, max_batch=1).generate(PROMPTS, SAMPLED)
    ours = engine(folder("llama"), **options).generate(PROMPTS, SAMPLED)
    assert [c.token_ids for c in ours] == [c.token_ids for c in expected]


@needs_gpu
def test_no_step_waits_for_the_gpu(folder, monkeypatch):
    """Neither those that decode nor those that take requests in; the host waits only where it reads tokens."""
    llm = engine(folder("llama"), max_context=128)
    expected = llm.generate(PROMPTS, SAMPLED)  # compiles and captures, which waits
    llm.forget_prefixes()
    launch = llm._core._launch

    def watched(chunks):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(chunks)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(llm._core, "_launch", watched)
    assert [c.token_ids for c in llm.generate(PROMPTS, SAMPLED)] == [c.token_ids for c in expected]


@needs_gpu
def test_what_the_host_reads_is_pinned(folder):
    """Else the copy would not be one on its way, but one that the host waits for."""
    llm = engine(folder("llama"), max_context=128)
    llm.submit(PROMPTS[3], SamplingParams(logprobs=2))
    llm.step()
    sampled = llm._core.launched.sampled
    assert sampled.token_ids.is_pinned() and sampled.logprobs.top.is_pinned()


@needs_two_gpus
def test_a_device_that_is_not_the_current_one(folder):
    with torch.cuda.device(0):
        first, second = (engine(folder("llama"), device=f"cuda:{i}", max_context=128) for i in range(2))
        expected = joining(first, SAMPLED)
        assert joining(second, SAMPLED) == expected and torch.cuda.current_device() == 0
        assert second.decoder.embedding.weight.device == torch.device("cuda:1")


@needs_gpu
def test_a_gpu_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"device cuda:99: PyTorch sees \d+ GPUs here"):
        engine(folder("llama"), device="cuda:99")
