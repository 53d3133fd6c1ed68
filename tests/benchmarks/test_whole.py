"""The benchmarks of whole models, each at its smallest size: measured, judged, and counted as by hand."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llama_fast import LLM, SamplingParams
from llama_fast.benchmarks import bench_generate, bench_layer, bench_prefill, bench_train_step
from llama_fast.benchmarks.models import ENGINE, FUSED, ModelCase, StoredModel, build_model, itself, model_peers
from llama_fast.benchmarks.peers import BASELINE, OURS, Unavailable
from llama_fast.benchmarks.shapes import ModelShape
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, Case
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.fusion.causal_lm import FusedCausalLM
from llama_fast.fusion.layers import FusedAttention, FusedDecoderLayer, FusedMLP, FusedRMSNorm
from llama_fast.kernels.launch import INTERPRETED
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.sides import EngineSide, Generation, sharing_weights
from llama_fast.profiler.measure.work import Work, decoding_step_work, layer_work, prompt_work, training_flops
from tests.checkpoints import DREAM, needs_dream
from tests.decoder.gguf.files import write_model
from tests.decoder.gguf.test_model import make as gguf_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole models in the interpreter take minutes")

CPU = torch.device("cpu")
KINDS = (FusedRMSNorm, FusedMLP, FusedAttention, FusedDecoderLayer, FusedCausalLM)
LIMITS = Limits(
    read_bytes_per_s=1e10, copy_bytes_per_s=1e10, matmul_flops_per_s={"float32": 1e11}, launch_s=1e-6,
    graph_node_s=None, cache_bytes=1 << 20,
)  # fmt: skip
LLAMA = ModelShape("tiny", 64, 96, 4, 2, 16, 2, 1200, context=128)
MISTRAL = ModelShape("tiny Mistral", 64, 96, 4, 2, 16, 2, 1200, context=128, window=8)
QWEN = ModelShape("tiny Qwen", 64, 96, 4, 2, 16, 2, 1200, context=128, head_norm=True)
SETTING = bench_generate.Setting(LLAMA, torch.float32, 3, 5, 4)

WHOLE = [
    *(bench_layer.layer_case(LLAMA, 24, torch.float32, direction, compiles=False) for direction in (FORWARD, TRAINING)),
    bench_layer.layer_case(MISTRAL, 24, torch.float32, FORWARD, compiles=False),
    bench_layer.layer_case(QWEN, 24, torch.float32, TRAINING, compiles=False),
    bench_prefill.prefill_case(LLAMA, 24, torch.float32, compiles=False),
    bench_prefill.prefill_case(dataclasses.replace(MISTRAL, tied=True), 24, torch.float32, layers=1, compiles=False),
    bench_train_step.train_case(LLAMA, None, 4, 12, torch.float32, compiles=False),
    bench_generate.GenerateCase(SETTING, bench_generate.FIRST_TOKEN, "cpu"),
    bench_generate.GenerateCase(SETTING, bench_generate.INTER_TOKEN, "cpu"),
]


def measured(case: Case) -> dict[str, Result]:
    return {result.implementation: result for result in case.measure(CPU, LIMITS, seconds=0.0)}


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.op}, {case.shape}, {case.direction}")
def test_all_that_is_there_passes_and_is_timed(case: Case) -> None:
    results = measured(case)
    there = {name for name, peer in case.implementations().items() if not isinstance(peer, Unavailable)}
    assert results.keys() == there >= {OURS, BASELINE}
    for result in results.values():
        assert result.failure is None
        assert result.work_key == (case.op, case.shape, "float32", case.direction)
        assert result.error is not None and result.bound is not None and 0 < result.error <= result.bound < 1e-5
        assert len(result.samples) >= 5 and all(sample > 0 for sample in result.samples)
        assert result.flops > 0 and result.floor_s == LIMITS.floor_s(
            Work(result.read, result.written, result.flops), torch.float32
        )


def test_who_takes_part() -> None:
    names = [set(case.implementations()) for case in (WHOLE[0], WHOLE[1], WHOLE[4], WHOLE[7])]
    peers = {OURS, BASELINE, "torch.compile", "torch.compile max-autotune", "Liger"}
    assert names[0] == peers | {ENGINE} and names[1] == peers and names[2] == peers | {FUSED}
    assert names[3] == {OURS, BASELINE, FUSED, bench_generate.STATIC}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_fused_peer_is_fused_and_the_plain_one_is_not(mode: Any) -> None:
    model = build_model(LLAMA, CPU, torch.float32)
    fused: Any = cast(Any, model_peers(mode=mode)[OURS])(model, lambda model: model)
    kinds = {kind: sum(isinstance(module, kind) for module in fused.modules()) for kind in KINDS}
    assert kinds == {
        FusedRMSNorm: 5, FusedMLP: 2, FusedAttention: 2, FusedDecoderLayer: 2, FusedCausalLM: mode == "training",
    }  # fmt: skip
    assert not any(isinstance(module, KINDS) for module in model.modules())
    assert all(ours is theirs for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True))
    assert fused.config._attn_implementation == "llama_fast" != model.config._attn_implementation


def test_a_training_step_says_tokens_per_second() -> None:
    result = measured(WHOLE[6])[OURS]
    rate = 48 / result.timing.median
    rule = rate * training_flops(config(LLAMA), 12)
    speed = f"{rate:,.0f} tokens/s, {1e-12 * rule:.3g} TFLOP/s by the rule of MFU"
    assert result.note is not None
    assert re.fullmatch(rf"{re.escape(speed)}, peak memory \d[\d.]* [kMG]?B", result.note)


@pytest.mark.parametrize("case", [WHOLE[0], WHOLE[4]], ids=lambda case: case.op)
def test_a_model_with_one_wrong_weight_has_no_speed(case: ModelCase) -> None:
    def wrong(model: Any, use: Callable[[Any], Any]) -> Any:
        model = sharing_weights(model)
        down = model.model.layers[0].mlp.down_proj
        down.weight = torch.nn.Parameter(1.01 * down.weight)
        return use(model)

    def raises(model: Any, use: Callable[[Any], Any]) -> Any:
        raise RuntimeError("no such thing\nat all")

    case = dataclasses.replace(case, peers=lambda: {OURS: wrong, "raises": raises, BASELINE: itself})
    results = measured(case)
    assert str(results[OURS].failure).startswith("FAIL: error") and not results[OURS].samples
    assert results["raises"].failure == "it raised RuntimeError: no such thing" and not results["raises"].samples
    assert results[BASELINE].failure is None and results[BASELINE].samples


def test_a_wrong_gradient_has_no_speed() -> None:
    def wrong(model: Any, use: Callable[[Any], Any]) -> Any:
        model = sharing_weights(model)
        model.model.layers[0].mlp.register_full_backward_hook(lambda module, given, wanted: (1.01 * given[0],))
        return use(model)

    for case in (WHOLE[1], WHOLE[6]):
        results = measured(dataclasses.replace(case, peers=lambda: {OURS: wrong, BASELINE: itself}))
        assert str(results[OURS].failure).startswith("FAIL: error") and not results[OURS].samples
        assert results[BASELINE].samples


def test_a_side_that_generates_a_wrong_token_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are right."""

    class Wrong(EngineSide):
        def generate(self, prompts: torch.Tensor, new_tokens: int, **options: Any) -> Generation:
            right = super().generate(prompts, new_tokens, **options)
            right.token_ids[1][2] = (right.token_ids[1][2] + 1) % 1200
            return right

    make: Any = bench_generate._engine
    makers = {**bench_generate._MAKERS, OURS: lambda *given: Wrong(make(*given).llm)}
    monkeypatch.setattr(bench_generate, "_MAKERS", makers)
    # another setting than the other tests', for what is measured is kept
    case = dataclasses.replace(WHOLE[8], setting=dataclasses.replace(SETTING, prompt=6))
    results = measured(case)
    assert str(results[OURS].failure).startswith("FAIL: error") and not results[OURS].samples
    assert "of output 1" in str(results[OURS].failure)
    assert results[BASELINE].failure is None and results[BASELINE].samples


