"""How kernels on a GPU become steps, with an invented GPU that runs one kernel for each op of the CPU: none is needed here."""

import json
from types import SimpleNamespace

import pytest
import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.paged import StepInputs
from llama_fast.kernels import cpu
from llama_fast.profiler import run
from llama_fast.profiler.attribute import on_gpu
from llama_fast.profiler.attribute.counting import ANNOTATION, OpCounter
from llama_fast.profiler.attribute.kernels import NOT_ATTRIBUTED, Event
from llama_fast.profiler.attribute.on_cpu import count
from llama_fast.profiler.attribute.trace import Trace, traced, write_trace
from llama_fast.profiler.measure.latency import run_rounds
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.sides import EngineSide, static_side, transformers_side
from llama_fast.profiler.measure.subject import open_subject
from llama_fast.profiler.measure.work import Work
from tests.decoder.models import make, save
from tests.parity import not_interpreted

pytestmark = not_interpreted

CPU = torch.device("cpu")
LIMITS = Limits(1e10, 1e10, {"float32": 1e11}, 1e-6, None, 0)
PROMPTS = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(
        save(make(), tmp_path_factory.mktemp("m")), dtype="float32", device="cpu", record_steps=False, progress=False
    )


@pytest.fixture
def gpu(monkeypatch):
    """`traced` sees a kernel of 1 us for each op that does some work, and replays of it while `replays` is set."""
    state = SimpleNamespace(side=None, replays=False, counters=[])

    class Listed(OpCounter):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            state.counters.append(self)

    def fake_traced(call, device):
        if state.counters:  # the op by op run
            result, counter = call(), state.counters.pop()
            return result, Trace(events(counter, known=True), [])
        counter = OpCounter(on_gpu.module_of(state.side))
        with counter.listening():
            result = call()
        launched = events(counter, known=False)
        if not state.replays:
            return result, Trace(launched, [])
        steps = on_gpu.by_token(launched, result)
        return result, Trace(steps[0], steps[1:])

    def events(counter, known):
        return [
            Event(f"{op.name}_kernel", op.ended - 1e-6, 1e-6, i if known else None)
            for i, op in enumerate(counter.ops)
            if op.work != Work()
        ]

    monkeypatch.setattr(on_gpu, "OpCounter", Listed)
    monkeypatch.setattr(on_gpu, "traced", fake_traced)
    return state


def wheres(entries):
    return {entry.where for entry in entries}


def test_an_engine_without_graphs_and_transformers_are_told_op_by_op(gpu, llm):
    for side in (EngineSide(llm), transformers_side(make())):
        gpu.side = side
        steps = on_gpu.steps_on_gpu(side, PROMPTS, 6)
        assert len(steps.prompt) == 1 and len(steps.decoding) == 4
        for entries in (*steps.prompt, *steps.decoding):
            assert NOT_ATTRIBUTED not in wheres(entries)
            assert {"head", "norm"} < wheres(entries)
        assert steps.until_first > 0 and steps.span == 0
        flops = [sum(entry.work.flops for entry in step) for step in steps.decoding]
        assert flops == sorted(flops) and flops[0] > 0


def test_replays_are_told_by_the_step_run_op_by_op(gpu, llm, monkeypatch):
    side = EngineSide(llm)
    gpu.side, gpu.replays = side, True

    def step_by_ops(side, captured, needs, device):
        counter = OpCounter(llm.decoder)
        _, of_tokens = count(side, PROMPTS, 3, counter)
        ops = of_tokens[-1]
        known = [Event(f"{op.name}_kernel", op.ended, 1e-6, i) for i, op in enumerate(ops) if op.work != Work()]
        return known[:-3], ops  # the last ones are not known

    monkeypatch.setattr(on_gpu, "_step_by_ops", step_by_ops)
    monkeypatch.setattr(on_gpu, "_widest", lambda *_: (None, None))
    monkeypatch.setattr(on_gpu, "_span", lambda captured: 5e-3)
    steps = on_gpu.steps_on_gpu(side, PROMPTS, 8)
    assert steps.span == 5e-3 and len(steps.decoding) == 8 - 1 - 2
    assert 0 < steps.between < 1
    for entries in steps.decoding:
        unknown = [entry for entry in entries if entry.where == NOT_ATTRIBUTED]
        assert len(unknown) == 3 and not any(entry.work.bytes for entry in unknown)
        assert {"attention", "mlp.down"} < wheres(entries)


