"""A whole profile: of the embedded model, of engines, of models of transformers. Its sums, its figures, its errors."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

import llama_fast
from llama_fast.engine.llm import LLM
from llama_fast.fusion import fuse
from llama_fast.kernels import cpu
from llama_fast.profiler import run as job
from llama_fast.profiler.measure.contexts import _steps_at
from llama_fast.profiler.measure.latency import Rounds
from llama_fast.profiler.measure.sides import Generation, TransformersSide
from llama_fast.profiler.measure.subject import open_subject
from llama_fast.profiler.measure.trust import is_warm, logits_in_float64, unsteady
from llama_fast.profiler.measure.work import Work, decoding_step_work
from llama_fast.profiler.result import Profile, Run, Waterfall
from llama_fast.reports.jsonfile import read_json, write_json
from tests.decoder.models import make, save
from tests.parity import not_interpreted

pytestmark = [not_interpreted, pytest.mark.usefixtures("limits_measured_once")]

FEW = dict(prompt_tokens=12, new_tokens=6, rounds=2, ablate=False, contexts=())


@pytest.fixture(scope="module")
def limits_measured_once():
    """The machine's limits take seconds, and `measure/test_limits.py` to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "measure_limits", functools.cache(job.measure_limits))
        yield


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Profile, list[str], dict]:
    """A profile of the embedded model on the CPU, what it said on its way, and its trace."""
    said, trace = [], tmp_path_factory.mktemp("trace") / "trace.json"
    profile = llama_fast.profile(
        prompt_tokens=40, new_tokens=24, contexts=(32, 64, 100_000), against=["transformers"], device="cpu",
        dtype="float32", rounds=5, trace=trace, progress=said.append,
    )  # fmt: skip
    return profile, said, json.loads(trace.read_text())


def waterfalls(run: Run) -> list[Waterfall]:
    return [run.first_token, run.token]


def check_sums(profile: Profile) -> None:
    for run in profile.runs:
        assert run.token.measured == run.latency.itl.median and run.first_token.measured == run.latency.ttft.median
        for waterfall in waterfalls(run):
            assert sum(part.seconds for part in waterfall.parts) == pytest.approx(waterfall.measured, rel=1e-9)
            assert all(part.seconds > 0 for part in waterfall.parts if part.kind != "rest")


def test_the_parts_sum_to_what_was_measured_and_little_is_left(embedded):
    profile, _, _ = embedded
    check_sums(profile)
    for run in profile.runs:
        parts = {part.name: part.seconds for part in run.token.parts}
        # on an idle machine under 3 %; operators and rounds are timed in turns, but not at once
        little = abs(parts["rest"]) < 0.25 * run.token.measured
        little &= parts.get("between operators", 0.0) + parts.get("call of the replay", 0.0) < 0.5 * run.token.measured
        assert little or run.is_disturbed, run.side  # a busy machine spoils the parts, and is said to
        assert parts["floor"] > 0.02 * run.token.measured
        if run.side == "llama-fast":
            assert {"schedule", "inputs of the step", "sampling", "read back", "detokenise"} < parts.keys()
            assert {"tokenise", "queue the request"} < {part.name for part in run.first_token.parts}


def test_both_sides_have_samples_of_every_round(embedded):
    profile, said, _ = embedded
    assert [run.side for run in profile.runs] == ["llama-fast", "transformers"]
    for run in profile.runs:
        latency = run.latency
        assert [len(x.samples) for x in (latency.ttft, latency.tpot, latency.e2el, latency.itl)] == [5, 5, 5, 5 * 23]
        assert latency.cold_ttft > 0 and min(latency.itl.samples) > 0
        first, end = latency.ttft.samples[0], latency.e2el.samples[0]
        assert end == pytest.approx(first + sum(latency.itl.samples[:23]))
        assert latency.tpot.samples[0] == pytest.approx((end - first) / 23)
    rounds = [text for text in said if "round" in text and "of 5" in text]
    assert rounds[:2] == ["llama-fast: round 1 of 5", "transformers: round 1 of 5"] and len(rounds) == 10