def test_a_model_too_large_for_float64_is_judged_by_its_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_fast.benchmarks.models.JUDGED_ELEMENTS", 1000)
    monkeypatch.setattr("llama_fast.benchmarks.models.JUDGED_LAYERS", 1)
    monkeypatch.setattr(bench_prefill, "JUDGED_TOKENS", 16)
    result = measured(WHOLE[4])[OURS]
    assert result.samples and result.note == "parity on the first 1 layers and first 16 tokens"
    assert result.flops == prompt_work(config(LLAMA), 24, torch.float32).flops  # but timed whole


def test_generated_rounds_are_measured_once_for_both_latencies() -> None:
    first, inter = measured(WHOLE[7]), measured(WHOLE[8])
    assert len(inter[OURS].samples) == (SETTING.new - 1) * len(first[OURS].samples)
    assert first[OURS].note == inter[OURS].note == "4 of 4 greedy tokens as PyTorch's"
    assert first[OURS].flops > inter[OURS].flops


@pytest.mark.parametrize("place", [EMBEDDED_MODEL, pytest.param(DREAM, marks=needs_dream), "a.gguf"], ids=str)
@pytest.mark.filterwarnings("error:max_context")
def test_a_stored_model_generates_after_stories(place: Any, tmp_path: Path) -> None:
    if place == "a.gguf":
        place = tmp_path / place
        write_model(place, gguf_model(max_position_embeddings=24), "Q8_0")
    model = StoredModel.named(str(place))
    settings = bench_generate.settings_of(model, CPU, quick=True)
    assert [str(setting) for setting in settings] == [
        f"{place.name}, batch 1, {min(16, model.config.max_positions // 2)} + {settings[0].new} tokens"
    ]
    setting = dataclasses.replace(settings[0], batch=2, new=6)
    _, prompts = bench_generate.model_and_prompts(setting, CPU)
    assert Tokenizer(model.path).decode(prompts[0].tolist()).strip()[:4] in ("Once", "One ", "Ther")
    results = measured(bench_generate.GenerateCase(setting, bench_generate.INTER_TOKEN, "cpu"))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    llm = LLM(model.path, dtype="float32", progress=False)
    expected = [out.token_ids for out in llm.generate(prompts.tolist(), params)]
    rounds = bench_generate._generated(setting, tuple(results), CPU, 0.0)
    for name in (OURS, BASELINE, FUSED):
        assert results[name].failure is None and results[name].samples
        assert rounds.texts[name] == expected
    assert results[OURS].read == decoding_step_work(model.config, 2, setting.prompt + 3, torch.float32).read