def test_the_step_of_all_rows_is_taken_apart_and_not_the_last_one(tmp_path):
    """Prompts of two steps: the row that came first has its tokens first, and the last step is the other's alone."""
    with cpu.use("pytorch"):  # natively the sampler is told nothing
        llm = LLM(
            save(make(), tmp_path), dtype="float32", device="cpu", step_tokens=6, read_late=True, progress=False,
        )  # fmt: skip

    class Graphs:
        """Stands for the graphs of a GPU: notes the rows of each step."""

        last = None

        def replay(self, chunks, needs):
            inputs = StepInputs.of(chunks, llm._core.runner.cache, llm.device)
            self.last = SimpleNamespace(inputs=inputs), needs
            return llm._core.runner.sample(llm._core.runner.forward(inputs, chunks), inputs.rows, needs)

    llm._core.runner.steps = Graphs()
    side = EngineSide(llm)
    captured, _ = on_gpu._widest(side, PROMPTS, 6)
    assert len(captured.inputs.cache_lens) == 2 and len(llm._core.runner.steps.last[0].inputs.cache_lens) == 1
    assert llm.on_phase is None


def test_idling_between_steps_is_seen_in_the_trace():
    steps = [[Event("a", start, 1.0), Event("b", start + 2.0, 1.0)] for start in (0.0, 5.0, 11.0, 15.0)]
    assert on_gpu._between(steps) == 2.0
    assert on_gpu._between(steps[:1]) == float("inf")


def test_no_kernel_of_a_compiled_model_is_told_apart(gpu):
    gpu.side = side = static_side(make())
    steps = on_gpu.steps_on_gpu(side, PROMPTS, 5)
    assert len(steps.prompt) == 1 and len(steps.decoding) == 3
    assert wheres(steps.decoding[0]) == {NOT_ATTRIBUTED}


@pytest.mark.parametrize("seen", [True, False])
def test_the_sums_of_a_gpu(gpu, llm, monkeypatch, seen):
    sizes = dict(prompt_tokens=5, new_tokens=6, batch=(2,), contexts=(), rounds=2)
    subject = open_subject(llm, against=(), dtype="auto", device="auto", sizes=sizes)
    gpu.side = side = subject.sides[0]
    if not seen:
        monkeypatch.setattr(on_gpu, "traced", traced)  # a CPU's: it holds no kernel
    rounds = run_rounds([side], PROMPTS, None, 6, 2, on_failure=subject.leave_out)[0]
    first, token, kernels, prompt_kernels = run._on_gpu(subject, LIMITS, PROMPTS, rounds)
    assert bool(kernels) == bool(prompt_kernels) == seen
    assert [text for text in subject.warnings if "saw no kernel" in text] == (
        [] if seen else ["llama-fast, batch 2: the tracer saw no kernel on the GPU"]
    )
    for waterfall in (first, token):
        assert sum(part.seconds for part in waterfall.parts) == pytest.approx(waterfall.measured, rel=1e-9)
        assert all(part.seconds > 0 for part in waterfall.parts[:-1])
    names = {part.name for part in token.parts}
    assert ({"floor", "gaps between kernels"} if seen else {"between operators", "schedule"}) < names


def test_a_tracer_that_fails_costs_only_what_it_would_have_shown(llm, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    sizes = dict(prompt_tokens=5, new_tokens=6, batch=(2,), contexts=(), rounds=2)
    subject = open_subject(llm, against=(), dtype="auto", device="auto", sizes=sizes)
    rounds = run_rounds(subject.sides, PROMPTS, None, 6, 2, on_failure=subject.leave_out)[0]
    monkeypatch.setattr(run, "steps_on_gpu", fails)
    subject.device = torch.device("cuda")
    found = run._run(subject, LIMITS, PROMPTS, rounds, {}, lambda _: None)
    assert found.latency.itl.samples and not found.kernels
    assert sum(part.seconds for part in found.token.parts) == pytest.approx(found.token.measured)
    assert subject.warnings == ["llama-fast, batch 2: its kernels were not traced: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"]


def test_each_op_lies_in_its_range_of_a_trace(llm, tmp_path):
    counter = OpCounter(llm.decoder, annotate=True)
    side = EngineSide(llm)
    write_trace(lambda: count(side, PROMPTS, 2, counter), CPU, tmp_path / "trace.json")

    spans = [
        event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event.get("ph") == "X"
    ]
    ranges = {
        int(event["name"].removeprefix(ANNOTATION)): event
        for event in spans
        if event["name"].startswith(ANNOTATION) and event["cat"] == "user_annotation"
    }
    products = [event for event in spans if event["name"] == "llama_fast::linear"]
    numbers = [i for i, op in enumerate(counter.ops) if op.name == "llama_fast::linear"]
    assert len(ranges) == len(counter.ops) and len(numbers) == 2 * 5
    for number in numbers:  # the call that reaches the counter lies around its range, the one that it makes inside
        begin, end = ranges[number]["ts"], ranges[number]["ts"] + ranges[number]["dur"]
        assert (
            len([product for product in products if begin <= product["ts"] and product["ts"] + product["dur"] <= end])
            == 1
        )