def test_the_table_holds_the_whole_step(embedded):
    profile, _, _ = embedded
    run = profile.runs[0]
    where = {kernel.where for kernel in run.kernels}
    assert {"embedding", "attention", "attention.qkv", "attention.output", "mlp.gate_up", "mlp.down", "head"} < where
    assert [kernel.winnable for kernel in run.kernels] == sorted((k.winnable for k in run.kernels), reverse=True)
    assert all(len(kernel.samples) == len(run.kernels[0].samples) > 20 for kernel in run.kernels)
    total = sum((Work(k.read, k.written, k.flops) for k in run.kernels), Work())
    config = LLM(progress=False, device="cpu", dtype="float32").config
    least = decoding_step_work(config, 1, 40 + 3, torch.float32)
    assert least.read < total.read < 1.1 * least.read  # a layer's activations come on top
    assert sum(kernel.flops for kernel in run.prompt_kernels) > 30 * total.flops


def test_contexts_are_measured_where_they_fit_and_computed_elsewhere(embedded):
    profile, _, _ = embedded
    measured = [point for point in profile.contexts if point.measured is not None]
    assert [(point.side, point.context) for point in measured] == [
        (side, context) for context in (32, 64) for side in ("llama-fast", "transformers")
    ]
    computed = [point for point in profile.contexts if point.measured is None]
    assert {128, 256, 512, 100_000} == {point.context for point in computed}
    one = profile.contexts[0]
    assert one.kv_bytes == 32 * 2 * 4 * 2 * 64 * 4  # tokens, k and v, layers, heads, head_dim, float32
    floors = [point.floor for point in profile.contexts if point.side == "llama-fast"]
    assert floors == sorted(floors) and floors[0] > 0


def test_only_what_has_an_effect_is_switched_off(embedded):
    profile, _, _ = embedded
    fused = ["residual"] if cpu.chosen() == "pytorch" else ["norm_qkv_rope", "norm_swiglu"]
    assert [ablation.fusion for ablation in profile.ablations] == fused
    for ablation in profile.ablations:
        assert len(ablation.on.samples) == len(ablation.off.samples) == 5 * 23


def test_the_evidence(embedded):
    profile, _, _ = embedded
    trust = profile.trust
    assert trust.logits_pass is True and trust.same_bits is True
    assert set(trust.logit_errors) == set(trust.largest_logit_errors) == {"llama-fast", "transformers"}
    assert all(0 < error < 1e-5 for error in trust.logit_errors.values())
    assert (trust.common_tokens, trust.tokens) == (24, 24)
    assert trust.memory["weights"] > 0 and trust.before == trust.after == {}
    assert trust.command.startswith(
        "llama-fast profile --prompt-tokens 40 --new-tokens 24 --batch 1 --context 32,64,100000"
    )
    assert profile.machine["versions"]["torch"] == torch.__version__


def test_a_profile_survives_its_file_and_a_trace_is_written(embedded, tmp_path):
    profile, _, trace = embedded
    write_json(tmp_path / "profile.json", profile)
    again = read_json(tmp_path / "profile.json", Profile)
    check = [(run.side, len(run.kernels), run.token.measured) for run in again.runs]
    assert check == [(run.side, len(run.kernels), pytest.approx(run.token.measured, rel=1e-5)) for run in profile.runs]
    assert any(event.get("name") == "llama_fast::rms_norm" for event in trace["traceEvents"])