@pytest.mark.parametrize("module", [bench_layer, bench_prefill, bench_train_step, bench_generate])
@pytest.mark.parametrize("quick", [False, True])
def test_no_two_cases_are_the_same_work(module: Any, quick: bool) -> None:
    for device in (CPU, torch.device("cuda")):
        cases = module.cases(device, quick=quick)
        assert len({(case.op, case.shape, case.dtype, case.direction) for case in cases}) == len(set(cases)) > 0


# What must be done, counted by hand for this:
SMALL = ModelShape("by hand", hidden=8, intermediate=12, heads=4, kv_heads=2, head_dim=2, layers=2, vocab=16)
MATRICES = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 8 * 12  # q, k, v, output; gate, up, down
LAYER = MATRICES + 8 + 8
WEIGHTS = 2 * LAYER + 8 + 16 * 8


def config(shape: ModelShape) -> DecoderConfig:
    return DecoderConfig.from_huggingface(shape.config())


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoding_step_counted_by_hand(tied: bool) -> None:
    """3 rows with 5 keys each, of which a row computes one: 4 are read, in 2 layers, of 2 heads of 2 elements, and as many values."""
    work = decoding_step_work(config(dataclasses.replace(SMALL, tied=tied)), 3, 5, torch.bfloat16)
    assert work.read == 2 * (WEIGHTS + 3 * 8) + 3 * 4 * 2 * (2 * 2 + 2 * 2) * 2
    assert work.written == 3 * 2 * (2 * 2 + 2 * 2) * 2
    assert work.flops == 3 * (2 * (2 * MATRICES + 16 * 8) + 2 * 5 * 4 * (2 * 2 + 2 * 2))


def test_a_window_bounds_what_a_decoding_step_reads() -> None:
    windowed = config(dataclasses.replace(SMALL, window=3))
    assert decoding_step_work(windowed, 1, 50, torch.float32) == decoding_step_work(config(SMALL), 1, 3, torch.float32)


def test_a_prompt_counted_by_hand() -> None:
    """2 prompts of 3 tokens: 1 + 2 + 3 pairs, 4 heads, 2 elements; the head only for the last token of each."""
    work = prompt_work(config(SMALL), 3, torch.float32, batch=2)
    assert work.read == 4 * (WEIGHTS + 2 * 3 * 8)
    assert work.written == 4 * 2 * 16
    assert work.flops == 2 * (3 * 2 * 2 * MATRICES + 2 * 16 * 8 + 2 * 6 * 4 * (2 * 2 + 2 * 2))


def test_a_layer_counted_by_hand() -> None:
    forward = layer_work(config(SMALL), 3, torch.float32)
    assert (forward.read, forward.written) == (4 * (LAYER + 3 * 8), 4 * 3 * 8)
    assert forward.flops == 3 * 2 * MATRICES + 6 * 4 * (2 * 2 + 2 * 2)
    training = layer_work(config(SMALL), 3, torch.float32, training=True)
    assert training.flops == 3 * 3 * 2 * MATRICES + 6 * 4 * 7 * 2 * 2  # seven products of 2 elements for each pair
    # weights and x twice, the gradient of y; y, and the gradients of weights and x
    assert training.read == 4 * (2 * (LAYER + 3 * 8) + 3 * 8)
    assert training.written == 4 * (3 * 8 + LAYER + 3 * 8)


def test_a_training_step_counted_by_hand() -> None:
    small = config(SMALL)
    assert training_flops(small, 10) == 6 * WEIGHTS + 12 * 2 * 8 * 10
    work = bench_train_step.step_work(small, 2, 10, torch.float32)
    # 2 texts: 3 products of 10 tokens with each matrix, 7 of 2 elements for each of 55 pairs in 2 layers of 4 heads
    assert work.flops == 2 * (3 * 2 * 10 * (2 * MATRICES + 16 * 8) + 2 * 55 * 4 * 7 * 2 * 2)
    everything = WEIGHTS + 16 * 8  # the embedding table is not read, but trained
    assert (work.read, work.written) == (4 * (2 * WEIGHTS + 4 * everything), 4 * 4 * everything)