def test_a_model_of_transformers_fused_and_not():
    plain = llama_fast.profile(make(), **FEW, batch=(1, 3), against=["transformers-fused"])
    assert [(run.side, run.batch) for run in plain.runs] == [
        (side, batch) for batch in (1, 3) for side in ("transformers", "transformers, fused")
    ]
    check_sums(plain)
    parts = {part.name for part in plain.runs[0].token.parts}
    assert {"floor", "generate around the model"} < parts
    assert plain.trust.logits_pass is True and plain.trust.common_tokens == plain.trust.tokens == 6
    assert plain.model == "LlamaForCausalLM" and plain.trust.command.startswith(
        "llama_fast.profile(model, prompt_tokens=12"
    )

    model = make()
    fuse(model)
    fused = llama_fast.profile(model, **FEW)
    assert [run.side for run in fused.runs] == ["transformers, fused"]
    assert set(fused.trust.logit_errors) == {"transformers, fused", "transformers"}
    assert "llama_fast::rms_norm" in {
        kernel.name for kernel in fused.runs[0].kernels
    } or "llama_fast::add_rms_norm" in {kernel.name for kernel in fused.runs[0].kernels}
    check_sums(fused)


def test_an_engine_that_is_there_already(tmp_path):
    llm = LLM(save(make(), tmp_path), dtype="float32", device="cpu", max_batch=2, max_cache_tokens=64, progress=False)
    profile = llama_fast.profile(llm, prompt_tokens=12, new_tokens=6, batch=(2,), rounds=2, contexts=(16, 40))
    assert [point.context for point in profile.contexts if point.measured] == [16]  # two rows of 40 have no room
    assert profile.runs[0].batch == 2 and llm.on_phase is None and llm.decoder.fusions.residual
    check_sums(profile)
    with pytest.raises(ValueError, match=r"batch 3 must run at once: this LLM has room for 2 sequences"):
        llama_fast.profile(llm, **FEW, batch=(3,))
    with pytest.raises(
        ValueError, match="dtype and device belong to a model that is loaded here: this LLM has its own"
    ):
        llama_fast.profile(llm, **FEW, device="cpu")


def test_rows_decode_together_at_a_context(tmp_path):
    """Prompts that take two steps: rows that begin one after the other would share fewer steps than the batch has rows."""
    sizes = dict(prompt_tokens=30, new_tokens=2, batch=(2,), contexts=(40,), rounds=1)
    llm = LLM(save(make(), tmp_path), dtype="float32", device="cpu", step_tokens=32, progress=False)
    subject = open_subject(llm, against=(), dtype="auto", device="auto", sizes=sizes)
    assert [text for text in subject.warnings if "batch 2: the prompts take 2 steps" in text]
    steps, launch, again = [], llm._core._launch, llm._core.runner.again
    llm._core._launch = lambda chunks: (steps.append(len(chunks)), launch(chunks))[1]
    llm._core.runner.again = lambda chunks: (steps.append(len(chunks)), again(chunks))[1]
    found = _steps_at(subject, 40)
    assert len(found["llama-fast"].samples) == 3 * 8
    assert steps[-9 * 3 :] == [2] * 9 * 3


def test_defaults_adapt_to_the_context(tmp_path):
    folder = save(make(max_position_embeddings=40), tmp_path)
    profile = llama_fast.profile(folder, device="cpu", dtype="float32", rounds=1)
    run = profile.runs[0]
    assert (run.prompt_tokens, run.new_tokens) == (30, 10)
    assert [point.context for point in profile.contexts if point.measured] == [5, 20, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=(1, 0)), r"batch\[1\] must be at least 1, got 0"),
        (dict(batch=()), "batch must name at least one number of requests"),
        (dict(prompt_tokens=500, new_tokens=13), r"prompt_tokens \+ new_tokens must be at most 512.*got 500 \+ 13"),
        (dict(prompt_tokens=0), "prompt_tokens must be at least 1, got 0"),
        (dict(prompt_tokens=512), "must be at most 512"),
        (dict(new_tokens=1), "new_tokens must be at least 2, got 1"),
        (dict(rounds=0), "rounds must be at least 1, got 0"),
        (dict(contexts=(1,)), r"contexts\[0\] must be at least 2, got 1"),
        (dict(against=["vllm"]), "against must hold names of 'transformers', .*got 'vllm'"),
        (dict(against=["transformers-static"]), "'transformers-static' needs a GPU"),
        (dict(device="tpu"), "device must be"),
        (dict(dtype="int4"), "dtype must be"),
        (
            dict(model=7),
            "model must be a folder, a .gguf file, a name on the hub, an LLM or a transformers model, got 7",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(options, message, monkeypatch):
    monkeypatch.setattr("llama_fast.profiler.run.measure_limits", lambda *_, **__: pytest.fail("it measures"))
    with pytest.raises(ValueError, match=message):
        llama_fast.profile(**(dict(device="auto" if "model" in options else "cpu") | options))


def test_nothing_is_set_against_itself():
    with pytest.raises(ValueError, match="against 'transformers' is what is profiled itself"):
        llama_fast.profile(make(), **FEW, against=["transformers"])


@pytest.mark.parametrize("longest", [0, 20])
def test_a_peer_that_fails_costs_only_itself(tmp_path, monkeypatch, longest):
    """At once, or only at a longer context."""
    generate = TransformersSide.generate

    def fails(self, prompts, new_tokens, **options):
        if prompts.shape[1] > longest:
            raise RuntimeError("no compiler\nmore")
        return generate(self, prompts, new_tokens, **options)

    monkeypatch.setattr(TransformersSide, "generate", fails)
    folder = save(make(), tmp_path)
    options = dict(device="cpu", dtype="float32", against=["transformers"]) | FEW | dict(contexts=(20, 40))
    profile = llama_fast.profile(folder, **options)
    assert [run.side for run in profile.runs] == ["llama-fast", "transformers"][: 2 if longest else 1]
    theirs = [("transformers", 20)] if longest else []
    assert [(point.side, point.context) for point in profile.contexts if point.measured] == [
        ("llama-fast", 20), *theirs, ("llama-fast", 40)
    ]  # fmt: skip
    assert "transformers is left out from here on, as it failed: no compiler" in profile.trust.warnings
    with pytest.raises(RuntimeError, match="no compiler"):  # it is what is profiled
        llama_fast.profile(make(), **FEW | dict(prompt_tokens=30))


def test_too_little_memory_for_a_comparison_costs_only_that(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB\nmore")

    monkeypatch.setattr("llama_fast.profiler.measure.trust.logits_in_float64", too_large)
    profile = llama_fast.profile(make(), **FEW)
    assert profile.trust.logits_pass is None and profile.runs[0].latency.itl.samples
    assert "logits were not compared: CUDA out of memory. Tried to allocate 4 GiB" in profile.trust.warnings


def test_logits_in_float64_are_those_of_a_copy_in_float64():
    from copy import deepcopy

    from llama_fast.fusion.verify import InFloat64

    for name in ("llama", "tied", "qwen2", "phi3", "stablelm"):
        model, ids = make(name), torch.arange(3, 20)
        with torch.no_grad(), InFloat64():
            expected = deepcopy(model).double()(ids[None], use_cache=False).logits[0]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = logits_in_float64(model, ids)
        assert found.dtype == torch.float64 and torch.equal(found, expected), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all("forward" not in module.__dict__ for module in model.modules())


def rounds_of(*medians: float) -> Rounds:
    """Rounds of five tokens each, so many seconds apart."""
    made = Rounds(side=SimpleNamespace(name="it"))
    made.generations = [Generation(0.0, [i * median for i in range(1, 6)], []) for median in medians]
    return made


def test_a_machine_that_was_not_steady_is_said_to_be_so():
    assert is_warm(rounds_of(1.0, 1.2, 1.04)) and not is_warm(rounds_of(1.0, 1.0, 1.0, 0.9))
    steady = {"clocks.sm": "1980 MHz", "clocks_throttle_reasons.active": "0x0000000000000001"}
    assert unsteady([rounds_of(1.0, 1.0)], steady, steady) == []
    found = unsteady([rounds_of(1.0, 2.0)], steady, {"clocks.sm": "1500 MHz", "clocks_throttle_reasons.active": "0x5"})
    assert [text.split(":")[0] for text in found] == [
        "it",
        "it",
        "clocks.sm moved from 1980 MHz to 1500 MHz",
        "the GPU throttled",
    ]
